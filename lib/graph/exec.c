#include "graph/exec.h"
#include "comm/comm.h"
#include "graph/inspect.h"

#include <stdlib.h>
#include <string.h>

struct call { /* one node, bound to memory */
	struct tensor in[OP_MAX_IN], out[OP_MAX_OUT];
	uint8_t first_writer; /* bit k: output k is an accumulator and this node writes it first */
	uint8_t accumulates;  /* bit k: output k is an accumulator */
};

struct exec {
	const struct prog *p;
	const struct backend *backend;
	struct stream *stream;
	struct exec_options options;
	void *base[R_COUNT];
	uint32_t owned; /* bit set of regions */
	struct call *call;
	struct inspector *inspector; /* NULL where no debugging tool is on */
	double seconds[OP_COUNT];
};

static struct tensor bind(const struct exec *x, int32_t id)
{
	if (id == NONE)
		return (struct tensor){0};
	const struct value *v = &x->p->value[id];
	struct tensor t = {
	        .data = (char *)x->base[v->region] + v->offset_bytes, .nd = v->nd, .dtype = v->dtype};
	memcpy(t.dim, v->dim, sizeof t.dim);
	return t;
}

static void bind_node(struct exec *x, size_t i)
{
	const struct node *n = &x->p->node[i];
	struct call *c = &x->call[i];
	for (int k = 0; k < OP_MAX_IN; k++)
		c->in[k] = bind(x, n->in[k]);
	for (int k = 0; k < op_rows[n->op].n_out; k++) {
		const struct value *v = &x->p->value[n->out[k]];
		c->out[k] = bind(x, n->out[k]);
		bool accumulator =
		        (v->region == R_GRAD || v->region == R_STAT) && !(op_rows[n->op].flags & COMM);
		c->accumulates |= (uint8_t)(accumulator << k);
		c->first_writer |= (uint8_t)((accumulator && v->def == (int32_t)i) << k);
	}
}

int exec_create(struct exec **out, const struct prog *program, const struct backend *backend,
                struct stream *stream, const struct exec_options *options, struct err *e)
{
	static const struct exec_options none;
	if (program->e.code) {
		*e = program->e;
		return e->code;
	}
	struct exec *x = mem_array(1, sizeof *x);
	x->p = program;
	x->backend = backend;
	x->stream = stream;
	x->options = options ? *options : none;
	for (int r = 0; r < R_COUNT; r++) {
		if (x->options.share && x->options.share_regions >> r & 1) {
			ASSERT(x->options.share->p->bytes[r] >= program->bytes[r]);
			x->base[r] = x->options.share->base[r];
			continue;
		}
		x->owned |= 1u << r;
		if (program->bytes[r])
			x->base[r] = backend->alloc(stream, (size_t)program->bytes[r]);
	}
	x->call = mem_array(program->n_node, sizeof *x->call);
	for (size_t i = 0; i < program->n_node; i++)
		bind_node(x, i);
	if (x->options.trace || x->options.nan_hunt || x->options.reference)
		x->inspector = inspector_new(program, backend, stream, &x->options);
	*out = x;
	return 0;
}

void exec_free(struct exec *x)
{
	if (!x)
		return;
	for (int r = 0; r < R_COUNT; r++)
		if (x->owned >> r & 1 && x->base[r])
			x->backend->free(x->stream, x->base[r]);
	inspector_free(x->inspector);
	free(x->call);
	free(x);
}

void *exec_data(const struct exec *x, int32_t value)
{
	return bind(x, value).data;
}

void exec_upload(struct exec *x, int32_t value, const void *host)
{
	x->backend->upload(x->stream, exec_data(x, value), host, (size_t)value_bytes(&x->p->value[value]));
}

void exec_download(struct exec *x, int32_t value, void *host)
{
	x->backend->download(x->stream, host, exec_data(x, value), (size_t)value_bytes(&x->p->value[value]));
}

int64_t exec_bytes(const struct exec *x)
{
	int64_t sum = 0;
	for (int r = 0; r < R_COUNT; r++)
		if (x->owned >> r & 1)
			sum += x->p->bytes[r];
	return sum;
}

void exec_take_times(struct exec *x, double *seconds)
{
	memcpy(seconds, x->seconds, sizeof x->seconds);
	memset(x->seconds, 0, sizeof x->seconds);
}

static int run_collective(struct exec *x, const struct node *n, struct call *c, struct err *e)
{
	for (size_t i = 0; i < x->options.n_comm; i++) {
		if (x->options.comm[i].axes != n->arg.comm.axes)
			continue;
		x->backend->wait(x->stream);
		if (c->out[0].data != c->in[0].data)
			memcpy(c->out[0].data, c->in[0].data, (size_t)tensor_bytes(&c->in[0]));
		return comm_all_reduce(x->options.comm[i].comm, c->out[0].data,
		                       (size_t)tensor_count(&c->out[0]), (enum dtype)c->out[0].dtype,
		                       REDUCE_SUM, e);
	}
	return err_set(e, EXIT_INTERNAL, "no communicator was given for a collective (%s)", n->where);
}

static int run_node(struct exec *x, size_t i, bool first, struct err *e)
{
	const struct node *n = &x->p->node[i];
	struct call *c = &x->call[i];
	for (int k = 0; k < OP_MAX_OUT; k++)
		c->out[k].acc = (c->accumulates >> k & 1) && !(first && c->first_writer >> k & 1);
	if (op_rows[n->op].flags & COMM)
		return run_collective(x, n, c, e);
	kernel_fn *kernel = x->backend->kernel[n->op];
	if (!x->inspector)
		return kernel(x->stream, &n->arg, c->in, c->out, e);
	return inspector_run(x->inspector, kernel, i, c->in, c->out, &x->seconds[n->op], e);
}

int exec_run(struct exec *x, enum segment segment, bool first, struct err *e)
{
	for (size_t i = 0; i < x->p->n_node; i++) {
		if (x->p->node[i].segment != segment)
			continue;
		int rc = run_node(x, i, first, e);
		if (rc)
			return rc;
	}
	return 0;
}
