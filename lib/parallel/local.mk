noinst_LIBRARIES += libparallel.a
libparallel_a_SOURCES = lib/parallel/config.c lib/parallel/config.h lib/parallel/config.def
