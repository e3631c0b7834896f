#include "kernels/cpu/cpu.h"
#include "kernels/fp8.h"

#include <stdlib.h>

/* An operand in double precision, rounded to 8 bits where the layer says so; the caller frees it. */
static double *operand(const struct tensor *t, const union op_arg *arg, enum fp8_format format)
{
	int64_t n = tensor_count(t);
	double *x = malloc((size_t)(n + 1) * sizeof *x), most = 0;
	ASSERT(x);
	for (int64_t i = 0; i < n; i++) {
		x[i] = cpu_get(t, i);
		most = fabs(x[i]) > most ? fabs(x[i]) : most;
	}
	float scale = fp8_scale((float)most, format);
	for (int64_t i = 0; i < n && arg->linear.fp8; i++)
		x[i] = (double)fp8_round((float)x[i] * scale, format) / scale;
	return x;
}

/* y[N,M] <- x[N,K] w[M,K]' + bias[M]? */
int cpu_ref_linear(struct stream *s, const union op_arg *arg, const struct tensor *in,
                   const struct tensor *out, struct err *e)
{
	(void)s, (void)e;
	const struct tensor *bias = &in[2];
	int64_t rows = in[0].dim[0], depth = tensor_row(&in[0]), width = in[1].dim[0];
	double *x = operand(&in[0], arg, FP8_E4M3), *w = operand(&in[1], arg, FP8_E4M3);
	for (int64_t n = 0; n < rows; n++)
		for (int64_t m = 0; m < width; m++) {
			double sum = bias->data ? cpu_get(bias, m) : 0;
			for (int64_t k = 0; k < depth; k++)
				sum += x[n * depth + k] * w[m * depth + k];
			cpu_set(&out[0], n * width + m, sum);
		}
	free(x);
	free(w);
	return 0;
}

/* dx[N,K] <- dy[N,M] w[M,K] */
int cpu_ref_linear_dx(struct stream *s, const union op_arg *arg, const struct tensor *in,
                      const struct tensor *out, struct err *e)
{
	(void)s, (void)e;
	int64_t rows = in[0].dim[0], width = tensor_row(&in[0]), depth = tensor_row(&in[1]);
	double *dy = operand(&in[0], arg, FP8_E5M2), *w = operand(&in[1], arg, FP8_E4M3);
	for (int64_t n = 0; n < rows; n++)
		for (int64_t k = 0; k < depth; k++) {
			double sum = 0;
			for (int64_t m = 0; m < width; m++)
				sum += dy[n * width + m] * w[m * depth + k];
			cpu_set(&out[0], n * depth + k, sum);
		}
	free(dy);
	free(w);
	return 0;
}

/* dw[M,K] (acc) <- dy[N,M]' x[N,K] */
int cpu_ref_linear_dw(struct stream *s, const union op_arg *arg, const struct tensor *in,
                      const struct tensor *out, struct err *e)
{
	(void)s, (void)e;
	int64_t rows = in[0].dim[0], width = tensor_row(&in[0]), depth = tensor_row(&in[1]);
	double *dy = operand(&in[0], arg, FP8_E5M2), *x = operand(&in[1], arg, FP8_E4M3);
	for (int64_t m = 0; m < width; m++)
		for (int64_t k = 0; k < depth; k++) {
			double sum = 0;
			for (int64_t n = 0; n < rows; n++)
				sum += dy[n * width + m] * x[n * depth + k];
			cpu_accumulate(&out[0], m * depth + k, sum);
		}
	free(dy);
	free(x);
	return 0;
}

/* db[M] (acc) <- column sums of dy[N,M] */
int cpu_ref_bias_grad(struct stream *s, const union op_arg *arg, const struct tensor *in,
                      const struct tensor *out, struct err *e)
{
	(void)s, (void)arg, (void)e;
	int64_t rows = in[0].dim[0], width = tensor_row(&in[0]);
	for (int64_t m = 0; m < width; m++) {
		double sum = 0;
		for (int64_t n = 0; n < rows; n++)
			sum += cpu_get(&in[0], n * width + m);
		cpu_accumulate(&out[0], m, sum);
	}
	return 0;
}

/* y[N,M], h[N,M] <- x[N,K], w[M,K], bias[M]? */
int cpu_ref_linear_act(struct stream *s, const union op_arg *arg, const struct tensor *in,
                       const struct tensor *out, struct err *e)
{
	union op_arg act = {.activation = {arg->linear.kind}};
	int rc = cpu_ref_linear(s, arg, in, &out[1], e);
	return rc ? rc : cpu_ref_activation(s, &act, &out[1], &out[0], e);
}

/* dh[N,K] <- dy[N,M], w[M,K], h[N,K] */
int cpu_ref_linear_dx_act(struct stream *s, const union op_arg *arg, const struct tensor *in,
                          const struct tensor *out, struct err *e)
{
	union op_arg act = {.activation = {arg->linear.kind}};
	struct tensor both[2] = {out[0], in[2]};
	int rc = cpu_ref_linear_dx(s, arg, in, out, e);
	return rc ? rc : cpu_ref_activation_bwd(s, &act, both, out, e);
}

/* dw[M,K] (acc), db[M] (acc) <- dy[N,M], x[N,K] */
int cpu_ref_linear_dw_bias(struct stream *s, const union op_arg *arg, const struct tensor *in,
                           const struct tensor *out, struct err *e)
{
	int rc = cpu_ref_linear_dw(s, arg, in, out, e);
	return rc ? rc : cpu_ref_bias_grad(s, arg, in, &out[1], e);
}
