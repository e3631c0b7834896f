/* AdamW in one pass over memory. */
#include "kernels/cpu/cpu.h"

#include <math.h>
#include <string.h>

struct job {
	const struct tensor *in;
	float gradient_scale, keep, rate, beta1, beta2, eps, bias1, bias2;
};

CPU_CLONES static void adamw_row(const struct job *h, float *w, const float *grad, float *m, float *v,
                                 int64_t n)
{
	float gradient_scale = h->gradient_scale, keep = h->keep, rate = h->rate, eps = h->eps;
	float b1 = h->beta1, b2 = h->beta2, bias1 = h->bias1, bias2 = h->bias2;
#pragma omp simd
	for (int64_t i = 0; i < n; i++) {
		float g = grad[i] * gradient_scale;
		float m1 = b1 * m[i] + (1 - b1) * g, v1 = b2 * v[i] + (1 - b2) * g * g;
		m[i] = m1;
		v[i] = v1;
		w[i] = keep * w[i] - rate * (m1 * bias1) / (sqrtf(v1 * bias2) + eps);
	}
}

static void adamw_part(struct stream *s, void *job, int64_t begin, int64_t end, int part)
{
	(void)s, (void)part;
	const struct job *j = job;
	const struct tensor *param = &j->in[0], *w = j->in[2].data ? &j->in[2] : param;
	float weight[CPU_BLOCK], grad[CPU_BLOCK], first[CPU_BLOCK], second[CPU_BLOCK];
	for (int64_t i = begin; i < end; i += CPU_BLOCK) {
		int64_t n = end - i < CPU_BLOCK ? end - i : CPU_BLOCK;
		float *at = (float *)cpu_read(w, i, n, weight);
		float *m = (float *)cpu_read(&j->in[3], i, n, first),
		      *v = (float *)cpu_read(&j->in[4], i, n, second);
		adamw_row(j, at, cpu_read(&j->in[1], i, n, grad), m, v, n);
		cpu_write(&j->in[3], i, n, m);
		cpu_write(&j->in[4], i, n, v);
		if (param->dtype == DT_f32 && w != param)
			memcpy((float *)param->data + i, at, (size_t)n * sizeof *at);
		cpu_write(param, i, n, at);
	}
}

int cpu_fast_adamw(struct stream *s, const union op_arg *arg, const struct tensor *in,
                   const struct tensor *out, struct err *e)
{
	(void)out, (void)e;
	const float *h = in[5].data;
	double unscale = h[HYPER_UNSCALE], norm = sqrt(cpu_get(&in[6], 0)) * unscale;
	double clip = h[HYPER_CLIP] > 0 ? h[HYPER_CLIP] / (norm + 1e-6) : 1;
	struct job j = {.in = in,
	                .gradient_scale = (float)(clip < 1 ? clip * unscale : unscale),
	                .keep = arg->adamw.decay ? 1 - h[HYPER_LR] * h[HYPER_DECAY] : 1,
	                .rate = h[HYPER_LR],
	                .beta1 = h[HYPER_BETA1],
	                .beta2 = h[HYPER_BETA2],
	                .eps = h[HYPER_EPS],
	                .bias1 = h[HYPER_BIAS1],
	                .bias2 = h[HYPER_BIAS2]};
	cpu_parallel(s, tensor_count(&in[0]), 16384, adamw_part, &j);
	return 0;
}
