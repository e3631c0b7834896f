#include "kernels/cpu/cpu.h"

#include <math.h>
#include <string.h>

#include "kernels/cpu/activation.h"
#include "kernels/cpu/mask.h"

int cpu_ref_add(struct stream *s, const union op_arg *arg, const struct tensor *in, const struct tensor *out,
                struct err *e)
{
	(void)s, (void)arg, (void)e;
	int64_t n = tensor_count(&in[0]);
	for (int64_t i = 0; i < n; i++)
		cpu_set(&out[0], i, cpu_get(&in[0], i) + cpu_get(&in[1], i));
	return 0;
}

int cpu_ref_bias_add(struct stream *s, const union op_arg *arg, const struct tensor *in,
                     const struct tensor *out, struct err *e)
{
	(void)s, (void)arg, (void)e;
	int64_t n = tensor_count(&in[0]), width = tensor_row(&in[0]);
	for (int64_t i = 0; i < n; i++)
		cpu_set(&out[0], i, cpu_get(&in[0], i) + cpu_get(&in[1], i % width));
	return 0;
}

int cpu_ref_cast(struct stream *s, const union op_arg *arg, const struct tensor *in, const struct tensor *out,
                 struct err *e)
{
	(void)s, (void)arg, (void)e;
	int64_t n = tensor_count(&in[0]);
	for (int64_t i = 0; i < n; i++)
		cpu_set(&out[0], i, cpu_get(&in[0], i));
	return 0;
}

int cpu_ref_accumulate(struct stream *s, const union op_arg *arg, const struct tensor *in,
                       const struct tensor *out, struct err *e)
{
	(void)s, (void)arg, (void)e;
	int64_t n = tensor_count(&in[0]);
	const uint32_t *x = in[0].data;
	uint32_t *y = out[0].data;
	for (int64_t i = 0; i < n; i++)
		if (in[0].dtype == DT_i32)
			y[i] = out[0].acc ? y[i] + x[i] : x[i];
		else
			cpu_accumulate(&out[0], i, cpu_get(&in[0], i));
	return 0;
}

int cpu_ref_zero(struct stream *s, const union op_arg *arg, const struct tensor *in, const struct tensor *out,
                 struct err *e)
{
	(void)s, (void)arg, (void)in, (void)e;
	memset(out[0].data, 0, (size_t)tensor_bytes(&out[0]));
	return 0;
}

/* value and slope of each activation, rows of ACTIVATIONS */
static const double gelu_a = 0.7978845608028654, gelu_b = 0.044715;

static double gelu_value(double x)
{
	return 0.5 * x * (1 + tanh(gelu_a * (x + gelu_b * x * x * x)));
}

static double gelu_slope(double x)
{
	double t = tanh(gelu_a * (x + gelu_b * x * x * x));
	return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * gelu_a * (1 + 3 * gelu_b * x * x);
}

static double gelu_exact_value(double x)
{
	return 0.5 * x * erfc(-x * M_SQRT1_2);
}

static double gelu_exact_slope(double x)
{
	return 0.5 * erfc(-x * M_SQRT1_2) + x * exp(-0.5 * x * x) * 0.3989422804014327;
}

static double relu_value(double x)
{
	return x < 0 ? 0 : x;
}

static double relu_slope(double x)
{
	return x > 0;
}

static double squared_relu_value(double x)
{
	return x < 0 ? 0 : x * x;
}

static double squared_relu_slope(double x)
{
	return x < 0 ? 0 : 2 * x;
}

static double silu_value(double x)
{
	return x / (1 + exp(-x));
}

static double silu_slope(double x)
{
	double sigmoid = 1 / (1 + exp(-x));
	return sigmoid * (1 + x * (1 - sigmoid));
}

const struct activation_math cpu_activation_math[ACT_COUNT] = {
#define ACTIVATION_ROW(name, doc) {name##_value, name##_slope},
        ACTIVATIONS(ACTIVATION_ROW)
#undef ACTIVATION_ROW
};

int cpu_ref_activation(struct stream *s, const union op_arg *arg, const struct tensor *in,
                       const struct tensor *out, struct err *e)
{
	(void)s, (void)e;
	int64_t n = tensor_count(&in[0]);
	for (int64_t i = 0; i < n; i++)
		cpu_set(&out[0], i, cpu_activation_math[arg->activation.kind].value(cpu_get(&in[0], i)));
	return 0;
}

int cpu_ref_activation_bwd(struct stream *s, const union op_arg *arg, const struct tensor *in,
                           const struct tensor *out, struct err *e)
{
	(void)s, (void)e;
	int64_t n = tensor_count(&in[0]);
	for (int64_t i = 0; i < n; i++) {
		double slope = cpu_activation_math[arg->activation.kind].slope(cpu_get(&in[1], i));
		cpu_set(&out[0], i, cpu_get(&in[0], i) * slope);
	}
	return 0;
}

/* Gated linear units: Shazeer 2020. A row of x is gate | up. */
int cpu_ref_glu(struct stream *s, const union op_arg *arg, const struct tensor *in, const struct tensor *out,
                struct err *e)
{
	(void)s, (void)e;
	int64_t rows = out[0].dim[0], width = tensor_row(&out[0]);
	for (int64_t n = 0; n < rows; n++)
		for (int64_t f = 0; f < width; f++) {
			double gate = cpu_get(&in[0], 2 * n * width + f);
			double up = cpu_get(&in[0], (2 * n + 1) * width + f);
			cpu_set(&out[0], n * width + f,
			        cpu_activation_math[arg->activation.kind].value(gate) * up);
		}
	return 0;
}

int cpu_ref_glu_bwd(struct stream *s, const union op_arg *arg, const struct tensor *in,
                    const struct tensor *out, struct err *e)
{
	(void)s, (void)e;
	int64_t rows = in[0].dim[0], width = tensor_row(&in[0]);
	for (int64_t n = 0; n < rows; n++)
		for (int64_t f = 0; f < width; f++) {
			int64_t at = 2 * n * width + f;
			double dy = cpu_get(&in[0], n * width + f);
			double gate = cpu_get(&in[1], at), up = cpu_get(&in[1], at + width);
			cpu_set(&out[0], at, dy * up * cpu_activation_math[arg->activation.kind].slope(gate));
			cpu_set(&out[0], at + width,
			        dy * cpu_activation_math[arg->activation.kind].value(gate));
		}
	return 0;
}

int cpu_ref_dropout(struct stream *s, const union op_arg *arg, const struct tensor *in,
                    const struct tensor *out, struct err *e)
{
	(void)s, (void)e;
	const float p = arg->dropout.p;
	int64_t width = tensor_row(&in[0]), n = tensor_count(&in[0]);
	for (int64_t i = 0; i < n; i++) {
		struct mask_place place = mask_place_of(arg, i / width);
		uint64_t key = (uint64_t)((const int64_t *)in[1].data)[place.sample];
		uint32_t word =
		        mask_word(key, arg->dropout.salt, (uint64_t)(place.position * width + i % width));
		double x = cpu_get(&in[0], i), kept = word >= mask_threshold(p) ? x * mask_scale(p) : 0;
		cpu_set(&out[0], i, arg->dropout.jitter ? x * mask_jitter(p, word) : kept);
	}
	return 0;
}

int cpu_ref_square_sum(struct stream *s, const union op_arg *arg, const struct tensor *in,
                       const struct tensor *out, struct err *e)
{
	(void)s, (void)e;
	int64_t n = arg->square_sum.counts ? tensor_count(&in[0]) : 0;
	double sum = 0;
	for (int64_t i = 0; i < n; i++)
		sum += cpu_get(&in[0], i) * cpu_get(&in[0], i);
	cpu_accumulate(&out[0], 0, sum);
	return 0;
}

/* AdamW: Loshchilov & Hutter 2019, as written beside enum hyper. */
int cpu_ref_adamw(struct stream *s, const union op_arg *arg, const struct tensor *in,
                  const struct tensor *out, struct err *e)
{
	(void)s, (void)out, (void)e;
	const struct tensor *param = &in[0], *grad = &in[1], *m = &in[3], *v = &in[4];
	const struct tensor *w = in[2].data ? &in[2] : param;
	double h[HYPER_COUNT];
	for (int i = 0; i < HYPER_COUNT; i++)
		h[i] = cpu_get(&in[5], i);
	double norm = sqrt(cpu_get(&in[6], 0)) * h[HYPER_UNSCALE];
	double clip = h[HYPER_CLIP] > 0 ? h[HYPER_CLIP] / (norm + 1e-6) : 1;
	double keep = 1 - (arg->adamw.decay ? h[HYPER_LR] * h[HYPER_DECAY] : 0);
	int64_t n = tensor_count(param);
	for (int64_t i = 0; i < n; i++) {
		double g = cpu_get(grad, i) * h[HYPER_UNSCALE] * (clip < 1 ? clip : 1);
		double m1 = h[HYPER_BETA1] * cpu_get(m, i) + (1 - h[HYPER_BETA1]) * g;
		double v1 = h[HYPER_BETA2] * cpu_get(v, i) + (1 - h[HYPER_BETA2]) * g * g;
		double step = m1 * h[HYPER_BIAS1] / (sqrt(v1 * h[HYPER_BIAS2]) + h[HYPER_EPS]);
		double w1 = cpu_get(w, i) * keep - h[HYPER_LR] * step;
		cpu_set(m, i, m1);
		cpu_set(v, i, v1);
		cpu_set(w, i, w1);
		cpu_set(param, i, cpu_get(w, i));
	}
	return 0;
}
