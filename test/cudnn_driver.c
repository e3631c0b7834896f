/* Stands in for the driver, libcuda.so.1, where there is no device: cuDNN builds plans for a device that is
 * described to it, loads what it has compiled, and never runs it. Loading succeeds, all else says that this
 * is a stub. */
enum { DRIVER_DONE = 0, DRIVER_STUB = 34, DRIVER_VERSION = 13000 };
static int nothing;

int cuDriverGetVersion(int *version)
{
	*version = DRIVER_VERSION;
	return DRIVER_DONE;
}

int cuLibraryLoadData(void **library)
{
	*library = &nothing;
	return DRIVER_DONE;
}

int cuLibraryGetKernel(void **kernel)
{
	*kernel = &nothing;
	return DRIVER_DONE;
}

int cuKernelGetAttribute(int *value)
{
	*value = 0;
	return DRIVER_DONE;
}

int cuKernelSetAttribute(void)
{
	return DRIVER_DONE;
}

int cuLibraryUnload(void)
{
	return DRIVER_DONE;
}

/* What the library looks up when it is loaded. */
#define STUBS(X)                                       \
	X(cuCtxGetCurrent)                             \
	X(cuCtxGetDevice)                              \
	X(cuCtxGetLimit)                               \
	X(cuCtxPopCurrent)                             \
	X(cuCtxPushCurrent)                            \
	X(cuDeviceGet)                                 \
	X(cuDeviceGetAttribute)                        \
	X(cuDeviceGetCount)                            \
	X(cuDevicePrimaryCtxRelease)                   \
	X(cuDevicePrimaryCtxReset)                     \
	X(cuDevicePrimaryCtxRetain)                    \
	X(cuFuncGetAttribute)                          \
	X(cuFuncSetAttribute)                          \
	X(cuGetErrorName)                              \
	X(cuGetErrorString)                            \
	X(cuInit)                                      \
	X(cuLaunchCooperativeKernel)                   \
	X(cuLaunchKernel)                              \
	X(cuLaunchKernelEx)                            \
	X(cuLibraryLoadFromFile)                       \
	X(cuLinkAddData)                               \
	X(cuLinkAddData_v2)                            \
	X(cuLinkAddFile_v2)                            \
	X(cuLinkComplete)                              \
	X(cuLinkCreate)                                \
	X(cuLinkCreate_v2)                             \
	X(cuLinkDestroy)                               \
	X(cuMemcpyDtoH_v2)                             \
	X(cuModuleGetFunction)                         \
	X(cuModuleGetGlobal_v2)                        \
	X(cuModuleLoadData)                            \
	X(cuModuleLoadDataEx)                          \
	X(cuModuleLoadFatBinary)                       \
	X(cuModuleUnload)                              \
	X(cuOccupancyMaxActiveBlocksPerMultiprocessor) \
	X(cuOccupancyMaxPotentialClusterSize)          \
	X(cuStreamGetCtx)                              \
	X(cuStreamSynchronize)                         \
	X(cuTensorMapEncodeTiled)
#define STUB(name)                  \
	int name(void)              \
	{                           \
		return DRIVER_STUB; \
	}
STUBS(STUB)
