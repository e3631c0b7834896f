/* attention and attention_part: a block has R queries of one head and goes through the keys they see, R at a
 * time, with a running maximum and sum of every row. */
#include "kernels/cuda/attention.cuh"

static struct attention_rows rows_of(const union op_arg *arg, struct context context, int32_t rows)
{
	int32_t length = arg->attention.seq_length;
	struct attention_rows r = {context.ranks, context.first, length, 0, 1, length};
	if (context.ranks > 1) {
		r.stretches = 2 * context.count;
		r.length = length / (2 * context.ranks);
	}
	r.samples = r.length ? rows / (r.stretches * r.length) : 0;
	return r;
}

static struct attention_heads heads_at(const struct tensor *t, int64_t row, int32_t column, int32_t size)
{
	int32_t each = 16 / dtype_rows[t->dtype].bytes;
	bool aligned = row % each == 0 && column % each == 0 && size % each == 0;
	struct attention_heads h = {t->data, row, column, size, aligned, t->dtype == DT_f32};
	return h;
}

struct attention_heads attention_heads_of(const struct tensor *t, int32_t column, int32_t size)
{
	return heads_at(t, tensor_row(t), column, size);
}

struct attention_heads attention_heads_in(const struct attention_heads *like, const struct tensor *t)
{
	return attention_heads_of(t, like->column, like->size);
}

/* Keys and values begin at `column` of kv's rows. */
static struct attention attention_on(const union op_arg *arg, const struct tensor *q, const struct tensor *kv,
                                     struct context keys, int32_t column)
{
	struct attention a = {};
	int32_t size = arg->attention.head_dim;
	a.heads = arg->attention.heads;
	a.groups = arg->attention.groups;
	a.first_head = arg->attention.first_head;
	a.window = arg->attention.window < arg->attention.seq_length ? arg->attention.window : 0;
	a.scale = arg->attention.scale;
	a.queries = rows_of(arg, arg->attention.queries, q->dim[0]);
	a.keys = rows_of(arg, keys, kv->dim[0]);
	a.q = attention_heads_of(q, 0, size);
	a.k = attention_heads_of(kv, column, size);
	a.v = attention_heads_of(kv, column + a.groups * size, attention_value_dim(arg));
	return a;
}

static void set_masks(struct attention *a, const union op_arg *arg, const struct tensor *keys,
                      const struct tensor *begins)
{
	a->begins = (const int32_t *)begins->data;
	if (arg->attention.dropout > 0)
		a->mask_keys = (const int64_t *)keys->data;
	a->threshold = mask_threshold(arg->attention.dropout);
	a->salt = arg->attention.salt;
	a->survivor = a->mask_keys ? mask_scale(arg->attention.dropout) : 1;
}

struct attention attention_of(const union op_arg *arg, const struct tensor *qkv, const struct tensor *keys,
                              const struct tensor *begins)
{
	int32_t column = arg->attention.heads * arg->attention.head_dim;
	struct attention a = attention_on(arg, qkv, qkv, arg->attention.queries, column);
	set_masks(&a, arg, keys, begins);
	return a;
}

struct attention attention_of_part(const union op_arg *arg, const struct tensor *q, const struct tensor *kv,
                                   const struct tensor *keys, const struct tensor *begins)
{
	struct attention a = attention_on(arg, q, kv, arg->attention.rows, 0);
	set_masks(&a, arg, keys, begins);
	return a;
}

int attention_check(enum op op, const struct attention *a, const struct tensor *q, const struct tensor *kv,
                    struct err *e)
{
	int rc = type_check(op, q, e);
	if (rc)
		return rc;
	if (kv->dtype != q->dtype)
		return err_set(e, EXIT_INTERNAL, "cuda: %s of queries in %s, keys in %s; allowed: one type",
		               op_rows[op].name, dtype_rows[q->dtype].name, dtype_rows[kv->dtype].name);
	int32_t size = a->k.size > a->v.size ? a->k.size : a->v.size;
	if (size < 1 || size > ATTENTION_MAX_SIZE)
		return err_set(e, EXIT_CONFIG, "cuda: %s with heads of %d; allowed: 1 to %d",
		               op_rows[op].name, size, ATTENTION_MAX_SIZE);
	return 0;
}

int attention_allow(struct stream *s, const void *kernel, const char *name, size_t bytes, struct err *e)
{
	enum { ALWAYS = 48 << 10 };
	if (bytes > s->properties.sharedMemPerBlockOptin)
		return err_set(
		        e, EXIT_UNAVAILABLE,
		        "cuda: %s wants %zu bytes of shared memory a block, %s has %zu; smaller heads, or "
		        "bf16 instead of f32, need less",
		        name, bytes, s->properties.name, (size_t)s->properties.sharedMemPerBlockOptin);
	if (bytes > ALWAYS)
		CUDA_TRY(e, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
		                                 (int)bytes));
	return 0;
}

/* One call of attention or of a part; before and lse_before: what other parts gave, or NULL. */
struct forward {
	struct attention a;
	struct attention_heads o, before;
	const float *lse_before;
	float *lse;
};

template <class T, int R> static size_t forward_bytes(const struct attention *a)
{
	return 2 * tile_bytes<T, R>(a->k.size) + tile_bytes<T, R>(a->v.size) + score_bytes<R>() +
	       R * 16 * sizeof(float) + TILE_ALIGN;
}

/* The running maximum of a row's scores, in powers of two, and the sum of 2^(score - maximum). */
struct running {
	float top, sum;
};

/* The thread's part of its row: scores become weights, 0 where dropout says so, in their place. Returns what
 * the sums so far are to be multiplied by. */
template <class T, int R>
__device__ __forceinline__ float weigh(const struct attention &a, const struct query_row &q,
                                       uint64_t mask_key, const struct row_block &keys, float *scores,
                                       struct running *run)
{
	float x[R / 4], top = run->top, sum = 0;
	int row = (int)threadIdx.x / 4, column = (int)threadIdx.x % 4 * 4;
	const float *from = scores + row * score_row<R>() + column;
	T *to = (T *)(scores + row * score_row<R>()) + column;
	UNROLL
	for (int i = 0; i < R / 4; i++) {
		int at = i / 4 * 16 + i % 4;
		x[i] = sees(q, keys, column + at) ? from[at] * (a.scale * ATTENTION_LOG2E) : -INFINITY;
		top = fmaxf(top, x[i]);
	}
	top = quad_max(top);
	float base = top == -INFINITY ? 0 : top; /* nothing seen: all weights are 0, not NaN */
	float shrink = exp2f(run->top - base);
	UNROLL
	for (int i = 0; i < R / 4; i++) {
		x[i] = exp2f(x[i] - base);
		sum += x[i];
	}
	run->top = top;
	run->sum = run->sum * shrink + quad_sum(sum);
	__syncwarp(); /* the row's scores have been read */
	UNROLL
	for (int i = 0; i < R / 16; i++) {
		quad<T> w;
		quad<float> z = {1, 1, 1, 1};
		if (a.mask_keys)
			z = survivors(a, mask_key, q.element + (uint64_t)(keys.position + column + 16 * i));
		UNROLL
		for (int c = 0; c < 4; c++)
			w.x[c] = store<T>(x[4 * i + c] * z.x[c]);
		*(quad<T> *)(to + 16 * i) = w;
	}
	return shrink;
}

/* factors[row][16] <- x, by the four threads of the row. */
__device__ __forceinline__ void spread(float *factors, float x)
{
	quad<float> v = {x, x, x, x};
	*(quad<float> *)(factors + 4 * threadIdx.x) = v;
}

template <class T, int N>
__device__ __forceinline__ void scale_sums(typename warp_math<T>::sum (&c)[N], const float *factors)
{
	UNROLL
	for (int i = 0; i < N; i++)
		warp_math<T>::scale(c[i], factors + warp_group() * 256);
}

/* The sums begin with what other parts gave; where that has no weight it may be anything. */
template <class T, int N>
__device__ __forceinline__ void load_before(const struct forward &f, const struct row_block &b,
                                            typename warp_math<T>::sum (&c)[N], float *staging)
{
	int lane = (int)threadIdx.x % WARP, count = warp_columns(f.before.size);
	float *mine = staging + (int)threadIdx.x / WARP * 256;
	UNROLL
	for (int i = 0; i < N; i++) {
		if (i >= count)
			break;
		int column = 16 * (2 * i + warp_half()) + lane % 16;
		for (int r = lane / 16; r < 16; r += 2) {
			int row = 16 * warp_group() + r;
			bool there = row < b.count && column < f.before.size &&
			             f.lse_before[(b.row + row) * f.a.heads + b.head] != -INFINITY;
			mine[r * 16 + lane % 16] =
			        there ? head_at<float>(f.before, b.row + row, b.head)[column] / f.a.survivor
			              : 0;
		}
		__syncwarp();
		warp_math<T>::get(c[i], mine);
		__syncwarp();
	}
}

template <class T, int R, int W>
__global__ void __launch_bounds__(4 * R, 2) attention_kernel(struct forward f)
{
	DYNAMIC_SHARED(unsigned char, raw);
	const struct attention &a = f.a;
	unsigned char *space = tiles_begin(raw);
	T *q = take<T>(space, R * tile_row<T>(a.q.size)), *k = take<T>(space, R * tile_row<T>(a.k.size));
	T *v = take<T>(space, R * tile_row<T>(a.v.size));
	float *scores = take<float>(space, R * score_row<R>()), *factors = take<float>(space, R * 16);
	struct row_block b = row_block_of(a.queries, a.heads, R, true);
	int group = b.head / (a.heads / a.groups), row = (int)threadIdx.x / 4;
	struct query_row query = query_row_of(a, b, row);
	uint64_t mask_key = a.mask_keys ? (uint64_t)a.mask_keys[b.sample] : 0;
	int64_t at = (b.row + row) * a.heads + b.head; /* of the row's lse */
	typename warp_math<T>::sum o[W / 32];
	struct running run = {-INFINITY, 0};

	load_tile(q, a.q, b, b.head);
	if (f.lse_before && row < b.count) {
		run.top = f.lse_before[at] * ATTENTION_LOG2E;
		run.sum = run.top == -INFINITY ? 0 : 1;
	}
	UNROLL
	for (int i = 0; i < W / 32; i++)
		warp_math<T>::clear(o[i]);
	if (f.lse_before)
		load_before<T>(f, b, o, scores);
	for (int stretch = 0; stretch < a.keys.stretches; stretch++) {
		struct span span = keys_seen(a, b, stretch, R);
		for (int j = span.begin; j < span.end; j += R) {
			struct row_block keys = row_block_at(a.keys, b.sample, group, stretch, j, R);
			/* also: the tiles of the last turn have been read */
			if (!__syncthreads_or(sees_any(query, keys)))
				continue;
			load_tile(k, a.k, keys, group);
			load_tile(v, a.v, keys, group);
			__syncthreads();
			tile_scores<T, R>(scores, q, k, a.k.size, b.count, keys.count);
			__syncthreads();
			if (row < padded(b.count)) /* whole warps */
				spread(factors, weigh<T, R>(a, query, mask_key, keys, scores, &run));
			__syncthreads();
			scale_sums<T>(o, factors);
			add_weighted<T, R, BY_ROWS>(o, (const T *)scores, v, a.v.size, b.count, keys.count);
		}
	}
	__syncthreads();
	spread(factors, run.sum == 0 ? 0 : 1 / run.sum);
	if (threadIdx.x % 4 == 0 && row < b.count)
		f.lse[at] = run.sum == 0 ? -INFINITY : run.top * ATTENTION_LN2 + logf(run.sum);
	__syncthreads();
	scale_sums<T>(o, factors);
	store_sums<T>(f.o, b, b.head, o, a.survivor, scores);
}

/* Tiles of 64 rows where they fit, else of 32. */
template <class T, int R, int W>
static int forward_tiles(struct stream *s, const struct forward *f, struct err *e)
{
	size_t bytes = forward_bytes<T, R>(&f->a);
	if constexpr (R > 32)
		if (bytes > s->properties.sharedMemPerBlockOptin)
			return forward_tiles<T, 32, W>(s, f, e);
	void (*kernel)(struct forward) = attention_kernel<T, R, W>;
	int rc = attention_allow(s, (const void *)kernel, "attention", bytes, e);
	if (rc)
		return rc;
	int64_t blocks = attention_blocks(&f->a.queries, R) * f->a.heads;
	struct shape shape = {dim3((unsigned)blocks), dim3(4 * R), bytes};
	return launch(s, "attention", shape, e, kernel, *f);
}

/* The registers that sums take depend on the size of heads. */
template <class T> static int forward_by(struct stream *s, const struct forward *f, struct err *e)
{
	constexpr int R = sizeof(T) == 2 ? 64 : 32;
	if (f->a.v.size <= 64)
		return forward_tiles<T, R, 64>(s, f, e);
	if (f->a.v.size <= 128)
		return forward_tiles<T, R, 128>(s, f, e);
	return forward_tiles<T, 32, 256>(s, f, e);
}

static int run_forward(struct stream *s, enum op op, const struct forward *f, const struct tensor *q,
                       const struct tensor *kv, struct err *e)
{
	int rc = attention_check(op, &f->a, q, kv, e);
	return rc ? rc : BY_TYPE(q->dtype, forward_by)(s, f, e);
}

int cuda_attention(struct stream *s, const union op_arg *arg, const struct tensor *in,
                   const struct tensor *out, struct err *e)
{
	int rc = cuda_attention_library(s, arg, in, out, e);
	if (rc >= 0)
		return rc;
	struct forward f = {};
	f.a = attention_of(arg, &in[0], &in[1], &in[2]);
	f.o = attention_heads_of(&out[0], 0, f.a.v.size);
	f.lse = at<float>(&out[1]);
	return run_forward(s, OP_attention, &f, &in[0], &in[0], e);
}

int cuda_attention_part(struct stream *s, const union op_arg *arg, const struct tensor *in,
                        const struct tensor *out, struct err *e)
{
	struct forward f = {};
	f.a = attention_of_part(arg, &in[0], &in[1], &in[4], &in[5]);
	f.o = attention_heads_of(&out[0], 0, f.a.v.size);
	f.before = attention_heads_of(&in[2], 0, f.a.v.size);
	f.lse_before = at<float>(&in[3]);
	f.lse = at<float>(&out[1]);
	return run_forward(s, OP_attention_part, &f, &in[0], &in[1], e);
}

size_t cuda_space_attention(struct stream *s, const struct kernel_call *call)
{
	int64_t bytes = cuda_attention_library_bytes(s, call);
	return bytes > 0 ? (size_t)bytes : 0;
}

static __global__ void attention_transpose_kernel(const float *from, float *to, int64_t count, int32_t rows,
                                                  int32_t columns)
{
	for (int64_t i = grid_first(); i < count; i += grid_step()) {
		int64_t sample = i / ((int64_t)rows * columns), in = i % ((int64_t)rows * columns);
		to[i] = from[(sample * rows + in % rows) * columns + in / rows];
	}
}

int cuda_attention_transpose(struct stream *s, const float *from, float *to, int32_t samples, int32_t rows,
                             int32_t columns, struct err *e)
{
	int64_t count = (int64_t)samples * rows * columns;
	return launch(s, "attention's sums, transposed", flat(count), e, attention_transpose_kernel, from, to,
	              count, rows, columns);
}
