/* The language of kernels: qualifiers, where a thread stands, barriers and the exchange within a warp.
 * Blocks run one at a time, so what a block shares is simply static. */
#ifndef SIMT_DEVICE_H
#define SIMT_DEVICE_H

#include "vector_types.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __shared__ static
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
static constexpr int warpSize = 32;

/* The block's dynamic shared memory, which holds garbage when a block starts. */
void *simt_dynamic_shared(void);
/* Where in the source a thread waits: all that meet must stand at one place. */
struct simt_place {
	const char *what, *file;
	int line;
};
/* Waits for the whole block; how many threads came with a true predicate. */
int simt_block_barrier(simt_place place, bool predicate);
/* Waits for the lanes of `mask`; the caller must be among them. Copies `size` (at most 16) bytes of lane
 * `source` to `out`; a source of -1 copies those of all lanes of the mask, 16 bytes apart. */
void simt_warp_exchange(simt_place place, unsigned mask, int source, const void *in, size_t size, void *out);
/* The calling thread's number within its warp. */
int simt_lane(void);
[[noreturn]] void simt_kernel_fault(const char *sentence);

#define SIMT_AT const char *file = __builtin_FILE(), int line = __builtin_LINE()

static inline void __syncthreads(SIMT_AT)
{
	simt_block_barrier({"__syncthreads", file, line}, false);
}

static inline int __syncthreads_count(int predicate, SIMT_AT)
{
	return simt_block_barrier({"__syncthreads_count", file, line}, predicate != 0);
}

static inline int __syncthreads_or(int predicate, SIMT_AT)
{
	return simt_block_barrier({"__syncthreads_or", file, line}, predicate != 0) != 0;
}

static inline int __syncthreads_and(int predicate, SIMT_AT)
{
	return simt_block_barrier({"__syncthreads_and", file, line}, predicate == 0) == 0;
}

static inline void __syncwarp(unsigned mask = 0xffffffffu, SIMT_AT)
{
	int nothing = 0, also;
	simt_warp_exchange({"__syncwarp", file, line}, mask, simt_lane(), &nothing, sizeof nothing, &also);
}

template <typename T> inline T simt_shuffle(simt_place place, unsigned mask, T value, int source)
{
	static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 16, "no shuffle moves such a value");
	T out;
	simt_warp_exchange(place, mask, source, &value, sizeof value, &out);
	return out;
}

/* Lanes are cut into segments of `width`; a shuffle that would leave its segment keeps its own value. */
template <typename T> inline T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, SIMT_AT)
{
	int from = (simt_lane() & ~(width - 1)) | (source & (width - 1));
	return simt_shuffle({"__shfl_sync", file, line}, mask, value, from);
}

template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = warpSize, SIMT_AT)
{
	int lane = simt_lane(), from = lane ^ lanes;
	bool inside = from < ((lane & ~(width - 1)) + width);
	return simt_shuffle({"__shfl_xor_sync", file, line}, mask, value, inside ? from : lane);
}

template <typename T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, SIMT_AT)
{
	int lane = simt_lane(), from = lane + (int)delta;
	bool inside = from < (lane & ~(width - 1)) + width;
	return simt_shuffle({"__shfl_down_sync", file, line}, mask, value, inside ? from : lane);
}

template <typename T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, SIMT_AT)
{
	int lane = simt_lane(), from = lane - (int)delta;
	bool inside = from >= (lane & ~(width - 1));
	return simt_shuffle({"__shfl_up_sync", file, line}, mask, value, inside ? from : lane);
}

/* Folds the values of all lanes of the mask, lowest lane first. */
template <typename T, typename Fold>
inline T simt_warp_fold(simt_place place, unsigned mask, T value, Fold fold)
{
	struct alignas(16) {
		T value;
	} all[32];
	simt_warp_exchange(place, mask, -1, &value, sizeof value, all);
	int lane = __builtin_ctz(mask);
	T result = all[lane].value;
	while (++lane < 32) {
		if (mask >> lane & 1)
			result = fold(result, all[lane].value);
	}
	return result;
}

static inline unsigned __ballot_sync(unsigned mask, int predicate, SIMT_AT)
{
	unsigned bit = predicate ? 1u << simt_lane() : 0;
	return simt_warp_fold({"__ballot_sync", file, line}, mask, bit,
	                      [](unsigned a, unsigned b) { return a | b; });
}

static inline int __any_sync(unsigned mask, int predicate, SIMT_AT)
{
	return simt_warp_fold({"__any_sync", file, line}, mask, predicate != 0,
	                      [](int a, int b) { return a | b; });
}

static inline int __all_sync(unsigned mask, int predicate, SIMT_AT)
{
	return simt_warp_fold({"__all_sync", file, line}, mask, predicate != 0,
	                      [](int a, int b) { return a & b; });
}

/* CUDA promises no more than that the caller is in it. */
static inline unsigned __activemask(void)
{
	return 1u << simt_lane();
}

#define SIMT_REDUCE(T, name, a_and_b)                                                       \
	static inline T __reduce_##name##_sync(unsigned mask, T value, SIMT_AT)             \
	{                                                                                   \
		return simt_warp_fold({"__reduce_" #name "_sync", file, line}, mask, value, \
		                      [](T a, T b) -> T { return a_and_b; });               \
	}
SIMT_REDUCE(unsigned, add, a + b)
SIMT_REDUCE(unsigned, min, a < b ? a : b)
SIMT_REDUCE(unsigned, max, a < b ? b : a)
SIMT_REDUCE(unsigned, and, a &b)
SIMT_REDUCE(unsigned, or, a | b)
SIMT_REDUCE(unsigned, xor, a ^ b)
SIMT_REDUCE(int, add, (int)((unsigned)a + (unsigned)b))
SIMT_REDUCE(int, min, a < b ? a : b)
SIMT_REDUCE(int, max, a < b ? b : a)
#undef SIMT_REDUCE

/* One thread runs at a time, and a switch happens only at a barrier. */
static inline void __threadfence(void)
{
}

static inline void __threadfence_block(void)
{
}

static inline void __threadfence_system(void)
{
}

static inline void __nanosleep(unsigned)
{
}

[[noreturn]] static inline void __trap(void)
{
	simt_kernel_fault("__trap was called");
}

#include "simt_math.h"
#include "simt_memory.h"

#endif
