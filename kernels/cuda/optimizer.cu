/* AdamW (Loshchilov & Hutter 2019), as written beside enum hyper, in one pass over memory. */
#include "kernels/cuda/rows.cuh"

enum { ADAMW_N = 4, ADAMW_BLOCKS = 132 * 16 };

/* Moments are one type or the other, both at once: M that of the first, V of the second. */
template <class P, class G, class M, class V> struct state {
	P *param;
	const G *grad;
	float *master; /* NULL: the parameter is its own */
	M *m;
	V *v;
	const float *hyper;
	const double *norm2;
};

struct factors {
	float gradient, keep;
};

/* Of the gradient, that it is not clipped to more than it is; of the weight, what decay leaves. */
__device__ __forceinline__ struct factors factors_of(const float *hyper, const double *norm2, bool decay)
{
	double unscale = hyper[HYPER_UNSCALE], norm = sqrt(*norm2) * unscale;
	double clip = hyper[HYPER_CLIP] > 0 ? hyper[HYPER_CLIP] / (norm + 1e-6) : 1;
	struct factors f = {(float)(clip < 1 ? clip * unscale : unscale), decay ? 1 - hyper[HYPER_LR] * hyper[HYPER_DECAY] : 1};
	return f;
}

template <class P, class G, class M, class V>
__global__ void __launch_bounds__(BLOCK) adamw_kernel(struct state<P, G, M, V> a, int64_t count, bool decay)
{
	constexpr int N = ADAMW_N;
	__shared__ struct factors shared;
	if (threadIdx.x == 0)
		shared = factors_of(a.hyper, a.norm2, decay);
	__syncthreads();
	struct factors f = shared;
	float rate = a.hyper[HYPER_LR], eps = a.hyper[HYPER_EPS], b1 = a.hyper[HYPER_BETA1],
	      b2 = a.hyper[HYPER_BETA2], bias1 = a.hyper[HYPER_BIAS1], bias2 = a.hyper[HYPER_BIAS2];
	each_pack<N>(count, [&](int64_t i, int64_t n) {
		float w[N], g[N], m[N], v[N];
		load_n(a.grad + i, n, g);
		load_n(a.m + i, n, m);
		load_n(a.v + i, n, v);
		if (a.master)
			load_n(a.master + i, n, w);
		else
			load_n(a.param + i, n, w);
#pragma unroll
		for (int k = 0; k < N; k++) {
			g[k] *= f.gradient;
			m[k] = b1 * m[k] + (1 - b1) * g[k];
			v[k] = b2 * v[k] + (1 - b2) * g[k] * g[k];
			w[k] = f.keep * w[k] - rate * (m[k] * bias1) / (sqrtf(v[k] * bias2) + eps);
		}
		store_n(a.m + i, n, m);
		store_n(a.v + i, n, v);
		if (a.master)
			store_n(a.master + i, n, w);
		store_n(a.param + i, n, w);
	});
}

template <class P, class G, class M, class V>
static int adamw(struct stream *s, const union op_arg *arg, const struct tensor *in, struct err *e)
{
	int64_t n = tensor_count(&in[0]);
	struct state<P, G, M, V> a = {at<P>(&in[0]), at<G>(&in[1]),     at<float>(&in[2]), at<M>(&in[3]),
	                              at<V>(&in[4]), at<float>(&in[5]), at<double>(&in[6])};
	return launch(s, "adamw", flat(n, ADAMW_N, ADAMW_BLOCKS), e, adamw_kernel<P, G, M, V>, a, n,
	              (bool)arg->adamw.decay);
}

template <class P, class G>
static int adamw_by(struct stream *s, const union op_arg *arg, const struct tensor *in, struct err *e)
{
	typedef int update(struct stream *, const union op_arg *, const struct tensor *, struct err *);
	static update *const table[2][2] = {{adamw<P, G, float, float>, adamw<P, G, float, bf16>},
	                                    {adamw<P, G, bf16, float>, adamw<P, G, bf16, bf16>}};
	return table[in[3].dtype == DT_bf16][in[4].dtype == DT_bf16](s, arg, in, e);
}

/* EXIT_INTERNAL where a moment is neither f32 nor bf16. */
static int moment_check(const struct tensor *t, struct err *e)
{
	return t->dtype == DT_f32 || t->dtype == DT_bf16
	               ? 0
	               : err_set(e, EXIT_INTERNAL, "cuda: adamw with a moment of %s; allowed: f32, bf16",
	                         dtype_rows[t->dtype].name);
}

int cuda_adamw(struct stream *s, const union op_arg *arg, const struct tensor *in, const struct tensor *out,
               struct err *e)
{
	(void)out;
	int rc = type_check(OP_adamw, &in[0], e);
	rc = rc ? rc : type_check(OP_adamw, &in[1], e);
	rc = rc ? rc : moment_check(&in[3], e);
	rc = rc ? rc : moment_check(&in[4], e);
	return rc ? rc : BY_TYPES(in[0].dtype, in[1].dtype, adamw_by)(s, arg, in, e);
}
