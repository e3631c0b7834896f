bin_PROGRAMS += pentad
pentad_CPPFLAGS = $(AM_CPPFLAGS) -DPENTAD_VERSION='"$(PACKAGE_VERSION)"'
pentad_CFLAGS = $(AM_CFLAGS) $(HDF5_CFLAGS)
pentad_LDADD = $(TRAIN_LIBS)
noinst_HEADERS += apps/commands.h apps/commands.def
pentad_SOURCES = apps/main.c apps/bench.c apps/bench.h apps/bench_matmul.c apps/bench_step.c apps/join.c apps/join.h apps/checkpoint.c apps/config.c apps/convert.c apps/options.c apps/options.h apps/prepare.c apps/tokenizer.c
pentad_SOURCES += apps/launch.c apps/train.c apps/plan.c apps/plan.h apps/plan_json.c apps/plan_search.c apps/verify.c apps/generate.c apps/doctor.c
