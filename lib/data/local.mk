noinst_LIBRARIES += libdata.a
libdata_a_SOURCES =

libdata_a_SOURCES += lib/data/indexed.c lib/data/indexed.h lib/data/indexed_layout.h lib/data/indexed_writer.c \
	lib/data/guard.c lib/data/guard.h lib/data/permute.c lib/data/permute.h lib/data/samples.c lib/data/samples.h \
	lib/data/blend.c lib/data/blend.h lib/data/dataset.c lib/data/dataset.h lib/data/prepare.c lib/data/prepare.h \
	lib/data/prepare_cut.c lib/data/prepare_cut.h

libdata_a_CFLAGS = $(AM_CFLAGS) $(UTF8PROC_CFLAGS) $(PCRE2_CFLAGS) $(ZLIB_CFLAGS)
libdata_a_SOURCES += lib/data/textfile.c lib/data/textfile.h lib/data/textfile_gzip.h lib/data/load.c lib/data/load.h \
	lib/data/normalize.c lib/data/normalize.h lib/data/pretokenize.c lib/data/pretokenize.h lib/data/pattern.c \
	lib/data/pattern.h lib/data/regex.h lib/data/string_map.c lib/data/string_map.h lib/data/unicode.c \
	lib/data/unicode.h lib/data/unicode_table.inc lib/data/added.c lib/data/added.h \
	lib/data/bpe.c lib/data/bpe.h lib/data/bpe_load.c lib/data/bpe_train.c lib/data/bpe_train.h \
	lib/data/bpe_train_file.c lib/data/bpe_train_file.h lib/data/byte_level.c lib/data/byte_level.h \
	lib/data/heap.c lib/data/heap.h lib/data/tokenizer.c lib/data/tokenizer.h lib/data/tokenizer_chain.h \
	lib/data/tokenizer_encode.c lib/data/tokenizer_decode.c
if HAVE_ZLIB
libdata_a_SOURCES += lib/data/textfile_zlib.c
else
libdata_a_SOURCES += lib/data/textfile_none.c
endif
if HAVE_UTF8PROC
libdata_a_SOURCES += lib/data/unicode_utf8proc.c
else
libdata_a_SOURCES += lib/data/unicode_none.c
endif
if HAVE_PCRE2
libdata_a_SOURCES += lib/data/regex_pcre2.c
else
libdata_a_SOURCES += lib/data/regex_none.c
endif

check_PROGRAMS += test_data
test_data_SOURCES = test/test_data.c
test_data_LDADD = $(TEST_LIBS) $(DATA_LIBS)
check_PROGRAMS += test_prepare
test_prepare_SOURCES = test/test_prepare.c
test_prepare_LDADD = $(TEST_LIBS) $(DATA_LIBS) -lpthread
check_PROGRAMS += test_tokenizer
test_tokenizer_SOURCES = test/test_tokenizer.c
test_tokenizer_LDADD = $(TEST_LIBS) $(DATA_LIBS) -lpthread
check_PROGRAMS += test_textfile
test_textfile_SOURCES = test/test_textfile.c
test_textfile_LDADD = $(TEST_LIBS) $(DATA_LIBS)
