/* cuDNN accepts our graphs of attention and makes plans of them. No device is needed: one is described to the
 * library, and libcuda is test/cudnn_driver.c. Nothing is run. */
#include <dlfcn.h>
#include <stdlib.h>
#include <unistd.h>

#include "base/err.h"
#include "kernels/cuda/attention_cudnn.h"
#include "test/test.h"

static const char hopper[] =
        "{\"deviceVer\":900,\"driverVer\":13000,\"cudaDeviceId\":0,\"pciDeviceId\":9013,\"isTccDriver\":0,"
        "\"multiProcessorCount\":132,\"l2CacheSize\":62914560,\"maxCtasPerSM\":32,\"maxRegistersPerSM\":"
        "65536,"
        "\"maxSharedMemoryPerBlock\":49152,\"maxSharedMemoryPerBlockOptin\":232448,"
        "\"reservedSharedMemoryPerBlock\":1024,\"maxThreadsPerBlock\":1024,\"maxThreadsPerSM\":2048,"
        "\"memClockRateKHz\":3201000,\"smClockRateKHz\":1980000,\"regsPerBlock\":65536,"
        "\"supportCoopLaunch\":1,\"totalGlobalMem\":150000000000,\"warpSize\":32,"
        "\"deviceName\":\"NVIDIA H200\",\"maxGridSize\":[2147483647,65535,65535],"
        "\"maxBlockSize\":[1024,1024,64]}";

static cudnnBackendDescriptor_t described_device(void)
{
	cudnnBackendDescriptor_t d = NULL;
	bool good = cudnnBackendCreateDescriptor(CUDNN_BACKEND_DEVICEPROP_DESCRIPTOR, &d) == 0 &&
	            cudnnBackendSetAttribute(d, CUDNN_ATTR_DEVICEPROP_JSON_REPRESENTATION, CUDNN_TYPE_CHAR,
	                                     sizeof hopper, hopper) == 0 &&
	            cudnnBackendFinalize(d) == 0;
	CHECK(good);
	return d;
}

/* What the library says of a shape: the exit code. */
static int plan(struct attention_shape shape, struct attention_plan *p, struct err *e)
{
	cudnnBackendDescriptor_t device = described_device();
	*p = (struct attention_plan){.shape = shape};
	int rc = attention_plan_make(p, NULL, device, e);
	attention_plan_free(p);
	cudnnBackendDestroyDescriptor(device);
	return rc;
}

static void check_shape(struct attention_shape shape, const char *name, int64_t most_workspace)
{
	for (int backward = 0; backward < 2; backward++) {
		struct attention_plan p;
		struct err e = {0};
		shape.backward = backward;
		if (plan(shape, &p, &e))
			test_failed(__FILE__, __LINE__, "%s, %s: %d engines, %s", name,
			            backward ? "backward" : "forward", p.offered, e.text);
		CHECK(p.offered > 0);
		if (p.workspace < 0 || p.workspace > most_workspace)
			test_failed(__FILE__, __LINE__, "%s, %s: %lld bytes of working space", name,
			            backward ? "backward" : "forward", (long long)p.workspace);
	}
}

TEST(heads_of_64)
{
	check_shape((struct attention_shape){8, 1024, 12, 12, 64, 64, 0, 0}, "GPT-2 124M", 1 << 20);
}

TEST(groups_of_heads_of_128)
{
	/* gradients of keys and values of every head, before they are summed */
	int64_t full = 2 * 2LL * 4096 * 32 * 128 * 2;
	check_shape((struct attention_shape){2, 4096, 32, 8, 128, 128, 0, 0}, "Llama 8B", full + (1 << 20));
}

TEST(a_window)
{
	int64_t full = 2 * 2LL * 4096 * 32 * 128 * 2;
	check_shape((struct attention_shape){2, 4096, 32, 8, 128, 128, 1024, 0}, "Mistral 7B",
	            full + (1 << 20));
}

TEST(values_narrower_than_keys)
{
	check_shape((struct attention_shape){1, 2048, 16, 16, 192, 128, 0, 0}, "latent attention", 1 << 20);
}

TEST(a_size_that_no_engine_knows)
{
	struct attention_plan p;
	struct err e = {0};
	CHECK_INT(plan((struct attention_shape){1, 1024, 2, 2, 36, 36, 0, 0}, &p, &e), EXIT_UNAVAILABLE);
	CHECK_HAS(e.text, "cuda: cuDNN: ");
}

/* The driver is looked for when the library is first used, so its folder has to be named before we start. */
static void start_again_with_driver(char **argv)
{
	char path[8192], self[4000];
	const char *others = getenv("LD_LIBRARY_PATH");
	ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
	if (getenv("PENTAD_TEST_DRIVER") || n < 0)
		return;
	self[n] = 0;
	*strrchr(self, '/') = 0;
	snprintf(path, sizeof path, "%s/test/driver%s%s", self, others ? ":" : "", others ? others : "");
	setenv("LD_LIBRARY_PATH", path, 1);
	setenv("PENTAD_TEST_DRIVER", path, 1);
	execv("/proc/self/exe", argv);
}

/* libcudnn loads its parts when they are needed. */
static bool has_library(void)
{
	static const char *const parts[] = {"libcudnn_graph.so.9", "libcudnn_heuristic.so.9",
	                                    "libcudnn_engines_runtime_compiled.so.9"};
	for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
		if (!dlopen(parts[i], RTLD_LAZY)) {
			printf("skipped: %s\n", dlerror());
			return false;
		}
	return true;
}

int main(int argc, char **argv)
{
	enum { SKIPPED = 77 };
	start_again_with_driver(argv);
	return has_library() ? test_main(argc, argv) : SKIPPED;
}
