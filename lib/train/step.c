#include "train/step.h"
#include "base/rng.h"
#include "comm/comm.h"
#include "kernels/kernels.h"

#include <math.h>
#include <stdlib.h>

static void upload_positions(struct step *s)
{
	const struct model_spec *spec = &s->program.model.spec;
	int32_t rows = spec->batch * spec->rows;
	for (int32_t i = 0; i < rows; i++)
		s->tokens[i] = i % spec->rows;
	exec_upload(s->exec, s->program.model.positions, s->tokens);
}

int step_create(struct step *s, const struct config *c, enum model_use use, const struct place_of_rank *at,
                const struct step *weights_of, struct err *e)
{
	*s = (struct step){.config = c, .at = *at, .dropout_key = rng_key((uint64_t)c->rng.seed, "dropout")};
	int rc = program_build(&s->program, c, use, 0, e);
	if (rc)
		goto fail;
	s->comm = (struct exec_comm){AXIS_BIT(dp), at->data_parallel};
	struct exec_options options = {.comm = &s->comm,
	                               .n_comm = at->data_parallel != NULL,
	                               .nan_hunt = c->profiling.nan_hunt,
	                               .trace = c->profiling.trace_nodes,
	                               .reference =
	                                       c->profiling.compare_kernels ? &cpu_reference_backend : NULL};
	if (weights_of) {
		options.share = weights_of->exec;
		options.share_regions = 1u << R_PARAM | 1u << R_CONST;
	}
	if ((rc = exec_create(&s->exec, &s->program.prog, at->backend, at->stream, &options, e)))
		goto fail;
	size_t n = (size_t)s->program.model.spec.batch * (size_t)s->program.model.spec.rows;
	s->tokens = mem_array(n, sizeof *s->tokens);
	s->targets = mem_array(n, sizeof *s->targets);
	s->keys = mem_array((size_t)s->program.model.spec.batch, sizeof *s->keys);
	upload_positions(s);
	if (!weights_of)
		model_fill_constants(&s->program.model, s->exec);
	return 0;
fail:
	step_free(s);
	return rc;
}

void step_free(struct step *s)
{
	exec_free(s->exec);
	program_free(&s->program);
	free(s->tokens);
	free(s->targets);
	free(s->keys);
	*s = (struct step){0};
}

/* Tokens of a dry run: any, but the same for the same sample. */
static int make_up_batch(struct step *s, uint64_t first)
{
	int64_t n = (int64_t)s->program.model.spec.batch * s->program.model.spec.rows;
	for (int64_t i = 0; i < n; i++) {
		s->tokens[i] =
		        (int32_t)(rng_bits(first, (uint64_t)i) % (uint64_t)s->config->model.vocab_size);
		s->targets[i] =
		        (int32_t)(rng_bits(first + 1, (uint64_t)i) % (uint64_t)s->config->model.vocab_size);
	}
	return 0;
}

/* Micro-batch m of the global batch: consecutive chunks of micro_batch_size · data_parallel samples, of which
 * each rank takes its part; the set of samples in a step is the same for any number of ranks. */
static int load_micro_batch(struct step *s, const struct dataset *d, uint64_t first_sample, int64_t m,
                            struct err *e)
{
	const struct model *model = &s->program.model;
	int64_t B = model->spec.batch, ranks = s->config->derived.data_parallel_size;
	uint64_t first = first_sample + (uint64_t)(m * B * ranks + s->at.data_parallel_rank * B);
	int rc = d ? dataset_batch(d, first, (int)B, s->tokens, s->targets, e) : make_up_batch(s, first);
	if (rc)
		return rc;
	exec_upload(s->exec, model->tokens, s->tokens);
	exec_upload(s->exec, model->targets, s->targets);
	if (model->keys == NONE)
		return 0;
	for (int64_t i = 0; i < B; i++)
		s->keys[i] = (int64_t)rng_subkey(s->dropout_key, first + (uint64_t)i);
	exec_upload(s->exec, model->keys, s->keys);
	return 0;
}

static double targets_of_a_step(const struct step *s)
{
	return (double)s->config->train.global_batch_size * (double)s->config->model.seq_length;
}

/* Micro-batches [0, n) through forward, and backward where the program has one. One rank's failure is
 * everybody's: the others would wait for its gradients. */
static int run_micro_batches(struct step *s, const struct dataset *d, uint64_t first_sample, int64_t n,
                             struct err *e)
{
	int rc = 0;
	for (int64_t m = 0; m < n && !rc; m++) {
		rc = load_micro_batch(s, d, first_sample, m, e);
		if (!rc)
			rc = exec_run(s->exec, SEG_FWD, m == 0, e);
		if (!rc)
			rc = exec_run(s->exec, SEG_BWD, m == 0, e);
	}
	if (s->at.data_parallel)
		rc = comm_any(s->at.data_parallel, rc, e);
	return rc ? rc : exec_run(s->exec, SEG_REDUCE, true, e);
}

int step_gradients(struct step *s, const struct dataset *d, uint64_t first_sample, struct step_result *r,
                   struct err *e)
{
	float scale = (float)(1 / targets_of_a_step(s));
	exec_upload(s->exec, s->program.model.loss_scale, &scale);
	int rc = run_micro_batches(s, d, first_sample, s->config->derived.accumulation, e);
	if (rc)
		return rc;
	double loss, norm2;
	exec_download(s->exec, s->program.loss, &loss);
	exec_download(s->exec, s->program.norm2, &norm2);
	r->lm_loss = loss / targets_of_a_step(s);
	r->grad_norm = sqrt(norm2);
	r->skipped = !isfinite(loss) || !isfinite(norm2);
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
	};
	exec_upload(s->exec, s->program.hyper, hyper);
	return exec_run(s->exec, SEG_STEP, true, e);
}

int step_evaluate(struct step *s, const struct dataset *d, uint64_t first_sample, int64_t n, double *lm_loss,
                  struct err *e)
{
	double loss;
	int rc = run_micro_batches(s, d, first_sample, n * s->config->derived.accumulation, e);
	if (rc)
		return rc;
	exec_download(s->exec, s->program.loss, &loss);
	*lm_loss = loss / (targets_of_a_step(s) * (double)n);
	return 0;
}
