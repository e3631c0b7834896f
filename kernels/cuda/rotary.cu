/* Rotary positions (Su et al. 2021), and the packing of multi-head latent attention (DeepSeek-AI 2024) that
 * turns part of its heads by them. A block works on one row; a row whose position the table does not have is
 * not turned. */
#include "kernels/cuda/rows.cuh"

/* Row `position` of table[P, 2·half], NULL where it has none. */
struct table {
	const float *data;
	const int32_t *position;
	int32_t positions, half;
	float sign; /* -1 turns back */
};
static struct table table_of(const struct tensor *table, const struct tensor *position, bool inverse)
{
	struct table t = {at<float>(table), at<int32_t>(position), table->dim[0],
	                  (int32_t)tensor_row(table) / 2, inverse ? -1.0f : 1.0f};
	return t;
}
__device__ __forceinline__ const float *table_row(const struct table &t, int64_t n)
{
	int32_t position = t.position[n];
	return position >= 0 && position < t.positions ? t.data + (int64_t)position * 2 * t.half : NULL;
}

/* f(h, k) for head h of `heads` and item k of `items` of each, shared by the block. */
template <class F> __device__ __forceinline__ void each_item(int32_t heads, int32_t items, F f)
{
	for (uint32_t i = threadIdx.x, all = (uint32_t)heads * (uint32_t)items; i < all; i += blockDim.x)
		f((int32_t)(i / (uint32_t)items), (int32_t)(i % (uint32_t)items));
}

template <int N, class T> __device__ __forceinline__ void copy_n(const T *x, T *y)
{
	put(y, raw<N>(x));
}

/* N pairs of a head from the k-th on: (i, i + half), or neighbours. y may be x. */
template <int N, bool NEXT, class X, class Y>
__device__ __forceinline__ void turn(const struct table &t, const float *row, int32_t k, const X *x, Y *y)
{
	int32_t first = NEXT ? 2 * k : k, second = NEXT ? 2 * k + N : k + t.half;
	float v[2][N], cosine[N], sine[N];
	load_n(x + first, v[0]);
	load_n(x + second, v[1]);
#pragma unroll
	for (int i = 0; i < N; i++)
		cosine[i] = 1, sine[i] = 0;
	if (row) {
		load_n(row + k, cosine);
		load_n(row + t.half + k, sine);
	}
#pragma unroll
	for (int i = 0; i < N; i++) {
		int p = NEXT ? 2 * i : i, q = NEXT ? 2 * i + 1 : N + i;
		float a = v[p / N][p % N], b = v[q / N][q % N], turned = t.sign * sine[i];
		v[p / N][p % N] = a * cosine[i] - b * turned;
		v[q / N][q % N] = a * turned + b * cosine[i];
	}
	store_n(y + first, v[0]);
	store_n(y + second, v[1]);
}

struct rope {
	int64_t rows;
	int32_t width, heads, size; /* heads: that are turned */
};

template <class T, int N, bool NEXT>
__global__ void __launch_bounds__(BLOCK) rope_kernel(struct rope r, struct table t, const T *from, T *to)
{
	int32_t turned = 2 * t.half;
	for (int64_t n = blockIdx.x; n < r.rows; n += gridDim.x) {
		const float *row = table_row(t, n);
		const T *x = from + n * r.width;
		T *y = to + n * r.width;
		each_item(r.heads, t.half / N, [&](int32_t h, int32_t k) {
			turn<N, NEXT>(t, row, k * N, x + h * r.size, y + h * r.size);
		});
		if (x == y)
			continue;
		each_item(r.heads, (r.size - turned) / N, [&](int32_t h, int32_t k) {
			copy_n<N>(x + h * r.size + turned + k * N, y + h * r.size + turned + k * N);
		});
		for (int32_t c = r.heads * r.size + (int32_t)threadIdx.x * N; c < r.width;
		     c += (int32_t)blockDim.x * N)
			copy_n<N>(x + c, y + c);
	}
}

template <class T, bool NEXT>
static int rope_in(struct stream *s, const struct rope *r, const struct table *t, const T *x, T *y,
                   struct err *e)
{
	constexpr int N = pack<T>::N;
	bool whole = t->half % N == 0 && r->size % N == 0;
	struct shape shape = block_rows(r->rows, row_threads((int64_t)r->heads * t->half / (whole ? N : 1)));
	return launch(s, "rope", shape, e, whole ? rope_kernel<T, N, NEXT> : rope_kernel<T, 1, NEXT>, *r, *t,
	              x, y);
}

template <class T>
static int rope(struct stream *s, const union op_arg *arg, const struct tensor *in, const struct tensor *out,
                struct err *e)
{
	struct table t = table_of(&in[1], &in[2], arg->rope.inverse);
	struct rope r = {in[0].dim[0], (int32_t)tensor_row(&in[0]), arg->rope.heads + arg->rope.groups,
	                 arg->rope.head_dim};
	return (arg->rope.interleaved ? rope_in<T, true> : rope_in<T, false>)(s, &r, &t, at<T>(&in[0]),
	                                                                      at<T>(&out[0]), e);
}

/* Tables in other types are for the reference alone. */
static int rotary_check(enum op op, const struct tensor *x, const struct tensor *table, struct err *e)
{
	if (table->dtype != DT_f32)
		return err_set(e, EXIT_INTERNAL, "cuda: %s by a table of %s; allowed: f32", op_rows[op].name,
		               dtype_rows[table->dtype].name);
	return type_check(op, x, e);
}

int cuda_rope(struct stream *s, const union op_arg *arg, const struct tensor *in, const struct tensor *out,
              struct err *e)
{
	int rc = rotary_check(OP_rope, &in[0], &in[1], e);
	return rc ? rc : BY_TYPE(in[0].dtype, rope)(s, arg, in, out, e);
}

/* Columns: of a packed row queries | keys | values, of kv D-R of the key and the value for each head. */
struct latent {
	int64_t rows;
	int32_t heads, plain, size, value; /* H, D-R, D, V */
	bool next;
};
static struct latent latent_of(const union op_arg *arg, const struct tensor *q, const struct table *t)
{
	struct latent l = {q->dim[0],         arg->mla.heads,     arg->mla.head_dim - 2 * t->half,
	                   arg->mla.head_dim, arg->mla.value_dim, (bool)arg->mla.interleaved};
	return l;
}
static bool latent_whole(const struct latent *l, const struct table *t, int n)
{
	return l->plain % n == 0 && t->half % n == 0 && l->value % n == 0;
}

/* Where head h lies. */
struct latent_at {
	int32_t q, kv, key, value; /* in q, in kv, of its key and its value in the packed row */
};
__device__ __forceinline__ struct latent_at latent_head(const struct latent &l, int32_t h)
{
	return {h * l.size, h * (l.plain + l.value), (l.heads + h) * l.size,
	        2 * l.heads * l.size + h * l.value};
}
__device__ __forceinline__ int64_t latent_width(const struct latent &l)
{
	return (int64_t)l.heads * (2 * l.size + l.value);
}

template <class T, int N, bool NEXT>
__global__ void __launch_bounds__(BLOCK) mla_pack_kernel(struct latent l, struct table t, const T *all_q,
                                                         const T *all_kv, const T *keys, T *packed)
{
	for (int64_t n = blockIdx.x; n < l.rows; n += gridDim.x) {
		const float *row = table_row(t, n);
		const T *q = all_q + n * l.heads * l.size, *kv = all_kv + n * l.heads * (l.plain + l.value);
		const T *key = keys + n * 2 * t.half;
		T *y = packed + n * latent_width(l);
		each_item(l.heads, l.plain / N, [&](int32_t h, int32_t k) {
			struct latent_at at = latent_head(l, h);
			copy_n<N>(q + at.q + k * N, y + at.q + k * N);
			copy_n<N>(kv + at.kv + k * N, y + at.key + k * N);
		});
		each_item(l.heads, t.half / N, [&](int32_t h, int32_t k) {
			struct latent_at at = latent_head(l, h);
			turn<N, NEXT>(t, row, k * N, q + at.q + l.plain, y + at.q + l.plain);
			turn<N, NEXT>(t, row, k * N, key, y + at.key + l.plain);
		});
		each_item(l.heads, l.value / N, [&](int32_t h, int32_t k) {
			struct latent_at at = latent_head(l, h);
			copy_n<N>(kv + at.kv + l.plain + k * N, y + at.value + k * N);
		});
	}
}

template <class T>
static int mla_pack(struct stream *s, const union op_arg *arg, const struct tensor *in,
                    const struct tensor *out, struct err *e)
{
	constexpr int N = pack<T>::N;
	struct table t = table_of(&in[3], &in[4], false);
	struct latent l = latent_of(arg, &in[0], &t);
	bool whole = latent_whole(&l, &t, N);
	auto *kernel = l.next ? (whole ? mla_pack_kernel<T, N, true> : mla_pack_kernel<T, 1, true>)
	                      : (whole ? mla_pack_kernel<T, N, false> : mla_pack_kernel<T, 1, false>);
	return launch(s, "mla_pack", block_rows(l.rows, BLOCK), e, kernel, l, t, at<T>(&in[0]), at<T>(&in[1]),
	              at<T>(&in[2]), at<T>(&out[0]));
}

int cuda_mla_pack(struct stream *s, const union op_arg *arg, const struct tensor *in,
                  const struct tensor *out, struct err *e)
{
	int rc = rotary_check(OP_mla_pack, &in[0], &in[3], e);
	return rc ? rc : BY_TYPE(in[0].dtype, mla_pack)(s, arg, in, out, e);
}

/* Groups of heads whose keys' gradients one thread a column adds up: as many as fill the block. */
static __host__ __device__ int32_t key_groups(int32_t turned)
{
	return turned < BLOCK ? BLOCK / turned : 1;
}

/* dkey[R] of a row: the heads' gradients summed, turned back in their sum. part[groups][R]. */
template <bool NEXT, class T>
__device__ __forceinline__ void key_backward(const struct latent &l, const struct table &t, const float *row,
                                             const T *packed, T *dkey, float *part)
{
	int32_t turned = 2 * t.half, groups = key_groups(turned);
	each_item(groups, turned, [&](int32_t g, int32_t c) {
		float sum = 0;
		for (int32_t h = g; h < l.heads; h += groups)
			sum += load(packed[latent_head(l, h).key + l.plain + c]);
		part[g * turned + c] = sum;
	});
	__syncthreads();
	each_item(1, turned, [&](int32_t, int32_t c) {
		for (int32_t g = 1; g < groups; g++)
			part[c] += part[g * turned + c];
	});
	__syncthreads();
	each_item(1, t.half, [&](int32_t, int32_t k) { turn<1, NEXT>(t, row, k, part, dkey); });
	__syncthreads(); /* the next row's parts */
}

template <class T, int N, bool NEXT>
__global__ void __launch_bounds__(BLOCK)
        mla_unpack_kernel(struct latent l, struct table t, const T *packed, T *all_dq, T *all_dkv, T *dkeys)
{
	DYNAMIC_SHARED(float, part);
	for (int64_t n = blockIdx.x; n < l.rows; n += gridDim.x) {
		const float *row = table_row(t, n);
		const T *y = packed + n * latent_width(l);
		T *dq = all_dq + n * l.heads * l.size, *dkv = all_dkv + n * l.heads * (l.plain + l.value);
		each_item(l.heads, l.plain / N, [&](int32_t h, int32_t k) {
			struct latent_at at = latent_head(l, h);
			copy_n<N>(y + at.q + k * N, dq + at.q + k * N);
			copy_n<N>(y + at.key + k * N, dkv + at.kv + k * N);
		});
		each_item(l.heads, t.half / N, [&](int32_t h, int32_t k) {
			struct latent_at at = latent_head(l, h);
			turn<N, NEXT>(t, row, k * N, y + at.q + l.plain, dq + at.q + l.plain);
		});
		each_item(l.heads, l.value / N, [&](int32_t h, int32_t k) {
			struct latent_at at = latent_head(l, h);
			copy_n<N>(y + at.value + k * N, dkv + at.kv + l.plain + k * N);
		});
		key_backward<NEXT>(l, t, row, y, dkeys + n * 2 * t.half, part);
	}
}

template <class T>
static int mla_unpack(struct stream *s, const union op_arg *arg, const struct tensor *in,
                      const struct tensor *out, struct err *e)
{
	constexpr int N = pack<T>::N;
	struct table t = table_of(&in[1], &in[2], true);
	struct latent l = latent_of(arg, &in[0], &t);
	bool whole = latent_whole(&l, &t, N);
	struct shape shape = block_rows(l.rows, BLOCK);
	shape.shared_bytes = (size_t)(key_groups(2 * t.half) * 2 * t.half) * sizeof(float);
	auto *kernel = l.next ? (whole ? mla_unpack_kernel<T, N, true> : mla_unpack_kernel<T, 1, true>)
	                      : (whole ? mla_unpack_kernel<T, N, false> : mla_unpack_kernel<T, 1, false>);
	return launch(s, "mla_unpack", shape, e, kernel, l, t, at<T>(&in[0]), at<T>(&out[0]), at<T>(&out[1]),
	              at<T>(&out[2]));
}

int cuda_mla_unpack(struct stream *s, const union op_arg *arg, const struct tensor *in,
                    const struct tensor *out, struct err *e)
{
	int rc = rotary_check(OP_mla_unpack, &in[0], &in[1], e);
	return rc ? rc : BY_TYPE(in[0].dtype, mla_unpack)(s, arg, in, out, e);
}
