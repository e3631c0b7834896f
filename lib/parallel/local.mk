noinst_LIBRARIES += libparallel.a
libparallel_a_SOURCES = lib/parallel/config.c lib/parallel/config.h lib/parallel/config.def \
	lib/parallel/shard.c lib/parallel/shard.h \
	lib/parallel/stages.c lib/parallel/stages.h lib/parallel/schedule.c lib/parallel/schedule.h

check_PROGRAMS += test_pipeline
test_pipeline_SOURCES = test/test_pipeline.c
test_pipeline_LDADD = $(TEST_LIBS) libparallel.a $(BASE_LIBS) -lm
