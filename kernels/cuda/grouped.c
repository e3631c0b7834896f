/* The products of experts: one product an expert that has rows, by sizes on the host. */
#include "kernels/cuda/product.h"
#include "op/experts.h"

static void *row_of(const struct tensor *t, int64_t row)
{
	return (char *)t->data + row * tensor_row(t) * dtype_rows[t->dtype].bytes;
}

/* Sizes as the host sees them. Where every expert has as many rows there is nothing to see, and nobody waits.
 */
static int host_sizes(struct stream *s, const union op_arg *arg, const struct tensor *sizes,
                      struct tensor *host, struct err *e)
{
	*host = *sizes;
	if (arg->expert.pad)
		host->dim[0] = 0;
	else
		host->data = (void *)cuda_counts(s, sizes, e);
	return host->data || arg->expert.pad ? 0 : e->code;
}

struct grouped {
	enum product_kind kind;
	const union op_arg *arg;
	const struct tensor *sizes;       /* on the host */
	const struct tensor *rows, *with; /* x or dy, of which an expert has rows; w[e·F,C], or x for dw */
	const struct tensor *result;
	int64_t from, to; /* C, F */
};

/* An expert's part of a tensor: of rows in order of expert, or of its weights. */
static void *part_of(const struct grouped *g, const struct tensor *t, bool weights,
                     const struct expert_walk *w)
{
	return row_of(t, weights ? w->i * g->to : w->first);
}

static int run_part(struct stream *s, const struct grouped *g, const struct expert_walk *w, int64_t batch,
                    struct err *e)
{
	bool dw = g->kind == PRODUCT_linear_dw;
	struct product p = {.kind = g->kind,
	                    .size = {w->rows, g->to, g->from},
	                    .batch = batch,
	                    .with = part_of(g, g->with, !dw, w),
	                    .rows = part_of(g, g->rows, false, w),
	                    .result = part_of(g, g->result, dw, w),
	                    .dtype = (enum dtype)g->rows->dtype,
	                    .result_dtype = (enum dtype)g->result->dtype,
	                    .acc = g->result->acc,
	                    .varies = !g->arg->expert.pad};
	return cuda_product(s, &p, e);
}

/* Where every expert has as many rows, all in one. */
static int run(struct stream *s, const struct grouped *g, struct err *e)
{
	struct expert_walk w = expert_begin(g->arg, g->sizes);
	int64_t batch = g->arg->expert.pad ? g->arg->expert.count : 1;
	int rc = 0;
	while (!rc && expert_next(&w)) {
		rc = run_part(s, g, &w, batch, e);
		if (batch > 1)
			break;
	}
	return rc;
}

int cuda_grouped_linear(struct stream *s, const union op_arg *arg, const struct tensor *in,
                        const struct tensor *out, struct err *e)
{
	struct tensor sizes;
	struct grouped g = {PRODUCT_linear, arg, &sizes, &in[0], &in[1], out, tensor_row(&in[0]),
	                    tensor_row(out)};
	if (host_sizes(s, arg, &in[2], &sizes, e) ||
	    grouped_check("grouped_linear", arg, &sizes, &in[0], out, &in[1], e))
		return e->code;
	return run(s, &g, e);
}

int cuda_grouped_dx(struct stream *s, const union op_arg *arg, const struct tensor *in,
                    const struct tensor *out, struct err *e)
{
	struct tensor sizes;
	struct grouped g = {PRODUCT_linear_dx, arg, &sizes, &in[0], &in[1], out, tensor_row(out),
	                    tensor_row(&in[0])};
	if (host_sizes(s, arg, &in[2], &sizes, e) ||
	    grouped_check("grouped_dx", arg, &sizes, out, &in[0], &in[1], e))
		return e->code;
	return run(s, &g, e);
}

int cuda_grouped_dw(struct stream *s, const union op_arg *arg, const struct tensor *in,
                    const struct tensor *out, struct err *e)
{
	struct tensor sizes;
	struct grouped g = {PRODUCT_linear_dw, arg, &sizes, &in[0], &in[1], out, tensor_row(&in[1]),
	                    tensor_row(&in[0])};
	if (host_sizes(s, arg, &in[2], &sizes, e) ||
	    grouped_check("grouped_dw", arg, &sizes, &in[1], &in[0], out, e))
		return e->code;
	return run(s, &g, e);
}
