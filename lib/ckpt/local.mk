noinst_LIBRARIES += libckpt.a
libckpt_a_CFLAGS = $(AM_CFLAGS) $(HDF5_CFLAGS)
libckpt_a_SOURCES = lib/ckpt/ckpt.h lib/ckpt/manifest.c lib/ckpt/manifest_check.c lib/ckpt/manifest.h \
	lib/ckpt/h5.c lib/ckpt/h5.h lib/ckpt/save.c lib/ckpt/folder.c lib/ckpt/folder.h \
	lib/ckpt/open.c lib/ckpt/read.c lib/ckpt/read.h \
	lib/ckpt/safetensors_read.c lib/ckpt/safetensors_write.c lib/ckpt/safetensors.h

check_PROGRAMS += test_ckpt test_manifest test_safetensors
test_ckpt_CFLAGS = $(AM_CFLAGS) $(HDF5_CFLAGS)
test_ckpt_SOURCES = test/test_ckpt.c
test_ckpt_LDADD = $(TEST_LIBS) $(CKPT_LIBS)
test_manifest_SOURCES = test/test_manifest.c
test_manifest_LDADD = $(TEST_LIBS) $(CKPT_LIBS)
test_safetensors_SOURCES = test/test_safetensors.c
test_safetensors_LDADD = $(TEST_LIBS) libmodel.a $(CKPT_LIBS)
dist_check_SCRIPTS += test/test_convert.sh
