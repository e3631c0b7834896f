#include "train/transfer.h"
#include "comm/queue.h"

#include <stdlib.h>

struct posted { /* one buffer on its way */
	struct comm_request request;
	uint64_t ticket; /* of a device's group */
	bool busy;
};

struct transfers {
	const struct program *t;
	struct exec *exec;
	const struct groups *groups;
	const struct group_table *devices; /* NULL: messages go through the host */
	struct stream *stream;
	struct comm *pipeline;
	struct comm_queue *queue;
	int slots;
	struct posted *posted; /* [chunk][direction][slot] */
};

struct transfers *transfers_new(const struct program *t, struct exec *x, const struct groups *groups,
                                struct stream *stream, struct comm_queue *queue)
{
	struct transfers *f = mem_array(1, sizeof *f);
	int slots = t->prog.edge_slots > 1 ? t->prog.edge_slots : 1;
	*f = (struct transfers){
	        .t = t,
	        .exec = x,
	        .groups = groups,
	        .devices = groups->devices ? groups->backend->groups : NULL,
	        .stream = stream,
	        .pipeline = groups_find(groups, AXIS_BIT(pp)),
	        .queue = queue,
	        .slots = slots,
	        .posted = mem_array((size_t)t->model.spec.n_chunk * 2 * (size_t)slots, sizeof *f->posted)};
	return f;
}

void transfers_free(struct transfers *f)
{
	if (!f)
		return;
	free(f->posted);
	free(f);
}

/* Virtual stage `step` behind slot's, on the pipeline ranks in turn: which rank, and a tag of its own. */
static int virtual_stage(const struct transfers *f, const struct slot *slot)
{
	return slot->chunk * f->t->mesh.size[AXIS_pp] + f->t->coord[AXIS_pp];
}

static int peer_of(const struct transfers *f, int stage)
{
	return stage % f->t->mesh.size[AXIS_pp];
}

/* Named after the stage that receives. */
static int tag_of(int stage, enum direction d)
{
	return 2 * stage + (int)d;
}

static struct posted *buffer_of(const struct transfers *f, const struct slot *slot, enum direction d)
{
	return &f->posted[(slot->chunk * 2 + (int)d) * f->slots + (int)(slot->micro_batch % f->slots)];
}

static int32_t value_to_send(const struct transfers *f, const struct slot *slot, enum direction d)
{
	const struct model_edge *edge = &f->t->model.edge[slot->chunk];
	if (d == FORWARD_EDGE)
		return edge->out;
	return edge->in == NONE ? NONE : f->t->prog.value[edge->in].grad;
}

static int32_t value_to_receive(const struct transfers *f, const struct slot *slot, enum direction d)
{
	const struct model_edge *edge = &f->t->model.edge[slot->chunk];
	return d == FORWARD_EDGE ? edge->in : edge->out_adjoint;
}

static int run_receive(const struct comm_job *j, struct err *e)
{
	return comm_recv(j->comm, j->out, j->count, j->dtype, j->peer, j->tag, e);
}

static int run_send(const struct comm_job *j, struct err *e)
{
	return comm_isend(j->comm, j->in, j->count, j->dtype, j->peer, j->tag, j->request, e);
}

static int run_wait(const struct comm_job *j, struct err *e)
{
	return comm_wait(j->request, 1, e);
}

static int post(struct transfers *f, const struct comm_job *job, bool wait, struct err *e)
{
	int rc;
	uint64_t ticket = comm_queue_post(f->queue, job, &rc, e);
	return rc || !wait ? rc : comm_queue_wait(f->queue, ticket, e);
}

/* The message of a slot between this rank and virtual stage `peer`; `to`: the virtual stage that receives it.
 */
static struct comm_job message(struct transfers *f, int32_t v, const struct slot *slot, int peer, int to,
                               enum direction d)
{
	const struct value *x = &f->t->prog.value[v];
	void *data = exec_data_of(f->exec, v, slot->micro_batch);
	return (struct comm_job){.comm = f->pipeline,
	                         .in = data,
	                         .out = data,
	                         .count = (size_t)value_count(x),
	                         .dtype = (enum dtype)x->dtype,
	                         .peer = peer_of(f, peer),
	                         .tag = tag_of(to, d)};
}

/* Tells the lane of a message; `where` it comes from or goes to. */
static int tell(struct transfers *f, enum group_kind kind, const struct edge_group *edge, int32_t v,
                const struct slot *slot, uint64_t *ticket, struct err *e)
{
	const struct value *x = &f->t->prog.value[v];
	void *data = exec_data_of(f->exec, v, slot->micro_batch);
	struct group_call call = {.kind = kind,
	                          .send = data,
	                          .recv = data,
	                          .count = (size_t)value_count(x),
	                          .dtype = (enum dtype)x->dtype,
	                          .peer = edge->peer,
	                          .where = "between pipeline stages"};
	return f->devices->begin(edge->group, &call, ticket, e);
}

static int receive_on_device(struct transfers *f, int32_t v, const struct slot *slot, enum direction d,
                             struct err *e)
{
	uint64_t ticket;
	int rc = tell(f, GROUP_recv, &f->groups->from[d], v, slot, &ticket, e);
	return rc ? rc : f->devices->join(f->stream, ticket, e);
}

int transfers_receive(struct transfers *f, const struct slot *slot, enum direction d, struct err *e)
{
	int32_t v = value_to_receive(f, slot, d);
	if (v == NONE)
		return 0;
	int stage = virtual_stage(f, slot), from = d == FORWARD_EDGE ? stage - 1 : stage + 1;
	if (f->devices)
		return receive_on_device(f, v, slot, d, e);
	struct comm_job job = message(f, v, slot, from, stage, d);
	job.run = run_receive;
	return post(f, &job, true, e);
}

static int finish(struct transfers *f, struct posted *b, struct err *e)
{
	if (!b->busy)
		return 0;
	b->busy = false;
	if (f->devices)
		return f->devices->join(f->stream, b->ticket, e);
	return post(f, &(struct comm_job){.run = run_wait, .request = &b->request}, true, e);
}

int transfers_make_room(struct transfers *f, const struct slot *slot, enum direction d, struct err *e)
{
	return finish(f, buffer_of(f, slot, d), e);
}

int transfers_send(struct transfers *f, const struct slot *slot, enum direction d, struct err *e)
{
	int32_t v = value_to_send(f, slot, d);
	if (v == NONE)
		return 0;
	struct posted *b = buffer_of(f, slot, d);
	if (f->devices) {
		b->busy = true;
		return tell(f, GROUP_send, &f->groups->to[d], v, slot, &b->ticket, e);
	}
	int stage = virtual_stage(f, slot), to = d == FORWARD_EDGE ? stage + 1 : stage - 1;
	struct comm_job job = message(f, v, slot, to, to, d);
	job.run = run_send;
	job.request = &b->request;
	int rc = post(f, &job, false, e);
	comm_queue_tend(f->queue, f->pipeline, &b->request);
	b->busy = !rc;
	return rc;
}

void transfers_abandon(struct transfers *f)
{
	comm_queue_tend(f->queue, NULL, NULL);
}

int transfers_finish(struct transfers *f, struct err *e)
{
	int n = f->t->model.spec.n_chunk * 2 * f->slots, rc = 0;
	transfers_abandon(f); /* what is still on its way is waited for now */
	for (int i = 0; i < n && !rc; i++)
		rc = finish(f, &f->posted[i], e);
	return rc;
}
