# The kernels are C++ for nvcc; for tests without a device the same files are compiled by the C++ compiler
# against the simulator in test/simt. The rest is C.
cuda_kernels = kernels/cuda/attention.cu kernels/cuda/attention_bwd.cu kernels/cuda/attention_cache.cu \
	kernels/cuda/columns.cu kernels/cuda/dispatch.cu kernels/cuda/elementwise.cu kernels/cuda/expert.cu \
	kernels/cuda/fp8.cu kernels/cuda/norm.cu kernels/cuda/optimizer.cu kernels/cuda/reduce.cu \
	kernels/cuda/rotary.cu kernels/cuda/router.cu kernels/cuda/token.cu
cuda_host = kernels/cuda/counts.c kernels/cuda/cuda.c kernels/cuda/grouped.c kernels/cuda/lanes.c \
	kernels/cuda/matmul.c kernels/cuda/nccl.c kernels/cuda/product.c kernels/cuda/record.c \
	kernels/cuda/staging.c
cuda_headers = kernels/cuda/activation.cuh kernels/cuda/attention.cuh kernels/cuda/attention.h \
	kernels/cuda/cuda.h kernels/cuda/device.cuh kernels/cuda/experts.cuh kernels/cuda/fold.cuh \
	kernels/cuda/lanes.h kernels/cuda/product.h kernels/cuda/rows.cuh kernels/cuda/scratch.def lib/op/experts.h \
	kernels/fp8.h kernels/mask.h
EXTRA_DIST += $(cuda_kernels) $(cuda_headers)

noinst_LIBRARIES += libcudakernels.a
libcudakernels_a_CFLAGS = $(AM_CFLAGS) $(CUDA_CFLAGS)
libcudakernels_a_LIBADD =
if HAVE_CUDA
cuda_objects = $(cuda_kernels:.cu=.nvcc.o)
libcudakernels_a_SOURCES = $(cuda_host) $(cuda_headers)
if HAVE_CUDNN
libcudakernels_a_SOURCES += kernels/cuda/attention_cudnn.c kernels/cuda/attention_cudnn.h kernels/cuda/attention_graph.c
else
libcudakernels_a_SOURCES += kernels/cuda/attention_absent.c
endif
libcudakernels_a_LIBADD += $(cuda_objects)
libcudakernels_a_DEPENDENCIES = $(cuda_objects)
else
libcudakernels_a_SOURCES = kernels/cuda/absent.c
endif

NVCCFLAGS = -O3 -std=c++17 $(CUDA_GENCODE) -Xcompiler -fPIC,-fno-exceptions,-fno-rtti,-fno-threadsafe-statics,-Wall
PENTAD_INCLUDES = -I$(top_srcdir)/lib -I$(top_srcdir) -I$(top_builddir)
%.nvcc.o: %.cu $(cuda_headers)
	@$(MKDIR_P) $(@D)
	$(AM_V_GEN)$(NVCC) $(NVCCFLAGS) $(PENTAD_INCLUDES) -c $< -o $@
CLEANFILES += kernels/cuda/*.nvcc.o kernels/cuda/*.simt.o

# The simulator, and the device built against it. Stacks that are switched by hand confuse the sanitizers.
simt_sources = test/simt/cliques.h test/simt/collectives.cc test/simt/communicators.cc test/simt/cublaslt.cc \
	test/simt/cublaslt_objects.cc test/simt/execute.cc test/simt/graphs.cc test/simt/matmul.cc \
	test/simt/matmul.h test/simt/memory.cc test/simt/names.cc test/simt/nccl.cc test/simt/runtime.cc \
	test/simt/schedule.cc test/simt/simt.h test/simt/streams.cc test/simt/streams.h test/simt/transfers.cc
EXTRA_DIST += test/simt/include
SIMT_INCLUDES = -I$(top_srcdir)/test/simt/include -DPENTAD_SIMULATED
SIMT_KERNELS = libcudasim.a -lstdc++ -lpthread
SIMT_TRAIN_LIBS = $(TRAIN_TOP) $(SIMT_KERNELS) $(TRAIN_BOTTOM)
simt_objects = $(cuda_kernels:.cu=.simt.o)
%.simt.o: %.cu $(cuda_headers)
	@$(MKDIR_P) $(@D)
	$(AM_V_GEN)$(CXX) $(PENTAD_CXXFLAGS) -fno-strict-aliasing -O2 $(SIMT_INCLUDES) $(PENTAD_INCLUDES) -x c++ -c $< -o $@
if SIMULATES
check_LIBRARIES += libcudasim.a
libcudasim_a_CPPFLAGS = $(SIMT_INCLUDES) $(AM_CPPFLAGS)
libcudasim_a_CXXFLAGS = $(PENTAD_CXXFLAGS) -O1
libcudasim_a_SOURCES = $(cuda_host) kernels/cuda/attention_absent.c $(simt_sources)
libcudasim_a_LIBADD = $(simt_objects)
libcudasim_a_DEPENDENCIES = $(simt_objects)

# The whole program on the simulated device, for tests from the outside.
EXTRA_PROGRAMS += pentad_simulated
SIMULATED = $(abs_top_builddir)/pentad_simulated
simulated = pentad_simulated
CLEANFILES += pentad_simulated
pentad_simulated_SOURCES =
pentad_simulated_LDADD = $(pentad_OBJECTS) $(SIMT_TRAIN_LIBS)

ops_fixture = test/device.c test/device.h test/ops_fixture.c test/ops_fixture.h test/op_cases.def
simt_test_libs = $(TEST_LIBS) libcpu.a $(ONEDNN_LIBS) $(SIMT_KERNELS) $(BACKEND_LIBS) -lpthread
check_PROGRAMS += test_simt test_cuda test_cuda_attention test_cuda_experts test_cuda_golden test_cuda_products \
	test_cuda_property
test_simt_CPPFLAGS = $(SIMT_INCLUDES) $(AM_CPPFLAGS)
test_simt_CXXFLAGS = $(PENTAD_CXXFLAGS) -O1
test_simt_SOURCES = test/test_simt.cc test/test_simt_cublaslt.cc test/test_simt_nccl.cc test/test_simt.h
test_simt_LDADD = $(TEST_LIBS) libcudasim.a $(BASE_LIBS) -lpthread
test_cuda_SOURCES = test/test_cuda.c $(ops_fixture)
test_cuda_LDADD = $(simt_test_libs)
test_cuda_attention_CPPFLAGS = $(SIMT_INCLUDES) $(AM_CPPFLAGS)
test_cuda_attention_SOURCES = test/test_cuda_attention.c $(ops_fixture)
test_cuda_attention_LDADD = $(simt_test_libs)
test_cuda_experts_SOURCES = test/test_cuda_experts.c $(ops_fixture)
test_cuda_experts_LDADD = $(simt_test_libs)
test_cuda_products_SOURCES = test/test_cuda_products.c $(ops_fixture)
test_cuda_products_LDADD = $(simt_test_libs)
test_cuda_property_SOURCES = test/test_cuda_property.c $(ops_fixture)
test_cuda_property_LDADD = $(simt_test_libs)
test_cuda_golden_CFLAGS = $(AM_CFLAGS) $(HDF5_CFLAGS)
test_cuda_golden_SOURCES = test/test_cuda_golden.c test/device.c test/device.h test/golden_run.c test/golden_run.h
test_cuda_golden_LDADD = $(TEST_LIBS) $(SIMT_TRAIN_LIBS)
endif

# With cuDNN, but neither a device nor its driver: a stand-in for this lies in a folder of its own. Then with its
# header alone.
if HAVE_CUDNN
check_PROGRAMS += test_cudnn
test_cudnn_SOURCES = test/test_cudnn.c
test_cudnn_CFLAGS = $(AM_CFLAGS) $(CUDA_CFLAGS)
test_cudnn_LDFLAGS = $(AM_LDFLAGS) -Wl,--as-needed
test_cudnn_LDADD = $(TEST_LIBS) libcudakernels.a $(BASE_LIBS) $(CUDA_LIBS) -ldl
EXTRA_test_cudnn_DEPENDENCIES = test/driver/libcuda.so.1
if SIMULATES
check_PROGRAMS += test_attention_library
test_attention_library_SOURCES = test/test_attention_library.c kernels/cuda/attention_cudnn.c $(ops_fixture)
test_attention_library_CPPFLAGS = $(SIMT_INCLUDES) $(AM_CPPFLAGS) $(CUDA_CFLAGS)
test_attention_library_LDADD = $(simt_test_libs)
endif
endif
test/driver/libcuda.so.1: test/cudnn_driver.c
	@$(MKDIR_P) $(@D)
	$(AM_V_GEN)$(CC) -Wall -Wextra -shared -fPIC $< -o $@
CLEANFILES += test/driver/libcuda.so.1
EXTRA_DIST += test/cudnn_driver.c
