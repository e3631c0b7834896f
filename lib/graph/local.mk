noinst_LIBRARIES += libgraph.a
libgraph_a_SOURCES = lib/graph/prog.c lib/graph/prog.h lib/graph/rule.c lib/graph/rule.h \
	lib/graph/rules_linear.c lib/graph/rules_elementwise.c lib/graph/rules_attention.c lib/graph/rules_step.c lib/graph/rules_comm.c lib/graph/rules_context.c lib/graph/rules_expert.c \
	lib/graph/backward.c lib/graph/split.c lib/graph/overlap.c lib/graph/fuse.c lib/graph/recompute.c lib/graph/plan.c lib/graph/print.c lib/graph/carry.c lib/graph/carry_device.c lib/graph/carry.h lib/graph/exec.c \
	lib/graph/exec.h lib/graph/inspect.c lib/graph/inspect.h

check_PROGRAMS += test_placement test_plan test_graph
test_placement_SOURCES = test/test_placement.c test/test_placement_context.c \
	test/test_placement_experts.c test/test_placement_refusals.c test/test_placement_refusals_experts.c \
	test/placement.c test/placement.h test/refusal.c test/refusal.h
test_placement_LDADD = $(TEST_LIBS) libgraph.a libcpu.a $(ONEDNN_LIBS) $(GRAPH_LIBS)
test_plan_SOURCES = test/test_plan.c
test_plan_LDADD = $(TEST_LIBS) libgraph.a libcpu.a $(ONEDNN_LIBS) $(GRAPH_LIBS)
# It counts who allocates in the steady state.
test_graph_SOURCES = test/test_graph.c
test_graph_LDFLAGS = $(AM_LDFLAGS) \
	-Wl,--wrap=malloc,--wrap=calloc,--wrap=realloc,--wrap=aligned_alloc,--wrap=posix_memalign
test_graph_LDADD = $(TEST_LIBS) $(TRAIN_LIBS)
