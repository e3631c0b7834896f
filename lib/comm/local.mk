noinst_LIBRARIES += libcomm.a
libcomm_a_CFLAGS = $(AM_CFLAGS) $(PMIX_CFLAGS) $(UCX_CFLAGS)
libcomm_a_SOURCES = lib/comm/mesh.c lib/comm/mesh.h lib/comm/comm.c lib/comm/comm.h lib/comm/link.h \
	lib/comm/collective.c lib/comm/check.c lib/comm/reduce.c lib/comm/thread.c lib/comm/queue.c lib/comm/queue.h \
	lib/comm/boot.c lib/comm/boot.h lib/comm/boot_guard.c lib/comm/boot_method.h lib/comm/host.h
if HAVE_PMIX
libcomm_a_SOURCES += lib/comm/boot_pmix.c lib/comm/host_pmix.c
else
libcomm_a_SOURCES += lib/comm/boot_pmix_absent.c lib/comm/host_absent.c
endif
if HAVE_UCX
libcomm_a_SOURCES += lib/comm/ucx.c
else
libcomm_a_SOURCES += lib/comm/ucx_absent.c
endif

check_PROGRAMS += test_comm test_comm_ranks
test_comm_SOURCES = test/test_comm.c test/comm_suite.c test/comm_suite.h
test_comm_LDADD = $(TEST_LIBS) $(COMM_LIBS)
test_comm_ranks_SOURCES = test/test_comm_ranks.c test/comm_suite.c test/comm_suite.h
test_comm_ranks_LDADD = $(TEST_LIBS) $(COMM_LIBS)
dist_check_SCRIPTS += test/e2e/test_launch
