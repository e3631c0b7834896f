#include "graph/inspect.h"
#include "base/clock.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct inspector {
	const struct prog *p;
	const struct backend *backend;
	struct stream *stream, *reference_stream;
	const struct exec_options *options;
	char *shadow[OP_MAX_IN + OP_MAX_OUT]; /* copies for the reference kernel, large enough for any node */
	float *row;                           /* host copy of one tensor, as f32 */
};

static int64_t largest_value(const struct prog *p)
{
	int64_t most = 64;
	for (size_t v = 0; v < p->n_value; v++)
		most = value_bytes(&p->value[v]) > most ? value_bytes(&p->value[v]) : most;
	return most;
}

struct inspector *inspector_new(const struct prog *p, const struct backend *backend, struct stream *stream,
                                const struct exec_options *options)
{
	struct inspector *s = mem_array(1, sizeof *s);
	*s = (struct inspector){.p = p, .backend = backend, .stream = stream, .options = options};
	size_t most = (size_t)largest_value(p);
	s->row = mem_aligned(3 * most); /* a tensor of two bytes an element, and its f32 copy */
	struct err e = {0};
	if (options->reference && options->reference->open(&s->reference_stream, THREADS(1), &e) == 0)
		for (int k = 0; k < OP_MAX_IN + OP_MAX_OUT; k++)
			s->shadow[k] = mem_aligned(most);
	return s;
}

void inspector_free(struct inspector *s)
{
	if (!s)
		return;
	for (int k = 0; k < OP_MAX_IN + OP_MAX_OUT; k++)
		free(s->shadow[k]);
	if (s->reference_stream)
		s->options->reference->close(s->reference_stream);
	free(s->row);
	free(s);
}

/* Elements of an output that mean something: of counted rows those that there are. `sizes` is the node's last
 * input. */
static int64_t meant(struct inspector *s, const struct node *n, const struct tensor *sizes,
                     const struct tensor *out)
{
	union op_arg arg = n->arg;
	struct tensor host = *sizes;
	int64_t rows;
	if (!(op_rows[n->op].flags & COUNTED))
		return tensor_count(out);
	host.data = mem_array((size_t)tensor_count(sizes), sizeof(int32_t));
	s->backend->download(s->stream, host.data, sizes->data, (size_t)tensor_bytes(sizes));
	if (arg.expert.back)
		arg.expert.pad = 0;
	expert_rows(&arg, &host, arg.expert.count, &rows);
	free(host.data);
	return rows * tensor_row(out);
}

/* The tensor's elements as f32 in s->row; 0 elements for integers. */
static int64_t fetch(struct inspector *s, const struct tensor *t)
{
	int64_t n = tensor_count(t);
	if (t->dtype == DT_f32) {
		s->backend->download(s->stream, s->row, t->data, (size_t)tensor_bytes(t));
		return n;
	}
	if (dtype_is_half(t->dtype)) {
		uint16_t *raw = (uint16_t *)(s->row + n); /* behind the place of the result */
		s->backend->download(s->stream, raw, t->data, (size_t)tensor_bytes(t));
		for (int64_t i = 0; i < n; i++)
			s->row[i] = half_to_f32(t->dtype, raw[i]);
		return n;
	}
	if (t->dtype == DT_f64) {
		double x;
		s->backend->download(s->stream, &x, t->data, sizeof x);
		s->row[0] = (float)x;
		return 1;
	}
	return 0;
}

static const char *base_name(const char *where)
{
	const char *slash = strrchr(where, '/');
	return slash ? slash + 1 : where;
}

static void trace(struct inspector *s, size_t i, const struct tensor *out, double seconds)
{
	const struct node *n = &s->p->node[i];
	double sum = 0, most = 0;
	int64_t count = op_rows[n->op].n_out && !(op_rows[n->op].flags & COUNTED) ? fetch(s, &out[0]) : 0;
	for (int64_t k = 0; k < count; k++) {
		sum += (double)s->row[k] * s->row[k];
		most = fabs(s->row[k]) > most ? fabs(s->row[k]) : most;
	}
	fprintf(stderr, "%5zu %-6s L%-3d %-18s [%d,%d] %8.3f ms  rms %.6g  max %.6g  (%s)\n", i,
	        segment_names[n->segment], n->layer, op_rows[n->op].name, out[0].dim[0], out[0].dim[1],
	        1e3 * seconds, count ? sqrt(sum / (double)count) : 0, most, base_name(n->where));
}

/* A share of the vocabulary without a token that counts, or of the keys that a query does not see, has the
 * logarithm of nothing. */
static bool is_fine(const struct node *n, double x)
{
	return isfinite(x) || ((n->op == OP_logit_stats || n->op == OP_attention_part) && x == -INFINITY);
}

/* Element j, from the tensor itself where f32 does not hold it. */
static double seen(struct inspector *s, const struct tensor *t, int64_t j)
{
	double x = s->row[j];
	if (t->dtype == DT_f64)
		s->backend->download(s->stream, &x, (const double *)t->data + j, sizeof x);
	return x;
}

static int hunt(struct inspector *s, size_t i, const struct tensor *in, const struct tensor *out,
                struct err *e)
{
	const struct node *n = &s->p->node[i];
	for (int k = 0; k < op_rows[n->op].n_out; k++) {
		int64_t most = meant(s, n, &in[op_rows[n->op].n_in - 1], &out[k]), count = fetch(s, &out[k]);
		count = most < count ? most : count;
		for (int64_t j = 0; j < count; j++)
			if (!is_fine(n, seen(s, &out[k], j)))
				return err_set(
				        e, EXIT_DIVERGED,
				        "the first value that is not finite: %s node %zu, layer %d, %s (%s), "
				        "output %d, element %lld is %g",
				        segment_names[n->segment], i, n->layer, op_rows[n->op].name,
				        base_name(n->where), k, (long long)j, (double)s->row[j]);
	}
	return 0;
}

/* Copies what the node reads and adds to; tensors that share memory share their copy. */
static void make_shadow(struct inspector *s, const struct tensor *all, struct tensor *copy)
{
	for (int k = 0; k < OP_MAX_IN + OP_MAX_OUT; k++) {
		copy[k] = all[k];
		if (!all[k].data)
			continue;
		copy[k].data = s->shadow[k];
		for (int j = 0; j < k; j++)
			if (all[j].data == all[k].data)
				copy[k].data = copy[j].data;
		s->backend->download(s->stream, copy[k].data, all[k].data, (size_t)tensor_bytes(&all[k]));
	}
}

static double element(const struct tensor *t, int64_t i)
{
	return t->dtype == DT_f32        ? ((const float *)t->data)[i]
	       : dtype_is_half(t->dtype) ? half_to_f32(t->dtype, ((const uint16_t *)t->data)[i])
	       : t->dtype == DT_f64      ? ((const double *)t->data)[i]
	                                 : 0;
}

static int differs(struct inspector *s, size_t i, const struct tensor *fast, const struct tensor *slow,
                   int64_t most, struct err *e)
{
	const struct node *n = &s->p->node[i];
	int64_t count = fetch(s, fast), worst = 0;
	count = most < count ? most : count;
	double scale = 1e-30, gap = 0;
	for (int64_t j = 0; j < count && isfinite(gap); j++) {
		double a = s->row[j], b = element(slow, j);
		bool same = a == b || (isnan(a) && isnan(b)), finite = isfinite(a) && isfinite(b);
		scale = isfinite(b) && fabs(b) > scale ? fabs(b) : scale;
		if (!same && (!finite || fabs(a - b) > gap)) {
			gap = finite ? fabs(a - b) : INFINITY;
			worst = j;
		}
	}
	double allowed = scale * (fast->dtype == DT_bf16 ? 2e-2 : fast->dtype == DT_f16 ? 2.5e-3 : 5e-4);
	if (gap <= allowed)
		return 0;
	return err_set(
	        e, EXIT_SELF_CHECK,
	        "kernels disagree: %s node %zu, layer %d, %s (%s): element %lld is %.9g, the reference gives "
	        "%.9g; allowed is a difference of %.3g",
	        segment_names[n->segment], i, n->layer, op_rows[n->op].name, base_name(n->where),
	        (long long)worst, (double)s->row[worst], element(slow, worst), allowed);
}

static int compare(struct inspector *s, size_t i, const struct tensor *all, struct tensor *copy,
                   struct err *e)
{
	const struct node *n = &s->p->node[i];
	int rc =
	        s->options->reference->kernel[n->op](s->reference_stream, &n->arg, copy, copy + OP_MAX_IN, e);
	bool updates = op_rows[n->op].flags & UPDATES;
	for (int k = 0; !rc && k < OP_MAX_IN + OP_MAX_OUT; k++)
		if (all[k].data && (k >= OP_MAX_IN || updates))
			rc = differs(s, i, &all[k], &copy[k],
			             k < OP_MAX_IN ? tensor_count(&all[k])
			                           : meant(s, n, &all[op_rows[n->op].n_in - 1], &all[k]),
			             e);
	return rc;
}

int inspector_run(struct inspector *s, kernel_fn *kernel, size_t i, struct tensor *in, struct tensor *out,
                  double *seconds, struct err *e)
{
	const struct node *n = &s->p->node[i];
	struct tensor all[OP_MAX_IN + OP_MAX_OUT], copy[OP_MAX_IN + OP_MAX_OUT];
	memcpy(all, in, sizeof(struct tensor) * OP_MAX_IN);
	memcpy(all + OP_MAX_IN, out, sizeof(struct tensor) * OP_MAX_OUT);
	if (s->options->reference)
		make_shadow(s, all, copy);
	double begin = clock_now_s();
	int rc = kernel(s->stream, &n->arg, in, out, e);
	s->backend->wait(s->stream);
	double spent = clock_now_s() - begin;
	*seconds += spent;
	if (!rc && s->options->trace)
		trace(s, i, out, spent);
	if (!rc && s->options->nan_hunt)
		rc = hunt(s, i, in, out, e);
	if (!rc && s->options->reference)
		rc = compare(s, i, all, copy, e);
	return rc;
}
