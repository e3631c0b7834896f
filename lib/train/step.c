#include "train/step.h"
#include "base/clock.h"
#include "comm/queue.h"
#include "kernels/kernels.h"
#include "train/transfer.h"

#include <math.h>
#include <stdlib.h>

static int world_rank(const struct place_of_rank *at)
{
	return at->world ? at->world->rank : 0;
}

static int agree(const struct step *s, int rc, struct err *e)
{
	return s->at.world ? comm_any(s->at.world, rc, e) : rc;
}

static bool overlaps(const struct step *s)
{
	const struct config *c = s->config;
	return c->ddp.overlap_grad_reduce || c->comm_overlap.tp_comm_overlap ||
	       (c->comm_overlap.overlap_p2p_comm && s->program.mesh.size[AXIS_pp] > 1);
}

static int create_exec(struct step *s, const struct step *weights_of, struct err *e)
{
	const struct config *c = s->config;
	bool queues = s->at.world && overlaps(s) && !s->at.backend->groups;
	int rc = queues ? comm_queue_open(&s->queue, e) : 0;
	if (rc)
		return rc;
	struct exec_options options = {.comm = s->at.groups ? s->at.groups->list : NULL,
	                               .n_comm = s->at.groups ? s->at.groups->n : 0,
	                               .queue = s->queue,
	                               .record = c->dist.cuda_graphs,
	                               .nan_hunt = c->profiling.nan_hunt,
	                               .trace = c->profiling.trace_nodes,
	                               .times = c->profiling.time_operations,
	                               .reference =
	                                       c->profiling.compare_kernels ? &cpu_reference_backend : NULL};
	if (weights_of) {
		options.share = weights_of->exec;
		options.share_regions = 1u << R_PARAM | 1u << R_CONST;
	}
	return exec_create(&s->exec, &s->program.prog, s->at.backend, s->at.stream, &options, e);
}

static int64_t load_count(const struct step *s)
{
	const struct model *m = &s->program.model;
	return m->n_expert_layers ? m->n_expert_layers * m->spec.config->num_experts : 0;
}

static int open_groups(struct step *s, struct err *e)
{
	struct groups_device device = {s->at.backend, s->at.stream, (double)s->config->dist.timeout_s};
	return groups_open(s->at.groups, s->at.world, &device, &s->program.mesh, &s->program.prog, e);
}

int step_create(struct step *s, const struct config *c, enum model_use use, const struct place_of_rank *at,
                const struct step *weights_of, struct err *e)
{
	*s = (struct step){.config = c, .at = *at, .loss_scale = scaler_moderate(c)};
	int rc = agree(s, program_build(&s->program, c, use, 0, world_rank(at), e), e);
	if (!rc && at->world)
		rc = open_groups(s, e);
	if (!rc)
		rc = agree(s, create_exec(s, weights_of, e), e);
	if (rc) {
		step_free(s);
		return rc;
	}
	batch_open(&s->batch, &s->program, s->exec, c);
	s->load = mem_array((size_t)load_count(s) + 1, sizeof *s->load);
	s->slot_s = mem_array(s->program.schedule.n, sizeof *s->slot_s);
	if (s->program.mesh.size[AXIS_pp] > 1)
		s->transfers = transfers_new(&s->program, s->exec, at->groups, at->stream, s->queue);
	if (!weights_of)
		model_fill_constants(&s->program.model, s->exec);
	return 0;
}

void step_free(struct step *s)
{
	comm_queue_close(s->queue);
	transfers_free(s->transfers);
	exec_free(s->exec);
	program_free(&s->program);
	batch_close(&s->batch);
	free(s->load);
	free(s->slot_s);
	*s = (struct step){0};
}

static double targets_of_a_step(const struct step *s)
{
	return (double)s->config->train.global_batch_size * (double)s->config->model.seq_length;
}

/* The micro-batches of one pass through the schedule. */
struct pass {
	struct step *s;
	const struct dataset *data;
	uint64_t first_sample;
	bool first; /* of this result: sums begin anew */
	size_t at;  /* slot of the schedule */
	int code;   /* of what went wrong on this rank alone; the pass goes on, since others count on it */
	struct err *e;
};

static void note_failure(struct pass *q, int rc, const struct err *why)
{
	if (rc && !q->code) {
		q->code = rc;
		*q->e = *why;
	}
}

static bool is_lost(const struct pass *q)
{
	return exec_is_lost(q->s->exec);
}

static void run_part(struct pass *q, uint32_t segments, int32_t chunk, int64_t m, bool first)
{
	struct err here = {0};
	struct exec_part part = {.segments = segments, .chunk = chunk, .micro_batch = m, .first = first};
	double begin = clock_now_s();
	note_failure(q, exec_run(q->s->exec, &part, &here), &here);
	q->s->slot_s[q->at] += clock_now_s() - begin;
}

static int slot_forward(struct pass *q, const struct slot *slot)
{
	struct step *s = q->s;
	struct transfers *f = s->transfers;
	int rc = f ? transfers_receive(f, slot, FORWARD_EDGE, q->e) : 0;
	if (!rc && f)
		rc = transfers_make_room(f, slot, FORWARD_EDGE, q->e);
	if (rc)
		return rc;
	if (slot->chunk == 0) {
		struct err here = {0};
		note_failure(q, batch_load(&s->batch, q->data, q->first_sample, slot->micro_batch, &here),
		             &here);
	}
	run_part(q, SEG_BIT(FWD), slot->chunk, slot->micro_batch, q->first && slot->micro_batch == 0);
	return f && !is_lost(q) ? transfers_send(f, slot, FORWARD_EDGE, q->e) : 0;
}

static bool is_last(const struct step *s, const struct slot *slot)
{
	return slot->micro_batch == s->program.schedule.spec.micro_batches - 1;
}

static int slot_backward(struct pass *q, const struct slot *slot)
{
	struct step *s = q->s;
	struct transfers *f = s->transfers;
	int rc = f ? transfers_receive(f, slot, BACKWARD_EDGE, q->e) : 0;
	if (!rc && f)
		rc = transfers_make_room(f, slot, BACKWARD_EDGE, q->e);
	if (rc)
		return rc;
	bool ends = is_last(s, slot) && s->program.schedule.spec.kind != PARALLEL_ZERO_BUBBLE;
	/* Where a stage waits for the gradient, that goes first. */
	bool waited = f && schedule_target(&s->program.schedule, slot) >= 0;
	bool together = ends && s->config->ddp.overlap_grad_reduce && !waited;
	run_part(q, SEG_BIT(BWD) | (together ? SEG_BIT(REDUCE) : 0), slot->chunk, slot->micro_batch,
	         slot->micro_batch == 0);
	if (f && !is_lost(q))
		rc = transfers_send(f, slot, BACKWARD_EDGE, q->e);
	if (!rc && ends && !together)
		run_part(q, SEG_BIT(REDUCE), slot->chunk, slot->micro_batch, false);
	return rc;
}

static int slot_weight(struct pass *q, const struct slot *slot)
{
	bool ends = is_last(q->s, slot);
	run_part(q, SEG_BIT(WGRAD) | (ends ? SEG_BIT(REDUCE) : 0), slot->chunk, slot->micro_batch,
	         slot->micro_batch == 0);
	return 0;
}

/* All slots of this rank's schedule. What fails here alone is kept for the end, where all ranks learn of it;
 * only a transfer that fails ends the pass. */
static int run_schedule(struct pass *q)
{
	static int (*const run[])(struct pass *, const struct slot *) = {
	        [SLOT_FORWARD] = slot_forward, [SLOT_BACKWARD] = slot_backward, [SLOT_WEIGHT] = slot_weight};
	const struct schedule *order = &q->s->program.schedule;
	int rc = 0;
	double begin = clock_now_s();
	for (q->at = 0; q->at < order->n && !rc; q->at++) {
		q->s->slot_s[q->at] = 0;
		rc = run[order->slot[q->at].kind](q, &order->slot[q->at]);
		if (is_lost(q))
			rc = q->code;
	}
	q->s->pass_s = clock_now_s() - begin;
	if (q->s->transfers && rc)
		transfers_abandon(q->s->transfers);
	else if (q->s->transfers)
		rc = transfers_finish(q->s->transfers, q->e);
	if (!rc)
		rc = comm_queue_wait(q->s->queue, UINT64_MAX, q->e);
	return rc ? rc : agree(q->s, q->code, q->e);
}

/* Segments that all ranks run at the end of a step. Kernels cannot fail there but under a debugging tool, and
 * then one rank's failure is everybody's. */
static int run_together(struct step *s, uint32_t segments, struct err *e)
{
	const struct profiling_config *p = &s->config->profiling;
	int rc = exec_run(s->exec, &(struct exec_part){.segments = segments, .first = true}, e);
	return (p->nan_hunt || p->compare_kernels) && !exec_is_lost(s->exec) ? agree(s, rc, e) : rc;
}

static void read_experts(struct step *s, struct step_experts *x)
{
	const struct model *m = &s->program.model;
	double sum[EXPERT_SUM_COUNT], tokens = targets_of_a_step(s);
	*x = (struct step_experts){0};
	if (!m->n_expert_layers)
		return;
	exec_download(s->exec, s->program.expert_sums, sum);
	exec_download(s->exec, s->program.expert_load, s->load);
	*x = (struct step_experts){.layers = m->n_expert_layers,
	                           .experts = (int)s->config->model.num_experts,
	                           .layer = m->expert_layer,
	                           .load = s->load,
	                           .balancing_loss = sum[EXPERT_LOSS] / tokens,
	                           .z = sum[EXPERT_Z] / tokens / m->n_expert_layers,
	                           .entropy = sum[EXPERT_ENTROPY] / tokens / m->n_expert_layers,
	                           .dropped = (int64_t)sum[EXPERT_DROPPED],
	                           .overflow = (int64_t)sum[EXPERT_OVERFLOW]};
}

int step_gradients(struct step *s, const struct dataset *d, uint64_t first_sample, struct step_result *r,
                   struct err *e)
{
	float scale = (float)(s->loss_scale / targets_of_a_step(s));
	struct pass pass = {.s = s, .data = d, .first_sample = first_sample, .first = true, .e = e};
	if (s->program.model.loss_scale != NONE)
		exec_upload(s->exec, s->program.model.loss_scale, &scale);
	int rc = run_schedule(&pass);
	if (!rc)
		rc = run_together(s, SEG_BIT(NORM), e);
	if (rc)
		return rc;
	double loss, norm2;
	exec_download(s->exec, s->program.loss, &loss);
	exec_download(s->exec, s->program.sharding.norm2, &norm2);
	if ((rc = exec_status(s->exec, e)))
		return rc;
	r->lm_loss = loss / targets_of_a_step(s);
	r->grad_norm = sqrt(norm2) / s->loss_scale;
	r->skipped = !isfinite(loss) || !isfinite(norm2);
	read_experts(s, &r->experts);
	return 0;
}

int step_update(struct step *s, int64_t step, double lr, struct err *e)
{
	const struct optimizer_config *o = &s->config->optimizer;
	float hyper[HYPER_COUNT] = {
	        [HYPER_LR] = (float)lr,
	        [HYPER_BETA1] = (float)o->adam_beta1,
	        [HYPER_BETA2] = (float)o->adam_beta2,
	        [HYPER_EPS] = (float)o->adam_eps,
	        [HYPER_DECAY] = (float)o->weight_decay,
	        [HYPER_CLIP] = (float)o->clip_grad,
	        [HYPER_BIAS1] = (float)(1 / (1 - pow(o->adam_beta1, (double)step))),
	        [HYPER_BIAS2] = (float)(1 / (1 - pow(o->adam_beta2, (double)step))),
	        [HYPER_UNSCALE] = (float)(1 / s->loss_scale),
	};
	exec_upload(s->exec, s->program.sharding.hyper, hyper);
	return run_together(s, SEG_BIT(STEP), e);
}

void step_read_piece(const struct step *s, const struct piece *q, enum shard_state state, float *host)
{
	int64_t n = state == SHARD_GRAD && s->loss_scale != 1 ? piece_count(q) : 0;
	piece_read(&s->program, s->exec, q, host);
	for (int64_t i = 0; i < n; i++)
		host[i] = (float)(host[i] / s->loss_scale);
}

int step_evaluate(struct step *s, const struct dataset *d, uint64_t first_sample, int64_t n, double *lm_loss,
                  struct err *e)
{
	double loss;
	int rc = 0;
	for (int64_t i = 0; i < n && !rc; i++) {
		struct pass pass = {.s = s,
		                    .data = d,
		                    .first_sample =
		                            first_sample + (uint64_t)(i * s->config->train.global_batch_size),
		                    .first = i == 0,
		                    .e = e};
		rc = run_schedule(&pass);
	}
	if (!rc)
		rc = run_together(s, SEG_BIT(NORM), e);
	if (rc)
		return rc;
	exec_download(s->exec, s->program.loss, &loss);
	*lm_loss = loss / (targets_of_a_step(s) * (double)n);
	return exec_status(s->exec, e);
}
