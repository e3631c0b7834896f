noinst_LIBRARIES += libop.a
libop_a_SOURCES =
