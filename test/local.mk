# What the test programs share; each module's tests stand in the module's own fragment.
check_LIBRARIES = libtest.a
libtest_a_SOURCES = test/test.c test/test.h test/ranks.c test/ranks.h
TEST_LIBS = libtest.a

# End to end, with the binary: seconds each, no Slurm, no network.
dist_check_SCRIPTS += test/e2e/test_resume test/e2e/test_ranks test/e2e/test_commands test/e2e/test_convert_train test/e2e/test_launch test/e2e/test_verify test/e2e/test_experts \
	test/e2e/test_auto
EXTRA_DIST += test/e2e/common test/slurm/test_train test/slurm/test_verify
dist_check_SCRIPTS += test/e2e/test_plan_memory test/e2e/test_gpu_check
