/* attention_cache: new keys and values go to their places, then one block for every new row and head reads
 * the cache once. */
#include "kernels/cuda/attention.cuh"

struct cached {
	struct attention_heads q, k, v, k_cache, v_cache, o;
	const int32_t *position;
	int32_t rows, heads, groups, places, window;
	float scale;
};

/* All heads of row n to its place. A position outside the cache, which no program asks for, is left out. */
template <class T>
__device__ void store_row(const struct cached &c, const struct attention_heads &from,
                          const struct attention_heads &to, int n)
{
	int32_t position = c.position[n];
	if (position < 0 || position >= c.places)
		return;
	const T *x = head_at<T>(from, n, 0);
	T *y = head_at<T>(to, position, 0);
	for (int i = (int)threadIdx.x; i < c.groups * from.size; i += (int)blockDim.x)
		y[i] = x[i];
}

template <class T> __global__ void attention_cache_store_kernel(struct cached c)
{
	store_row<T>(c, c.k, c.k_cache, (int)blockIdx.x);
	store_row<T>(c, c.v, c.v_cache, (int)blockIdx.x);
}

/* q · k by the four neighbouring threads of a key. */
template <class T>
__device__ __forceinline__ float key_score(const struct cached &c, const float *q, int place, int group)
{
	const T *k = head_at<T>(c.k_cache, place, group);
	int quarter = (int)threadIdx.x % 4;
	float score = 0;
	if (c.k_cache.aligned) {
		for (int d = quarter * pack<T>::N; d < c.k.size; d += 4 * pack<T>::N) {
			pack<T> v = load_pack(k + d);
			UNROLL
			for (int i = 0; i < pack<T>::N; i++)
				score += q[d + i] * load(v.x[i]);
		}
	} else {
		for (int d = quarter; d < c.k.size; d += 4)
			score += q[d] * load(k[d]);
	}
	return quad_sum(score);
}

/* One column of the values of every `parts`-th key. */
template <class T>
__device__ __forceinline__ float weighted_values(const struct cached &c, const float *weight, int first,
                                                 int count, int group, int column, int part, int parts)
{
	float sum = 0;
	for (int j = part; j < count; j += parts)
		sum += weight[j] * load(head_at<T>(c.v_cache, first + j, group)[column]);
	return sum;
}

template <class T> __global__ void __launch_bounds__(BLOCK) attention_cache_kernel(struct cached c)
{
	__shared__ float q[ATTENTION_MAX_SIZE], weight[BLOCK], partial[BLOCK];
	int n = (int)(blockIdx.x / c.heads), head = (int)(blockIdx.x % c.heads);
	int group = head / (c.heads / c.groups), tid = (int)threadIdx.x;
	int last = c.position[n] < c.places ? c.position[n] : c.places - 1;
	int begin = c.window > 0 && last >= c.window ? last - c.window + 1 : 0;
	int parts = BLOCK / c.v.size, part = tid / c.v.size, column = tid % c.v.size;
	float top = -INFINITY, total = 0, sum = 0;

	for (int i = tid; i < c.q.size; i += BLOCK)
		q[i] = load(head_at<T>(c.q, n, head)[i]) * (c.scale * ATTENTION_LOG2E);
	for (int j = begin; j <= last; j += BLOCK) {
		int count = last + 1 - j < BLOCK ? last + 1 - j : BLOCK;
		__syncthreads(); /* q is there; the last turn's weights have been read */
		for (int i = tid / 4; i < padded(count); i += BLOCK / 4) { /* padded: whole warps */
			float score = key_score<T>(c, q, j + (i < count ? i : 0), group);
			if (tid % 4 == 0)
				weight[i] = score;
		}
		__syncthreads();
		float mine = tid < count ? weight[tid] : -INFINITY;
		float highest = fmaxf(top, block_max(mine)), shrink = exp2f(top - highest);
		mine = exp2f(mine - highest);
		weight[tid] = mine;
		total = total * shrink + block_sum(mine); /* its barriers: all weights are there */
		top = highest;
		sum *= shrink;
		if (part < parts)
			sum += weighted_values<T>(c, weight, j, count, group, column, part, parts);
	}
	__syncthreads();
	partial[tid] = sum;
	__syncthreads();
	if (part > 0)
		return;
	for (int i = 1; i < parts; i++)
		sum += partial[i * c.v.size + column];
	head_at<T>(c.o, n, head)[column] = store<T>(total == 0 ? 0 : sum / total);
}

template <class T> static int cache_by(struct stream *s, const struct cached *c, struct err *e)
{
	struct shape rows = {dim3((unsigned)c->rows), dim3(BLOCK), 0};
	struct shape heads = {dim3((unsigned)(c->rows * c->heads)), dim3(BLOCK), 0};
	int rc = launch(s, "attention_cache, new rows", rows, e, attention_cache_store_kernel<T>, *c);
	return rc ? rc : launch(s, "attention_cache", heads, e, attention_cache_kernel<T>, *c);
}

int cuda_attention_cache(struct stream *s, const union op_arg *arg, const struct tensor *in,
                         const struct tensor *out, struct err *e)
{
	static const struct tensor absent = {};
	struct attention a = attention_of(arg, &in[0], &absent, &absent);
	int rc = attention_check(OP_attention_cache, &a, &in[0], &in[1], e);
	if (rc)
		return rc;
	struct cached c = {};
	c.q = a.q;
	c.k = a.k;
	c.v = a.v;
	c.k_cache = attention_heads_of(&in[1], 0, a.k.size);
	c.v_cache = attention_heads_of(&in[2], 0, a.v.size);
	c.o = attention_heads_of(&out[0], 0, a.v.size);
	c.position = at<int32_t>(&in[3]);
	c.rows = in[0].dim[0];
	c.heads = a.heads;
	c.groups = a.groups;
	c.places = in[1].dim[0];
	c.window = arg->attention.window;
	c.scale = a.scale;
	return BY_TYPE(in[0].dtype, cache_by)(s, &c, e);
}
