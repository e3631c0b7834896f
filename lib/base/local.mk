noinst_LIBRARIES += libbase.a
libbase_a_CFLAGS = $(AM_CFLAGS) $(YAML_CFLAGS)
libbase_a_SOURCES = lib/base/err.c lib/base/err.h lib/base/mem.c lib/base/mem.h lib/base/sys.c lib/base/sys.h \
	lib/base/log.c lib/base/log.h lib/base/json.c lib/base/json.h lib/base/rng.c lib/base/rng.h \
	lib/base/hash.c lib/base/inline.h lib/base/hash.h lib/base/text.c lib/base/text.h lib/base/clock.c lib/base/clock.h \
	lib/base/yaml.c lib/base/yaml.h lib/base/option.c lib/base/option.h lib/base/option_nearest.c \
	lib/base/option_print.c lib/base/option_fields.h lib/base/option_rows.h lib/base/option_end.h

check_PROGRAMS += test_base
test_base_SOURCES = test/test_base.c
test_base_LDADD = $(TEST_LIBS) $(BASE_LIBS)
