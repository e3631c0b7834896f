noinst_LIBRARIES += libcomm.a
libcomm_a_CFLAGS = $(AM_CFLAGS) $(PMIX_CFLAGS) $(UCX_CFLAGS)
libcomm_a_SOURCES = lib/comm/mesh.c lib/comm/mesh.h lib/comm/comm.c lib/comm/comm.h lib/comm/link.h \
	lib/comm/collective.c lib/comm/check.c lib/comm/reduce.c lib/comm/thread.c \
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
