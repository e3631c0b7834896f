#include "kernels/cpu/cpu.h"

#include <math.h>

/* LayerNorm: Ba, Kiros, Hinton 2016. mean and rstd per row; y = (x - mean) · rstd · w + b. */
int cpu_ref_layernorm(struct stream *s, const union op_arg *arg, const struct tensor *in,
                      const struct tensor *out, struct err *e)
{
	(void)s, (void)e;
	int64_t rows = in[0].dim[0], width = tensor_row(&in[0]);
	for (int64_t n = 0; n < rows; n++) {
		double sum = 0, squares = 0;
		for (int64_t c = 0; c < width; c++)
			sum += cpu_get(&in[0], n * width + c);
		double mean = sum / (double)width;
		for (int64_t c = 0; c < width; c++) {
			double d = cpu_get(&in[0], n * width + c) - mean;
			squares += d * d;
		}
		double rstd = 1 / sqrt(squares / (double)width + arg->norm.eps);
		for (int64_t c = 0; c < width; c++) {
			double x = (cpu_get(&in[0], n * width + c) - mean) * rstd;
			cpu_set(&out[0], n * width + c, x * cpu_get(&in[1], c) + cpu_get(&in[2], c));
		}
		cpu_set(&out[1], n, mean);
		cpu_set(&out[2], n, rstd);
	}
	return 0;
}

/* A row of a norm's input gradient: with g = dy · w and the normalised row h,
 * dx = rstd · (g - mean(g) - h · mean(g h)) + addend; RMSNorm has no mean(g). */
struct norm_row {
	const struct tensor *dy, *x, *w, *addend, *dx;
	int64_t at, width;
	double mean, rstd;
	int centred;
};

static double row_gradient(const struct norm_row *r, int64_t c)
{
	return cpu_get(r->dy, r->at + c) * cpu_get(r->w, c);
}

static double row_normal(const struct norm_row *r, int64_t c)
{
	return (cpu_get(r->x, r->at + c) - r->mean) * r->rstd;
}

static void row_backward(const struct norm_row *r)
{
	double g_sum = 0, gh_sum = 0;
	for (int64_t c = 0; c < r->width; c++) {
		g_sum += r->centred ? row_gradient(r, c) : 0;
		gh_sum += row_gradient(r, c) * row_normal(r, c);
	}
	for (int64_t c = 0; c < r->width; c++) {
		double dx = row_gradient(r, c) - (g_sum + row_normal(r, c) * gh_sum) / (double)r->width;
		double more = r->addend && r->addend->data ? cpu_get(r->addend, r->at + c) : 0;
		cpu_set(r->dx, r->at + c, dx * r->rstd + more);
	}
}

int cpu_ref_layernorm_bwd(struct stream *s, const union op_arg *arg, const struct tensor *in,
                          const struct tensor *out, struct err *e)
{
	(void)s, (void)arg, (void)e;
	int64_t rows = in[0].dim[0], width = tensor_row(&in[0]);
	struct norm_row r = {.dy = &in[0],
	                     .x = &in[1],
	                     .w = &in[2],
	                     .addend = &in[5],
	                     .dx = &out[0],
	                     .width = width,
	                     .centred = 1};
	for (int64_t c = 0; c < width; c++) {
		double dw = 0, db = 0;
		for (int64_t n = 0; n < rows; n++) {
			double dy = cpu_get(&in[0], n * width + c);
			dw += dy * (cpu_get(&in[1], n * width + c) - cpu_get(&in[3], n)) * cpu_get(&in[4], n);
			db += dy;
		}
		cpu_accumulate(&out[1], c, dw);
		cpu_accumulate(&out[2], c, db);
	}
	for (int64_t n = 0; n < rows; n++) {
		r.at = n * width;
		r.mean = cpu_get(&in[3], n);
		r.rstd = cpu_get(&in[4], n);
		row_backward(&r);
	}
	return 0;
}

/* width elements from `at` on: y = x · rstd · w, rstd = 1 / sqrt(mean(x²) + eps). Returns rstd. */
static double rms_row(const struct tensor *x, const struct tensor *w, const struct tensor *y, int64_t at,
                      int64_t width, double eps)
{
	double squares = 0;
	for (int64_t c = 0; c < width; c++)
		squares += cpu_get(x, at + c) * cpu_get(x, at + c);
	double rstd = 1 / sqrt(squares / (double)width + eps);
	for (int64_t c = 0; c < width; c++)
		cpu_set(y, at + c, cpu_get(x, at + c) * rstd * cpu_get(w, c));
	return rstd;
}

/* RMSNorm: Zhang & Sennrich 2019. */
int cpu_ref_rmsnorm(struct stream *s, const union op_arg *arg, const struct tensor *in,
                    const struct tensor *out, struct err *e)
{
	(void)s, (void)e;
	int64_t rows = in[0].dim[0], width = tensor_row(&in[0]);
	for (int64_t n = 0; n < rows; n++)
		cpu_set(&out[1], n, rms_row(&in[0], &in[1], &out[0], n * width, width, arg->norm.eps));
	return 0;
}

int cpu_ref_rmsnorm_bwd(struct stream *s, const union op_arg *arg, const struct tensor *in,
                        const struct tensor *out, struct err *e)
{
	(void)s, (void)arg, (void)e;
	int64_t rows = in[0].dim[0], width = tensor_row(&in[0]);
	struct norm_row r = {
	        .dy = &in[0], .x = &in[1], .w = &in[2], .addend = &in[4], .dx = &out[0], .width = width};
	for (int64_t c = 0; c < width; c++) {
		double dw = 0;
		for (int64_t n = 0; n < rows; n++)
			dw += cpu_get(&in[0], n * width + c) * cpu_get(&in[1], n * width + c) *
			      cpu_get(&in[3], n);
		cpu_accumulate(&out[1], c, dw);
	}
	for (int64_t n = 0; n < rows; n++) {
		r.at = n * width;
		r.rstd = cpu_get(&in[3], n);
		row_backward(&r);
	}
	return 0;
}

/* Query heads by wq, key heads by wk, value heads unchanged. */
int cpu_ref_qk_norm(struct stream *s, const union op_arg *arg, const struct tensor *in,
                    const struct tensor *out, struct err *e)
{
	(void)s, (void)e;
	int64_t heads = arg->norm.heads, groups = arg->norm.groups, size = arg->norm.head_dim;
	int64_t row = (heads + 2 * groups) * size, normed = heads + groups;
	for (int64_t n = 0; n < in[0].dim[0]; n++) {
		for (int64_t h = 0; h < normed; h++) {
			double rstd = rms_row(&in[0], &in[h < heads ? 1 : 2], &out[0], n * row + h * size,
			                      size, arg->norm.eps);
			cpu_set(&out[1], n * normed + h, rstd);
		}
		for (int64_t c = normed * size; c < row; c++)
			cpu_set(&out[0], n * row + c, cpu_get(&in[0], n * row + c));
	}
	return 0;
}

/* dw[c] (acc) of heads [first, end) summed over all rows. */
static void qk_weight_backward(const struct tensor *in, const struct tensor *dw, int64_t first, int64_t end,
                               int64_t normed, int64_t size)
{
	int64_t row = tensor_row(&in[0]);
	for (int64_t c = 0; c < size; c++) {
		double sum = 0;
		for (int64_t n = 0; n < in[0].dim[0]; n++)
			for (int64_t h = first; h < end; h++) {
				int64_t at = n * row + h * size + c;
				sum += cpu_get(&in[0], at) * cpu_get(&in[1], at) *
				       cpu_get(&in[4], n * normed + h);
			}
		cpu_accumulate(dw, c, sum);
	}
}

int cpu_ref_qk_norm_bwd(struct stream *s, const union op_arg *arg, const struct tensor *in,
                        const struct tensor *out, struct err *e)
{
	(void)s, (void)e;
	int64_t heads = arg->norm.heads, groups = arg->norm.groups, size = arg->norm.head_dim;
	int64_t row = (heads + 2 * groups) * size, normed = heads + groups;
	struct norm_row r = {.dy = &in[0], .x = &in[1], .dx = &out[0], .width = size};
	for (int64_t n = 0; n < in[0].dim[0]; n++) {
		for (int64_t h = 0; h < normed; h++) {
			r.w = &in[h < heads ? 2 : 3];
			r.at = n * row + h * size;
			r.rstd = cpu_get(&in[4], n * normed + h);
			row_backward(&r);
		}
		for (int64_t c = normed * size; c < row; c++)
			cpu_set(&out[0], n * row + c, cpu_get(&in[0], n * row + c));
	}
	qk_weight_backward(in, &out[1], 0, heads, normed, size);
	qk_weight_backward(in, &out[2], heads, normed, normed, size);
	return 0;
}
