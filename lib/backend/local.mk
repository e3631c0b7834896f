noinst_LIBRARIES += libbackend.a
libbackend_a_SOURCES =
