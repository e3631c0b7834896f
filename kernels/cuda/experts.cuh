/* What the kernels of routers, dispatch and experts share. Floor: kernels. */
#ifndef PENTAD_KERNELS_CUDA_EXPERTS_CUH
#define PENTAD_KERNELS_CUDA_EXPERTS_CUH

#include "kernels/cuda/rows.cuh"
#include "op/experts.h"

/* Shared memory that a kernel asks for at most: the rest of 48 KiB is for its reductions. */
enum { EXPERTS_MAX = 4096, SHARED_MOST = 40 << 10 };

static inline int experts_check(enum op op, int64_t experts, struct err *e)
{
	if (experts >= 1 && experts <= EXPERTS_MAX)
		return 0;
	return err_set(e, EXIT_INTERNAL, "cuda: %s of %lld experts; 1 to %d are allowed", op_rows[op].name,
	               (long long)experts, EXPERTS_MAX);
}

/* A warp a row, as warp_rows, where each warp needs `bytes` of shared memory. */
static inline struct shape warp_rows_with(int64_t rows, size_t bytes, int64_t most = 1 << 16)
{
	int each = BLOCK / WARP;
	while (each > 1 && each * bytes > SHARED_MOST)
		each /= 2;
	int64_t blocks = (rows + each - 1) / each;
	struct shape s = {dim3((unsigned)(blocks < 1      ? 1
	                                  : blocks < most ? blocks
	                                                  : most)),
	                  dim3(each * WARP), each * bytes};
	return s;
}
/* Larger for a larger x. What is not a number is the largest, zeros are equal; 0 is below all. */
__device__ __forceinline__ uint32_t order_key(float x)
{
	uint32_t bits = __float_as_uint(x);
	if (isnan(x))
		return 0xfffffffeu;
	if (x == 0)
		return 0x80000000u;
	return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ bool is_among(int32_t index, int64_t n)
{
	return index >= 0 && index < n;
}

/* Rows that are only moved go in the largest units that divide them: BY_UNIT(row_bytes, move_by)(…). */
#define BY_UNIT(row_bytes, function) \
	by_unit((row_bytes), function<uint4>, function<uint32_t>, function<uint16_t>)
template <class F> static inline F *by_unit(int64_t row_bytes, F *large, F *middle, F *small)
{
	return row_bytes % 16 == 0 ? large : row_bytes % 4 == 0 ? middle : small;
}
/* A warp moves a row of n units; NULL: zeros. */
template <class U>
__device__ __forceinline__ void move_row(const U *__restrict__ from, U *__restrict__ to, int64_t n)
{
	const U zero = {};
#pragma unroll 4
	for (int64_t i = threadIdx.x % WARP; i < n; i += WARP)
		to[i] = from ? from[i] : zero;
}

#endif
