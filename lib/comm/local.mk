noinst_LIBRARIES += libcomm.a
libcomm_a_SOURCES =
