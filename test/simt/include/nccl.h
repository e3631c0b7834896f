/* The part of NCCL's interface that this project uses, between the threads of one process. Signatures and
 * values are those of 2.28.9. */
#ifndef SIMT_NCCL_H
#define SIMT_NCCL_H

#include <limits.h>
#include <cuda_runtime.h>

#define NCCL_MAJOR 2
#define NCCL_MINOR 28
#define NCCL_PATCH 9
#define NCCL_SUFFIX ""
#define NCCL_VERSION(X, Y, Z) (((X) <= 2 && (Y) <= 8) ? (X)*1000 + (Y)*100 + (Z) : (X)*10000 + (Y)*100 + (Z))
#define NCCL_VERSION_CODE 22809

#define NCCL_UNIQUE_ID_BYTES 128
#define NCCL_COMM_NULL NULL
#define NCCL_CONFIG_UNDEF_INT INT_MIN
#define NCCL_CONFIG_UNDEF_PTR NULL
#define NCCL_SPLIT_NOCOLOR -1

#ifdef __cplusplus
extern "C" {
#endif

typedef struct ncclComm *ncclComm_t;
typedef struct {
	char internal[NCCL_UNIQUE_ID_BYTES];
} ncclUniqueId;

#define SIMT_NCCL_RESULTS(X)                                                        \
	X(ncclSuccess, 0, "no error")                                               \
	X(ncclUnhandledCudaError, 1, "unhandled cuda error")                        \
	X(ncclSystemError, 2, "unhandled system error")                             \
	X(ncclInternalError, 3, "internal error")                                   \
	X(ncclInvalidArgument, 4, "invalid argument")                               \
	X(ncclInvalidUsage, 5, "invalid usage")                                     \
	X(ncclRemoteError, 6, "remote process exited or there was a network error") \
	X(ncclInProgress, 7, "NCCL operation in progress")
typedef enum {
#define SIMT_NCCL_RESULT(name, value, text) name = value,
	SIMT_NCCL_RESULTS(SIMT_NCCL_RESULT)
#undef SIMT_NCCL_RESULT
	        ncclNumResults = 8
} ncclResult_t;

/* The type in memory and the type in which it is added up. */
#define SIMT_NCCL_TYPES(X)                          \
	X(ncclInt8, 0, int8_t, int8_t)              \
	X(ncclUint8, 1, uint8_t, uint8_t)           \
	X(ncclInt32, 2, int32_t, int32_t)           \
	X(ncclUint32, 3, uint32_t, uint32_t)        \
	X(ncclInt64, 4, int64_t, int64_t)           \
	X(ncclUint64, 5, uint64_t, uint64_t)        \
	X(ncclFloat16, 6, __half, float)            \
	X(ncclFloat32, 7, float, float)             \
	X(ncclFloat64, 8, double, double)           \
	X(ncclBfloat16, 9, __nv_bfloat16, float)    \
	X(ncclFloat8e4m3, 10, __nv_fp8_e4m3, float) \
	X(ncclFloat8e5m2, 11, __nv_fp8_e5m2, float)
typedef enum {
#define SIMT_NCCL_TYPE(name, value, type, sum) name = value,
	SIMT_NCCL_TYPES(SIMT_NCCL_TYPE)
#undef SIMT_NCCL_TYPE
	        ncclNumTypes = 12,
	ncclChar = ncclInt8,
	ncclInt = ncclInt32,
	ncclHalf = ncclFloat16,
	ncclFloat = ncclFloat32,
	ncclDouble = ncclFloat64
} ncclDataType_t;

typedef enum { ncclSum = 0, ncclProd = 1, ncclMax = 2, ncclMin = 3, ncclAvg = 4, ncclNumOps = 5 } ncclRedOp_t;

typedef struct {
	size_t size;
	unsigned int magic;
	unsigned int version;
	int blocking;
	int cgaClusterSize;
	int minCTAs;
	int maxCTAs;
	const char *netName;
	int splitShare;
	int trafficClass;
	const char *commName;
	int collnetEnable;
	int CTAPolicy;
	int shrinkShare;
	int nvlsCTAs;
	int nChannelsPerNetPeer;
	int nvlinkCentricSched;
} ncclConfig_t;

#define NCCL_CONFIG_INITIALIZER                                                              \
	{                                                                                    \
		sizeof(ncclConfig_t), 0xcafebeef, NCCL_VERSION_CODE, NCCL_CONFIG_UNDEF_INT,  \
		        NCCL_CONFIG_UNDEF_INT, NCCL_CONFIG_UNDEF_INT, NCCL_CONFIG_UNDEF_INT, \
		        NCCL_CONFIG_UNDEF_PTR, NCCL_CONFIG_UNDEF_INT, NCCL_CONFIG_UNDEF_INT, \
		        NCCL_CONFIG_UNDEF_PTR, NCCL_CONFIG_UNDEF_INT, NCCL_CONFIG_UNDEF_INT, \
		        NCCL_CONFIG_UNDEF_INT, NCCL_CONFIG_UNDEF_INT, NCCL_CONFIG_UNDEF_INT, \
		        NCCL_CONFIG_UNDEF_INT                                                \
	}

const char *ncclGetErrorString(ncclResult_t result);
const char *ncclGetLastError(ncclComm_t comm);
ncclResult_t ncclGetVersion(int *version);
ncclResult_t ncclGetUniqueId(ncclUniqueId *uniqueId);
ncclResult_t ncclCommInitRank(ncclComm_t *comm, int nranks, ncclUniqueId commId, int rank);
ncclResult_t ncclCommInitRankConfig(ncclComm_t *comm, int nranks, ncclUniqueId commId, int rank,
                                    ncclConfig_t *config);
ncclResult_t ncclCommSplit(ncclComm_t comm, int color, int key, ncclComm_t *newcomm, ncclConfig_t *config);
ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *asyncError);
ncclResult_t ncclCommFinalize(ncclComm_t comm);
ncclResult_t ncclCommDestroy(ncclComm_t comm);
ncclResult_t ncclCommAbort(ncclComm_t comm);
ncclResult_t ncclCommCount(const ncclComm_t comm, int *count);
ncclResult_t ncclCommCuDevice(const ncclComm_t comm, int *device);
ncclResult_t ncclCommUserRank(const ncclComm_t comm, int *rank);
ncclResult_t ncclMemAlloc(void **ptr, size_t size);
ncclResult_t ncclMemFree(void *ptr);
ncclResult_t ncclCommRegister(const ncclComm_t comm, void *buff, size_t size, void **handle);
ncclResult_t ncclCommDeregister(const ncclComm_t comm, void *handle);

ncclResult_t ncclReduce(const void *sendbuff, void *recvbuff, size_t count, ncclDataType_t datatype,
                        ncclRedOp_t op, int root, ncclComm_t comm, cudaStream_t stream);
ncclResult_t ncclBroadcast(const void *sendbuff, void *recvbuff, size_t count, ncclDataType_t datatype,
                           int root, ncclComm_t comm, cudaStream_t stream);
ncclResult_t ncclAllReduce(const void *sendbuff, void *recvbuff, size_t count, ncclDataType_t datatype,
                           ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream);
ncclResult_t ncclReduceScatter(const void *sendbuff, void *recvbuff, size_t recvcount,
                               ncclDataType_t datatype, ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream);
ncclResult_t ncclAllGather(const void *sendbuff, void *recvbuff, size_t sendcount, ncclDataType_t datatype,
                           ncclComm_t comm, cudaStream_t stream);
ncclResult_t ncclSend(const void *sendbuff, size_t count, ncclDataType_t datatype, int peer, ncclComm_t comm,
                      cudaStream_t stream);
ncclResult_t ncclRecv(void *recvbuff, size_t count, ncclDataType_t datatype, int peer, ncclComm_t comm,
                      cudaStream_t stream);
ncclResult_t ncclGroupStart(void);
ncclResult_t ncclGroupEnd(void);

#ifdef __cplusplus
}
#endif

#endif
