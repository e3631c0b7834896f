noinst_LIBRARIES += libcpu.a
libcpu_a_SOURCES = kernels/kernels.h kernels/mask.h kernels/cpu/cpu.c kernels/cpu/cpu.h kernels/cpu/fast.def \
	kernels/cpu/reference_attention.c kernels/cpu/reference_columns.c \
	kernels/cpu/reference_elementwise.c kernels/cpu/reference_matmul.c \
	kernels/cpu/reference_norm.c kernels/cpu/reference_token.c \
	kernels/cpu/columns.c kernels/cpu/mla.c kernels/cpu/rope.h \
	kernels/cpu/cross_entropy.c kernels/cpu/elementwise.c kernels/cpu/embedding.c kernels/cpu/fold.c \
	kernels/cpu/fold.h kernels/cpu/mask.c kernels/cpu/mask.h kernels/cpu/norm.c kernels/cpu/optimizer.c \
	kernels/cpu/rope.c kernels/cpu/vmath.h
libcpu_a_CFLAGS = $(AM_CFLAGS) $(ONEDNN_CFLAGS)
libcpu_a_SOURCES += kernels/cpu/attention.c kernels/cpu/attention.h kernels/cpu/attention_bwd.c \
	kernels/cpu/attention_cache.c kernels/cpu/attention_isa.h kernels/fp8.h kernels/cpu/linear.c kernels/cpu/linear.h kernels/cpu/matmul.c kernels/cpu/matmul.h \
	kernels/cpu/matmul_blocked.c kernels/cpu/matmul_isa.h kernels/cpu/matmul_product.h \
	kernels/cpu/matmul_tile.c kernels/cpu/matmul_tile.h
libcpu_a_SOURCES += kernels/cpu/activation.h kernels/cpu/dispatch.c kernels/cpu/dispatch.h kernels/cpu/expert.c \
	kernels/cpu/grouped.c kernels/cpu/reference_dispatch.c kernels/cpu/reference_expert.c \
	kernels/cpu/reference_router.c kernels/cpu/router.c
if HAVE_ONEDNN
libcpu_a_SOURCES += kernels/cpu/matmul_onednn.c
else
libcpu_a_SOURCES += kernels/cpu/matmul_absent.c
endif

check_PROGRAMS += test_matmul
test_matmul_SOURCES = test/test_matmul.c
test_matmul_LDADD = $(TEST_LIBS) $(KERNEL_LIBS) -lpthread

check_PROGRAMS += test_ops
test_ops_SOURCES = test/test_ops.c test/test_ops_context.c test/test_ops_property.c test/ops_fixture.c test/ops_fixture.h test/op_cases.def
test_ops_LDADD = $(TEST_LIBS) $(KERNEL_LIBS) -lpthread

check_PROGRAMS += test_experts
test_experts_SOURCES = test/test_experts.c test/ops_fixture.c test/ops_fixture.h test/op_cases.def
test_experts_LDADD = $(TEST_LIBS) $(KERNEL_LIBS) -lpthread
