# The tests of local.mk once more, linked with the kernels of a real device instead of the simulator:
# `make device-tests` on a machine with CUDA. `make check` leaves them out; scripts/gpu-check builds and runs them.
if HAVE_CUDA
if SIMULATES
device_tests = $(filter test_cuda%,$(check_PROGRAMS))
device_programs = $(device_tests:=_device)
# A test's objects do not know which of the two devices they will meet.
device_objects = $(foreach test,$(device_tests),$($(test)_OBJECTS))
device-tests: $(device_programs)
$(device_programs): %_device: pentad$(EXEEXT) libtest.a $(device_objects)
	$(AM_V_CCLD)$(LINK) $($*_OBJECTS) $(TEST_LIBS) $(TRAIN_LIBS) $(LIBS)
CLEANFILES += $(device_programs)
.PHONY: device-tests
endif
endif
