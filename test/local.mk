# What the test programs share; each module's tests stand in the module's own fragment.
check_LIBRARIES = libtest.a
libtest_a_SOURCES = test/test.c test/test.h
TEST_LIBS = libtest.a
