#include "kernels/cpu/cpu.h"

/* y[N,M] <- x[N,K] w[M,K]' + bias[M]? */
int cpu_ref_linear(struct stream *s, const union op_arg *arg, const struct tensor *in,
                   const struct tensor *out, struct err *e)
{
	(void)s, (void)arg, (void)e;
	const struct tensor *x = &in[0], *w = &in[1], *bias = &in[2];
	int64_t rows = x->dim[0], depth = tensor_row(x), width = w->dim[0];
	for (int64_t n = 0; n < rows; n++)
		for (int64_t m = 0; m < width; m++) {
			double sum = bias->data ? cpu_get(bias, m) : 0;
			for (int64_t k = 0; k < depth; k++)
				sum += cpu_get(x, n * depth + k) * cpu_get(w, m * depth + k);
			cpu_set(&out[0], n * width + m, sum);
		}
	return 0;
}

/* dx[N,K] <- dy[N,M] w[M,K] */
int cpu_ref_linear_dx(struct stream *s, const union op_arg *arg, const struct tensor *in,
                      const struct tensor *out, struct err *e)
{
	(void)s, (void)arg, (void)e;
	const struct tensor *dy = &in[0], *w = &in[1];
	int64_t rows = dy->dim[0], width = tensor_row(dy), depth = tensor_row(w);
	for (int64_t n = 0; n < rows; n++)
		for (int64_t k = 0; k < depth; k++) {
			double sum = 0;
			for (int64_t m = 0; m < width; m++)
				sum += cpu_get(dy, n * width + m) * cpu_get(w, m * depth + k);
			cpu_set(&out[0], n * depth + k, sum);
		}
	return 0;
}

/* dw[M,K] (acc) <- dy[N,M]' x[N,K] */
int cpu_ref_linear_dw(struct stream *s, const union op_arg *arg, const struct tensor *in,
                      const struct tensor *out, struct err *e)
{
	(void)s, (void)arg, (void)e;
	const struct tensor *dy = &in[0], *x = &in[1];
	int64_t rows = dy->dim[0], width = tensor_row(dy), depth = tensor_row(x);
	for (int64_t m = 0; m < width; m++)
		for (int64_t k = 0; k < depth; k++) {
			double sum = 0;
			for (int64_t n = 0; n < rows; n++)
				sum += cpu_get(dy, n * width + m) * cpu_get(x, n * depth + k);
			cpu_accumulate(&out[0], m * depth + k, sum);
		}
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
