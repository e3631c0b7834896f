/* What the device code shares: element types, launches, reductions. Floor: kernels. */
#ifndef PENTAD_KERNELS_CUDA_DEVICE_CUH
#define PENTAD_KERNELS_CUDA_DEVICE_CUH

#include <float.h>
#include <limits.h>
#include <math.h>
#include <stdint.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "kernels/cuda/cuda.h"
#include "kernels/mask.h"

typedef __nv_bfloat16 bf16;
typedef __half f16;

/* Dynamic shared memory: DYNAMIC_SHARED(float, tile); then tile[i]. */
#ifdef PENTAD_SIMULATED
#define DYNAMIC_SHARED(type, name) type *name = (type *)simt_dynamic_shared()
#else
#define DYNAMIC_SHARED(type, name)                                  \
	extern __shared__ __align__(16) unsigned char shared_raw[]; \
	type *name = (type *)shared_raw
#endif

/* One element as f32 and back, rounded to nearest even. */
__device__ __forceinline__ float load(float x)
{
	return x;
}
__device__ __forceinline__ float load(bf16 x)
{
	return __bfloat162float(x);
}
__device__ __forceinline__ float load(f16 x)
{
	return __half2float(x);
}
template <class T> __device__ __forceinline__ T store(float x);
template <> __device__ __forceinline__ float store<float>(float x)
{
	return x;
}
template <> __device__ __forceinline__ bf16 store<bf16>(float x)
{
	return __float2bfloat16_rn(x);
}
template <> __device__ __forceinline__ f16 store<f16>(float x)
{
	return __float2half_rn(x);
}

/* The instance of a template over element types for tensors of one: BY_TYPE(in[0].dtype, add_by)(s, …),
 * add_by<T> a function on the host that launches kernels of T. Checked before: type_check. */
#define BY_TYPE(type, function) by_type((enum dtype)(type), function<float>, function<bf16>, function<f16>)
template <class F> static inline F *by_type(enum dtype dtype, F *f32, F *b16, F *h16)
{
	return dtype == DT_f32 ? f32 : dtype == DT_bf16 ? b16 : h16;
}
/* EXIT_INTERNAL where the tensor is neither f32 nor a half. */
static inline int type_check(enum op op, const struct tensor *t, struct err *e)
{
	if (t->dtype == DT_f32 || dtype_is_half((enum dtype)t->dtype))
		return 0;
	return err_set(e, EXIT_INTERNAL, "cuda: %s of %s; allowed: f32, bf16, f16", op_rows[op].name,
	               dtype_rows[t->dtype].name);
}
template <class T> static inline T *at(const struct tensor *t)
{
	return (T *)t->data;
}

/* 16 bytes at a time: N elements of T. Pointers from tensors are 64-byte-aligned. */
template <class T> struct __align__(16) pack
{
	enum { N = 16 / sizeof(T) };
	T x[N];
};
template <class T> __device__ __forceinline__ pack<T> load_pack(const T *p)
{
	return *(const pack<T> *)p;
}
template <class T> __device__ __forceinline__ void store_pack(T *p, const pack<T> &v)
{
	*(pack<T> *)p = v;
}

struct shape {
	dim3 grid, block;
	size_t shared_bytes;
};
enum { WARP = 32, BLOCK = 256 };

/* `items` of work, `each` a thread, in a grid of at most `most` blocks: kernels go on by grid_step. */
static inline struct shape flat(int64_t items, int64_t each = 1, int64_t most = 1 << 20)
{
	int64_t blocks = (items + each * BLOCK - 1) / (each * BLOCK);
	struct shape s = {dim3((unsigned)(blocks < 1 ? 1 : blocks < most ? blocks : most)), dim3(BLOCK), 0};
	return s;
}
__device__ __forceinline__ int64_t grid_first()
{
	return (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
}
__device__ __forceinline__ int64_t grid_step()
{
	return (int64_t)gridDim.x * blockDim.x;
}

/* Tells the stream to run a kernel; nothing where the grid is empty. */
template <class... P, class... A>
static int launch(struct stream *s, const char *name, struct shape shape, struct err *e, void (*kernel)(P...),
                  A... args)
{
	cudaLaunchConfig_t how = {};
	how.gridDim = shape.grid;
	how.blockDim = shape.block;
	how.dynamicSmemBytes = shape.shared_bytes;
	how.stream = s->compute;
	if (!shape.grid.x || !shape.grid.y || !shape.grid.z)
		return 0;
	cudaError_t rc = cudaLaunchKernelEx(&how, kernel, args...);
	return rc == cudaSuccess ? 0 : cuda_failed(e, rc, name);
}

/* All lanes of a warp get the sum, the maximum. */
template <class T> __device__ __forceinline__ T warp_sum(T x)
{
	for (int k = WARP / 2; k; k /= 2)
		x += __shfl_xor_sync(0xffffffffu, x, k);
	return x;
}
__device__ __forceinline__ float warp_max(float x)
{
	for (int k = WARP / 2; k; k /= 2)
		x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, k));
	return x;
}
/* The same for a block of whole warps, at most 1024 threads in x; every thread calls it. */
template <class T> __device__ __forceinline__ T block_sum(T x)
{
	__shared__ T part[WARP];
	int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = (blockDim.x + WARP - 1) / WARP;
	x = warp_sum(x);
	__syncthreads(); /* an earlier call's parts have been read */
	if (lane == 0)
		part[warp] = x;
	__syncthreads();
	return warp_sum(lane < warps ? part[lane] : (T)0);
}
__device__ __forceinline__ float block_max(float x)
{
	__shared__ float part[WARP];
	int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = (blockDim.x + WARP - 1) / WARP;
	x = warp_max(x);
	__syncthreads();
	if (lane == 0)
		part[warp] = x;
	__syncthreads();
	return warp_max(lane < warps ? part[lane] : -INFINITY);
}

/* Sum of x of the threads before this one, and of all; whole numbers, in a block as above. */
template <class T> __device__ __forceinline__ T block_before(T x, T *all)
{
	__shared__ T part[WARP];
	int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = (blockDim.x + WARP - 1) / WARP;
	T sum = x, before = 0;
	for (int k = 1; k < WARP; k *= 2) {
		T other = __shfl_up_sync(0xffffffffu, sum, k);
		sum += lane >= k ? other : (T)0;
	}
	__syncthreads();
	if (lane == WARP - 1)
		part[warp] = sum;
	__syncthreads();
	*all = 0;
	for (int k = 0; k < warps; k++) {
		before += k < warp ? part[k] : (T)0;
		*all += part[k];
	}
	return before + sum - x;
}

#endif
