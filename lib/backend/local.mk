noinst_LIBRARIES += libbackend.a
libbackend_a_SOURCES = lib/backend/backend.h
