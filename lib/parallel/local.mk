noinst_LIBRARIES += libparallel.a
libparallel_a_SOURCES =
