/* Each element, or each row, by itself: sums, casts, activations, dropout, gates. */
#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/rows.cuh"

template <class T> __global__ void add_kernel(const T *a, const T *b, T *y, int64_t count)
{
	constexpr int N = pack<T>::N;
	each_pack<N>(count, [&](int64_t i, int64_t n) {
		float u[N], v[N];
		load_n(a + i, n, u);
		load_n(b + i, n, v);
#pragma unroll
		for (int k = 0; k < N; k++)
			u[k] += v[k];
		store_n(y + i, n, u);
	});
}

template <class T>
static int add(struct stream *s, const struct tensor *in, const struct tensor *out, struct err *e)
{
	int64_t n = tensor_count(&in[0]);
	return launch(s, "add", flat(n, pack<T>::N), e, add_kernel<T>, at<T>(&in[0]), at<T>(&in[1]),
	              at<T>(&out[0]), n);
}

int cuda_add(struct stream *s, const union op_arg *arg, const struct tensor *in, const struct tensor *out,
             struct err *e)
{
	(void)arg;
	int rc = type_check(OP_add, &in[0], e);
	return rc ? rc : BY_TYPE(in[0].dtype, add)(s, in, out, e);
}

template <class T, int N>
__global__ void bias_add_kernel(const T *x, const T *bias, T *y, int64_t rows, int64_t width)
{
	each_row(rows, [&](int64_t row) {
		each_column<N>(width, [&](int64_t c) {
			float u[N], v[N];
			load_n(x + row * width + c, u);
			load_n(bias + c, v);
#pragma unroll
			for (int k = 0; k < N; k++)
				u[k] += v[k];
			store_n(y + row * width + c, u);
		});
	});
}

template <class T>
static int bias_add(struct stream *s, const struct tensor *in, const struct tensor *out, struct err *e)
{
	int64_t rows = in[0].dim[0], width = tensor_row(&in[0]);
	return launch(s, "bias_add", warp_rows(rows), e, BY_PACK(T, width % pack<T>::N == 0, bias_add_kernel),
	              at<T>(&in[0]), at<T>(&in[1]), at<T>(&out[0]), rows, width);
}

int cuda_bias_add(struct stream *s, const union op_arg *arg, const struct tensor *in,
                  const struct tensor *out, struct err *e)
{
	(void)arg;
	int rc = type_check(OP_bias_add, &in[0], e);
	return rc ? rc : BY_TYPE(in[0].dtype, bias_add)(s, in, out, e);
}

/* Eight elements at once: 16 bytes of the shorter type. */
enum { CAST_N = 8 };

template <class X, class Y> __global__ void cast_kernel(const X *x, Y *y, int64_t count)
{
	each_pack<CAST_N>(count, [&](int64_t i, int64_t n) {
		float v[CAST_N];
		load_n(x + i, n, v);
		store_n(y + i, n, v);
	});
}

template <class X, class Y>
static int cast(struct stream *s, const struct tensor *in, const struct tensor *out, struct err *e)
{
	int64_t n = tensor_count(&in[0]);
	return launch(s, "cast", flat(n, CAST_N), e, cast_kernel<X, Y>, at<X>(&in[0]), at<Y>(&out[0]), n);
}

int cuda_cast(struct stream *s, const union op_arg *arg, const struct tensor *in, const struct tensor *out,
              struct err *e)
{
	(void)arg;
	int rc = type_check(OP_cast, &in[0], e);
	rc = rc ? rc : type_check(OP_cast, &out[0], e);
	return rc ? rc : BY_TYPES(in[0].dtype, out[0].dtype, cast)(s, in, out, e);
}

/* f32, or integers that wrap around as the processor's do. */
template <class T> __global__ void accumulate_kernel(const T *x, T *y, int64_t count, bool adds)
{
	constexpr int N = pack<T>::N;
	each_pack<N>(count, [&](int64_t i, int64_t n) {
		for (int64_t k = i; n < N && k < i + n; k++)
			y[k] = adds ? y[k] + x[k] : x[k];
		if (n < N)
			return;
		elements<T, N> v = raw<N>(x + i), sum = v;
		if (adds)
			sum = raw<N>(y + i);
#pragma unroll
		for (int k = 0; k < N; k++)
			sum.x[k] = adds ? sum.x[k] + v.x[k] : v.x[k];
		put(y + i, sum);
	});
}

template <class T>
static int accumulate(struct stream *s, const struct tensor *in, const struct tensor *out, struct err *e)
{
	int64_t n = tensor_count(&in[0]);
	return launch(s, "accumulate", flat(n, pack<T>::N), e, accumulate_kernel<T>, at<T>(&in[0]),
	              at<T>(&out[0]), n, (bool)out[0].acc);
}

int cuda_accumulate(struct stream *s, const union op_arg *arg, const struct tensor *in,
                    const struct tensor *out, struct err *e)
{
	(void)arg;
	if (in[0].dtype != DT_f32 && in[0].dtype != DT_i32)
		return err_set(e, EXIT_INTERNAL, "cuda: accumulate of %s; allowed: f32, i32",
		               dtype_rows[in[0].dtype].name);
	return (in[0].dtype == DT_f32 ? accumulate<float> : accumulate<uint32_t>)(s, in, out, e);
}

int cuda_zero(struct stream *s, const union op_arg *arg, const struct tensor *in, const struct tensor *out,
              struct err *e)
{
	(void)arg, (void)in;
	size_t bytes = (size_t)tensor_bytes(&out[0]);
	cuda_counts_forget(s, out[0].data, bytes);
	CUDA_TRY(e, cudaMemsetAsync(out[0].data, 0, bytes, s->compute));
	return 0;
}

template <class T, class A> __global__ void activation_kernel(const T *x, T *y, int64_t count)
{
	constexpr int N = pack<T>::N;
	each_pack<N>(count, [&](int64_t i, int64_t n) {
		float v[N];
		load_n(x + i, n, v);
#pragma unroll
		for (int k = 0; k < N; k++)
			v[k] = A::value(v[k]);
		store_n(y + i, n, v);
	});
}

template <class T, class A>
__global__ void activation_bwd_kernel(const T *dy, const T *x, T *dx, int64_t count)
{
	constexpr int N = pack<T>::N;
	each_pack<N>(count, [&](int64_t i, int64_t n) {
		float d[N], v[N];
		load_n(dy + i, n, d);
		load_n(x + i, n, v);
#pragma unroll
		for (int k = 0; k < N; k++)
			d[k] *= A::slope(v[k]);
		store_n(dx + i, n, d);
	});
}

/* Gated linear units: Shazeer 2020. A row of x is gate | up. */
template <class T, class A, int N> __global__ void glu_kernel(const T *x, T *y, int64_t rows, int64_t width)
{
	each_row(rows, [&](int64_t row) {
		each_column<N>(width, [&](int64_t c) {
			float gate[N], up[N];
			load_n(x + 2 * row * width + c, gate);
			load_n(x + (2 * row + 1) * width + c, up);
#pragma unroll
			for (int k = 0; k < N; k++)
				up[k] *= A::value(gate[k]);
			store_n(y + row * width + c, up);
		});
	});
}

template <class T, class A, int N>
__global__ void glu_bwd_kernel(const T *dy, const T *x, T *dx, int64_t rows, int64_t width)
{
	each_row(rows, [&](int64_t row) {
		each_column<N>(width, [&](int64_t c) {
			int64_t of_gate = 2 * row * width + c, of_up = of_gate + width;
			float d[N], gate[N], up[N];
			load_n(dy + row * width + c, d);
			load_n(x + of_gate, gate);
			load_n(x + of_up, up);
#pragma unroll
			for (int k = 0; k < N; k++) {
				float g = gate[k];
				gate[k] = d[k] * up[k] * A::slope(g);
				up[k] = d[k] * A::value(g);
			}
			store_n(dx + of_gate, gate);
			store_n(dx + of_up, up);
		});
	});
}

typedef int activation_run(struct stream *s, const struct tensor *in, const struct tensor *out,
                           struct err *e);

template <class T, class A> struct activation_forward {
	static int run(struct stream *s, const struct tensor *in, const struct tensor *out, struct err *e)
	{
		int64_t n = tensor_count(&in[0]);
		return launch(s, "activation", flat(n, pack<T>::N), e, activation_kernel<T, A>, at<T>(&in[0]),
		              at<T>(&out[0]), n);
	}
};

template <class T, class A> struct activation_backward {
	static int run(struct stream *s, const struct tensor *in, const struct tensor *out, struct err *e)
	{
		int64_t n = tensor_count(&in[0]);
		return launch(s, "activation_bwd", flat(n, pack<T>::N), e, activation_bwd_kernel<T, A>,
		              at<T>(&in[0]), at<T>(&in[1]), at<T>(&out[0]), n);
	}
};

template <class T, class A> struct glu_forward {
	static int run(struct stream *s, const struct tensor *in, const struct tensor *out, struct err *e)
	{
		int64_t rows = out[0].dim[0], width = tensor_row(&out[0]);
		bool whole = width % pack<T>::N == 0;
		return launch(s, "glu", warp_rows(rows), e,
		              whole ? glu_kernel<T, A, pack<T>::N> : glu_kernel<T, A, 1>, at<T>(&in[0]),
		              at<T>(&out[0]), rows, width);
	}
};

template <class T, class A> struct glu_backward {
	static int run(struct stream *s, const struct tensor *in, const struct tensor *out, struct err *e)
	{
		int64_t rows = in[0].dim[0], width = tensor_row(&in[0]);
		bool whole = width % pack<T>::N == 0;
		return launch(s, "glu_bwd", warp_rows(rows), e,
		              whole ? glu_bwd_kernel<T, A, pack<T>::N> : glu_bwd_kernel<T, A, 1>,
		              at<T>(&in[0]), at<T>(&in[1]), at<T>(&out[0]), rows, width);
	}
};

template <class T> static activation_run *activation_by(int32_t kind)
{
	return by_activation<activation_forward, T, activation_run>(kind);
}
template <class T> static activation_run *activation_bwd_by(int32_t kind)
{
	return by_activation<activation_backward, T, activation_run>(kind);
}
template <class T> static activation_run *glu_by(int32_t kind)
{
	return by_activation<glu_forward, T, activation_run>(kind);
}
template <class T> static activation_run *glu_bwd_by(int32_t kind)
{
	return by_activation<glu_backward, T, activation_run>(kind);
}

#define ACTIVATION_OP(name)                                                                            \
	int cuda_##name(struct stream *s, const union op_arg *arg, const struct tensor *in,            \
	                const struct tensor *out, struct err *e)                                       \
	{                                                                                              \
		int rc = type_check(OP_##name, &in[0], e);                                             \
		return rc ? rc : BY_TYPE(in[0].dtype, name##_by)(arg->activation.kind)(s, in, out, e); \
	}
ACTIVATION_OP(activation)
ACTIVATION_OP(activation_bwd)
ACTIVATION_OP(glu)
ACTIVATION_OP(glu_bwd)

struct mask {
	union op_arg arg;
	uint32_t threshold;
	float scale;
};

/* Words of elements i, …, i+N-1 of a sample; i is a multiple of 4 where N is. */
template <int N>
__device__ __forceinline__ void mask_words(uint64_t key, uint32_t salt, uint64_t i, uint32_t (&word)[N])
{
	if constexpr (N % 4) {
		for (int k = 0; k < N; k++)
			word[k] = mask_word(key, salt, i + (uint64_t)k);
	} else {
#pragma unroll
		for (int k = 0; k < N; k += 4)
			rng_philox(key, (i + (uint64_t)k) / 4, salt, word + k);
	}
}

/* A dropped element is 0 even where x is not finite. */
__device__ __forceinline__ float masked(const struct mask &m, float x, uint32_t word)
{
	if (m.arg.dropout.jitter)
		return x * mask_jitter(m.arg.dropout.p, word);
	return word >= m.threshold ? x * m.scale : 0;
}

template <class T, int N>
__global__ void dropout_kernel(struct mask m, const T *x, const int64_t *keys, T *y, int64_t rows,
                               int64_t width)
{
	each_row(rows, [&](int64_t row) {
		struct mask_place place = mask_place_of(&m.arg, row);
		uint64_t key = (uint64_t)keys[place.sample];
		each_column<N>(width, [&](int64_t c) {
			float v[N];
			uint32_t word[N];
			load_n(x + row * width + c, v);
			mask_words(key, m.arg.dropout.salt, (uint64_t)(place.position * width + c), word);
#pragma unroll
			for (int k = 0; k < N; k++)
				v[k] = masked(m, v[k], word[k]);
			store_n(y + row * width + c, v);
		});
	});
}

template <class T>
static int dropout(struct stream *s, const union op_arg *arg, const struct tensor *in,
                   const struct tensor *out, struct err *e)
{
	int64_t rows = in[0].dim[0], width = tensor_row(&in[0]);
	struct mask m = {*arg, mask_threshold(arg->dropout.p), mask_scale(arg->dropout.p)};
	return launch(s, "dropout", warp_rows(rows), e, BY_PACK(T, width % pack<T>::N == 0, dropout_kernel),
	              m, at<T>(&in[0]), at<int64_t>(&in[1]), at<T>(&out[0]), rows, width);
}

int cuda_dropout(struct stream *s, const union op_arg *arg, const struct tensor *in, const struct tensor *out,
                 struct err *e)
{
	int rc = type_check(OP_dropout, &in[0], e);
	return rc ? rc : BY_TYPE(in[0].dtype, dropout)(s, arg, in, out, e);
}

template <class T, int N>
__global__ void row_gate_kernel(const T *x, const T *gate, T *y, int64_t rows, int64_t width)
{
	each_row(rows, [&](int64_t row) {
		float open = logistic(load(gate[row]));
		each_column<N>(width, [&](int64_t c) {
			float v[N];
			load_n(x + row * width + c, v);
#pragma unroll
			for (int k = 0; k < N; k++)
				v[k] *= open;
			store_n(y + row * width + c, v);
		});
	});
}

template <class T>
static int row_gate(struct stream *s, const struct tensor *in, const struct tensor *out, struct err *e)
{
	int64_t rows = in[0].dim[0], width = tensor_row(&in[0]);
	return launch(s, "row_gate", warp_rows(rows), e, BY_PACK(T, width % pack<T>::N == 0, row_gate_kernel),
	              at<T>(&in[0]), at<T>(&in[1]), at<T>(&out[0]), rows, width);
}

int cuda_row_gate(struct stream *s, const union op_arg *arg, const struct tensor *in,
                  const struct tensor *out, struct err *e)
{
	(void)arg;
	int rc = type_check(OP_row_gate, &in[0], e);
	return rc ? rc : BY_TYPE(in[0].dtype, row_gate)(s, in, out, e);
}

template <class T, int N>
__global__ void row_gate_bwd_kernel(const T *dy, const T *x, const T *gate, T *dx, T *dgate, int64_t rows,
                                    int64_t width)
{
	each_row(rows, [&](int64_t row) {
		float open = logistic(load(gate[row])), sum = 0;
		each_column<N>(width, [&](int64_t c) {
			float d[N], v[N];
			load_n(dy + row * width + c, d);
			load_n(x + row * width + c, v);
#pragma unroll
			for (int k = 0; k < N; k++) {
				sum += d[k] * v[k];
				d[k] *= open;
			}
			store_n(dx + row * width + c, d);
		});
		sum = warp_sum(sum);
		if (threadIdx.x % WARP == 0)
			dgate[row] = store<T>(sum * open * (1 - open));
	});
}

template <class T>
static int row_gate_bwd(struct stream *s, const struct tensor *in, const struct tensor *out, struct err *e)
{
	int64_t rows = in[0].dim[0], width = tensor_row(&in[0]);
	return launch(s, "row_gate_bwd", warp_rows(rows), e,
	              BY_PACK(T, width % pack<T>::N == 0, row_gate_bwd_kernel), at<T>(&in[0]), at<T>(&in[1]),
	              at<T>(&in[2]), at<T>(&out[0]), at<T>(&out[1]), rows, width);
}

int cuda_row_gate_bwd(struct stream *s, const union op_arg *arg, const struct tensor *in,
                      const struct tensor *out, struct err *e)
{
	(void)arg;
	int rc = type_check(OP_row_gate_bwd, &in[0], e);
	return rc ? rc : BY_TYPE(in[0].dtype, row_gate_bwd)(s, in, out, e);
}
