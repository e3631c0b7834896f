/* Devices, errors and launches. */
#include "streams.h"

#include <cstdio>
#include <cstring>
#include <map>

static thread_local cudaError_t last_error;
static thread_local int device_of_thread;
static std::map<std::pair<int, const void *>, size_t> raised_shared; /* by device and kernel */

cudaError_t report(cudaError_t error)
{
	if (error)
		last_error = error;
	return error;
}

int current_device(void)
{
	return device_of_thread;
}

/* ---- errors ---- */

const char *cudaGetErrorName(cudaError_t error)
{
	switch (error) {
#define NAME(name, value, text) \
	case name:              \
		return #name;
		SIMT_ERRORS(NAME)
#undef NAME
	}
	return "unrecognized error code";
}

const char *cudaGetErrorString(cudaError_t error)
{
	switch (error) {
#define TEXT(name, value, text) \
	case name:              \
		return text;
		SIMT_ERRORS(TEXT)
#undef TEXT
	}
	return "unrecognized error code";
}

cudaError_t cudaGetLastError(void)
{
	cudaError_t error = last_error;
	last_error = cudaSuccess;
	return error;
}

cudaError_t cudaPeekAtLastError(void)
{
	return last_error;
}

/* ---- devices ---- */

int device_count(void)
{
	static const int count = (int)environment("SIMT_DEVICES", 8);
	return count;
}

/* Few, and no power of two, so that kernels whose grid follows the machine loop and have odd ends. */
static int multiprocessors(void)
{
	static const int count = (int)environment("SIMT_MULTIPROCESSORS", 3);
	return count;
}

cudaError_t cudaGetDeviceCount(int *count)
{
	*count = device_count();
	return report(*count > 0 ? cudaSuccess : cudaErrorNoDevice);
}

cudaError_t cudaSetDevice(int device)
{
	if (device < 0 || device >= device_count())
		return report(cudaErrorInvalidDevice);
	device_of_thread = device;
	return cudaSuccess;
}

cudaError_t cudaGetDevice(int *device)
{
	*device = device_of_thread;
	return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *prop, int device)
{
	if (device < 0 || device >= device_count())
		return report(cudaErrorInvalidDevice);
	*prop = {};
	snprintf(prop->name, sizeof prop->name, "simulated GPU");
	memset(prop->uuid.bytes, 0x51, sizeof prop->uuid.bytes);
	prop->uuid.bytes[15] = (char)device;
	prop->totalGlobalMem = device_memory_total;
	prop->sharedMemPerBlock = 48 << 10;
	prop->sharedMemPerBlockOptin = 227 << 10;
	prop->sharedMemPerMultiprocessor = 228 << 10;
	prop->regsPerBlock = prop->regsPerMultiprocessor = 65536;
	prop->warpSize = 32;
	prop->maxThreadsPerBlock = prop->maxThreadsDim[0] = prop->maxThreadsDim[1] = 1024;
	prop->maxThreadsDim[2] = 64;
	prop->maxGridSize[0] = 0x7fffffff;
	prop->maxGridSize[1] = prop->maxGridSize[2] = 65535;
	prop->major = 9;
	prop->multiProcessorCount = multiprocessors();
	prop->pciBusID = device + 1;
	prop->memoryBusWidth = 6144;
	prop->l2CacheSize = 50 << 20;
	prop->maxThreadsPerMultiProcessor = 2048;
	prop->concurrentKernels = prop->streamPrioritiesSupported = 1;
	prop->asyncEngineCount = 3;
	return cudaSuccess;
}

static int attribute(enum cudaDeviceAttr attr, const cudaDeviceProp &p)
{
	switch (attr) {
	case cudaDevAttrMaxThreadsPerBlock:
		return p.maxThreadsPerBlock;
	case cudaDevAttrMaxSharedMemoryPerBlock:
		return (int)p.sharedMemPerBlock;
	case cudaDevAttrWarpSize:
		return p.warpSize;
	case cudaDevAttrClockRate:
		return 1980000;
	case cudaDevAttrMultiProcessorCount:
		return p.multiProcessorCount;
	case cudaDevAttrMemoryClockRate:
		return 3201000;
	case cudaDevAttrGlobalMemoryBusWidth:
		return p.memoryBusWidth;
	case cudaDevAttrL2CacheSize:
		return p.l2CacheSize;
	case cudaDevAttrMaxThreadsPerMultiProcessor:
		return p.maxThreadsPerMultiProcessor;
	case cudaDevAttrComputeCapabilityMajor:
		return p.major;
	case cudaDevAttrComputeCapabilityMinor:
		return p.minor;
	case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
		return (int)p.sharedMemPerMultiprocessor;
	case cudaDevAttrMaxSharedMemoryPerBlockOptin:
		return (int)p.sharedMemPerBlockOptin;
	}
	return -1;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attr, int device)
{
	cudaDeviceProp properties;
	cudaError_t error = cudaGetDeviceProperties(&properties, device);
	if (error)
		return error;
	*value = attribute(attr, properties);
	return report(*value < 0 ? cudaErrorInvalidValue : cudaSuccess);
}

cudaError_t cudaDeviceGetPCIBusId(char *pciBusId, int len, int device)
{
	if (device < 0 || device >= device_count() || len < 13)
		return report(cudaErrorInvalidValue);
	snprintf(pciBusId, (size_t)len, "0000:%02x:00.0", (unsigned)device + 1);
	return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int *driverVersion)
{
	*driverVersion = CUDART_VERSION;
	return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int *runtimeVersion)
{
	*runtimeVersion = CUDART_VERSION;
	return cudaSuccess;
}

/* ---- launches ---- */

cudaError_t cudaFuncSetAttribute(const void *func, enum cudaFuncAttribute attr, int value)
{
	Lock lock = take_lock();
	if (!func)
		return report(cudaErrorInvalidDeviceFunction);
	if (attr == cudaFuncAttributePreferredSharedMemoryCarveout)
		return report(value >= -1 && value <= 100 ? cudaSuccess : cudaErrorInvalidValue);
	if (value < 0 || value > 227 << 10)
		return report(cudaErrorInvalidValue);
	raised_shared[{device_of_thread, func}] = (size_t)value;
	return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *numBlocks, const void *func, int blockSize,
                                                          size_t dynamicSMemSize)
{
	if (!func || blockSize < 1 || blockSize > 1024)
		return report(cudaErrorInvalidValue);
	size_t by_threads = 2048 / (size_t)blockSize, by_memory = (228 << 10) / (dynamicSMemSize + 1024);
	*numBlocks = (int)std::min(std::min(by_threads, by_memory), (size_t)32);
	return cudaSuccess;
}

static cudaError_t check_attributes(const cudaLaunchConfig_t &c)
{
	for (unsigned i = 0; i < c.numAttrs; i++) {
		const cudaLaunchAttribute &a = c.attrs[i];
		bool cluster = a.id == cudaLaunchAttributeClusterDimension &&
		               a.val.clusterDim.x * a.val.clusterDim.y * a.val.clusterDim.z != 1;
		if (cluster || (a.id == cudaLaunchAttributeCooperative && a.val.cooperative)) {
			talk("clusters and cooperative grids are not simulated");
			return cudaErrorNotSupported;
		}
	}
	return cudaSuccess;
}

static cudaError_t check_sizes(const cudaLaunchConfig_t &c, size_t shared_allowed)
{
	const dim3 &g = c.gridDim, &b = c.blockDim;
	if (!g.x || !g.y || !g.z || g.x > 0x7fffffff || g.y > 65535 || g.z > 65535)
		return cudaErrorInvalidConfiguration;
	if (!b.x || !b.y || !b.z || b.x > 1024 || b.y > 1024 || b.z > 64 || (size_t)b.x * b.y * b.z > 1024)
		return cudaErrorInvalidConfiguration;
	return c.dynamicSmemBytes > shared_allowed ? cudaErrorInvalidValue : cudaSuccess;
}

/* A small number is an offset from no pointer at all, which a kernel may get for what it does not use. */
static void check_pointers(const void *kernel, const std::vector<const void *> &pointers)
{
	for (const void *pointer : pointers) {
		Region region = region_of(pointer);
		if (region.freed || (region.place == Place::pageable && (uintptr_t)pointer > 1 << 20))
			die("kernel %s is given %p, which is %s memory", function_name(kernel).c_str(),
			    pointer, region.freed ? "freed" : "pageable host");
	}
}

cudaError_t simt_launch(const cudaLaunchConfig_t *config, const void *kernel, std::function<void()> body,
                        const std::vector<const void *> &pointers)
{
	Lock lock = take_lock();
	auto raised = raised_shared.find({device_of_thread, kernel});
	size_t allowed = 48 << 10;
	if (raised != raised_shared.end() && raised->second > allowed)
		allowed = raised->second;
	cudaError_t error = check_sizes(*config, allowed);
	if (!error)
		error = check_attributes(*config);
	CUstream_st *stream = find_stream(config->stream);
	if (!error && (!stream || stream->device != device_of_thread))
		error = cudaErrorInvalidResourceHandle;
	if (error)
		return report(error);
	check_pointers(kernel, pointers);
	int device = device_of_thread;
	Grid grid = {kernel, config->gridDim, config->blockDim, config->dynamicSmemBytes, std::move(body)};
	Run run = [grid, device] {
		run_grid(grid, draw_number(device));
		return true;
	};
	return report(enqueue(
	        lock, stream, [kernel] { return "kernel " + function_name(kernel); }, [run] { return run; }));
}
