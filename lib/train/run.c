#include "train/run.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/sys.h"
#include "base/text.h"
#include "ckpt/ckpt.h"
#include "comm/comm.h"
#include "data/indexed.h"
#include "data/tokenizer.h"
#include "model/hf.h"
#include "train/auto.h"
#include "train/expert_load.h"
#include "train/meter.h"
#include "train/pieces.h"
#include "train/learning_rate.h"
#include "train/state.h"
#include "train/stop.h"

#include <errno.h>
#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { SKIPS_IN_A_ROW = 3, FAILED_SAVES_IN_A_ROW = 3 };

struct run {
	const struct config *c;
	const struct run_options *options;
	struct comm *world;
	struct groups groups;
	struct place_of_rank at;
	struct step step, eval;
	struct dataset *data, *valid;
	struct position position;
	struct meter meter;
	struct step_experts experts; /* of the last step */
	struct memory planned;
	double matmul_peak; /* flop/s */
	bool memory_checked;
	int64_t free_before; /* bytes of device memory, before the programs took theirs */
	char checkpoints[PATH_MAX];
	int skips, failed_saves;
	int64_t saved_step;   /* newest checkpoint of this run, -1 = none */
	int64_t updated_step; /* the newest one that was not skipped, or that of the weights it began with */
	double started_s, save_s;
};

static int override_id(struct config *c, const char *key, int32_t value, struct err *e)
{
	char text[32];
	snprintf(text, sizeof text, "%d", value);
	return config_override(c, key, text, c->tokenizer.tokenizer_model, e);
}

int run_complete_config(struct config *c, struct err *e)
{
	struct tokenizer *t;
	bool resets = c->dataset.reset_position_ids || c->dataset.reset_attention_mask;
	bool needs_size = !config_is_given(c, "model.vocab_size");
	bool needs_eod = resets && !config_is_given(c, "tokenizer.eod_id");
	const char *path = c->tokenizer.tokenizer_model;
	if (!path || (!needs_size && !needs_eod))
		return 0;
	int rc = tokenizer_load(path, &t, e);
	if (rc)
		return rc;
	int32_t size = tokenizer_vocab_size(t), eod = tokenizer_eod(t);
	tokenizer_free(t);
	if (needs_eod && eod < 0)
		return err_set(e, EXIT_CONFIG,
		               "tokenizer.eod_id: %s does not say which token ends a document; give its id",
		               path);
	if (needs_size)
		rc = override_id(c, "model.vocab_size", size, e);
	return !rc && needs_eod ? override_id(c, "tokenizer.eod_id", eod, e) : rc;
}

/* Data */

static int open_split(struct run *r, enum samples_split which, struct dataset **out, struct err *e)
{
	const struct config *c = r->c;
	size_t words = c->dataset.data_path.n;
	const char **paths = mem_array(words, sizeof *paths);
	double *weights = mem_array(words, sizeof *weights);
	int n;
	bool weighted;
	int rc =
	        dataset_parse_paths(c->dataset.data_path.items, (int)words, paths, weights, &n, &weighted, e);
	struct dataset_spec spec = {.paths = paths,
	                            .weights = weighted ? weights : NULL,
	                            .n = n,
	                            .which = which,
	                            .seq_length = (int)c->model.seq_length,
	                            .seed = (uint64_t)c->dataset.random_seed,
	                            .shuffle = c->dataset.shuffle,
	                            .vocab_size = c->model.vocab_size};
	memcpy(spec.split, c->derived.split, sizeof spec.split);
	if (!rc)
		rc = dataset_open(&spec, out, e);
	free(paths);
	free(weights);
	return rc;
}

static int open_data(struct run *r, struct err *e)
{
	if (r->options->dry_run)
		return 0;
	if (!r->c->dataset.data_path.n)
		return err_set(e, EXIT_CONFIG,
		               "dataset.data_path: nothing to train on; give the prefix that `pentad "
		               "prepare` wrote");
	indexed_guard_install();
	int rc = open_split(r, SPLIT_TRAIN, &r->data, e);
	if (!rc && r->c->validation.eval_interval > 0)
		rc = open_split(r, SPLIT_VALID, &r->valid, e);
	if (rc)
		return rc;
	r->position.dataset_fingerprint = dataset_fingerprint(r->data);
	double samples = (double)dataset_count_samples(r->data);
	log_info("data: %.0f tokens, %.0f samples of %lld, %.2f epochs in %lld steps",
	         (double)dataset_count_tokens(r->data), samples, (long long)r->c->model.seq_length,
	         (double)r->c->train.train_iters * (double)r->c->train.global_batch_size / samples,
	         (long long)r->c->train.train_iters);
	return 0;
}

/* The run folder */

static int make_folder(struct run *r, struct err *e)
{
	char path[PATH_MAX];
	const char *dir = r->c->run.dir;
	if (r->options->dry_run || r->world->rank)
		return 0;
	if (!dir)
		return err_set(e, EXIT_CONFIG,
		               "run.dir: where the run's files go must be said, for example --set "
		               "run.dir=runs/demo");
	int rc = sys_make_dirs(dir, e);
	if (rc)
		return rc;
	struct buf yaml = {0};
	config_write_yaml(r->c, &yaml);
	snprintf(path, sizeof path, "%s/config.yaml", dir);
	rc = sys_write_file(path, yaml.data, yaml.length, e);
	buf_free(&yaml);
	snprintf(path, sizeof path, "%s/log.txt", dir);
	return rc ? rc : log_open(path, e);
}

/* Where to begin: this run's newest checkpoint, another's, pretrained weights, or initial values */

/* Rank 0 finds the newest step whose checksums are all right, the others open the same one. *out NULL: there
 * is none at all. */
static int open_checkpoint(struct run *r, const char *path, struct ckpt **out, struct err *e)
{
	int64_t step = -1;
	int rc = 0;
	*out = NULL;
	if (r->world->rank == 0) {
		rc = ckpt_open(path, CKPT_NEWEST, CKPT_VERIFY, out, e);
		step = rc ? -1 : ckpt_step(*out);
		if (rc == EXIT_NO_INPUT)
			rc = 0;
	}
	if ((rc = comm_any(r->world, rc, e)) || (rc = comm_broadcast(r->world, &step, 1, DT_i64, 0, e)))
		return rc;
	if (step >= 0 && r->world->rank)
		rc = ckpt_open(path, step, CKPT_STRICT, out, e);
	return comm_any(r->world, rc, e);
}

static int resume(struct run *r, struct ckpt *c, struct err *e)
{
	struct position at;
	int rc = position_read(c, &at, e);
	if (!rc)
		rc = state_load(&r->step, &(struct weights){.ckpt = c}, true, e);
	if (rc)
		return rc;
	if (r->data && at.dataset_fingerprint != r->position.dataset_fingerprint)
		log_warn("the data differ from those of %s: samples may repeat or be left out", ckpt_path(c));
	at.dataset_fingerprint = r->position.dataset_fingerprint;
	if (!scaler_searches(r->c) || !(at.scaler.scale > 0))
		at.scaler = r->position.scaler;
	r->position = at;
	r->saved_step = r->updated_step = at.step;
	log_info("resumed from %s at step %lld", ckpt_path(c), (long long)at.step);
	return 0;
}

static int start_from_weights(struct run *r, const char *path, struct err *e)
{
	struct weights w = {0};
	int rc = 0;
	if (hf_is_folder(path))
		rc = comm_any(r->world, weights_open(path, &w, e), e);
	else
		rc = open_checkpoint(r, path, &w.ckpt, e);
	if (!rc && !w.ckpt && !w.hf)
		rc = err_set(e, EXIT_NO_INPUT, "checkpoint.pretrained_checkpoint: %s: no checkpoint there",
		             path);
	if (!rc)
		rc = comm_any(r->world, state_load(&r->step, &w, false, e), e);
	if (!rc)
		log_info("weights from %s", w.ckpt ? ckpt_path(w.ckpt) : path);
	weights_close(&w);
	return rc;
}

static int start_state(struct run *r, struct err *e)
{
	const struct checkpoint_config *k = &r->c->checkpoint;
	struct ckpt *c = NULL;
	int rc = 0;
	pieces_init(&r->step.program, r->step.exec, (uint64_t)r->c->rng.seed);
	pieces_refresh_masters(&r->step.program, r->step.exec);
	if (r->options->dry_run)
		return 0;
	if ((rc = open_checkpoint(r, r->checkpoints, &c, e)))
		return rc;
	if (!c && k->load && !k->finetune && (rc = open_checkpoint(r, k->load, &c, e)))
		return rc;
	if (!c && k->load && !k->finetune)
		return err_set(e, EXIT_NO_INPUT, "checkpoint.load: %s: no checkpoint there", k->load);
	if (c) {
		rc = comm_any(r->world, resume(r, c, e), e);
		ckpt_close(c);
		return rc;
	}
	const char *weights = k->pretrained_checkpoint ? k->pretrained_checkpoint
	                      : k->finetune            ? k->load
	                                               : NULL;
	return weights ? start_from_weights(r, weights, e) : 0;
}

/* The loop */

static int save(struct run *r, bool last, struct err *e)
{
	if (!r->c->checkpoint.save || r->options->dry_run || r->saved_step == r->position.step)
		return 0;
	double begin = clock_now_s();
	mem_trim(); /* what libraries have freed need not stay beside what is staged */
	int rc = state_save(&r->step, &r->position, r->world, r->checkpoints, e);
	if (!rc) {
		char took[32];
		r->save_s = clock_now_s() - begin;
		r->saved_step = r->position.step;
		r->failed_saves = 0;
		log_info("saved step %lld in %s", (long long)r->position.step,
		         text_duration(took, sizeof took, r->save_s));
		return 0;
	}
	/* A full disk may be cleared by the next time; training goes on, the former checkpoint is whole. */
	if (!last && rc == EXIT_IO && ++r->failed_saves < FAILED_SAVES_IN_A_ROW) {
		if (r->world->rank == 0)
			log_error("step %lld was not saved: %s", (long long)r->position.step, e->text);
		*e = (struct err){0};
		return 0;
	}
	return rc;
}

static int validate(struct run *r, struct err *e)
{
	double loss;
	int rc = step_evaluate(&r->eval, r->valid, 0, r->c->validation.eval_iters, &loss, e);
	if (!rc)
		meter_validation(&r->meter, r->position.step, loss);
	return rc;
}

/* After the first whole step nothing is allocated any more: now every rank holds what was planned. */
static int check_memory(struct run *r, struct err *e)
{
	if (r->memory_checked)
		return 0;
	r->memory_checked = true;
	return comm_any(r->world, memory_check(&r->planned, &r->step, &r->eval, e), e);
}

/* Skipped steps in a row that are no part of the search for a loss scale, which leaves the loss finite. */
static void count_skips(struct run *r, const struct step_result *result)
{
	bool searching = isfinite(result->lm_loss) && !scaler_is_lowest(&r->position.scaler, r->c);
	r->skips = result->skipped && !searching ? r->skips + 1 : 0;
	r->updated_step = result->skipped ? r->updated_step : r->position.step;
}

static const char *lower_too(const struct config *c)
{
	return scaler_searches(c)                               ? " or mixed_precision.min_loss_scale"
	       : c->mixed_precision.precision == PRECISION_FP16 ? " or mixed_precision.loss_scale"
	                                                        : "";
}

static int one_step(struct run *r, struct err *e)
{
	struct step_result result;
	double begin = clock_now_s();
	int64_t step = r->position.step + 1;
	double lr = learning_rate(r->c, step);
	if (!r->options->dry_run) /* whose only step should not be one that is skipped */
		r->step.loss_scale = r->position.scaler.scale;
	int rc = step_gradients(&r->step, r->data, r->position.consumed_samples, &result, e);
	if (!rc && !result.skipped)
		rc = step_update(&r->step, r->position.updates + 1, lr, e);
	if (rc)
		return rc;
	r->position.step = step;
	r->position.updates += !result.skipped;
	r->position.consumed_samples += (uint64_t)r->c->train.global_batch_size;
	count_skips(r, &result);
	scaler_update(&r->position.scaler, r->c, result.skipped);
	struct step_report report = {.step = step,
	                             .lm_loss = result.lm_loss,
	                             .grad_norm = result.grad_norm,
	                             .lr = lr,
	                             .loss_scale = r->step.loss_scale,
	                             .seconds = clock_now_s() - begin,
	                             .skipped = result.skipped,
	                             .experts = result.experts};
	r->experts = result.experts;
	if (r->world->rank == 0)
		meter_step(&r->meter, &report);
	if (!result.skipped && (rc = check_memory(r, e)))
		return rc;
	if (r->skips >= SKIPS_IN_A_ROW)
		return err_set(
		        e, EXIT_DIVERGED,
		        "step %lld: loss or gradient was not finite for %d steps in a row; the weights are "
		        "those of step %lld. Lower optimizer.lr%s, or find the operation with "
		        "profiling.nan_hunt: true",
		        (long long)step, SKIPS_IN_A_ROW, (long long)r->updated_step, lower_too(r->c));
	return 0;
}

/* The highest reason of any rank. */
static int agree_to_stop(struct run *r, enum stop_reason *reason, struct err *e)
{
	const struct train_config *t = &r->c->train;
	double needed_s = 60 + 2 * r->meter.smooth_step_s + 2 * r->save_s;
	const char *dir = r->world->rank || r->options->dry_run ? NULL : r->c->run.dir;
	int32_t mine = stop_look(dir, needed_s);
	if (t->exit_interval > 0 && r->position.step % t->exit_interval == 0 && mine < STOP_INTERVAL)
		mine = STOP_INTERVAL;
	if (t->exit_duration_in_mins > 0 && clock_now_s() - r->started_s > 60 * t->exit_duration_in_mins &&
	    mine < STOP_DURATION)
		mine = STOP_DURATION;
	int rc = comm_all_reduce(r->world, &mine, 1, DT_i32, REDUCE_MAX, e);
	*reason = (enum stop_reason)mine;
	return rc;
}

static int after_step(struct run *r, enum stop_reason *reason, struct err *e)
{
	const struct config *c = r->c;
	int64_t step = r->position.step;
	int rc = 0;
	if (r->valid && (step % c->validation.eval_interval == 0 || step == c->train.train_iters))
		rc = validate(r, e);
	if (!rc)
		rc = agree_to_stop(r, reason, e);
	if (rc)
		return rc;
	bool due = c->checkpoint.save_interval > 0 && step % c->checkpoint.save_interval == 0;
	bool last = *reason > STOP_SAVE || step == c->train.train_iters;
	return due || last || *reason == STOP_SAVE ? save(r, last, e) : 0;
}

static int loop(struct run *r, struct err *e)
{
	int64_t end = r->options->dry_run ? r->position.step + 1 : r->c->train.train_iters;
	if (r->position.step >= end)
		log_info("nothing to do: step %lld of %lld is done", (long long)r->position.step,
		         (long long)end);
	while (r->position.step < end) {
		enum stop_reason reason = STOP_NOTHING;
		int rc = one_step(r, e);
		if (!rc && !r->options->dry_run)
			rc = after_step(r, &reason, e);
		if (rc)
			return rc;
		if (reason > STOP_SAVE && r->position.step < end) {
			log_info("stopped by %s after step %lld; start again to go on", stop_words[reason],
			         (long long)r->position.step);
			return EXIT_AGAIN;
		}
	}
	return 0;
}

static void say_hello(struct run *r)
{
	char params[32], memory[32];
	const struct program *t = &r->step.program;
	auto_say(r->options->why);
	for (size_t i = 0; i < r->c->derived.equations.n; i++)
		log_info("%s", r->c->derived.equations.items[i]);
	for (size_t i = 0; i < r->c->derived.stages.n; i++)
		log_info("%s", r->c->derived.stages.items[i]);
	for (size_t i = 0; i < r->c->derived.notes.n; i++)
		log_warn("%s", r->c->derived.notes.items[i]);
	log_info("model: %s parameters, %zu operations, %s on rank 0; %d rank%s over %s; device %s (%s)",
	         text_count(params, sizeof params,
	                    (double)model_count_parameters(&r->c->model, r->c->derived.padded_vocab_size)),
	         t->prog.n_node, text_bytes(memory, sizeof memory, (double)r->meter.mem_bytes),
	         r->world->size, r->world->size > 1 ? "s" : "", comm_transport(r->world), r->at.backend->name,
	         r->at.backend->describe());
}

/* Peak and memory of a device that is not the host. */
static void describe_device(struct run *r)
{
	const struct backend *b = r->at.backend;
	int64_t free_bytes;
	if (b->datasheet_peak)
		r->meter.datasheet_peak = b->datasheet_peak(r->at.stream, program_dtype(r->c));
	if (b->memory)
		b->memory(r->at.stream, &free_bytes, &r->meter.memory_limit_bytes);
}

static int start_meter(struct run *r, struct err *e)
{
	const struct config *c = r->c;
	const char *dir = r->world->rank || r->options->dry_run ? NULL : c->run.dir;
	int rc = meter_open(&r->meter, c, dir, r->position.step, e);
	double tokens = (double)c->train.global_batch_size * (double)c->model.seq_length;
	r->meter.flops_per_step = model_flops(&c->model, c->derived.padded_vocab_size, tokens);
	r->meter.world_size = r->world->size;
	r->meter.skipped = r->position.step - r->position.updates;
	r->meter.mem_bytes = memory_total(&r->planned);
	r->meter.matmul_peak = r->matmul_peak;
	describe_device(r);
	return rc;
}

/* What was planned on rank 0's device, and what is gone of it since before: other processes may have a part
 * in that. */
static int report_device_memory(struct run *r)
{
	int64_t free_bytes, total;
	char planned[32], taken[32];
	r->at.backend->memory(r->at.stream, &free_bytes, &total);
	log_info("device memory: planned %s, taken %s",
	         text_bytes(planned, sizeof planned, (double)memory_total(&r->planned)),
	         text_bytes(taken, sizeof taken, (double)(r->free_before - free_bytes)));
	return 0;
}

/* What the rank planned and what was resident, where the two differ most. Collective over the world. */
static int report_memory(struct run *r, struct err *e)
{
	if (r->planned.on_device)
		return report_device_memory(r);
	int64_t mine[] = {memory_total(&r->planned), sys_peak_resident(), sys_mapped_files()};
	int64_t(*all)[3] = mem_array((size_t)r->world->size, sizeof *all);
	int rc = comm_all_gather(r->world, mine, all, 3, DT_i64, e), at = 0;
	char planned[32], resident[32], mapped[32];
	for (int i = 1; i < r->world->size && !rc; i++)
		if (llabs(all[i][1] - all[i][0]) > llabs(all[at][1] - all[at][0]))
			at = i;
	if (!rc && all[at][1] >= 0)
		log_info("memory: planned %s, resident %s at its peak on rank %d, where they differ most; "
		         "%s of it are pages of files",
		         text_bytes(planned, sizeof planned, (double)all[at][0]),
		         text_bytes(resident, sizeof resident, (double)all[at][1]), at,
		         text_bytes(mapped, sizeof mapped, (double)all[at][2]));
	free(all);
	return rc;
}

/* How the last step's tokens went to the experts, and what the run lost for want of room. */
static void report_experts(struct run *r)
{
	struct buf b = {0};
	if (!r->experts.layers || r->world->rank)
		return;
	expert_load_put_table(&r->experts, &b);
	for (char *line = strtok(b.data, "\n"); line; line = strtok(NULL, "\n"))
		log_info("%s", line);
	buf_free(&b);
	if (r->meter.overflow_sum)
		log_warn("%lld choices found no room on the ranks of their experts: raise "
		         "model.moe_expert_rank_capacity_factor (%g), or leave it out",
		         (long long)r->meter.overflow_sum, r->c->model.moe_expert_rank_capacity_factor);
}

static int open_run(struct run *r, struct err *e)
{
	r->at.world = r->world->size > 1 ? r->world : NULL;
	r->at.groups = &r->groups;
	/* Before the run's memory is taken. */
	int rc = run_measure_device(r->c, r->options->host, &r->matmul_peak, e);
	if (!rc)
		rc = run_open_device(r->c, r->options->host, &r->at.backend, &r->at.stream, e);
	if (!rc)
		rc = make_folder(r, e);
	if (!rc)
		rc = open_data(r, e);
	return comm_any(r->world, rc, e);
}

static int open_steps(struct run *r, struct err *e)
{
	int rc = estimate_memory(&r->planned, r->c, r->world->rank, r->options->host, r->options->dry_run, e);
	if ((rc = comm_any(r->world, rc, e)))
		return rc;
	if (r->at.backend->memory)
		r->at.backend->memory(r->at.stream, &r->free_before, &(int64_t){0});
	mem_trim(); /* what came before, the tokenizer above all, would stay resident */
	rc = step_create(&r->step, r->c, MODEL_TRAIN, &r->at, NULL, e);
	if (!rc && r->valid)
		rc = step_create(&r->eval, r->c, MODEL_EVALUATE, &r->at, &r->step, e);
	return rc;
}

static void close_run(struct run *r)
{
	meter_close(&r->meter);
	step_free(&r->eval);
	step_free(&r->step);
	dataset_close(r->data);
	dataset_close(r->valid);
	groups_close(&r->groups);
	if (r->at.stream)
		r->at.backend->close(r->at.stream);
	log_close();
}

int run_train(const struct config *c, struct comm *world, const struct run_options *options, struct err *e)
{
	struct run *r = mem_array(1, sizeof *r);
	*r = (struct run){.c = c,
	                  .options = options,
	                  .world = world,
	                  .position = {.scaler = scaler_start(c)},
	                  .saved_step = -1,
	                  .started_s = clock_now_s()};
	snprintf(r->checkpoints, sizeof r->checkpoints, "%s/checkpoints", c->run.dir ? c->run.dir : "");
	int rc = open_run(r, e);
	if (!rc)
		rc = open_steps(r, e);
	if (!rc)
		rc = start_state(r, e);
	if (!rc)
		rc = comm_any(world, start_meter(r, e), e);
	if (!rc) {
		stop_install_signals();
		say_hello(r);
		rc = loop(r, e);
	}
	if (rc == 0 || rc == EXIT_AGAIN) {
		report_experts(r);
		int reported = report_memory(r, e);
		rc = reported ? reported : rc;
	}
	log_progress("%s", "");
	close_run(r);
	free(r);
	return rc;
}
