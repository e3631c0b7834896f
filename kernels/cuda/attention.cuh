/* What the kernels of attention share: where rows and heads lie, tiles in shared memory, products of tiles by
 * a warp, masks.
 *
 * A block of 4·R threads works on R queries times R keys at a time; scores never leave shared memory (Dao et
 * al., "FlashAttention", 2022). Its R/8 warps stand in R/16 groups of two: a group has 16 rows of a result,
 * a warp of it every second block of 16 columns. Elementwise, four neighbouring threads have a row. Sizes of
 * heads are filled up to multiples of 16 with zeros. Floor: kernels. */
#ifndef PENTAD_KERNELS_CUDA_ATTENTION_CUH
#define PENTAD_KERNELS_CUDA_ATTENTION_CUH

#include <mma.h>

#include "kernels/cuda/attention.h"
#include "kernels/cuda/device.cuh"

#ifdef __CUDACC__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL
#endif

#define ATTENTION_LOG2E 1.44269504088896340736f
#define ATTENTION_LN2 0.69314718055994530942f
enum { ATTENTION_MAX_SIZE = 256, TILE_ALIGN = 128 };

/* The rows of a tensor: of each sample as many stretches of `length` rows at consecutive positions. */
struct attention_rows {
	int32_t ranks, first, seq_length;
	int32_t samples, stretches, length;
};

/* Heads of `size` elements that lie side by side in the rows of a tensor from `column` on. */
struct attention_heads {
	void *data;
	int64_t row; /* elements of a whole row */
	int32_t column, size;
	bool aligned; /* every head of every row begins at a multiple of 16 bytes, and has whole ones */
	bool is_f32;  /* whatever the type of queries, keys and values */
};

/* One call: H query heads, G key-value heads. */
struct attention {
	struct attention_rows queries, keys;
	struct attention_heads q, k, v;
	int32_t heads, groups, first_head, window;
	float scale;
	const int32_t *begins;    /* NULL: every sample is one document */
	const int64_t *mask_keys; /* NULL: no dropout */
	uint32_t threshold, salt;
	float survivor; /* what is kept is multiplied by it; 1 without dropout */
};

struct attention attention_of(const union op_arg *arg, const struct tensor *qkv, const struct tensor *keys,
                              const struct tensor *begins);
struct attention attention_of_part(const union op_arg *arg, const struct tensor *q, const struct tensor *kv,
                                   const struct tensor *keys, const struct tensor *begins);
/* Heads of t[N, count·size]. */
struct attention_heads attention_heads_of(const struct tensor *t, int32_t column, int32_t size);
/* The same columns of another tensor of that shape: q's place in dqkv is that of dq. */
struct attention_heads attention_heads_in(const struct attention_heads *like, const struct tensor *t);
/* Fails unless the types are f32 or bf16, one for all, and the sizes are known to the kernels. */
int attention_check(enum op op, const struct attention *a, const struct tensor *q, const struct tensor *kv,
                    struct err *e);
/* Blocks of `each` rows that one head of all samples is cut into; no block reaches over a stretch's end. */
static inline int64_t attention_blocks(const struct attention_rows *r, int each)
{
	return (int64_t)r->samples * r->stretches * ((r->length + each - 1) / each);
}
/* Lets a kernel use so much shared memory; EXIT_UNAVAILABLE where a block of the device has less. */
int attention_allow(struct stream *s, const void *kernel, const char *name, size_t bytes, struct err *e);

/* Where stretch i of a sample begins: its position in the sample, its row in the tensor. */
__device__ __forceinline__ int32_t position_of(const struct attention_rows &r, int32_t i)
{
	return r.ranks <= 1 ? 0
	                    : context_position(r.seq_length, r.ranks, (r.first + i / 2) % r.ranks,
	                                       i % 2 * r.length);
}
__device__ __forceinline__ int64_t row_of(const struct attention_rows &r, int32_t sample, int32_t i)
{
	int32_t each = r.ranks > 1 ? 2 : 1; /* stretches that a rank has of a sample */
	return (((int64_t)(i / each) * r.samples + sample) * each + i % each) * r.length;
}

/* A block of rows within a stretch. */
struct row_block {
	int32_t sample, head, stretch, at, count;
	int32_t position; /* of its first row */
	int64_t row;      /* in the tensor */
};
__device__ __forceinline__ struct row_block row_block_at(const struct attention_rows &r, int32_t sample,
                                                         int32_t head, int32_t stretch, int32_t at,
                                                         int32_t most)
{
	int32_t left = r.length - at;
	struct row_block b = {sample, head, stretch, at, left < most ? left : most, 0, 0};
	b.position = position_of(r, stretch) + at;
	b.row = row_of(r, sample, stretch) + at;
	return b;
}
/* Block n of a head's rows for each of `heads` heads: those at one place stand side by side in the grid. With
 * `backwards` the last rows come first: causal queries at the end have most to do. */
__device__ __forceinline__ struct row_block row_block_of(const struct attention_rows &r, int32_t heads,
                                                         int32_t each, bool backwards)
{
	int32_t cut = (r.length + each - 1) / each, blocks = r.stretches * cut, side = heads * r.samples;
	int32_t n = (int32_t)(blockIdx.x / side), rest = (int32_t)(blockIdx.x % side);
	n = backwards ? blocks - 1 - n : n;
	return row_block_at(r, rest / heads, rest % heads, n / cut, n % cut * each, each);
}

/* What a query sees: keys at positions [first, t]; none where it is beyond its block's rows. */
struct query_row {
	int32_t t, first;
	uint64_t element; /* of the dropout mask, for the key at position 0 */
};
__device__ __forceinline__ struct query_row query_row_of(const struct attention &a, const struct row_block &b,
                                                         int32_t i)
{
	struct query_row q = {b.position + i, 0, 0};
	if (i >= b.count) {
		q.t = -1;
		return q;
	}
	if (a.window > 0 && q.t >= a.window)
		q.first = q.t - a.window + 1;
	if (a.begins && a.begins[b.row + i] > q.first)
		q.first = a.begins[b.row + i];
	q.element = ((uint64_t)(a.first_head + b.head) * a.queries.seq_length + q.t) * a.queries.seq_length;
	return q;
}
__device__ __forceinline__ bool sees_any(const struct query_row &q, const struct row_block &keys)
{
	return q.t >= keys.position && q.first < keys.position + keys.count;
}
__device__ __forceinline__ bool sees(const struct query_row &q, const struct row_block &keys, int32_t j)
{
	int32_t position = keys.position + j;
	return j < keys.count && position >= q.first && position <= q.t;
}

/* Keys of a stretch, or queries of one, that can matter: [begin, end), begin a multiple of `each`. `begins`
 * may leave out more. */
struct span {
	int32_t begin, end;
};
__device__ __forceinline__ struct span clamp_span(int32_t begin, int32_t end, int32_t length, int32_t each)
{
	begin = begin > 0 ? begin / each * each : 0;
	end = end < length ? end : length;
	struct span s = {begin, end > begin ? end : begin};
	return s;
}
__device__ __forceinline__ struct span keys_seen(const struct attention &a, const struct row_block &queries,
                                                 int32_t stretch, int32_t each)
{
	int32_t position = position_of(a.keys, stretch);
	int32_t first = a.window > 0 ? queries.position - a.window + 1 : 0;
	return clamp_span(first - position, queries.position + queries.count - position, a.keys.length, each);
}
__device__ __forceinline__ struct span queries_seeing(const struct attention &a, const struct row_block &keys,
                                                      int32_t stretch, int32_t each)
{
	int32_t position = position_of(a.queries, stretch), length = a.queries.length;
	int32_t end = a.window > 0 ? keys.position + keys.count - 1 + a.window - position : length;
	return clamp_span(keys.position - position, end, length, each);
}

/* Four neighbours of a row. */
template <class T> struct alignas(4 * sizeof(T)) quad {
	T x[4];
};

/* Which of four keys, from the element on, dropout keeps: 1 or 0. What it keeps is multiplied by `survivor`,
 * but where sums are in f32: weights in 16 bits are rounded without it. */
__device__ __forceinline__ quad<float> survivors(const struct attention &a, uint64_t mask_key,
                                                 uint64_t element)
{
	uint32_t word[8];
	quad<float> z;
	int at = (int)(element % 4);
	rng_philox(mask_key, element / 4, a.salt, word);
	if (at)
		rng_philox(mask_key, element / 4 + 1, a.salt, word + 4);
	UNROLL
	for (int c = 0; c < 4; c++) {
		/* constant indices, so that the words stay in registers */
		uint32_t w = at == 0 ? word[c] : at == 1 ? word[c + 1] : at == 2 ? word[c + 2] : word[c + 3];
		z.x[c] = w >= a.threshold ? 1.0f : 0.0f;
	}
	return z;
}

__host__ __device__ constexpr int padded(int size)
{
	return (size + 15) / 16 * 16;
}
/* Elements from row to row of a tile: 16 bytes more than it has, so that rows lie in other banks. */
template <class T> __host__ __device__ constexpr int tile_row(int size)
{
	return padded(size) + 16 / (int)sizeof(T);
}
/* The same for a tile of R x R scores, f32; with probabilities in their place, in elements of T. */
template <int R> __host__ __device__ constexpr int score_row()
{
	return R + 8;
}
template <class T, int R> __host__ __device__ constexpr int weight_row()
{
	return score_row<R>() * (int)(sizeof(float) / sizeof(T));
}
template <class T, int R> constexpr size_t tile_bytes(int size)
{
	return (size_t)R * tile_row<T>(size) * sizeof(T);
}
template <int R> constexpr size_t score_bytes()
{
	return (size_t)R * score_row<R>() * sizeof(float);
}

/* The next piece of a block's dynamic shared memory. */
template <class T> __device__ __forceinline__ T *take(unsigned char *&from, int count)
{
	T *piece = (T *)from;
	from += (size_t)count * sizeof(T);
	return piece;
}
__device__ __forceinline__ unsigned char *tiles_begin(unsigned char *raw)
{
	return (unsigned char *)(((uintptr_t)raw + TILE_ALIGN - 1) / TILE_ALIGN * TILE_ALIGN);
}

template <class T>
__device__ __forceinline__ T *head_at(const struct attention_heads &h, int64_t row, int32_t head)
{
	return (T *)h.data + row * h.row + h.column + (int64_t)head * h.size;
}

/* tile[padded rows][tile_row] <- one head of b's rows; zeros around it. What is behind is never read. */
template <class T>
__device__ void load_tile(T *tile, const struct attention_heads &h, const struct row_block &b, int32_t head)
{
	const T *from = head_at<T>(h, b.row, head);
	int row = tile_row<T>(h.size), each = h.aligned ? (int)pack<T>::N : 1, pieces = padded(h.size) / each;
	for (int i = (int)threadIdx.x; i < padded(b.count) * pieces; i += (int)blockDim.x) {
		int r = i / pieces, c = i % pieces * each;
		bool there = r < b.count && c < h.size;
		if (h.aligned) {
			pack<T> v = {};
			if (there)
				v = load_pack(from + r * h.row + c);
			store_pack(tile + r * row + c, v);
		} else {
			tile[r * row + c] = there ? from[r * h.row + c] : store<T>(0.0f);
		}
	}
}

/* How a matrix lies in memory. */
enum layout { BY_ROWS, BY_COLUMNS };
template <enum layout> struct wmma_layout {
	typedef nvcuda::wmma::row_major type;
};
template <> struct wmma_layout<BY_COLUMNS> {
	typedef nvcuda::wmma::col_major type;
};

/* A warp's products of 16-bit matrices: on tensor cores, sums of 16 x 16 in f32. */
template <class T> struct warp_math {
	typedef nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, 16, float> sum;

	static __device__ __forceinline__ void clear(sum &c)
	{
		nvcuda::wmma::fill_fragment(c, 0.0f);
	}
	/* c[i] += a[16][depth] b_i[depth][16] for i < count <= N, b_i `step` elements after b_i-1. */
	template <enum layout A, enum layout B, int N>
	static __device__ __forceinline__ void add_product(sum (&c)[N], int count, const T *a, int a_row,
	                                                   const T *b, int b_row, int step, int depth)
	{
		nvcuda::wmma::fragment<nvcuda::wmma::matrix_a, 16, 16, 16, T, typename wmma_layout<A>::type>
		        x;
		nvcuda::wmma::fragment<nvcuda::wmma::matrix_b, 16, 16, 16, T, typename wmma_layout<B>::type>
		        y;
		for (int k = 0; k < depth; k += 16) {
			nvcuda::wmma::load_matrix_sync(x, a + k * (A == BY_ROWS ? 1 : a_row), a_row);
			UNROLL
			for (int i = 0; i < N; i++) {
				if (i < count) {
					const T *from = b + i * step + k * (B == BY_ROWS ? b_row : 1);
					nvcuda::wmma::load_matrix_sync(y, from, b_row);
					nvcuda::wmma::mma_sync(c[i], x, y, c[i]);
				}
			}
		}
	}
	/* c *= factor[16][16]. Which element a lane has is the chip's secret, but the same for both. */
	static __device__ __forceinline__ void scale(sum &c, const float *factor)
	{
		sum f;
		nvcuda::wmma::load_matrix_sync(f, factor, 16, nvcuda::wmma::mem_row_major);
		UNROLL
		for (int i = 0; i < f.num_elements; i++)
			c.x[i] *= f.x[i];
	}
	static __device__ __forceinline__ void put(const sum &c, float *to, int row)
	{
		nvcuda::wmma::store_matrix_sync(to, c, row, nvcuda::wmma::mem_row_major);
	}
	static __device__ __forceinline__ void get(sum &c, const float *from)
	{
		nvcuda::wmma::load_matrix_sync(c, from, 16, nvcuda::wmma::mem_row_major);
	}
};

/* The same for f32, without tensor cores. Lane l has rows 2(l/4) and the next, columns 4(l%4) … and three
 * more. */
template <> struct warp_math<float> {
	struct sum {
		float x[2][4];
	};
	static __device__ __forceinline__ int lane_row()
	{
		return (int)threadIdx.x % WARP / 4 * 2;
	}
	static __device__ __forceinline__ int lane_column()
	{
		return (int)threadIdx.x % 4 * 4;
	}
	static __device__ __forceinline__ void clear(sum &c)
	{
		UNROLL
		for (int i = 0; i < 8; i++)
			c.x[i / 4][i % 4] = 0;
	}
	/* Rows of the lane, four steps of depth from k on. */
	template <enum layout A>
	static __device__ __forceinline__ void load_rows(float (&x)[2][4], const float *a, int a_row, int k)
	{
		UNROLL
		for (int r = 0; r < 2; r++) {
			if (A == BY_ROWS) {
				quad<float> v = *(const quad<float> *)(a + (lane_row() + r) * a_row + k);
				UNROLL
				for (int d = 0; d < 4; d++)
					x[r][d] = v.x[d];
			} else {
				UNROLL
				for (int d = 0; d < 4; d++)
					x[r][d] = a[(k + d) * a_row + lane_row() + r];
			}
		}
	}
	/* y[d][c]: the lane's columns, four steps of depth from k on. */
	template <enum layout B>
	static __device__ __forceinline__ void load_columns(float (&y)[4][4], const float *b, int b_row,
	                                                    int k)
	{
		UNROLL
		for (int i = 0; i < 4; i++) {
			const float *from = B == BY_ROWS ? b + (k + i) * b_row + lane_column()
			                                 : b + (lane_column() + i) * b_row + k;
			quad<float> v = *(const quad<float> *)from;
			UNROLL
			for (int j = 0; j < 4; j++) {
				if (B == BY_ROWS)
					y[i][j] = v.x[j];
				else
					y[j][i] = v.x[j];
			}
		}
	}
	template <enum layout A, enum layout B, int N>
	static __device__ __forceinline__ void add_product(sum (&c)[N], int count, const float *a, int a_row,
	                                                   const float *b, int b_row, int step, int depth)
	{
		for (int k = 0; k < depth; k += 4) {
			float x[2][4], y[4][4];
			load_rows<A>(x, a, a_row, k);
			UNROLL
			for (int i = 0; i < N; i++) {
				if (i < count) {
					load_columns<B>(y, b + i * step, b_row, k);
					UNROLL
					for (int j = 0; j < 32; j++)
						c[i].x[j / 4 % 2][j % 4] +=
						        x[j / 4 % 2][j / 8] * y[j / 8][j % 4];
				}
			}
		}
	}
	static __device__ __forceinline__ void scale(sum &c, const float *factor)
	{
		UNROLL
		for (int i = 0; i < 8; i++)
			c.x[i / 4][i % 4] *= factor[(lane_row() + i / 4) * 16];
	}
	static __device__ __forceinline__ void put(const sum &c, float *to, int row)
	{
		UNROLL
		for (int i = 0; i < 8; i++)
			to[(lane_row() + i / 4) * row + lane_column() + i % 4] = c.x[i / 4][i % 4];
	}
	static __device__ __forceinline__ void get(sum &c, const float *from)
	{
		UNROLL
		for (int i = 0; i < 8; i++)
			c.x[i / 4][i % 4] = from[(lane_row() + i / 4) * 16 + lane_column() + i % 4];
	}
};

/* A warp's place in the block. */
__device__ __forceinline__ int warp_group()
{
	return (int)threadIdx.x / WARP / 2;
}
__device__ __forceinline__ int warp_half()
{
	return (int)threadIdx.x / WARP % 2;
}
/* Blocks of 16 columns that the warp has of a head of `size`. */
__device__ __forceinline__ int warp_columns(int size)
{
	return (padded(size) / 16 - warp_half() + 1) / 2;
}

/* scores[R][R] <- a b', tiles of heads of one size, of which `rows` and `columns` rows count. */
template <class T, int R>
__device__ __forceinline__ void tile_scores(float *scores, const T *a, const T *b, int size, int rows,
                                            int columns)
{
	typename warp_math<T>::sum c[R / 32];
	int row = tile_row<T>(size), r = 16 * warp_group(), at = 16 * warp_half();
	int count = (padded(columns) - at + 16) / 32; /* blocks of columns that the warp has */
	if (r >= rows)
		return;
	UNROLL
	for (int i = 0; i < R / 32; i++)
		warp_math<T>::clear(c[i]);
	warp_math<T>::template add_product<BY_ROWS, BY_COLUMNS>(c, count, a + r * row, row, b + at * row, row,
	                                                        32 * row, padded(size));
	UNROLL
	for (int i = 0; i < R / 32; i++)
		warp_math<T>::put(c[i], scores + r * score_row<R>() + at + 32 * i, score_row<R>());
}

/* c += w b, or w' b where A is BY_COLUMNS: w R x R weights, b a tile of a head of `size`. `rows` rows of the
 * result count, `depth` of b. */
template <class T, int R, enum layout A, int N>
__device__ __forceinline__ void add_weighted(typename warp_math<T>::sum (&c)[N], const T *w, const T *b,
                                             int size, int rows, int depth)
{
	int r = 16 * warp_group(), row = tile_row<T>(size);
	if (r < rows)
		warp_math<T>::template add_product<A, BY_ROWS>(
		        c, warp_columns(size), w + (A == BY_ROWS ? r * weight_row<T, R>() : r),
		        weight_row<T, R>(), b + 16 * warp_half(), row, 32, padded(depth));
}

/* One head of b's rows <- the warps' sums times `factor`. `staging` is a tile of scores that nobody reads any
 * more. */
template <class T, int N>
__device__ void store_sums(const struct attention_heads &h, const struct row_block &b, int32_t head,
                           const typename warp_math<T>::sum (&c)[N], float factor, float *staging)
{
	int lane = (int)threadIdx.x % WARP, count = warp_columns(h.size);
	float *mine = staging + (int)threadIdx.x / WARP * 256;
	UNROLL
	for (int i = 0; i < N; i++) {
		if (i >= count)
			break;
		warp_math<T>::put(c[i], mine, 16);
		__syncwarp();
		int column = 16 * (2 * i + warp_half()) + lane % 16;
		for (int r = lane / 16; r < 16; r += 2) {
			int row = 16 * warp_group() + r;
			if (row >= b.count || column >= h.size)
				continue;
			float x = mine[r * 16 + lane % 16] * factor;
			if (h.is_f32)
				head_at<float>(h, b.row + row, head)[column] = x;
			else
				head_at<T>(h, b.row + row, head)[column] = store<T>(x);
		}
		__syncwarp();
	}
}

/* The four threads of a row. */
__device__ __forceinline__ float quad_sum(float x)
{
	x += __shfl_xor_sync(0xffffffffu, x, 1);
	return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
__device__ __forceinline__ float quad_max(float x)
{
	x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
	return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

#endif
