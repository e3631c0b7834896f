/* Sums over rows that do not depend on scheduling: rows are cut into parts by the shape alone, each part has
 * partial sums of its own in scratch, and a second kernel adds them in a fixed order. Floor: kernels. */
#ifndef PENTAD_KERNELS_CUDA_FOLD_CUH
#define PENTAD_KERNELS_CUDA_FOLD_CUH

#include "kernels/cuda/rows.cuh"

enum {
	FOLD_SUMS = 2, /* of one kernel at most */
	FOLD_BLOCK = 1024,
	FOLD_GROUPS = FOLD_BLOCK / WARP,
	COLUMN_GROUPS = BLOCK / WARP
};

/* Where sums of `width` columns go, and whether they are added there. */
struct fold_outputs {
	float *y[FOLD_SUMS];
	bool adds[FOLD_SUMS];
};

/* partial[parts][sums][width], sum blockIdx.y; a warp adds every FOLD_GROUPS-th part of WARP columns. */
static __global__ void __launch_bounds__(FOLD_BLOCK)
        fold_kernel(const float *partial, int64_t parts, int64_t width, struct fold_outputs out)
{
	__shared__ float sums[FOLD_GROUPS][WARP];
	int lane = threadIdx.x % WARP, group = threadIdx.x / WARP;
	int64_t c = (int64_t)blockIdx.x * WARP + lane;
	float sum = 0;
	if (c < width)
#pragma unroll 8
		for (int64_t p = group; p < parts; p += FOLD_GROUPS)
			sum += partial[(p * gridDim.y + blockIdx.y) * width + c];
	sums[group][lane] = sum;
	__syncthreads();
	if (group || c >= width)
		return;
	for (int g = 1; g < FOLD_GROUPS; g++)
		sum += sums[g][lane];
	float *y = (blockIdx.y ? out.y[1] : out.y[0]) + c;
	*y = (blockIdx.y ? out.adds[1] : out.adds[0]) ? *y + sum : sum;
}

/* out[0], … out[sums-1] (f32, acc) <- partial[parts][sums][width] */
static inline int fold(struct stream *s, const char *name, const float *partial, int64_t parts, int sums,
                       int64_t width, const struct tensor *out, struct err *e)
{
	struct fold_outputs to = {};
	struct shape shape = {dim3((unsigned)((width + WARP - 1) / WARP), (unsigned)sums), dim3(FOLD_BLOCK),
	                      0};
	for (int i = 0; i < sums; i++) {
		to.y[i] = at<float>(&out[i]);
		to.adds[i] = out[i].acc;
	}
	return launch(s, name, shape, e, fold_kernel, partial, parts, width, to);
}

/* Sums of columns: of N columns a lane, in parts of rows. */
struct column_parts {
	int64_t rows, width, groups, parts;
};
static inline struct column_parts column_parts_of(int64_t rows, int64_t width, int n)
{
	int64_t groups = (width + WARP * n - 1) / (WARP * n);
	int64_t parts = 1056 / groups, most = (rows + 4 * COLUMN_GROUPS - 1) / (4 * COLUMN_GROUPS);
	parts = parts < most ? parts : most;
	struct column_parts p = {rows, width, groups, parts > 1 ? parts : 1};
	return p;
}
static inline size_t column_parts_bytes(const struct column_parts *p, int sums)
{
	return (size_t)(p->parts * sums * p->width) * sizeof(float);
}

/* partial[parts][S][width] <- sums over rows n of what term(n, c, v) puts into v[S][N] for columns from c on.
 */
template <int N, int S, class F>
__global__ void __launch_bounds__(BLOCK) column_kernel(struct column_parts p, F term, float *partial)
{
	__shared__ float sums[COLUMN_GROUPS][WARP * N];
	int lane = threadIdx.x % WARP, group = threadIdx.x / WARP;
	int64_t first = (int64_t)blockIdx.x * WARP * N, c = first + lane * N, part = blockIdx.y;
	int64_t end = c < p.width ? p.rows * (part + 1) / p.parts : 0;
	float sum[S][N] = {};
#pragma unroll 4
	for (int64_t n = p.rows * part / p.parts + group; n < end; n += COLUMN_GROUPS) {
		float v[S][N];
		term(n, c, v);
#pragma unroll
		for (int k = 0; k < S * N; k++)
			sum[k / N][k % N] += v[k / N][k % N];
	}
	for (int i = 0; i < S; i++) {
#pragma unroll
		for (int k = 0; k < N; k++)
			sums[group][lane * N + k] = sum[i][k];
		__syncthreads();
		for (int64_t k = threadIdx.x; k < WARP * N && first + k < p.width; k += BLOCK) {
			float all = 0;
			for (int g = 0; g < COLUMN_GROUPS; g++)
				all += sums[g][k];
			partial[(part * S + i) * p.width + first + k] = all;
		}
		__syncthreads();
	}
}
template <int N, int S, class F>
static int column_sums(struct stream *s, const char *name, const struct column_parts *p, F term,
                       float *partial, struct err *e)
{
	struct shape shape = {dim3((unsigned)p->groups, (unsigned)p->parts), dim3(BLOCK), 0};
	return launch(s, name, shape, e, column_kernel<N, S, F>, *p, term, partial);
}

#endif
