/* Rows of the vocabulary: the table's, and the loss over its columns. */
#include "kernels/cuda/rows.cuh"

/* Ids whose row of the table is here: [first, first + rows). */
struct table_part {
	int64_t first, rows;
};
static struct table_part part_of(const union op_arg *arg, const struct tensor *table)
{
	struct table_part p = {arg->embedding.first_row, table->dim[0]};
	return p;
}
/* The row of an id; p.rows where it is not here. */
__device__ __forceinline__ int64_t row_of(const struct table_part &p, int32_t id)
{
	int64_t row = id - p.first;
	return row >= 0 && row < p.rows ? row : p.rows;
}

template <class T, int N>
__global__ void embedding_kernel(struct table_part p, const T *table, const int32_t *ids, T *y, int64_t count,
                                 int64_t width)
{
	each_row(count, [&](int64_t n) {
		int64_t row = row_of(p, ids[n]);
		each_column<N>(width, [&](int64_t c) {
			elements<T, N> v;
#pragma unroll
			for (int k = 0; k < N; k++)
				v.x[k] = store<T>(0);
			if (row < p.rows)
				v = raw<N>(table + row * width + c);
			put(y + n * width + c, v);
		});
	});
}

template <class T>
static int embedding(struct stream *s, const union op_arg *arg, const struct tensor *in,
                     const struct tensor *out, struct err *e)
{
	int64_t rows = out[0].dim[0], width = tensor_row(&out[0]);
	return launch(s, "embedding", warp_rows(rows), e,
	              BY_PACK(T, width % pack<T>::N == 0, embedding_kernel), part_of(arg, &in[0]),
	              at<T>(&in[0]), at<int32_t>(&in[1]), at<T>(&out[0]), rows, width);
}

int cuda_embedding(struct stream *s, const union op_arg *arg, const struct tensor *in,
                   const struct tensor *out, struct err *e)
{
	int rc = type_check(OP_embedding, &in[0], e);
	if (!rc && in[0].dtype != out[0].dtype)
		rc = err_set(e, EXIT_INTERNAL, "cuda: embedding of %s from a table of %s; allowed: the same",
		             dtype_rows[out[0].dtype].name, dtype_rows[in[0].dtype].name);
	return rc ? rc : BY_TYPE(in[0].dtype, embedding)(s, arg, in, out, e);
}

/* embedding_bwd: tokens are sorted by their rows, those of one row by position (radix sort: counts of digits
 * in chunks of tokens, where each chunk's digits begin, and there each token behind the earlier ones of its
 * chunk). Runs of one row are then summed in tiles of the sorted tokens; a run that goes on over tiles leaves
 * partial sums that a second kernel adds in order. So a row's sum is the same in every run, and no row keeps
 * one block busy for long. */
enum { DIGIT_BITS = 9, DIGITS = 1 << DIGIT_BITS, CHUNK = DIGITS, SCAN_BLOCK = 1024, TILE = 32 };

struct sorted {
	uint32_t *row, *token;
};
struct sorting {
	int64_t count, chunks, tiles, width;
	struct sorted from, to;
	uint32_t *begins; /* [DIGITS][chunks] */
	float *partial;   /* [tiles][2][width]: of the run that came from before, of the one that goes on */
};

static __global__ void __launch_bounds__(CHUNK)
        number_kernel(struct table_part p, const int32_t *ids, struct sorting a)
{
	for (int64_t n = grid_first(); n < a.count; n += grid_step()) {
		a.from.row[n] = (uint32_t)row_of(p, ids[n]);
		a.from.token[n] = (uint32_t)n;
	}
}

static __global__ void __launch_bounds__(CHUNK) digits_kernel(struct sorting a, int shift)
{
	__shared__ uint32_t count[DIGITS];
	int64_t n = (int64_t)blockIdx.x * CHUNK + threadIdx.x;
	count[threadIdx.x] = 0;
	__syncthreads();
	if (n < a.count)
		atomicAdd(&count[a.from.row[n] >> shift & (DIGITS - 1)], 1u);
	__syncthreads();
	a.begins[threadIdx.x * a.chunks + blockIdx.x] = count[threadIdx.x];
}

/* The sum of this lane's and all earlier lanes' x. */
__device__ __forceinline__ uint32_t warp_running_sum(uint32_t x)
{
	for (int k = 1; k < WARP; k *= 2) {
		uint32_t before = __shfl_up_sync(0xffffffffu, x, k);
		x += (int)threadIdx.x % WARP >= k ? before : 0;
	}
	return x;
}

/* Counts become sums of all before them. One block; each warp has a stretch, WARP entries at a time. */
static __global__ void __launch_bounds__(SCAN_BLOCK) scan_kernel(uint32_t *count, int64_t entries)
{
	enum { WARPS = SCAN_BLOCK / WARP };
	__shared__ uint32_t sums[WARPS];
	int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
	int64_t steps = entries / WARP, end = steps * (warp + 1) / WARPS * WARP;
	int64_t first = steps * warp / WARPS * WARP;
	uint32_t sum = 0, before = 0;
#pragma unroll 8
	for (int64_t i = first; i < end; i += WARP)
		sum += count[i + lane];
	sums[warp] = warp_sum(sum);
	__syncthreads();
	for (int w = 0; w < warp; w++)
		before += sums[w];
	for (int64_t i = first; i < end; i += WARP) {
		uint32_t here = count[i + lane], upto = warp_running_sum(here);
		count[i + lane] = before + upto - here;
		before += __shfl_sync(0xffffffffu, upto, WARP - 1);
	}
}

static __global__ void __launch_bounds__(CHUNK) scatter_kernel(struct sorting a, int shift)
{
	__shared__ uint32_t digits[CHUNK];
	int64_t n = (int64_t)blockIdx.x * CHUNK + threadIdx.x;
	uint32_t row = n < a.count ? a.from.row[n] : 0, digit = row >> shift & (DIGITS - 1);
	digits[threadIdx.x] = digit;
	__syncthreads();
	if (n >= a.count)
		return;
	uint32_t to = a.begins[digit * a.chunks + blockIdx.x];
	for (unsigned j = 0; j < threadIdx.x; j++)
		to += digits[j] == digit;
	a.to.row[to] = row;
	a.to.token[to] = a.from.token[n];
}

/* Sorted rows of a tile, with one on each side: row[j + 1] is that of the j-th token. */
struct tile {
	uint32_t row[TILE + 2], token[TILE];
};
/* Returns how many tokens of the tile have their row here: the others come behind them. */
__device__ __forceinline__ int tile_read(struct tile *t, const struct table_part &p, const struct sorting &a)
{
	const uint32_t no_row = 0xffffffffu;
	int64_t first = (int64_t)blockIdx.x * TILE;
	int count = TILE;
	for (int j = threadIdx.x; j < TILE + 2; j += blockDim.x) {
		int64_t i = first + j - 1;
		t->row[j] = i >= 0 && i < a.count ? a.from.row[i] : no_row;
	}
	for (int j = threadIdx.x; j < TILE; j += blockDim.x)
		t->token[j] = first + j < a.count ? a.from.token[first + j] : 0;
	__syncthreads();
	while (count && t->row[count] >= p.rows)
		count--;
	return count;
}

template <int N> __device__ __forceinline__ void add_n(float *y, const float (&v)[N])
{
	float sum[N];
	load_n(y, sum);
#pragma unroll
	for (int k = 0; k < N; k++)
		sum[k] += v[k];
	store_n(y, sum);
}

/* A block has a tile and blockDim.x · N columns. */
template <class T, int N>
__global__ void __launch_bounds__(BLOCK)
        tile_kernel(struct table_part p, struct sorting a, const T *dy, float *dtable)
{
	enum { AHEAD = 4 };
	__shared__ struct tile t;
	int count = tile_read(&t, p, a);
	int64_t c = ((int64_t)blockIdx.y * blockDim.x + threadIdx.x) * N;
	float sum[N] = {};
	bool from_before = t.row[0] == t.row[1];
	for (int j = 0; j < count && c < a.width; j += AHEAD) {
		float v[AHEAD][N];
#pragma unroll
		for (int i = 0; i < AHEAD; i++)
			if (j + i < count)
				load_n(dy + t.token[j + i] * a.width + c, v[i]);
#pragma unroll
		for (int i = 0; i < AHEAD; i++) {
			if (j + i >= count)
				break;
			uint32_t row = t.row[j + i + 1];
			bool goes_on = t.row[j + i + 2] == row;
#pragma unroll
			for (int k = 0; k < N; k++)
				sum[k] += v[i][k];
			if (goes_on && j + i + 1 < count)
				continue;
			if (from_before || goes_on)
				store_n(a.partial + (blockIdx.x * 2 + !from_before) * a.width + c, sum);
			else
				add_n(dtable + row * a.width + c, sum);
			from_before = false;
#pragma unroll
			for (int k = 0; k < N; k++)
				sum[k] = 0;
		}
	}
}

/* The run that begins in this tile and goes on: its partial sums, tile after tile. */
template <int N>
__global__ void __launch_bounds__(BLOCK) join_kernel(struct table_part p, struct sorting a, float *dtable)
{
	__shared__ struct tile t;
	int count = tile_read(&t, p, a);
	int64_t c = ((int64_t)blockIdx.y * blockDim.x + threadIdx.x) * N, u = (int64_t)blockIdx.x + 1;
	uint32_t row = t.row[count];
	bool begins = t.row[1] != row || t.row[0] != row, goes_on = t.row[count + 1] == row;
	if (!count || !begins || !goes_on || c >= a.width)
		return;
	float sum[N], v[N];
	load_n(a.partial + (blockIdx.x * 2 + 1) * a.width + c, sum);
	for (; u < a.tiles && a.from.row[u * TILE] == row; u++) {
		load_n(a.partial + u * 2 * a.width + c, v);
#pragma unroll
		for (int k = 0; k < N; k++)
			sum[k] += v[k];
	}
	add_n(dtable + row * a.width + c, sum);
}

/* The next part of scratch, 256-byte-aligned; where there is no scratch, only counted. */
static void *next_part(char *scratch, size_t *end, int64_t bytes)
{
	void *part = scratch ? scratch + *end : NULL;
	*end += ((size_t)bytes + 255) / 256 * 256;
	return part;
}

/* Lays the parts of scratch out; returns its bytes. */
static size_t sorting_lay_out(struct sorting *a, const struct tensor *dy, char *scratch)
{
	size_t end = 0;
	a->count = dy->dim[0];
	a->width = tensor_row(dy);
	a->chunks = (a->count + CHUNK - 1) / CHUNK;
	a->tiles = (a->count + TILE - 1) / TILE;
	uint32_t **const lists[] = {&a->from.row, &a->from.token, &a->to.row, &a->to.token};
	for (int i = 0; i < 4; i++)
		*lists[i] = (uint32_t *)next_part(scratch, &end, a->count * (int64_t)sizeof(uint32_t));
	a->begins = (uint32_t *)next_part(scratch, &end, DIGITS * a->chunks * (int64_t)sizeof(uint32_t));
	a->partial = (float *)next_part(scratch, &end, a->tiles * 2 * a->width * (int64_t)sizeof(float));
	return end;
}

size_t cuda_space_embedding_bwd(struct stream *s, const struct kernel_call *call)
{
	struct sorting a;
	(void)s;
	return sorting_lay_out(&a, &call->in[0], NULL);
}

/* Leaves the tokens in a->from by row, those whose row is not here last. */
static int sort_tokens(struct stream *s, struct table_part p, const int32_t *ids, struct sorting *a,
                       struct err *e)
{
	const char *name = "embedding_bwd";
	struct shape chunks = {dim3((unsigned)a->chunks), dim3(CHUNK), 0},
	             scan = {dim3(1), dim3(SCAN_BLOCK), 0};
	int rc = launch(s, name, chunks, e, number_kernel, p, ids, *a);
	for (int shift = 0; !rc && p.rows >> shift; shift += DIGIT_BITS) {
		rc = launch(s, name, chunks, e, digits_kernel, *a, shift);
		rc = rc ? rc : launch(s, name, scan, e, scan_kernel, a->begins, DIGITS * a->chunks);
		rc = rc ? rc : launch(s, name, chunks, e, scatter_kernel, *a, shift);
		struct sorted swap = a->from;
		a->from = a->to;
		a->to = swap;
	}
	return rc;
}

template <class T, int N>
static int sum_runs(struct stream *s, struct table_part p, const struct sorting *a, const T *dy,
                    float *dtable, struct err *e)
{
	int64_t packs = a->width / N, threads = row_threads(packs);
	struct shape tiles = {dim3((unsigned)a->tiles, (unsigned)((packs + threads - 1) / threads)),
	                      dim3((unsigned)threads), 0};
	int rc = launch(s, "embedding_bwd", tiles, e, tile_kernel<T, N>, p, *a, dy, dtable);
	return rc ? rc : launch(s, "embedding_bwd", tiles, e, join_kernel<N>, p, *a, dtable);
}

template <class T>
static int embedding_bwd(struct stream *s, const union op_arg *arg, const struct tensor *in,
                         const struct tensor *out, struct err *e)
{
	struct sorting a;
	struct table_part p = part_of(arg, &out[0]);
	char *scratch = (char *)cuda_scratch(s, sorting_lay_out(&a, &in[0], NULL), e);
	if (!scratch)
		return e->code;
	sorting_lay_out(&a, &in[0], scratch);
	if (!out[0].acc)
		CUDA_TRY(e, cudaMemsetAsync(out[0].data, 0, (size_t)tensor_bytes(&out[0]), s->compute));
	int rc = sort_tokens(s, p, at<int32_t>(&in[1]), &a, e);
	return rc ? rc
	          : (a.width % pack<T>::N ? sum_runs<T, 1> : sum_runs<T, pack<T>::N>)(s, p, &a, at<T>(&in[0]),
	                                                                              at<float>(&out[0]), e);
}

int cuda_embedding_bwd(struct stream *s, const union op_arg *arg, const struct tensor *in,
                       const struct tensor *out, struct err *e)
{
	int rc = type_check(OP_embedding_bwd, &in[0], e);
	return rc ? rc : BY_TYPE(in[0].dtype, embedding_bwd)(s, arg, in, out, e);
}

/* Logits [rows, width], of which the first `columns` count; column 0 is number `first` of the whole. */
struct logits {
	int64_t rows, width, columns, first;
};
static struct logits logits_of(const union op_arg *arg, const struct tensor *logits)
{
	int64_t width = tensor_row(logits), first = arg->cross_entropy.first_column;
	int64_t columns = arg->cross_entropy.vocab_size - first;
	struct logits l = {logits->dim[0], width, columns < 0 ? 0 : columns < width ? columns : width, first};
	return l;
}

/* What exponents are taken from: the largest, but not -inf, so that exp(-inf - it) is 0. */
__device__ __forceinline__ float finite_top(float top)
{
	return top > -INFINITY ? top : 0;
}

/* log of the sum of exp over a row's n elements, by a block that reads them once: each thread keeps the
 * largest so far and the sum of exponents from there (Milakov & Gimelshein 2018). */
template <class T, int N> __device__ __forceinline__ float row_lse(const T *x, int64_t n)
{
	float top = -INFINITY, sum = 0, v[N];
	auto take = [&] {
		float higher = top, more = 0;
#pragma unroll
		for (int k = 0; k < N; k++)
			higher = fmaxf(higher, v[k]);
		float from = finite_top(higher);
#pragma unroll
		for (int k = 0; k < N; k++)
			more += __expf(v[k] - from);
		sum = sum * __expf(top - from) + more;
		top = higher;
	};
	int64_t c = (int64_t)threadIdx.x * N, step = (int64_t)blockDim.x * N;
#pragma unroll 4
	for (; c + N <= n; c += step) {
		load_n(x + c, v);
		take();
	}
	if (c < n) {
		load_n(x + c, n - c, v);
#pragma unroll
		for (int k = 0; k < N; k++)
			v[k] = k < n - c ? v[k] : -INFINITY;
		take();
	}
	float all = block_max(top), from = finite_top(all);
	sum = block_sum(sum * __expf(top - from));
	return from + logf(sum);
}

/* The logit of a row's target; 0 where there is none, or not here. */
template <class T>
__device__ __forceinline__ float target_logit(const struct logits &l, const T *row, int32_t target)
{
	int64_t c = target - l.first;
	return target >= 0 && c >= 0 && c < l.columns ? load(row[c]) : 0;
}

template <class T, int N>
__global__ void __launch_bounds__(BLOCK)
        stats_kernel(struct logits l, const T *x, const int32_t *targets, float *stats)
{
	for (int64_t n = blockIdx.x; n < l.rows; n += gridDim.x) {
		const T *row = x + n * l.width;
		float lse = row_lse<T, N>(row, l.columns);
		if (threadIdx.x)
			continue;
		stats[2 * n] = lse;
		stats[2 * n + 1] = target_logit(l, row, targets[n]);
	}
}

static struct shape logits_shape(const struct logits *l, int n)
{
	return block_rows(l->rows, row_threads((l->width + n - 1) / n));
}

template <class T>
static int logit_stats(struct stream *s, const union op_arg *arg, const struct tensor *in,
                       const struct tensor *out, struct err *e)
{
	struct logits l = logits_of(arg, &in[0]);
	bool whole = l.width % pack<T>::N == 0;
	return launch(s, "logit_stats", logits_shape(&l, whole ? pack<T>::N : 1), e,
	              BY_PACK(T, whole, stats_kernel), l, at<T>(&in[0]), at<int32_t>(&in[1]),
	              at<float>(&out[0]));
}

int cuda_logit_stats(struct stream *s, const union op_arg *arg, const struct tensor *in,
                     const struct tensor *out, struct err *e)
{
	int rc = type_check(OP_logit_stats, &in[0], e);
	return rc ? rc : BY_TYPE(in[0].dtype, logit_stats)(s, arg, in, out, e);
}

template <class T, int N>
__global__ void __launch_bounds__(BLOCK)
        loss_kernel(struct logits l, const T *x, const int32_t *targets, float *lse, float *row_loss)
{
	for (int64_t n = blockIdx.x; n < l.rows; n += gridDim.x) {
		const T *row = x + n * l.width;
		float of_row = row_lse<T, N>(row, l.columns);
		if (threadIdx.x)
			continue;
		lse[n] = of_row;
		row_loss[n] = targets[n] < 0 ? 0 : of_row - target_logit(l, row, targets[n]);
	}
}

/* The same from the statistics of all shards of the columns, stats[shards][rows][2]: one thread a row. */
static __global__ void shards_kernel(const float *stats, int64_t shards, int64_t rows, const int32_t *targets,
                                     float *lse, float *row_loss)
{
	for (int64_t n = grid_first(); n < rows; n += grid_step()) {
		const float *shard = stats + 2 * n;
		float top = -INFINITY, sum = 0, logit = 0;
		for (int64_t r = 0; r < shards; r++)
			top = fmaxf(top, shard[2 * r * rows]);
		top = finite_top(top);
		for (int64_t r = 0; r < shards; r++) {
			sum += expf(shard[2 * r * rows] - top);
			logit += shard[2 * r * rows + 1];
		}
		float of_row = top + logf(sum);
		lse[n] = of_row;
		row_loss[n] = targets[n] < 0 ? 0 : of_row - logit;
	}
}

enum { LOSS_BLOCK = 1024 };
static __global__ void __launch_bounds__(LOSS_BLOCK)
        loss_sum_kernel(const float *row_loss, int64_t rows, double *loss, bool adds)
{
	double sum = 0;
	for (int64_t n = threadIdx.x; n < rows; n += LOSS_BLOCK)
		sum += row_loss[n];
	sum = block_sum(sum);
	if (threadIdx.x == 0)
		*loss = adds ? *loss + sum : sum;
}

template <class T>
static int row_losses(struct stream *s, const union op_arg *arg, const struct tensor *in,
                      const struct tensor *out, struct err *e)
{
	struct logits l = logits_of(arg, &in[0]);
	bool whole = l.width % pack<T>::N == 0;
	return launch(s, "cross_entropy", logits_shape(&l, whole ? pack<T>::N : 1), e,
	              BY_PACK(T, whole, loss_kernel), l, at<T>(&in[0]), at<int32_t>(&in[1]),
	              at<float>(&out[1]), at<float>(&out[2]));
}

int cuda_cross_entropy(struct stream *s, const union op_arg *arg, const struct tensor *in,
                       const struct tensor *out, struct err *e)
{
	int64_t rows = tensor_count(&in[1]);
	struct shape last = {dim3(1), dim3(LOSS_BLOCK), 0};
	int rc = type_check(OP_cross_entropy, &in[0], e);
	if (!rc && in[2].data)
		rc = launch(s, "cross_entropy", flat(rows), e, shards_kernel, at<float>(&in[2]),
		            in[2].dim[0] / rows, rows, at<int32_t>(&in[1]), at<float>(&out[1]),
		            at<float>(&out[2]));
	else if (!rc)
		rc = BY_TYPE(in[0].dtype, row_losses)(s, arg, in, out, e);
	return rc ? rc
	          : launch(s, "cross_entropy", last, e, loss_sum_kernel, at<float>(&out[2]), rows,
	                   at<double>(&out[0]), (bool)out[0].acc);
}

/* dx may be x. */
template <class T, int N>
__global__ void __launch_bounds__(BLOCK) loss_bwd_kernel(struct logits l, const T *x, const int32_t *targets,
                                                         const float *lse, const float *scale, T *dx)
{
	for (int64_t n = blockIdx.x; n < l.rows; n += gridDim.x) {
		float of_row = lse[n], by = *scale;
		int64_t target = targets[n] - l.first, columns = targets[n] < 0 ? 0 : l.columns;
		for (int64_t c = (int64_t)threadIdx.x * N; c < l.width; c += (int64_t)blockDim.x * N) {
			float v[N];
			int64_t hit = target - c, left = columns - c;
			int one = hit >= 0 && hit < N ? (int)hit : -1, count = left < N ? (int)left : N;
			load_n(x + n * l.width + c, v);
#pragma unroll
			for (int k = 0; k < N; k++) {
				float p = __expf(v[k] - of_row) - (k == one ? 1.0f : 0.0f);
				v[k] = k < count ? by * p : 0;
			}
			store_n(dx + n * l.width + c, v);
		}
	}
}

template <class T>
static int cross_entropy_bwd(struct stream *s, const union op_arg *arg, const struct tensor *in,
                             const struct tensor *out, struct err *e)
{
	struct logits l = logits_of(arg, &in[0]);
	bool whole = l.width % pack<T>::N == 0;
	return launch(s, "cross_entropy_bwd", logits_shape(&l, whole ? pack<T>::N : 1), e,
	              BY_PACK(T, whole, loss_bwd_kernel), l, at<T>(&in[0]), at<int32_t>(&in[1]),
	              at<float>(&in[2]), at<float>(&in[3]), at<T>(&out[0]));
}

int cuda_cross_entropy_bwd(struct stream *s, const union op_arg *arg, const struct tensor *in,
                           const struct tensor *out, struct err *e)
{
	int rc = type_check(OP_cross_entropy_bwd, &in[0], e);
	return rc ? rc : BY_TYPE(in[0].dtype, cross_entropy_bwd)(s, arg, in, out, e);
}
