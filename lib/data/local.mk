noinst_LIBRARIES += libdata.a
libdata_a_SOURCES =

libdata_a_SOURCES += lib/data/indexed.c lib/data/indexed.h lib/data/indexed_layout.h lib/data/indexed_writer.c \
	lib/data/guard.c lib/data/guard.h lib/data/permute.c lib/data/permute.h lib/data/samples.c lib/data/samples.h \
	lib/data/blend.c lib/data/blend.h lib/data/dataset.c lib/data/dataset.h lib/data/prepare.c lib/data/prepare.h \
	lib/data/prepare_cut.c lib/data/prepare_cut.h

check_PROGRAMS += test_data
test_data_SOURCES = test/test_data.c
test_data_LDADD = $(TEST_LIBS) $(DATA_LIBS)
