/* Gradients of attention. Probabilities are computed again from lse, twice: by blocks that have R keys and go
 * through the queries of all heads of their group (dk, dv), and by blocks that have R queries and go through
 * the keys (dq). So every gradient is summed in one place, in one order, and is the same in every run. */
#include "kernels/cuda/attention.cuh"

struct backward {
	struct attention a;
	struct attention_heads dout, o, dq, dk, dv;
	const float *lse;
	float *delta; /* [N,H]: row sums of do · o */
};

/* With P = exp(S - lse) and dropout mask Z: dV = (P Z)' do, dS = P (Z do v' - do·o). Dao et al. 2022,
 * algorithm 4. What the thread's row needs of that. */
struct backward_row {
	struct query_row q;
	float lse, delta; /* lse in powers of two */
};

template <class T> __global__ void attention_delta_kernel(struct backward b, int64_t rows)
{
	int64_t n = grid_first() / WARP;
	int lane = (int)threadIdx.x % WARP;
	if (n >= rows * b.a.heads)
		return;
	const T *dout = head_at<T>(b.dout, n / b.a.heads, (int32_t)(n % b.a.heads));
	const T *o = head_at<T>(b.o, n / b.a.heads, (int32_t)(n % b.a.heads));
	const float *wide = head_at<float>(b.o, n / b.a.heads, (int32_t)(n % b.a.heads));
	float sum = 0;
	for (int i = lane; i < b.o.size; i += WARP)
		sum += load(dout[i]) * (b.o.is_f32 ? wide[i] : load(o[i]));
	sum = warp_sum(sum);
	if (lane == 0)
		b.delta[n] = sum;
}

__device__ __forceinline__ struct backward_row backward_row_of(const struct backward &f,
                                                               const struct row_block &b)
{
	int row = (int)threadIdx.x / 4;
	struct backward_row r = {query_row_of(f.a, b, row), 0, 0};
	if (row < b.count) {
		int64_t at = (b.row + row) * f.a.heads + b.head;
		r.lse = f.lse[at] * ATTENTION_LOG2E;
		r.delta = f.delta[at];
	}
	return r;
}

/* The thread's part of its row, in place: scores become P Z, but for the survivors' factor, where WEIGHTS, dp
 * becomes dS times the scale. */
template <class T, int R, bool WEIGHTS>
__device__ __forceinline__ void differentiate(const struct attention &a, const struct backward_row &r,
                                              uint64_t mask_key, const struct row_block &keys, float *scores,
                                              float *dp)
{
	float p[R / 4], d[R / 4];
	int row = (int)threadIdx.x / 4, column = (int)threadIdx.x % 4 * 4, begin = row * score_row<R>();
	UNROLL
	for (int i = 0; i < R / 4; i++) {
		int at = column + i / 4 * 16 + i % 4;
		float s = scores[begin + at] * (a.scale * ATTENTION_LOG2E);
		bool seen = sees(r.q, keys, at);
		p[i] = seen ? exp2f(s - r.lse) : 0;
		d[i] = seen ? dp[begin + at] : 0; /* what has not been computed may be anything */
	}
	__syncwarp(); /* the row has been read */
	T *weights = (T *)(scores + begin) + column, *ds = (T *)(dp + begin) + column;
	UNROLL
	for (int i = 0; i < R / 16; i++) {
		quad<T> pz, dx;
		quad<float> z = {1, 1, 1, 1};
		if (a.mask_keys)
			z = survivors(a, mask_key, r.q.element + (uint64_t)(keys.position + column + 16 * i));
		UNROLL
		for (int c = 0; c < 4; c++) {
			float x = p[4 * i + c];
			pz.x[c] = store<T>(x * z.x[c]);
			dx.x[c] = store<T>(x * (z.x[c] * a.survivor * d[4 * i + c] - r.delta) * a.scale);
		}
		if (WEIGHTS)
			*(quad<T> *)(weights + 16 * i) = pz;
		*(quad<T> *)(ds + 16 * i) = dx;
	}
}

/* Tiles of both kernels. */
template <class T, int R> struct backward_tiles {
	T *q, *dout, *k, *v;
	float *scores, *dp;
};
template <class T, int R>
__device__ __forceinline__ backward_tiles<T, R> backward_tiles_of(const struct attention &a,
                                                                  unsigned char *raw)
{
	unsigned char *space = tiles_begin(raw);
	int size = R * tile_row<T>(a.k.size), value = R * tile_row<T>(a.v.size);
	backward_tiles<T, R> t;
	t.q = take<T>(space, size);
	t.k = take<T>(space, size);
	t.dout = take<T>(space, value);
	t.v = take<T>(space, value);
	t.scores = take<float>(space, R * score_row<R>());
	t.dp = take<float>(space, R * score_row<R>());
	return t;
}
template <class T, int R> static size_t backward_bytes(const struct attention *a)
{
	return 2 * tile_bytes<T, R>(a->k.size) + 2 * tile_bytes<T, R>(a->v.size) + 2 * score_bytes<R>() +
	       TILE_ALIGN;
}

/* P Z and dS of the tiles, for all threads; `rows` queries count. */
template <class T, int R, bool WEIGHTS>
__device__ __forceinline__ void backward_turn(const struct attention &a, const backward_tiles<T, R> &t,
                                              const struct backward_row &r, int rows, uint64_t mask_key,
                                              const struct row_block &keys)
{
	tile_scores<T, R>(t.scores, t.q, t.k, a.k.size, rows, keys.count);
	tile_scores<T, R>(t.dp, t.dout, t.v, a.v.size, rows, keys.count);
	__syncthreads();
	if ((int)threadIdx.x / 4 < padded(rows)) /* whole warps */
		differentiate<T, R, WEIGHTS>(a, r, mask_key, keys, t.scores, t.dp);
	__syncthreads();
}

template <class T, int R, int W>
__global__ void __launch_bounds__(4 * R, 2) attention_queries_kernel(struct backward f)
{
	DYNAMIC_SHARED(unsigned char, raw);
	const struct attention &a = f.a;
	backward_tiles<T, R> t = backward_tiles_of<T, R>(a, raw);
	struct row_block b = row_block_of(a.queries, a.heads, R, true);
	int group = b.head / (a.heads / a.groups);
	struct backward_row row = backward_row_of(f, b);
	uint64_t mask_key = a.mask_keys ? (uint64_t)a.mask_keys[b.sample] : 0;
	typename warp_math<T>::sum dq[W / 32];

	load_tile(t.q, a.q, b, b.head);
	load_tile(t.dout, f.dout, b, b.head);
	UNROLL
	for (int i = 0; i < W / 32; i++)
		warp_math<T>::clear(dq[i]);
	for (int stretch = 0; stretch < a.keys.stretches; stretch++) {
		struct span span = keys_seen(a, b, stretch, R);
		for (int j = span.begin; j < span.end; j += R) {
			struct row_block keys = row_block_at(a.keys, b.sample, group, stretch, j, R);
			/* also: the tiles of the last turn have been read */
			if (!__syncthreads_or(sees_any(row.q, keys)))
				continue;
			load_tile(t.k, a.k, keys, group);
			load_tile(t.v, a.v, keys, group);
			__syncthreads();
			backward_turn<T, R, false>(a, t, row, b.count, mask_key, keys);
			add_weighted<T, R, BY_ROWS>(dq, (const T *)t.dp, t.k, a.k.size, b.count, keys.count);
		}
	}
	store_sums<T>(f.dq, b, b.head, dq, 1, t.scores);
}

template <class T, int R, int W>
__global__ void __launch_bounds__(4 * R, 2) attention_keys_kernel(struct backward f)
{
	DYNAMIC_SHARED(unsigned char, raw);
	const struct attention &a = f.a;
	backward_tiles<T, R> t = backward_tiles_of<T, R>(a, raw);
	struct row_block b = row_block_of(a.keys, a.groups, R, false);
	int each = a.heads / a.groups;
	uint64_t mask_key = a.mask_keys ? (uint64_t)a.mask_keys[b.sample] : 0;
	typename warp_math<T>::sum dk[W / 32], dv[W / 32];

	load_tile(t.k, a.k, b, b.head);
	load_tile(t.v, a.v, b, b.head);
	UNROLL
	for (int i = 0; i < W / 32; i++) {
		warp_math<T>::clear(dk[i]);
		warp_math<T>::clear(dv[i]);
	}
	for (int n = 0; n < each * a.queries.stretches; n++) {
		int head = b.head * each + n % each, stretch = n / each;
		struct span span = queries_seeing(a, b, stretch, R);
		for (int j = span.begin; j < span.end; j += R) {
			struct row_block queries = row_block_at(a.queries, b.sample, head, stretch, j, R);
			struct backward_row row = backward_row_of(f, queries);
			/* also: the tiles of the last turn have been read */
			if (!__syncthreads_or(sees_any(row.q, b)))
				continue;
			load_tile(t.q, a.q, queries, head);
			load_tile(t.dout, f.dout, queries, head);
			__syncthreads();
			backward_turn<T, R, true>(a, t, row, queries.count, mask_key, b);
			add_weighted<T, R, BY_COLUMNS>(dv, (const T *)t.scores, t.dout, a.v.size, b.count,
			                               queries.count);
			add_weighted<T, R, BY_COLUMNS>(dk, (const T *)t.dp, t.q, a.k.size, b.count,
			                               queries.count);
		}
	}
	__syncthreads();
	store_sums<T>(f.dk, b, b.head, dk, 1, t.scores);
	store_sums<T>(f.dv, b, b.head, dv, a.survivor, t.scores);
}

static struct shape blocks_of(const struct attention_rows *rows, int32_t heads, int each, size_t bytes)
{
	struct shape shape = {dim3((unsigned)(attention_blocks(rows, each) * heads)), dim3(4 * each), bytes};
	return shape;
}

/* Tiles of 64 rows where they fit, else of 32. */
template <class T, int R, int W>
static int backward_with(struct stream *s, const struct backward *b, struct err *e)
{
	size_t bytes = backward_bytes<T, R>(&b->a);
	if constexpr (R > 32)
		if (bytes > s->properties.sharedMemPerBlockOptin)
			return backward_with<T, 32, W>(s, b, e);
	void (*queries)(struct backward) = attention_queries_kernel<T, R, W>;
	void (*keys)(struct backward) = attention_keys_kernel<T, R, W>;
	int rc = attention_allow(s, (const void *)queries, "attention_bwd", bytes, e);
	if (!rc)
		rc = attention_allow(s, (const void *)keys, "attention_bwd", bytes, e);
	if (!rc)
		rc = launch(s, "attention_bwd, dk and dv", blocks_of(&b->a.keys, b->a.groups, R, bytes), e,
		            keys, *b);
	if (!rc)
		rc = launch(s, "attention_bwd, dq", blocks_of(&b->a.queries, b->a.heads, R, bytes), e,
		            queries, *b);
	return rc;
}

/* The registers that sums take depend on the size of heads. */
template <class T>
static int backward_by(struct stream *s, const struct backward *b, int64_t rows, struct err *e)
{
	constexpr int R = sizeof(T) == 2 ? 64 : 32;
	int32_t size = b->a.k.size > b->a.v.size ? b->a.k.size : b->a.v.size;
	struct shape shape = flat(rows * b->a.heads * WARP, 1, INT_MAX);
	int rc = launch(s, "attention_bwd, delta", shape, e, attention_delta_kernel<T>, *b, rows);
	if (rc)
		return rc;
	if (size <= 64)
		return backward_with<T, R, 64>(s, b, e);
	if (size <= 128)
		return backward_with<T, R, 128>(s, b, e);
	return backward_with<T, 32, 256>(s, b, e);
}

static size_t delta_bytes(const union op_arg *arg, int32_t rows)
{
	return (size_t)rows * (size_t)arg->attention.heads * sizeof(float);
}

static int run_backward(struct stream *s, enum op op, const union op_arg *arg, struct backward *b,
                        const struct tensor *q, const struct tensor *kv, struct err *e)
{
	int rc = attention_check(op, &b->a, q, kv, e);
	if (rc)
		return rc;
	b->delta = (float *)cuda_scratch(s, delta_bytes(arg, q->dim[0]), e);
	return b->delta ? BY_TYPE(q->dtype, backward_by)(s, b, q->dim[0], e) : e->code;
}

/* Gradients lie as what they are of does. */
static void set_outputs(struct backward *b, const struct tensor *dq, const struct tensor *dkv)
{
	b->dq = attention_heads_in(&b->a.q, dq);
	b->dk = attention_heads_in(&b->a.k, dkv);
	b->dv = attention_heads_in(&b->a.v, dkv);
}

static struct backward backward_of(const struct attention *a, const struct tensor *dout,
                                   const struct tensor *o, const struct tensor *lse)
{
	struct backward b = {};
	b.a = *a;
	b.dout = attention_heads_of(dout, 0, a->v.size);
	b.o = attention_heads_of(o, 0, a->v.size);
	b.lse = at<float>(lse);
	return b;
}

int cuda_attention_bwd(struct stream *s, const union op_arg *arg, const struct tensor *in,
                       const struct tensor *out, struct err *e)
{
	int rc = cuda_attention_bwd_library(s, arg, in, out, e);
	if (rc >= 0)
		return rc;
	struct attention a = attention_of(arg, &in[1], &in[4], &in[5]);
	struct backward b = backward_of(&a, &in[0], &in[2], &in[3]);
	set_outputs(&b, &out[0], &out[0]);
	return run_backward(s, OP_attention_bwd, arg, &b, &in[1], &in[1], e);
}

int cuda_attention_part_bwd(struct stream *s, const union op_arg *arg, const struct tensor *in,
                            const struct tensor *out, struct err *e)
{
	struct attention a = attention_of_part(arg, &in[1], &in[2], &in[5], &in[6]);
	struct backward b = backward_of(&a, &in[0], &in[3], &in[4]);
	set_outputs(&b, &out[0], &out[1]);
	return run_backward(s, OP_attention_part_bwd, arg, &b, &in[1], &in[2], e);
}

/* As much as either way to compute it takes. */
size_t cuda_space_attention_bwd(struct stream *s, const struct kernel_call *call)
{
	size_t own = delta_bytes(call->arg, call->in[0].dim[0]);
	int64_t library = cuda_attention_library_bytes(s, call);
	return library > (int64_t)own ? (size_t)library : own;
}
