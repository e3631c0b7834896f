noinst_LIBRARIES += libmodel.a
libmodel_a_SOURCES = lib/model/config.c lib/model/config.h lib/model/config.def lib/model/attention.c lib/model/builder.c lib/model/builder.h lib/model/experts.c lib/model/gpt.c lib/model/model.c lib/model/model.h \
	lib/model/hf.h lib/model/hf_map.c lib/model/hf_config.c lib/model/hf_config.h lib/model/hf_experts.c lib/model/hf_read.c lib/model/hf_import.c \
	lib/model/hf_export.c

check_PROGRAMS += test_oracle
test_oracle_SOURCES = test/test_oracle.c
test_oracle_LDADD = $(TEST_LIBS) $(TRAIN_LIBS)
check_PROGRAMS += test_model
test_model_SOURCES = test/test_model.c
test_model_LDADD = $(TEST_LIBS) $(MODEL_LIBS)
