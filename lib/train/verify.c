#include "train/verify.h"
#include "backend/backend.h"
#include "comm/comm.h"
#include "data/indexed.h"
#include "train/run.h"
#include "train/state.h"

#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* The configuration of one rank */

static bool is_of_the_layout(const char *key)
{
	static const char *const groups[] = {"parallel.", "ddp.", "recompute.", "comm_overlap."};
	for (size_t i = 0; i < sizeof groups / sizeof *groups; i++)
		if (!strncmp(key, groups[i], strlen(groups[i])))
			return true;
	return false;
}

int verify_reference_config(struct config *reference, const struct config *c, struct err *e)
{
	const struct option_table *t = config_table();
	char batch[32];
	for (size_t i = 0; i < t->n; i++)
		if (is_of_the_layout(t->rows[i].key))
			option_reset(&reference->set, &t->rows[i]);
	snprintf(batch, sizeof batch, "%lld", (long long)c->train.global_batch_size);
	int rc = config_replace(reference, "train.global_batch_size", batch, "the layout", e);
	if (!rc)
		rc = config_replace(reference, "profiling.trace_nodes", "false", "verify", e);
	return rc ? rc : config_check(reference, 1, e);
}

/* Work for rank 0 alone */

enum { PULSE_MS = 200 };

struct errand {
	struct verify *v;
	int (*work)(struct verify *, struct err *);
	pthread_t thread;
	pthread_mutex_t lock;
	pthread_cond_t ended;
	bool done;
	int code;
	struct err e;
};

static void *run_errand(void *argument)
{
	struct errand *q = argument;
	int code = q->work(q->v, &q->e);
	pthread_mutex_lock(&q->lock);
	q->code = code;
	q->done = true;
	pthread_cond_signal(&q->ended);
	pthread_mutex_unlock(&q->lock);
	return NULL;
}

/* Until it has ended, but no longer than a pulse. */
static bool has_ended(struct errand *q)
{
	struct timespec until;
	clock_gettime(CLOCK_REALTIME, &until);
	until.tv_nsec += PULSE_MS * 1000000L;
	until.tv_sec += until.tv_nsec / 1000000000;
	until.tv_nsec %= 1000000000;
	pthread_mutex_lock(&q->lock);
	while (!q->done && pthread_cond_timedwait(&q->ended, &q->lock, &until) != ETIMEDOUT)
		;
	bool done = q->done;
	pthread_mutex_unlock(&q->lock);
	return done;
}

/* Rank 0 works in a thread of its own and meanwhile tells the others that it lives: one rank's step may take
 * longer than a silence that counts as a hang. */
static int on_rank_0(struct verify *v, int (*work)(struct verify *, struct err *), struct err *e)
{
	struct errand q = {
	        .v = v, .work = work, .lock = PTHREAD_MUTEX_INITIALIZER, .ended = PTHREAD_COND_INITIALIZER};
	bool works = v->world->rank == 0;
	int32_t busy = 1;
	int rc = 0;
	if (works && pthread_create(&q.thread, NULL, run_errand, &q)) {
		works = false;
		q.done = true;
		q.code = err_set(&q.e, EXIT_UNAVAILABLE, "verify: cannot start a thread");
	}
	while (busy && !rc) {
		if (v->world->rank == 0)
			busy = !has_ended(&q);
		rc = comm_broadcast(v->world, &busy, 1, DT_i32, 0, e);
	}
	if (works)
		pthread_join(q.thread, NULL);
	if (rc)
		return rc;
	if (q.code)
		*e = q.e;
	return comm_any(v->world, q.code, e);
}

/* Opening */

static int open_data(struct verify *v, struct err *e)
{
	const struct config *c = v->config;
	size_t words = c->dataset.data_path.n;
	struct dataset_spec spec = {.which = SPLIT_TRAIN,
	                            .seq_length = (int)c->model.seq_length,
	                            .seed = (uint64_t)c->dataset.random_seed,
	                            .shuffle = c->dataset.shuffle,
	                            .vocab_size = c->model.vocab_size};
	bool weighted;
	if (!words)
		return 0;
	const char **paths = mem_array(words, sizeof *paths);
	double *weights = mem_array(words, sizeof *weights);
	int rc = dataset_parse_paths(c->dataset.data_path.items, (int)words, paths, weights, &spec.n,
	                             &weighted, e);
	memcpy(spec.split, c->derived.split, sizeof spec.split);
	spec.paths = paths;
	spec.weights = weighted ? weights : NULL;
	if (!rc)
		rc = dataset_open(&spec, &v->data, e);
	free(paths);
	free(weights);
	return rc;
}

/* The weights that a training would begin with. */
static int fill(const struct config *c, struct step *s, struct err *e)
{
	const struct checkpoint_config *k = &c->checkpoint;
	const char *from = k->pretrained_checkpoint ? k->pretrained_checkpoint : k->load;
	struct weights w = {0};
	pieces_init(&s->program, s->exec, (uint64_t)c->rng.seed);
	pieces_refresh_masters(&s->program, s->exec);
	if (!from)
		return 0;
	int rc = weights_open(from, &w, e);
	if (!rc)
		rc = state_load(s, &w, false, e);
	weights_close(&w);
	return rc;
}

static int open_reference(struct verify *v, struct err *e)
{
	const struct config *c = v->reference_config;
	int rc = run_open_device(c, v->options.host, &v->alone.backend, &v->alone.stream, e);
	if (!rc)
		rc = step_create(&v->reference, c, MODEL_TRAIN, &v->alone, NULL, e);
	if (!rc)
		rc = fill(c, &v->reference, e);
	if (!rc)
		v->verdict = verdict_new(&v->reference, &v->step, v->options.tolerance);
	return rc;
}

/* Rank 0 reports, a line or several at a time. */
static void report(const struct verify *v, struct buf *b)
{
	if (b->data)
		fputs(b->data, v->options.out);
	fflush(v->options.out);
	buf_free(b);
}

/* The keys of the layout that were written down, and what follows from them. */
static void put_layout(const struct config *c, struct buf *b)
{
	const struct option_table *t = config_table();
	for (size_t i = 0; i < t->n; i++) {
		const struct option *o = &t->rows[i];
		if (!is_of_the_layout(o->key) || !config_is_given(c, o->key))
			continue;
		buf_printf(b, "%s ", strchr(o->key, '.') + 1);
		option_put_value(&c->set, o, b);
		buf_puts(b, ", ");
	}
	buf_printf(b, "data_parallel %lld", (long long)c->derived.data_parallel_size);
}

/* What may differ although the layout is right. */
static void put_notes(const struct config *c, struct buf *b)
{
	const struct model_config *m = &c->model;
	if (m->num_experts == OPTION_NULL_INT)
		return;
	if (c->mixed_precision.precision != PRECISION_FP32)
		buf_puts(b, "note: a router near a tie chooses by rounding, which no bound covers; fp32 is "
		            "safer with experts\n");
	if (m->moe_router_load_balancing_type == MODEL_BALANCING_GLOBAL)
		buf_puts(b, "note: global_aux_loss depends on how samples are dealt to micro-batches\n");
	if (!isnan(m->moe_expert_rank_capacity_factor))
		buf_puts(b, "note: what moe_expert_rank_capacity_factor drops depends on the layout\n");
}

static void say_hello(const struct verify *v)
{
	const struct config *c = v->config;
	struct buf b = {0};
	buf_printf(&b, "layout: %d rank%s over %s: ", v->world->size, v->world->size > 1 ? "s" : "",
	           comm_transport(v->world));
	put_layout(c, &b);
	buf_printf(
	        &b,
	        "; against one rank\nsteps:  %lld of %lld samples of %lld tokens, %s; learning rate %g; %s\n",
	        (long long)v->options.steps, (long long)c->train.global_batch_size,
	        (long long)c->model.seq_length,
	        v->data ? "of dataset.data_path" : "made up: no dataset.data_path", c->optimizer.lr,
	        precision_choices[c->mixed_precision.precision].name);
	verdict_put_bounds(v->verdict, &b);
	put_notes(v->config, &b);
	report(v, &b);
}

int verify_open(struct verify *v, const struct config *c, const struct config *reference, struct comm *world,
                const struct verify_options *options, struct err *e)
{
	*v = (struct verify){.config = c,
	                     .reference_config = reference,
	                     .options = *options,
	                     .world = world,
	                     .at = {.world = world->size > 1 ? world : NULL, .groups = &v->groups}};
	int rc = run_open_device(c, options->host, &v->at.backend, &v->at.stream, e);
	if (!rc)
		rc = open_data(v, e);
	if ((rc = comm_any(world, rc, e)))
		return rc;
	rc = step_create(&v->step, c, MODEL_TRAIN, &v->at, NULL, e);
	if (!rc)
		rc = comm_any(world, fill(c, &v->step, e), e);
	if (!rc)
		rc = on_rank_0(v, open_reference, e);
	if (!rc && world->rank == 0)
		say_hello(v);
	return rc;
}

void verify_close(struct verify *v)
{
	verdict_free(v->verdict);
	step_free(&v->reference);
	step_free(&v->step);
	dataset_close(v->data);
	groups_close(&v->groups);
	if (v->alone.stream)
		v->alone.backend->close(v->alone.stream);
	if (v->at.stream)
		v->at.backend->close(v->at.stream);
}

/* Steps */

static uint64_t first_sample(const struct verify *v)
{
	return (uint64_t)(v->done - 1) * (uint64_t)v->config->train.global_batch_size;
}

static int reference_gradients(struct verify *v, struct err *e)
{
	return step_gradients(&v->reference, v->data, first_sample(v), &v->wanted, e);
}

static int reference_update(struct verify *v, struct err *e)
{
	return step_update(&v->reference, v->done, v->tuned.optimizer.lr, e);
}

static void put_numbers(const struct verify *v, struct buf *b)
{
	const struct step_result *a = &v->result, *w = &v->wanted;
	if (v->done == 1)
		buf_printf(b, "%4s  %-14s %-14s %-10s %-14s %-14s %s\n", "step", "loss, layout", "one rank",
		           "relative", "norm, layout", "one rank", "relative");
	buf_printf(b, "%4lld  %-14.9g %-14.9g %-10.1e %-14.9g %-14.9g %.1e\n", (long long)v->done, a->lm_loss,
	           w->lm_loss, fabs(a->lm_loss / w->lm_loss - 1), a->grad_norm, w->grad_norm,
	           fabs(a->grad_norm / w->grad_norm - 1));
}

static void judge_numbers(struct verify *v, const double *all)
{
	struct buf b = {0};
	for (int r = 0; r < v->world->size; r++) {
		struct step_result have = {.lm_loss = all[2 * r], .grad_norm = all[2 * r + 1]};
		verdict_numbers(v->verdict, v->done, r, &have, &v->wanted);
	}
	put_numbers(v, &b);
	report(v, &b);
}

/* A step that is not finite is the last one: on both sides there is nothing to verify, on one it differs. */
static int look_for_the_end(struct verify *v, struct err *e)
{
	bool mine = v->result.skipped, wanted = v->world->rank == 0 && v->wanted.skipped;
	int32_t lost = mine || wanted;
	int rc = comm_broadcast(v->world, &lost, 1, DT_i32, 0, e);
	if (rc)
		return rc;
	v->lost = lost;
	if (mine && wanted)
		rc = err_set(
		        e, EXIT_DIVERGED,
		        "verify: loss or gradient of step %lld is not finite, nor is that of one rank; lower "
		        "optimizer.lr, or find the operation with profiling.nan_hunt: true",
		        (long long)v->done);
	return comm_any(v->world, rc, e);
}

int verify_gradients(struct verify *v, struct err *e)
{
	double *all = mem_array(2 * (size_t)v->world->size, sizeof *all), mine[2];
	v->done++;
	int rc = step_gradients(&v->step, v->data, first_sample(v), &v->result, e);
	if (!rc)
		rc = on_rank_0(v, reference_gradients, e);
	mine[0] = v->result.lm_loss;
	mine[1] = v->result.grad_norm;
	if (!rc)
		rc = comm_all_gather(v->world, mine, all, 2, DT_f64, e);
	if (!rc && v->world->rank == 0)
		judge_numbers(v, all);
	free(all);
	return rc ? rc : look_for_the_end(v, e);
}

/* Both sides train with the verdict's epsilon. */
static int tune(struct verify *v, struct err *e)
{
	double eps = v->world->rank ? 0 : verdict_adam_eps(v->verdict, v->wanted.grad_norm);
	int rc = comm_broadcast(v->world, &eps, 1, DT_f64, 0, e);
	v->tuned = *v->config;
	v->tuned.optimizer.adam_eps = eps;
	v->step.config = v->reference.config = &v->tuned;
	return rc;
}

int verify_update(struct verify *v, struct err *e)
{
	int rc = v->done == 1 ? tune(v, e) : 0;
	if (!rc)
		rc = step_update(&v->step, v->done, v->tuned.optimizer.lr, e);
	return rc ? rc : on_rank_0(v, reference_update, e);
}

/* Comparing */

enum { TAG_BOX = 1, TAG_DATA };

static struct verdict_box box_of(const struct verify *v, const struct piece *q, enum shard_state state)
{
	struct verdict_box box = {.owned = piece_is_owned(&v->step.program, q, state)};
	ASSERT(strlen(q->part->name) < sizeof box.name);
	memcpy(box.offset, q->offset, sizeof box.offset);
	memcpy(box.extent, q->extent, sizeof box.extent);
	snprintf(box.name, sizeof box.name, "%s", q->part->name);
	return box;
}

static int hand_over(struct verify *v, const struct verdict_box *box, const float *data, struct err *e)
{
	size_t count = (size_t)(box->extent[0] * box->extent[1]);
	if (v->world->rank == 0) {
		if (count)
			verdict_take(v->verdict, 0, box, data);
		return 0;
	}
	int rc = comm_send(v->world, box, sizeof *box / 8, DT_i64, 0, TAG_BOX, e);
	return rc || !count ? rc : comm_send(v->world, data, count, DT_f32, 0, TAG_DATA, e);
}

/* All boxes of this rank, then an empty one. */
static int hand_in(struct verify *v, enum verdict_stage stage, struct err *e)
{
	static const struct verdict_box end;
	const struct program *t = &v->step.program;
	struct piece *list;
	size_t n = pieces_list(t, verdict_state(stage), &list);
	int rc = 0;
	for (size_t i = 0; i < n && !rc; i++) {
		struct verdict_box box = box_of(v, &list[i], verdict_state(stage));
		float *data = mem_array((size_t)piece_count(&list[i]), sizeof *data);
		step_read_piece(&v->step, &list[i], verdict_state(stage), data);
		rc = hand_over(v, &box, data, e);
		free(data);
	}
	free(list);
	return rc ? rc : hand_over(v, &end, NULL, e);
}

static int take_from(struct verify *v, int rank, struct err *e)
{
	struct verdict_box box;
	for (;;) {
		int rc = comm_recv(v->world, &box, sizeof box / 8, DT_i64, rank, TAG_BOX, e);
		size_t count = rc ? 0 : (size_t)(box.extent[0] * box.extent[1]);
		if (!count)
			return rc;
		float *data = mem_array(count, sizeof *data);
		rc = comm_recv(v->world, data, count, DT_f32, rank, TAG_DATA, e);
		if (!rc)
			verdict_take(v->verdict, rank, &box, data);
		free(data);
		if (rc)
			return rc;
	}
}

int verify_compare(struct verify *v, enum verdict_stage stage, struct err *e)
{
	struct buf b = {0};
	int rc = 0, me = v->world->rank;
	if (me == 0)
		verdict_begin(v->verdict, stage);
	for (int r = 0; r < v->world->size && !rc; r++) {
		if (r == me)
			rc = hand_in(v, stage, e);
		else if (me == 0)
			rc = take_from(v, r, e);
		if (!rc) /* so that nobody waits longer than for one rank's boxes */
			rc = comm_barrier(v->world, e);
	}
	if (!rc && me == 0)
		verdict_end(v->verdict, &b);
	if (me == 0)
		report(v, &b);
	return rc;
}

/* The end */

int verify_conclude(struct verify *v, struct err *e)
{
	struct buf first = {0}, b = {0};
	int rc = 0;
	if (v->world->rank == 0 && verdict_put_first(v->verdict, &first)) {
		buf_printf(&b, "first difference: %s\n", first.data);
		rc = err_set(e, EXIT_SELF_CHECK, "verify: this layout does not train as one rank does: %s",
		             first.data);
	} else if (v->world->rank == 0) {
		buf_printf(
		        &b,
		        "verified: world size %d trains what one rank trains, %lld steps within the bounds\n",
		        v->world->size, (long long)v->done);
	}
	if (v->world->rank == 0)
		report(v, &b);
	buf_free(&first);
	return comm_any(v->world, rc, e);
}

static int run_steps(struct verify *v, struct err *e)
{
	int rc = verify_compare(v, VERDICT_START, e);
	while (!rc && v->done < v->options.steps && !v->lost) {
		rc = verify_gradients(v, e);
		if (!rc && v->done == 1)
			rc = verify_compare(v, VERDICT_GRADIENTS, e);
		if (!rc && !v->lost)
			rc = verify_update(v, e);
	}
	if (!rc && !v->lost)
		rc = verify_compare(v, VERDICT_WEIGHTS, e);
	if (!rc && !v->lost && v->config->mixed_precision.precision != PRECISION_FP32)
		rc = verify_compare(v, VERDICT_MASTERS, e);
	return rc ? rc : verify_conclude(v, e);
}

int verify_run(const struct config *c, const struct config *reference, struct comm *world,
               const struct verify_options *options, struct err *e)
{
	struct verify *v = mem_array(1, sizeof *v);
	int rc = verify_open(v, c, reference, world, options, e);
	if (!rc)
		rc = run_steps(v, e);
	verify_close(v);
	free(v);
	return rc;
}
