noinst_LIBRARIES += libtrain.a
libtrain_a_SOURCES = lib/train/config.c lib/train/config.h lib/train/batch.c lib/train/batch.h lib/train/expert_load.c lib/train/expert_load.h lib/train/check.c lib/train/check.h \
	lib/train/check_model.c lib/train/check_layout.c lib/train/rosetta.def \
	lib/train/program.c lib/train/program.h lib/train/pieces.c lib/train/pieces.h \
	lib/train/groups.c lib/train/groups.h lib/train/transfer.c lib/train/transfer.h lib/train/step.c lib/train/step.h lib/train/learning_rate.c lib/train/learning_rate.h lib/train/scaler.c lib/train/scaler.h \
	lib/train/state.c lib/train/state.h lib/train/meter.c lib/train/meter.h lib/train/stop.c lib/train/stop.h \
	lib/train/run.c lib/train/run.h lib/train/device.c lib/train/probe.c lib/train/probe.h \
	lib/train/generate.c lib/train/generate.h \
	lib/train/verify.c lib/train/verify.h lib/train/verdict.c lib/train/verdict.h

noinst_HEADERS += lib/train/keys/run.def lib/train/keys/ddp.def lib/train/keys/optimizer.def \
	lib/train/keys/scheduler.def lib/train/keys/mixed_precision.def lib/train/keys/recompute.def lib/train/keys/comm_overlap.def \
	lib/train/keys/dataset.def lib/train/keys/tokenizer.def lib/train/keys/train.def lib/train/keys/validation.def \
	lib/train/keys/checkpoint.def lib/train/keys/logger.def lib/train/keys/rng.def lib/train/keys/dist.def lib/train/keys/profiling.def

check_PROGRAMS += test_config
test_config_SOURCES = test/test_config.c apps/options.c
test_config_LDADD = $(TEST_LIBS) $(TRAIN_LIBS)

check_PROGRAMS += test_golden
test_golden_CFLAGS = $(AM_CFLAGS) $(HDF5_CFLAGS)
test_golden_SOURCES = test/test_golden.c test/golden_run.c test/golden_run.h
test_golden_LDADD = $(TEST_LIBS) $(TRAIN_LIBS)

check_PROGRAMS += test_learning_rate test_scaler test_layout test_axes test_verify
test_scaler_SOURCES = test/test_scaler.c
test_scaler_LDADD = $(TEST_LIBS) $(TRAIN_LIBS)
test_learning_rate_SOURCES = test/test_learning_rate.c
test_learning_rate_LDADD = $(TEST_LIBS) $(TRAIN_LIBS)
test_layout_SOURCES = test/test_layout.c test/layouts.c test/layouts.h test/walk.c test/walk.h
test_axes_SOURCES = test/test_axes.c test/layouts.c test/layouts.h test/walk.c test/walk.h
test_axes_LDADD = $(TEST_LIBS) $(TRAIN_LIBS)
test_layout_LDADD = $(TEST_LIBS) $(TRAIN_LIBS)
test_verify_SOURCES = test/test_verify.c
test_verify_LDADD = $(TEST_LIBS) $(TRAIN_LIBS)

libtrain_a_SOURCES += lib/train/estimate.c lib/train/estimate.h \
	lib/train/auto.c lib/train/auto.h lib/train/auto_list.c lib/train/auto_cost.c lib/train/auto_guess.c lib/train/auto_links.h
check_PROGRAMS += test_estimate
test_estimate_SOURCES = test/test_estimate.c
test_estimate_LDADD = $(TEST_LIBS) $(TRAIN_LIBS)

check_PROGRAMS += test_auto
test_auto_SOURCES = test/test_auto.c
test_auto_LDADD = $(TEST_LIBS) $(TRAIN_LIBS)
