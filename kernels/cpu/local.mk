noinst_LIBRARIES += libcpu.a
libcpu_a_SOURCES =
