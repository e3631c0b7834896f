/* What kernels that are bound by memory share: several elements a thread at once, of flat tensors or of rows.
 * Floor: kernels. */
#ifndef PENTAD_KERNELS_CUDA_ROWS_CUH
#define PENTAD_KERNELS_CUDA_ROWS_CUH

#include <string.h>

#include "kernels/cuda/device.cuh"

/* What one access moves. */
template <int BYTES> struct unit;
template <> struct unit<2> {
	typedef unsigned short type;
};
template <> struct unit<4> {
	typedef unsigned int type;
};
template <> struct unit<8> {
	typedef uint2 type;
};
template <> struct unit<16> {
	typedef uint4 type;
};

/* N elements that move in accesses of 16 bytes, or in one that is shorter, to and from device memory. Left to
 * itself the compiler takes them apart where it unrolls loops, so the store is one that it cannot. */
template <class T, int N> struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) elements {
	T x[N];
	typedef typename unit<N * sizeof(T) < 16 ? N * sizeof(T) : 16>::type access;
	enum { ACCESSES = N * sizeof(T) / sizeof(access) };
};
template <int N, class T> __device__ __forceinline__ elements<T, N> raw(const T *p)
{
	typedef typename elements<T, N>::access access;
	elements<T, N> v;
#pragma unroll
	for (int k = 0; k < elements<T, N>::ACCESSES; k++) {
		access a = ((const access *)p)[k];
		memcpy((char *)&v + k * sizeof a, &a, sizeof a);
	}
	return v;
}
template <class T, int N> __device__ __forceinline__ void put(T *p, const elements<T, N> &v)
{
	typedef typename elements<T, N>::access access;
#pragma unroll
	for (int k = 0; k < elements<T, N>::ACCESSES; k++) {
		access a;
		memcpy(&a, (const char *)&v + k * sizeof a, sizeof a);
		__stwb((access *)p + k, a);
	}
}
template <class T, int N> __device__ __forceinline__ void widen(const elements<T, N> &v, float (&x)[N])
{
#pragma unroll
	for (int k = 0; k < N; k++)
		x[k] = load(v.x[k]);
}
/* N elements from p on, p aligned to them, as f32 and back. */
template <int N, class T> __device__ __forceinline__ void load_n(const T *p, float (&x)[N])
{
	widen(raw<N>(p), x);
}
template <int N, class T> __device__ __forceinline__ void store_n(T *p, const float (&x)[N])
{
	elements<T, N> v;
#pragma unroll
	for (int k = 0; k < N; k++)
		v.x[k] = store<T>(x[k]);
	put(p, v);
}
/* The same where only n elements are left: those behind are 0, and are not written. */
template <int N, class T> __device__ __forceinline__ void load_n(const T *p, int64_t n, float (&x)[N])
{
	if (n >= N) {
		load_n(p, x);
		return;
	}
#pragma unroll
	for (int k = 0; k < N; k++)
		x[k] = k < n ? load(p[k]) : 0;
}
template <int N, class T> __device__ __forceinline__ void store_n(T *p, int64_t n, const float (&x)[N])
{
	if (n >= N) {
		store_n(p, x);
		return;
	}
#pragma unroll
	for (int k = 0; k < N; k++)
		if (k < n)
			p[k] = store<T>(x[k]);
}

/* The instance for packs of T, or where rows are no whole packs the one for single elements:
 * BY_PACK(T, width % pack<T>::N == 0, add_kernel). */
#define BY_PACK(T, whole, kernel) ((whole) ? kernel<T, pack<T>::N> : kernel<T, 1>)
/* The instance for a pair of types. */
#define BY_TYPES(a, b, function)                                                                            \
	by_type((enum dtype)(a),                                                                            \
	        by_type((enum dtype)(b), function<float, float>, function<float, bf16>,                     \
	                function<float, f16>),                                                              \
	        by_type((enum dtype)(b), function<bf16, float>, function<bf16, bf16>, function<bf16, f16>), \
	        by_type((enum dtype)(b), function<f16, float>, function<f16, bf16>, function<f16, f16>))

/* f(i, n) for every N elements of `count` from i on, of which n are left. Grid: flat(count, N). */
template <int N, class F> __device__ __forceinline__ void each_pack(int64_t count, F f)
{
	for (int64_t i = grid_first() * N; i < count; i += grid_step() * N)
		f(i, count - i);
}

/* One warp a row: blocks of BLOCK / WARP rows. */
static inline struct shape warp_rows(int64_t rows)
{
	return flat(rows * WARP, 1, 1 << 16);
}
template <class F> __device__ __forceinline__ void each_row(int64_t rows, F f)
{
	int64_t warps = grid_step() / WARP;
	for (int64_t row = grid_first() / WARP; row < rows; row += warps)
		f(row);
}
/* f(c) for every N columns of a warp's row that are this lane's. */
template <int N, class F> __device__ __forceinline__ void each_column(int64_t width, F f)
{
	for (int64_t c = (int64_t)(threadIdx.x % WARP) * N; c < width; c += WARP * N)
		f(c);
}

/* Threads for a block that works on one row of so many items: whole warps. */
static inline int row_threads(int64_t items)
{
	int64_t warps = (items + WARP - 1) / WARP, most = BLOCK / WARP;
	return (int)(warps < 1 ? 1 : warps < most ? warps : most) * WARP;
}
/* One block a row: blocks go on by gridDim.x. */
static inline struct shape block_rows(int64_t rows, int threads)
{
	struct shape s = {dim3((unsigned)(rows < 1 << 20 ? rows : 1 << 20)), dim3((unsigned)threads), 0};
	return s;
}

#endif
