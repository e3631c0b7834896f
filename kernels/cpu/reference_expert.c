#include <math.h>
#include <string.h>

#include "kernels/cpu/activation.h"
#include "kernels/cpu/cpu.h"
#include "op/experts.h"

static double gate(const struct tensor *g, int64_t row)
{
	return 1 / (1 + exp(-cpu_get(g, row)));
}

int cpu_ref_row_gate(struct stream *s, const union op_arg *arg, const struct tensor *in,
                     const struct tensor *out, struct err *e)
{
	(void)s, (void)arg, (void)e;
	int64_t n = tensor_count(&in[0]), width = tensor_row(&in[0]);
	for (int64_t i = 0; i < n; i++)
		cpu_set(&out[0], i, cpu_get(&in[0], i) * gate(&in[1], i / width));
	return 0;
}

int cpu_ref_row_gate_bwd(struct stream *s, const union op_arg *arg, const struct tensor *in,
                         const struct tensor *out, struct err *e)
{
	(void)s, (void)arg, (void)e;
	int64_t rows = in[0].dim[0], width = tensor_row(&in[0]);
	for (int64_t n = 0; n < rows; n++) {
		double open = gate(&in[2], n), sum = 0;
		for (int64_t i = n * width; i < (n + 1) * width; i++) {
			sum += cpu_get(&in[0], i) * cpu_get(&in[1], i);
			cpu_set(&out[0], i, cpu_get(&in[0], i) * open);
		}
		cpu_set(&out[1], n, sum * open * (1 - open));
	}
	return 0;
}

/* Row `from` of x, which has the shape of a row of y, goes to row `to` of y. */
static void copy_row(const struct tensor *x, int64_t from, const struct tensor *y, int64_t to)
{
	size_t bytes = (size_t)tensor_row(x) * dtype_rows[x->dtype].bytes;
	memcpy((char *)y->data + (size_t)to * bytes, (const char *)x->data + (size_t)from * bytes, bytes);
}

int cpu_ref_permute(struct stream *s, const union op_arg *arg, const struct tensor *in,
                    const struct tensor *out, struct err *e)
{
	(void)s, (void)arg;
	if (slot_check("permute", &in[1], out[0].dim[0], e))
		return e->code;
	const int32_t *slot = in[1].data;
	int64_t choices = tensor_row(&in[1]);
	memset(out[0].data, 0, (size_t)tensor_bytes(&out[0]));
	for (int64_t i = 0; i < tensor_count(&in[1]); i++)
		if (slot[i] >= 0)
			copy_row(&in[0], i / choices, &out[0], slot[i]);
	return 0;
}

int cpu_ref_unpermute(struct stream *s, const union op_arg *arg, const struct tensor *in,
                      const struct tensor *out, struct err *e)
{
	(void)s, (void)arg;
	if (slot_check("unpermute", &in[1], in[0].dim[0], e))
		return e->code;
	const int32_t *slot = in[1].data;
	int64_t choices = tensor_row(&in[1]), width = tensor_row(&out[0]);
	for (int64_t n = 0; n < out[0].dim[0]; n++)
		for (int64_t c = 0; c < width; c++) {
			double sum = 0;
			for (int64_t i = n * choices; i < (n + 1) * choices; i++)
				sum += slot[i] < 0 ? 0 : cpu_get(&in[0], slot[i] * width + c);
			cpu_set(&out[0], n * width + c, sum);
		}
	return 0;
}

int cpu_ref_permute_probs(struct stream *s, const union op_arg *arg, const struct tensor *in,
                          const struct tensor *out, struct err *e)
{
	(void)s;
	bool back = arg->permute.back;
	if (slot_check("permute_probs", &in[1], tensor_count(back ? &in[0] : &out[0]), e))
		return e->code;
	const int32_t *slot = in[1].data;
	int64_t choices = tensor_count(&in[1]);
	if (!back)
		memset(out[0].data, 0, (size_t)tensor_bytes(&out[0]));
	for (int64_t i = 0; i < choices; i++)
		if (back)
			cpu_set(&out[0], i, slot[i] < 0 ? 0 : cpu_get(&in[0], slot[i]));
		else if (slot[i] >= 0)
			cpu_set(&out[0], slot[i], cpu_get(&in[0], i));
	return 0;
}

/* Where the rows of rank r for own expert i are among those of all ranks, in order of rank. */
static int64_t sent_first(const union op_arg *arg, const struct tensor *sizes, int32_t r, int32_t i)
{
	const int32_t *size = (const int32_t *)sizes->data + arg->expert.first;
	int64_t first = 0, experts = sizes->dim[1];
	for (int32_t k = 0; k < r; k++)
		for (int32_t l = 0; l < arg->expert.count; l++)
			first += size[k * experts + l];
	for (int32_t l = 0; l < i; l++)
		first += size[r * experts + l];
	return first;
}

int cpu_ref_regroup(struct stream *s, const union op_arg *arg, const struct tensor *in,
                    const struct tensor *out, struct err *e)
{
	(void)s;
	bool back = arg->expert.back;
	const struct tensor *sizes = &in[1];
	const int32_t *size = (const int32_t *)sizes->data + arg->expert.first;
	if (regroup_check(arg, sizes, (back ? out : in)->dim[0], (back ? in : out)->dim[0], e))
		return e->code;
	size_t row = (size_t)tensor_row(out) * dtype_rows[out->dtype].bytes;
	for (struct expert_walk w = expert_begin(arg, sizes); expert_next(&w);) {
		int64_t to = w.first;
		for (int32_t r = 0; r < sizes->dim[0]; r++) {
			int64_t from = sent_first(arg, sizes, r, w.i);
			for (int32_t k = 0; k < size[(int64_t)r * sizes->dim[1] + w.i]; k++, from++, to++)
				copy_row(in, back ? to : from, out, back ? from : to);
		}
		if (!back)
			memset((char *)out->data + (size_t)to * row, 0,
			       (size_t)(w.first + w.rows - to) * row);
	}
	return 0;
}

/* y[M,F] <- x[M,C], w[e·F,C] */
int cpu_ref_grouped_linear(struct stream *s, const union op_arg *arg, const struct tensor *in,
                           const struct tensor *out, struct err *e)
{
	(void)s;
	const struct tensor *x = &in[0], *w = &in[1];
	if (grouped_check("grouped_linear", arg, &in[2], x, out, w, e))
		return e->code;
	int64_t depth = tensor_row(x), width = tensor_row(out);
	for (struct expert_walk k = expert_begin(arg, &in[2]); expert_next(&k);)
		for (int64_t n = k.first; n < k.first + k.rows; n++)
			for (int64_t f = 0; f < width; f++) {
				double sum = 0;
				for (int64_t c = 0; c < depth; c++)
					sum += cpu_get(x, n * depth + c) *
					       cpu_get(w, (k.i * width + f) * depth + c);
				cpu_set(out, n * width + f, sum);
			}
	return 0;
}

/* dx[M,C] <- dy[M,F], w[e·F,C] */
int cpu_ref_grouped_dx(struct stream *s, const union op_arg *arg, const struct tensor *in,
                       const struct tensor *out, struct err *e)
{
	(void)s;
	const struct tensor *dy = &in[0], *w = &in[1];
	if (grouped_check("grouped_dx", arg, &in[2], out, dy, w, e))
		return e->code;
	int64_t depth = tensor_row(out), width = tensor_row(dy);
	for (struct expert_walk k = expert_begin(arg, &in[2]); expert_next(&k);)
		for (int64_t n = k.first; n < k.first + k.rows; n++)
			for (int64_t c = 0; c < depth; c++) {
				double sum = 0;
				for (int64_t f = 0; f < width; f++)
					sum += cpu_get(dy, n * width + f) *
					       cpu_get(w, (k.i * width + f) * depth + c);
				cpu_set(out, n * depth + c, sum);
			}
	return 0;
}

/* dw[e·F,C] (acc) <- dy[M,F], x[M,C] */
int cpu_ref_grouped_dw(struct stream *s, const union op_arg *arg, const struct tensor *in,
                       const struct tensor *out, struct err *e)
{
	(void)s;
	const struct tensor *dy = &in[0], *x = &in[1];
	if (grouped_check("grouped_dw", arg, &in[2], x, dy, out, e))
		return e->code;
	int64_t depth = tensor_row(x), width = tensor_row(dy);
	for (struct expert_walk k = expert_begin(arg, &in[2]); expert_next(&k);)
		for (int64_t f = 0; f < width; f++)
			for (int64_t c = 0; c < depth; c++) {
				double sum = 0;
				for (int64_t n = k.first; n < k.first + k.rows; n++)
					sum += cpu_get(dy, n * width + f) * cpu_get(x, n * depth + c);
				cpu_accumulate(out, (k.i * width + f) * depth + c, sum);
			}
	return 0;
}

/* An element of x[M,F], or of the halves of x[M,2F]: f and its slope there, and what f is multiplied by. */
struct expert_element {
	double value, slope, up;
};

static struct expert_element element_of(const union op_arg *arg, const struct tensor *x, int64_t row,
                                        int64_t f, int64_t width)
{
	const struct activation_math *math = &cpu_activation_math[arg->expert.kind];
	bool gated = arg->expert.gated;
	int64_t at = row * tensor_row(x) + f;
	double gate = cpu_get(x, at);
	return (struct expert_element){math->value(gate), math->slope(gate),
	                               gated ? cpu_get(x, at + width) : 1};
}

int cpu_ref_expert_activation(struct stream *s, const union op_arg *arg, const struct tensor *in,
                              const struct tensor *out, struct err *e)
{
	(void)s;
	if (activation_check("expert_activation", arg, &in[2], &in[0], out, &in[1], e))
		return e->code;
	int64_t rows = expert_total(arg, &in[2]), width = tensor_row(out);
	for (int64_t n = 0; n < rows; n++)
		for (int64_t f = 0; f < width; f++) {
			struct expert_element x = element_of(arg, &in[0], n, f, width);
			cpu_set(out, n * width + f, x.value * x.up * cpu_get(&in[1], n));
		}
	return 0;
}

int cpu_ref_expert_activation_bwd(struct stream *s, const union op_arg *arg, const struct tensor *in,
                                  const struct tensor *out, struct err *e)
{
	(void)s;
	if (activation_check("expert_activation_bwd", arg, &in[3], &in[1], &in[0], &in[2], e))
		return e->code;
	int64_t rows = expert_total(arg, &in[3]), width = tensor_row(&in[0]), pitch = tensor_row(&in[1]);
	for (int64_t n = 0; n < rows; n++) {
		double dw = 0, w = cpu_get(&in[2], n);
		for (int64_t f = 0; f < width; f++) {
			struct expert_element x = element_of(arg, &in[1], n, f, width);
			double dy = cpu_get(&in[0], n * width + f);
			dw += dy * x.value * x.up;
			cpu_set(&out[0], n * pitch + f, dy * w * x.up * x.slope);
			if (arg->expert.gated)
				cpu_set(&out[0], n * pitch + width + f, dy * w * x.value);
		}
		cpu_set(&out[1], n, dw);
	}
	return 0;
}
