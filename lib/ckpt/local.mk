noinst_LIBRARIES += libckpt.a
libckpt_a_SOURCES =
