#include "graph/exec.h"
#include "base/clock.h"
#include "base/log.h"
#include "comm/queue.h"
#include "graph/carry.h"
#include "graph/inspect.h"

#include <stdlib.h>
#include <string.h>

struct call { /* one node, bound to memory */
	struct tensor in[OP_MAX_IN], out[OP_MAX_OUT];
	uint8_t first_writer; /* bit k: output k is an accumulator and this node writes it first */
	uint8_t accumulates;  /* bit k: output k is an accumulator */
};

struct kept { /* a part as the device has recorded it */
	struct exec_part part;
	int64_t slots[3];            /* of saved activations, batches, edges */
	bool known;                  /* it has run once */
	struct recording *recording; /* NULL until it runs for the second time */
};

struct exec {
	const struct prog *p;
	const struct backend *backend;
	struct stream *stream;
	struct exec_options options;
	char *memory; /* of the regions that it owns */
	void *base[R_COUNT];
	uint32_t owned; /* bit set of regions */
	struct call *call;
	struct inspector *inspector; /* NULL where no debugging tool is on */
	double seconds[OP_COUNT];
	int64_t nodes[OP_COUNT]; /* that took them */
	uint64_t *ticket;        /* by node: of the collective that it posted last, */
	struct carried *carried; /* and what that works on */
	bool lost;               /* a collective failed */
	bool records;
	struct kept *kept;
	size_t n_kept, cap_kept;
};

static struct tensor shape_of(const struct prog *p, int32_t id)
{
	if (id == NONE)
		return (struct tensor){0};
	const struct value *v = &p->value[id];
	struct tensor t = {.nd = v->nd, .dtype = v->dtype};
	memcpy(t.dim, v->dim, sizeof t.dim);
	return t;
}

static struct tensor bind(const struct exec *x, int32_t id)
{
	struct tensor t = shape_of(x->p, id);
	if (id != NONE)
		t.data = (char *)x->base[x->p->value[id].region] + x->p->value[id].offset_bytes;
	return t;
}

struct workspace exec_workspace(const struct prog *program, const struct backend *backend,
                                struct stream *stream)
{
	for (size_t i = 0; i < program->n_node; i++) {
		const struct node *n = &program->node[i];
		struct tensor in[OP_MAX_IN], out[OP_MAX_OUT];
		if (op_rows[n->op].flags & COMM)
			continue;
		for (int k = 0; k < OP_MAX_IN; k++)
			in[k] = shape_of(program, n->in[k]);
		for (int k = 0; k < OP_MAX_OUT; k++)
			out[k] = shape_of(program, k < op_rows[n->op].n_out ? n->out[k] : NONE);
		backend->workspace(stream, &(struct kernel_call){(enum op)n->op, &n->arg, in, out});
	}
	return backend->workspace(stream, NULL);
}

/* Sums of the step are added to from the second micro-batch on; sums in temporary memory begin anew each
 * time. */
static bool lasts(const struct value *v)
{
	return v->region == R_GRAD || v->region == R_STAT;
}

static void bind_node(struct exec *x, size_t i)
{
	const struct node *n = &x->p->node[i];
	struct call *c = &x->call[i];
	for (int k = 0; k < OP_MAX_IN; k++)
		c->in[k] = bind(x, n->in[k]);
	for (int k = 0; k < op_rows[n->op].n_out; k++) {
		const struct value *v = &x->p->value[n->out[k]];
		bool begins = v->def == (int32_t)i;
		c->out[k] = bind(x, n->out[k]);
		c->accumulates |= (uint8_t)((v->sums && !(begins && !lasts(v))) << k);
		c->first_writer |= (uint8_t)((v->sums && begins) << k);
	}
}

enum { REGION_ALIGN = 4096 }; /* regions begin at pages: some are registered with a network */

static size_t region_bytes(const struct prog *p, int r)
{
	return ((size_t)p->bytes[r] + REGION_ALIGN - 1) / REGION_ALIGN * REGION_ALIGN;
}

int64_t exec_allocation(const struct prog *program, uint32_t shared_regions)
{
	size_t sum = 0;
	for (int r = 0; r < R_COUNT; r++)
		sum += shared_regions >> r & 1 ? 0 : region_bytes(program, r);
	return (int64_t)sum;
}

/* One piece of memory for all regions that are not another's. */
static void take_memory(struct exec *x)
{
	const struct exec *share = x->options.share;
	uint32_t shared = share ? x->options.share_regions : 0;
	size_t sum = (size_t)exec_allocation(x->p, shared), at = 0;
	x->owned = ((1u << R_COUNT) - 1) & ~shared;
	x->memory = sum ? x->backend->alloc(x->stream, sum) : NULL;
	for (int r = 0; r < R_COUNT; r++) {
		bool own = x->owned >> r & 1;
		ASSERT(own || share->p->bytes[r] >= x->p->bytes[r]);
		x->base[r] = own ? x->memory + at : share->base[r];
		at += own ? region_bytes(x->p, r) : 0;
	}
}

/* Rows that are counted on the device are counted by the host before it tells of them: such a program is told
 * anew each time. */
static bool can_record(const struct exec *x)
{
	bool counts = false;
	for (size_t i = 0; i < x->p->n_node; i++) {
		const struct node *n = &x->p->node[i];
		counts |= op_rows[n->op].flags & COUNTED || n->op == OP_grouped_dw ||
		          (n->op == OP_all_to_all && n->in[1] != NONE);
	}
	return x->options.record && x->backend->recorder && !x->inspector && !x->options.times && !counts;
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
	exec_workspace(program, backend, stream);
	take_memory(x);
	x->call = mem_array(program->n_node, sizeof *x->call);
	x->ticket = mem_array(program->n_node, sizeof *x->ticket);
	x->carried = mem_array(program->n_node, sizeof *x->carried);
	for (size_t i = 0; i < program->n_node; i++)
		bind_node(x, i);
	if (x->options.trace || x->options.nan_hunt || x->options.reference)
		x->inspector = inspector_new(program, backend, stream, &x->options);
	x->records = can_record(x);
	*out = x;
	return 0;
}

void exec_free(struct exec *x)
{
	if (!x)
		return;
	for (size_t i = 0; i < x->n_kept; i++)
		x->backend->recorder->free(x->kept[i].recording);
	free(x->kept);
	if (x->memory)
		x->backend->free(x->stream, x->memory);
	inspector_free(x->inspector);
	free(x->call);
	free(x->ticket);
	free(x->carried);
	free(x);
}

static int64_t slot_of(int64_t micro_batch, int32_t slots)
{
	return slots > 1 ? micro_batch % slots : 0;
}

/* How far the memory of this micro-batch lies from that of slot 0. */
static int64_t shift(const struct prog *p, int region, int chunk, int64_t micro_batch)
{
	if (region == R_SAVED)
		return slot_of(micro_batch, p->saved_slots[chunk]) * p->saved_stride[chunk];
	if (region == R_BATCH)
		return slot_of(micro_batch, p->batch_slots) * p->batch_stride;
	return region == R_EDGE ? slot_of(micro_batch, p->edge_slots) * p->edge_stride : 0;
}

/* The chunk that a saved value belongs to. */
static int chunk_of(const struct prog *p, const struct value *v)
{
	int32_t at = v->def != NONE ? v->def : v->last;
	return at == NONE ? 0 : p->node[at].chunk;
}

void *exec_data_of(const struct exec *x, int32_t value, int64_t micro_batch)
{
	const struct value *v = &x->p->value[value];
	return (char *)bind(x, value).data + shift(x->p, v->region, chunk_of(x->p, v), micro_batch);
}

void *exec_data(const struct exec *x, int32_t value)
{
	return exec_data_of(x, value, 0);
}

void exec_upload_of(struct exec *x, int32_t value, int64_t micro_batch, const void *host)
{
	x->backend->upload(x->stream, exec_data_of(x, value, micro_batch), host,
	                   (size_t)value_bytes(&x->p->value[value]));
}

void exec_upload(struct exec *x, int32_t value, const void *host)
{
	exec_upload_of(x, value, 0, host);
}

void exec_download(struct exec *x, int32_t value, void *host)
{
	x->backend->download(x->stream, host, exec_data(x, value), (size_t)value_bytes(&x->p->value[value]));
}

void exec_upload_part(struct exec *x, int32_t value, int64_t first, int64_t count, const void *host)
{
	int64_t size = dtype_rows[x->p->value[value].dtype].bytes;
	x->backend->upload(x->stream, (char *)exec_data(x, value) + first * size, host,
	                   (size_t)(count * size));
}

void exec_download_part(struct exec *x, int32_t value, int64_t first, int64_t count, void *host)
{
	int64_t size = dtype_rows[x->p->value[value].dtype].bytes;
	x->backend->download(x->stream, host, (char *)exec_data(x, value) + first * size,
	                     (size_t)(count * size));
}

int64_t exec_bytes(const struct exec *x)
{
	int64_t sum = 0;
	for (int r = 0; r < R_COUNT; r++)
		if (x->owned >> r & 1)
			sum += x->p->bytes[r];
	return sum;
}

void exec_take_times(struct exec *x, double *seconds, int64_t *nodes)
{
	memcpy(seconds, x->seconds, sizeof x->seconds);
	memcpy(nodes, x->nodes, sizeof x->nodes);
	memset(x->seconds, 0, sizeof x->seconds);
	memset(x->nodes, 0, sizeof x->nodes);
}

static const struct exec_comm *group_over(const struct exec *x, uint32_t axes)
{
	for (size_t i = 0; i < x->options.n_comm; i++)
		if (x->options.comm[i].axes == axes && x->options.comm[i].comm)
			return &x->options.comm[i];
	return NULL;
}

static int begin_on_host(struct exec *x, size_t i, struct comm *comm, struct err *e)
{
	const struct node *n = &x->p->node[i];
	struct carried *c = &x->carried[i];
	struct comm_job job = {.run = carry_of((enum op)n->op),
	                       .comm = comm,
	                       .in = c->in.data,
	                       .out = c->out.data,
	                       .count = (size_t)tensor_count(&c->out),
	                       .dtype = (enum dtype)c->out.dtype,
	                       .peer = n->arg.comm.step,
	                       .more = c};
	int rc;
	x->backend->wait(x->stream);
	x->ticket[i] = comm_queue_post(x->options.queue, &job, &rc, e);
	return rc;
}

static int join(struct exec *x, uint64_t ticket, struct err *e)
{
	return x->backend->groups ? x->backend->groups->join(x->stream, ticket, e)
	                          : comm_queue_wait(x->options.queue, ticket, e);
}

/* Tensors that are not only renamed: the collective is carried out, or (arg.begins) only begun. */
static int run_collective(struct exec *x, size_t i, struct call *c, struct err *e)
{
	const struct node *n = &x->p->node[i];
	const struct exec_comm *over = group_over(x, n->arg.comm.axes);
	if (!over)
		return err_set(e, EXIT_INTERNAL, "no communicator was given for a collective (%s)", n->where);
	x->carried[i] =
	        (struct carried){&n->arg, c->in[0], c->in[1], op_rows[n->op].n_out ? c->out[0] : c->in[0]};
	int rc = x->backend->groups
	                 ? carry_on_device(x->backend, x->stream, over->comm, over->group, (enum op)n->op,
	                                   &x->carried[i], n->where, &x->ticket[i], e)
	                 : begin_on_host(x, i, over->comm, e);
	return rc || n->arg.comm.begins ? rc : join(x, x->ticket[i], e);
}

static int run_comm_node(struct exec *x, size_t i, struct call *c, struct err *e)
{
	const struct node *n = &x->p->node[i];
	if (n->op == OP_wait)
		return join(x, x->ticket[x->p->value[n->in[0]].def], e);
	return op_rows[n->op].flags & ALIAS ? 0 : run_collective(x, i, c, e);
}

/* The node's tensors in the slots of this micro-batch. */
static struct call call_of(const struct exec *x, size_t i, const struct exec_part *part)
{
	const struct node *n = &x->p->node[i];
	struct call c = x->call[i];
	for (int k = 0; k < op_rows[n->op].n_in; k++)
		if (n->in[k] != NONE)
			c.in[k].data = (char *)c.in[k].data +
			               shift(x->p, x->p->value[n->in[k]].region, n->chunk, part->micro_batch);
	for (int k = 0; k < op_rows[n->op].n_out; k++) {
		c.out[k].data = (char *)c.out[k].data +
		                shift(x->p, x->p->value[n->out[k]].region, n->chunk, part->micro_batch);
		c.out[k].acc = (c.accumulates >> k & 1) && !(part->first && c.first_writer >> k & 1);
	}
	return c;
}

static int run_node(struct exec *x, size_t i, const struct exec_part *part, struct err *e)
{
	const struct node *n = &x->p->node[i];
	struct call c = call_of(x, i, part);
	if (op_rows[n->op].flags & COMM)
		return run_comm_node(x, i, &c, e);
	kernel_fn *kernel = x->backend->kernel[n->op];
	if (!x->inspector)
		return kernel(x->stream, &n->arg, c.in, c.out, e);
	return inspector_run(x->inspector, kernel, i, c.in, c.out, &x->seconds[n->op], e);
}

bool exec_is_lost(const struct exec *x)
{
	return x->lost;
}

int exec_status(struct exec *x, struct err *e)
{
	return x->backend->status ? x->backend->status(x->stream, e) : 0;
}

static int run_timed(struct exec *x, size_t i, const struct exec_part *part, struct err *e)
{
	enum op op = (enum op)x->p->node[i].op;
	double begin = clock_now_s();
	int rc = run_node(x, i, part, e);
	x->backend->wait(x->stream);
	x->seconds[op] += clock_now_s() - begin;
	x->nodes[op]++;
	return rc;
}

/* A node that fails on one rank does not end the part: the others count on its collectives. */
static int run_nodes(struct exec *x, const struct exec_part *part, struct err *e)
{
	int code = 0;
	for (size_t i = 0; i < x->p->n_node; i++) {
		const struct node *n = &x->p->node[i];
		if (!(part->segments >> n->segment & 1) || n->chunk != part->chunk)
			continue;
		struct err here = {0};
		int rc = x->options.times ? run_timed(x, i, part, &here) : run_node(x, i, part, &here);
		if (rc && !code)
			*e = here;
		code = code ? code : rc;
		x->lost |= rc && op_rows[n->op].flags & COMM;
		if (x->lost)
			return code;
	}
	return code;
}

/* Parts are the same to the device where they work on the same memory. */
static struct kept *find_kept(struct exec *x, const struct exec_part *part)
{
	const struct prog *p = x->p;
	struct kept key = {.part = *part,
	                   .slots = {shift(p, R_SAVED, part->chunk, part->micro_batch),
	                             shift(p, R_BATCH, part->chunk, part->micro_batch),
	                             shift(p, R_EDGE, part->chunk, part->micro_batch)}};
	for (size_t i = 0; i < x->n_kept; i++) {
		const struct kept *k = &x->kept[i];
		if (k->part.segments == part->segments && k->part.chunk == part->chunk &&
		    k->part.first == part->first && !memcmp(k->slots, key.slots, sizeof key.slots))
			return &x->kept[i];
	}
	x->kept = mem_grow(x->kept, x->n_kept, &x->cap_kept, sizeof *x->kept);
	x->kept[x->n_kept] = key;
	return &x->kept[x->n_kept++];
}

static int record(struct exec *x, struct kept *k, const struct exec_part *part, struct err *e)
{
	const struct recorder *r = x->backend->recorder;
	struct err ending = {0};
	int rc = r->begin(x->stream, e);
	if (rc)
		return rc;
	rc = run_nodes(x, part, e);
	if (r->end(x->stream, &k->recording, &ending) && !rc) {
		log_warn("%s; from now on every kernel is launched by itself", ending.text);
		x->records = false;
	}
	return rc;
}

/* The first time kernels choose how they work; from the second on there is a recording. */
int exec_run(struct exec *x, const struct exec_part *part, struct err *e)
{
	if (!x->records)
		return run_nodes(x, part, e);
	struct kept *k = find_kept(x, part);
	if (!k->known) {
		k->known = true;
		return run_nodes(x, part, e);
	}
	int rc = k->recording ? 0 : record(x, k, part, e);
	if (rc || !x->records)
		return rc ? rc : run_nodes(x, part, e);
	return x->backend->recorder->replay(x->stream, k->recording, e);
}
