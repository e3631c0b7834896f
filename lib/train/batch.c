#include "train/batch.h"
#include "base/rng.h"

#include <stdlib.h>

static int64_t sample_count(const struct batch *b)
{
	return b->program->model.spec.batch;
}

static int32_t length_of(const struct batch *b)
{
	return b->program->model.spec.rows;
}

/* Rows of context-parallel ranks [first, first + count), in the order of their blocks. */
static void take_blocks(struct batch *b, const int32_t *all, int32_t first, int32_t count)
{
	int32_t ranks = b->program->mesh.size[AXIS_cp], T = length_of(b), share = T / ranks, *to = b->rows;
	for (int32_t r = first; r < first + count; r++)
		for (int64_t s = 0; s < sample_count(b); s++)
			for (int32_t j = 0; j < share; j++)
				*to++ = all[s * T + context_position(T, ranks, r, j)];
}

/* Of whole samples to an input of this rank's block of rows. */
static void upload_block(struct batch *b, int32_t value, int64_t m, const int32_t *all)
{
	if (value == NONE)
		return;
	take_blocks(b, all, b->program->coord[AXIS_cp], 1);
	exec_upload_of(b->exec, value, m, b->rows);
}

/* Of these, the tensor-parallel rank's share. */
static void upload_share(struct batch *b, int32_t value, int64_t m, const int32_t *all)
{
	if (value == NONE)
		return;
	int32_t mine = b->program->prog.value[value].dim[0];
	take_blocks(b, all, b->program->coord[AXIS_cp], 1);
	exec_upload_of(b->exec, value, m, b->rows + (int64_t)mine * b->program->coord[AXIS_tp]);
}

static void upload_all(struct batch *b, int32_t value, int64_t m, const int32_t *all)
{
	if (value == NONE)
		return;
	take_blocks(b, all, 0, b->program->mesh.size[AXIS_cp]);
	exec_upload_of(b->exec, value, m, b->rows);
}

/* An end belongs to the document that it ends (Megatron-LM's reset_position_ids, reset_attention_mask). */
static void find_documents(struct batch *b)
{
	bool resets = b->program->model.spec.resets_positions;
	for (int64_t s = 0; s < sample_count(b); s++)
		for (int32_t t = 0, begin = 0; t < length_of(b); t++) {
			int64_t i = s * length_of(b) + t;
			b->begins[i] = begin;
			b->positions[i] = resets ? t - begin : t;
			begin = b->eod >= 0 && b->tokens[i] == b->eod ? t + 1 : begin;
		}
}

static void upload_positions(struct batch *b, int64_t m)
{
	const struct model *model = &b->program->model;
	upload_block(b, model->positions, m, b->positions);
	upload_share(b, model->row_positions, m, b->positions);
}

void batch_open(struct batch *b, const struct program *program, struct exec *exec, const struct config *c)
{
	const struct model_spec *spec = &program->model.spec;
	size_t n = (size_t)spec->batch * (size_t)spec->rows;
	*b = (struct batch){.program = program,
	                    .exec = exec,
	                    .tokens = mem_array(n, sizeof *b->tokens),
	                    .targets = mem_array(n, sizeof *b->targets),
	                    .begins = mem_array(n, sizeof *b->begins),
	                    .positions = mem_array(n, sizeof *b->positions),
	                    .rows = mem_array(n, sizeof *b->rows),
	                    .keys = mem_array((size_t)spec->batch, sizeof *b->keys),
	                    .eod = (int32_t)c->tokenizer.eod_id,
	                    .vocab_size = c->model.vocab_size,
	                    .dropout_key = rng_key((uint64_t)c->rng.seed, "dropout")};
	find_documents(b); /* zeros have no ends but where these are 0, and then positions are of the batch */
	if (!spec->resets_positions)
		upload_positions(b, 0);
}

void batch_close(struct batch *b)
{
	free(b->tokens);
	free(b->targets);
	free(b->begins);
	free(b->positions);
	free(b->rows);
	free(b->keys);
	*b = (struct batch){0};
}

static int make_up(struct batch *b, uint64_t first)
{
	int64_t n = sample_count(b) * length_of(b);
	for (int64_t i = 0; i < n; i++) {
		b->tokens[i] = (int32_t)(rng_bits(first, (uint64_t)i) % (uint64_t)b->vocab_size);
		b->targets[i] = (int32_t)(rng_bits(first + 1, (uint64_t)i) % (uint64_t)b->vocab_size);
	}
	return 0;
}

static bool needs_tokens(const struct model *m)
{
	return m->tokens != NONE || m->targets != NONE || m->begins != NONE || m->begins_of_all != NONE ||
	       (m->spec.resets_positions && (m->positions != NONE || m->row_positions != NONE));
}

static void upload_tokens(struct batch *b, int64_t m)
{
	const struct model *model = &b->program->model;
	upload_block(b, model->tokens, m, b->tokens);
	upload_block(b, model->targets, m, b->targets);
	if (!model->spec.resets_positions && !model->spec.resets_attention)
		return;
	find_documents(b);
	upload_block(b, model->begins, m, b->begins);
	upload_all(b, model->begins_of_all, m, b->begins);
	if (model->spec.resets_positions)
		upload_positions(b, m);
}

static void upload_keys(struct batch *b, int64_t m, uint64_t first)
{
	for (int64_t i = 0; i < sample_count(b); i++)
		b->keys[i] = (int64_t)rng_subkey(b->dropout_key, first + (uint64_t)i);
	exec_upload_of(b->exec, b->program->model.keys, m, b->keys);
}

/* Consecutive chunks of micro_batch_size · data_parallel samples, of which each rank takes its part; the set
 * of samples in a step is the same for any number of ranks. */
int batch_load(struct batch *b, const struct dataset *d, uint64_t first_sample, int64_t m, struct err *e)
{
	const struct model *model = &b->program->model;
	int64_t B = sample_count(b), ranks = program_data_ranks(b->program);
	uint64_t first = first_sample + (uint64_t)(m * B * ranks + program_data_rank(b->program) * B);
	if (needs_tokens(model)) {
		int rc = d ? dataset_batch(d, first, (int)B, b->tokens, b->targets, e) : make_up(b, first);
		if (rc)
			return rc;
		upload_tokens(b, m);
	}
	if (model->keys != NONE)
		upload_keys(b, m, first);
	return 0;
}
