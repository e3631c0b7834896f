noinst_LIBRARIES += libop.a
libop_a_SOURCES = lib/op/experts.c lib/op/experts.h lib/op/op.c lib/op/op.h lib/op/ops.def lib/op/dtypes.def
