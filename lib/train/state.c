#include "train/state.h"
#include "base/json.h"
#include "ckpt/ckpt.h"
#include "comm/comm.h"
#include "model/hf.h"

#include <stdlib.h>
#include <string.h>

/* The states of a parameter: what the checkpoint calls them, which value holds them. */
#define KINDS(X) X(model) X(master) X(exp_avg) X(exp_avg_sq)
enum kind {
#define KIND_ROW(name) KIND_##name,
	KINDS(KIND_ROW)
#undef KIND_ROW
	        KIND_COUNT
};
#define KIND_NAME(name) #name,
static const char *const kind_names[KIND_COUNT] = {KINDS(KIND_NAME)};

static int32_t value_of(const struct step *s, size_t k, enum kind kind)
{
	const struct param_state *state = &s->program.state[k];
	const int32_t values[KIND_COUNT] = {s->program.model.param[k].value, state->master, state->exp_avg,
	                                    state->exp_avg_sq};
	return values[kind];
}

struct piece { /* one part of one state, where it lies */
	struct ckpt_tensor tensor;
	const char *device;
};

static struct piece make_piece(const struct model *m, const struct exec *x, int32_t value,
                               const struct part *part, enum kind kind)
{
	const struct value *v = &m->prog->value[value];
	int64_t row = part->nd > 1 ? part->extent[1] : 1;
	struct piece p = {.tensor = {.name = part->name,
	                             .kind = kind_names[kind],
	                             .dtype = (enum dtype)v->dtype,
	                             .nd = part->nd},
	                  .device = (const char *)exec_data(x, value) +
	                            part->local_row * row * dtype_rows[v->dtype].bytes};
	for (int i = 0; i < part->nd; i++) {
		p.tensor.shape[i] = part->shape[i];
		p.tensor.offset[i] = part->offset[i];
		p.tensor.extent[i] = part->extent[i];
	}
	return p;
}

static size_t piece_bytes(const struct ckpt_tensor *t)
{
	size_t n = dtype_rows[t->dtype].bytes;
	for (int i = 0; i < t->nd; i++)
		n *= (size_t)t->extent[i];
	return n;
}

/* The pieces this rank writes: replicas are dealt out by turns. */
static size_t list_pieces(const struct step *s, struct piece **out)
{
	const struct model *m = &s->program.model;
	size_t n = 0, turn = 0;
	struct piece *list = mem_array(m->n_part * KIND_COUNT, sizeof *list);
	size_t ranks = (size_t)s->config->derived.data_parallel_size;
	for (size_t k = 0; k < m->n_param; k++)
		for (int32_t i = 0; i < m->param[k].n_parts; i++)
			for (int kind = 0; kind < KIND_COUNT; kind++) {
				int32_t v = value_of(s, k, (enum kind)kind);
				if (v == NONE || turn++ % ranks != (size_t)s->at.data_parallel_rank)
					continue;
				list[n++] = make_piece(m, s->exec, v, &m->part[m->param[k].first_part + i],
				                       (enum kind)kind);
			}
	*out = list;
	return n;
}

static int write_shard(const struct step *s, struct ckpt_save *save, const struct piece *piece,
                       struct buf *record, struct err *e)
{
	struct ckpt_shard *shard;
	struct ckpt_tensor *tensors = mem_array(save->n_tensors, sizeof *tensors);
	size_t most = 1;
	for (size_t i = 0; i < save->n_tensors; i++) {
		tensors[i] = piece[i].tensor;
		most = piece_bytes(&tensors[i]) > most ? piece_bytes(&tensors[i]) : most;
	}
	save->tensors = tensors;
	char *staging = mem_array(most, 1);
	int rc = ckpt_shard_create(save, &shard, e);
	if (!rc) {
		for (size_t i = 0; i < save->n_tensors && !rc; i++) {
			s->at.backend->download(s->at.stream, staging, piece[i].device,
			                        piece_bytes(&tensors[i]));
			rc = ckpt_shard_write(shard, i, staging, e);
		}
		struct err closing = {0};
		int closed = ckpt_shard_close(shard, rc ? NULL : record, &closing);
		if (!rc && (rc = closed))
			*e = closing;
	}
	free(staging);
	free(tensors);
	save->tensors = NULL;
	return rc;
}

/* Records of all ranks, one behind the other, on rank 0. */
static int gather_records(struct comm *world, const struct buf *mine, struct buf *all, struct err *e)
{
	if (world->size == 1) {
		buf_add(all, mine->data ? mine->data : "", mine->length);
		return 0;
	}
	int64_t length = (int64_t)mine->length;
	int64_t *lengths = mem_array((size_t)world->size, sizeof *lengths);
	int rc = comm_all_gather(world, &length, lengths, 1, DT_i64, e);
	for (int r = 0; r < world->size && !rc; r++) {
		size_t words = ((size_t)lengths[r] + 3) / 4; /* messages count in elements of 4 bytes */
		char *text = mem_array(words + 1, 4);
		if (r == world->rank && mine->length)
			memcpy(text, mine->data, mine->length);
		if (r && world->rank == r)
			rc = comm_send(world, text, words, DT_i32, 0, r, e);
		if (r && world->rank == 0)
			rc = comm_recv(world, text, words, DT_i32, r, r, e);
		if (world->rank == 0 && !rc)
			buf_add(all, text, (size_t)lengths[r]);
		free(text);
	}
	free(lengths);
	return rc;
}

static void write_meta(const struct step *s, const struct position *at, struct buf *meta)
{
	buf_printf(meta, "{\"step\": %lld, \"updates\": %lld, \"consumed_samples\": %llu, ",
	           (long long)at->step, (long long)at->updates, (unsigned long long)at->consumed_samples);
	buf_printf(meta, "\"dataset_fingerprint\": \"%016llx\", \"config_hash\": \"%016llx\", ",
	           (unsigned long long)at->dataset_fingerprint, (unsigned long long)config_hash(s->config));
	const char *tokenizer = s->config->tokenizer.tokenizer_model;
	if (tokenizer) {
		buf_puts(meta, "\"tokenizer_model\": ");
		json_put_string(meta, tokenizer, strlen(tokenizer));
		buf_puts(meta, ", ");
	}
	buf_puts(meta, "\"model\": ");
	hf_model_put_json(&s->config->model, meta);
	struct buf yaml = {0};
	config_write_yaml(s->config, &yaml);
	buf_puts(meta, ", \"config\": ");
	json_put_string(meta, yaml.data, yaml.length);
	buf_puts(meta, "}");
	buf_free(&yaml);
}

int state_save(const struct step *s, const struct position *at, struct comm *world, const char *dir,
               struct err *e)
{
	struct buf meta = {0}, record = {0}, records = {0};
	struct piece *piece;
	size_t n = list_pieces(s, &piece);
	write_meta(s, at, &meta);
	struct ckpt_save save = {.dir = dir,
	                         .step = at->step,
	                         .rank = world->rank,
	                         .world_size = world->size,
	                         .n_tensors = n,
	                         .meta_json = meta.data};
	int rc = comm_any(world, world->rank ? 0 : ckpt_save_begin(&save, e), e);
	if (rc)
		goto done;
	rc = comm_any(world, write_shard(s, &save, piece, &record, e), e);
	if (!rc)
		rc = comm_any(world, gather_records(world, &record, &records, e), e);
	if (rc && world->rank == 0)
		ckpt_save_abort(&save);
	if (!rc)
		rc = comm_any(world,
		              world->rank ? 0
		                          : ckpt_save_commit(&save, records.data ? records.data : "",
		                                             records.length, e),
		              e);
	int64_t keep = s->config->checkpoint.most_recent_k;
	if (!rc && world->rank == 0 && keep > 0)
		rc = ckpt_prune(dir, (int)keep, e);
	rc = comm_any(world, rc, e);
done:
	free(piece);
	buf_free(&meta);
	buf_free(&record);
	buf_free(&records);
	return rc;
}

int weights_open(const char *path, struct weights *out, struct err *e)
{
	*out = (struct weights){0};
	return hf_is_folder(path) ? hf_open(path, &out->hf, e)
	                          : ckpt_open(path, CKPT_NEWEST, 0, &out->ckpt, e);
}

void weights_close(struct weights *w)
{
	hf_close(w->hf);
	ckpt_close(w->ckpt);
	*w = (struct weights){0};
}

static int read_part(const struct weights *w, const char *kind, const struct part *part, enum dtype dtype,
                     void *out, struct err *e)
{
	if (w->hf)
		return hf_read_box(w->hf, part->name, part->offset, part->extent, dtype, out, e);
	const struct ckpt_entry *entry = ckpt_find(w->ckpt, kind, part->name);
	if (entry &&
	    (entry->nd != part->nd || memcmp(entry->shape, part->shape, sizeof(int64_t) * (size_t)part->nd)))
		return err_set(e, EXIT_CONFIG,
		               "%s: %s is [%lld,%lld] in the checkpoint, [%lld,%lld] in the configuration",
		               ckpt_path(w->ckpt), part->name, (long long)entry->shape[0],
		               (long long)(entry->nd > 1 ? entry->shape[1] : 1), (long long)part->shape[0],
		               (long long)(part->nd > 1 ? part->shape[1] : 1));
	return ckpt_read_box(w->ckpt, kind, part->name, part->offset, part->extent, dtype, out, e);
}

/* Which state of the file serves: a master is the exact weight, and where there is none the weight is exact.
 */
static const char *best_kind(const struct weights *w, const struct part *part, enum kind kind,
                             enum dtype dtype)
{
	bool has_master = w->ckpt && ckpt_find(w->ckpt, kind_names[KIND_master], part->name);
	if (kind == KIND_model && dtype == DT_f32 && has_master)
		return kind_names[KIND_master];
	return kind_names[kind == KIND_master && !has_master ? KIND_model : kind];
}

/* Reads one state of one parameter, part by part, as the type the program wants. */
static int load_value(const struct model *m, struct exec *x, size_t k, int32_t value, enum kind kind,
                      const struct weights *w, struct err *e)
{
	const struct param *q = &m->param[k];
	const struct value *v = &m->prog->value[value];
	char *host = mem_array((size_t)value_bytes(v), 1);
	int rc = 0;
	for (int32_t i = 0; i < q->n_parts && !rc; i++) {
		const struct part *part = &m->part[q->first_part + i];
		int64_t row = part->nd > 1 ? part->extent[1] : 1;
		rc = read_part(w, best_kind(w, part, kind, (enum dtype)v->dtype), part, (enum dtype)v->dtype,
		               host + part->local_row * row * dtype_rows[v->dtype].bytes, e);
	}
	if (!rc)
		exec_upload(x, value, host);
	free(host);
	return rc;
}

int state_load_weights(const struct model *m, struct exec *x, const struct weights *w, struct err *e)
{
	int rc = 0;
	for (size_t k = 0; k < m->n_param && !rc; k++)
		rc = load_value(m, x, k, m->param[k].value, KIND_model, w, e);
	return rc;
}

/* A weight of the checkpoint that the model has no place for means that the model is another one. */
static int refuse_unknown(const struct model *m, const struct ckpt *c, struct err *e)
{
	size_t known = 0, there = 0;
	for (size_t i = 0; i < ckpt_count(c); i++)
		there += !strcmp(ckpt_entry(c, i)->kind, kind_names[KIND_model]);
	for (size_t i = 0; i < m->n_part; i++)
		known += ckpt_find(c, kind_names[KIND_model], m->part[i].name) != NULL;
	for (size_t i = 0; i < ckpt_count(c) && known < there; i++) {
		bool found = strcmp(ckpt_entry(c, i)->kind, kind_names[KIND_model]) != 0;
		for (size_t j = 0; j < m->n_part && !found; j++)
			found = !strcmp(m->part[j].name, ckpt_entry(c, i)->name);
		if (!found)
			return err_set(e, EXIT_CONFIG, "%s: holds %s, which this model does not have",
			               ckpt_path(c), ckpt_entry(c, i)->name);
	}
	return 0;
}

void state_refresh_masters(struct step *s)
{
	const struct model *m = &s->program.model;
	for (size_t k = 0; k < m->n_param; k++) {
		int32_t master = s->program.state[k].master;
		if (master == NONE)
			continue;
		size_t n = (size_t)value_count(&m->prog->value[master]);
		uint16_t *half = mem_array(n, sizeof *half);
		float *full = mem_array(n, sizeof *full);
		exec_download(s->exec, m->param[k].value, half);
		for (size_t i = 0; i < n; i++)
			full[i] = bf16_to_f32(half[i]);
		exec_upload(s->exec, master, full);
		free(half);
		free(full);
	}
}

int state_load(struct step *s, const struct weights *w, bool optimizer, struct err *e)
{
	const struct model *m = &s->program.model;
	int rc = s->config->checkpoint.strict && w->ckpt ? refuse_unknown(m, w->ckpt, e) : 0;
	if (!rc)
		rc = state_load_weights(m, s->exec, w, e);
	for (size_t k = 0; k < m->n_param && !rc; k++)
		for (int kind = KIND_master; kind < KIND_COUNT && !rc; kind++) {
			int32_t v = value_of(s, k, (enum kind)kind);
			if (v != NONE && (optimizer || kind == KIND_master))
				rc = load_value(m, s->exec, k, v, (enum kind)kind, w, e);
		}
	return rc;
}

int position_read(const struct ckpt *c, struct position *out, struct err *e)
{
	const struct json *meta = ckpt_meta(c);
	struct position p = {.step = json_get_integer(meta, "step", -1),
	                     .updates = json_get_integer(meta, "updates", -1),
	                     .consumed_samples = (uint64_t)json_get_integer(meta, "consumed_samples", -1),
	                     .dataset_fingerprint =
	                             strtoull(json_get_string(meta, "dataset_fingerprint", "0"), NULL, 16)};
	if (p.step != ckpt_step(c) || p.updates < 0 || p.updates > p.step || (int64_t)p.consumed_samples < 0)
		return err_set(e, EXIT_BAD_DATA,
		               "%s: holds no position in a run (weights alone?); start from its weights with "
		               "checkpoint.pretrained_checkpoint and checkpoint.finetune: true",
		               ckpt_path(c));
	*out = p;
	return 0;
}
