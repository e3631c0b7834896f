noinst_LIBRARIES += libgraph.a
libgraph_a_SOURCES = lib/graph/prog.c lib/graph/prog.h lib/graph/rule.c lib/graph/rule.h \
	lib/graph/rules_linear.c lib/graph/rules_elementwise.c lib/graph/rules_attention.c lib/graph/rules_step.c \
	lib/graph/backward.c lib/graph/fuse.c lib/graph/recompute.c lib/graph/plan.c lib/graph/print.c lib/graph/exec.c \
	lib/graph/exec.h lib/graph/inspect.c lib/graph/inspect.h
