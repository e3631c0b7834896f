#include "train/state.h"
#include "base/json.h"
#include "ckpt/ckpt.h"
#include "comm/comm.h"
#include "model/hf.h"
#include "train/pieces.h"

#include <stdlib.h>
#include <string.h>

/* The states of a parameter: what the checkpoint calls them. */
static const struct {
	enum shard_state state;
	const char *name;
} kinds[] = {{SHARD_PARAM, "model"},
             {SHARD_MASTER, "master"},
             {SHARD_EXP_AVG, "exp_avg"},
             {SHARD_EXP_AVG_SQ, "exp_avg_sq"}};
enum { KINDS = sizeof kinds / sizeof *kinds };

struct record { /* one piece of one state, as the checkpoint names it */
	struct ckpt_tensor tensor;
	struct piece piece;
};

static struct ckpt_tensor tensor_of(const struct program *t, const struct piece *q, const char *kind)
{
	struct ckpt_tensor tensor = {.name = q->part->name,
	                             .kind = kind,
	                             .dtype = (enum dtype)t->prog.value[q->value].dtype,
	                             .nd = q->part->nd};
	for (int i = 0; i < tensor.nd; i++) {
		tensor.shape[i] = q->part->shape[i];
		tensor.offset[i] = q->offset[i];
		tensor.extent[i] = q->extent[i];
	}
	return tensor;
}

/* The pieces that this rank writes. */
static size_t list_records(const struct step *s, struct record **out)
{
	struct record *list = NULL;
	size_t n = 0, cap = 0;
	for (int k = 0; k < KINDS; k++) {
		struct piece *piece;
		size_t pieces = pieces_list(&s->program, kinds[k].state, &piece);
		for (size_t i = 0; i < pieces; i++) {
			if (!piece_is_owned(&s->program, &piece[i], kinds[k].state))
				continue;
			list = mem_grow(list, n, &cap, sizeof *list);
			list[n++] =
			        (struct record){tensor_of(&s->program, &piece[i], kinds[k].name), piece[i]};
		}
		free(piece);
	}
	*out = list;
	return n;
}

static size_t record_bytes(const struct record *r)
{
	return (size_t)piece_count(&r->piece) * dtype_rows[r->tensor.dtype].bytes;
}

static int write_shard(const struct step *s, struct ckpt_save *save, const struct record *list,
                       struct buf *manifest, struct err *e)
{
	struct ckpt_shard *shard;
	struct ckpt_tensor *tensors = mem_array(save->n_tensors, sizeof *tensors);
	size_t most = 1;
	for (size_t i = 0; i < save->n_tensors; i++) {
		tensors[i] = list[i].tensor;
		most = record_bytes(&list[i]) > most ? record_bytes(&list[i]) : most;
	}
	save->tensors = tensors;
	char *staging = mem_array(most, 1);
	int rc = ckpt_shard_create(save, &shard, e);
	if (!rc) {
		for (size_t i = 0; i < save->n_tensors && !rc; i++) {
			const struct piece *q = &list[i].piece;
			exec_download_part(s->exec, q->value, q->first, piece_count(q), staging);
			rc = exec_status(s->exec, e);
			rc = rc ? rc : ckpt_shard_write(shard, i, staging, e);
		}
		struct err closing = {0};
		int closed = ckpt_shard_close(shard, rc ? NULL : manifest, &closing);
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
	if (scaler_searches(s->config)) {
		buf_puts(meta, "\"loss_scale\": {\"scale\": ");
		json_put_number(meta, at->scaler.scale);
		buf_printf(meta, ", \"growth_tracker\": %lld, \"hysteresis_tracker\": %lld}, ",
		           (long long)at->scaler.clean, (long long)at->scaler.left);
	}
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
	struct record *list;
	size_t n = list_records(s, &list);
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
	rc = comm_any(world, write_shard(s, &save, list, &record, e), e);
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
	free(list);
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

static int read_box(const struct weights *w, const char *kind, const struct piece *q, enum dtype dtype,
                    void *out, struct err *e)
{
	const struct part *part = q->part;
	if (w->hf)
		return hf_read_box(w->hf, part->name, q->offset, q->extent, dtype, out, e);
	const struct ckpt_entry *entry = ckpt_find(w->ckpt, kind, part->name);
	if (entry &&
	    (entry->nd != part->nd || memcmp(entry->shape, part->shape, sizeof(int64_t) * (size_t)part->nd)))
		return err_set(e, EXIT_CONFIG,
		               "%s: %s is [%lld,%lld] in the checkpoint, [%lld,%lld] in the configuration",
		               ckpt_path(w->ckpt), part->name, (long long)entry->shape[0],
		               (long long)(entry->nd > 1 ? entry->shape[1] : 1), (long long)part->shape[0],
		               (long long)(part->nd > 1 ? part->shape[1] : 1));
	return ckpt_read_box(w->ckpt, kind, part->name, q->offset, q->extent, dtype, out, e);
}

/* Which state of the file serves: a master is the exact weight, and where there is none the weight is exact.
 */
static const char *best_kind(const struct weights *w, const char *name, const char *kind, enum dtype dtype)
{
	bool has_master = w->ckpt && ckpt_find(w->ckpt, "master", name);
	const struct ckpt_entry *weight = has_master ? ckpt_find(w->ckpt, kinds[0].name, name) : NULL;
	if (!strcmp(kind, kinds[0].name) && weight && weight->dtype != dtype)
		return "master";
	return !strcmp(kind, "master") && !has_master ? "model" : kind;
}

/* Reads one state of all parameters, piece by piece, as the type the program wants. */
static int load_kind(const struct program *t, struct exec *x, int k, const struct weights *w, struct err *e)
{
	struct piece *list;
	size_t n = pieces_list(t, kinds[k].state, &list);
	int rc = 0;
	for (size_t i = 0; i < n && !rc; i++) {
		const struct piece *q = &list[i];
		enum dtype dtype = (enum dtype)t->prog.value[q->value].dtype;
		char *host = mem_array((size_t)piece_count(q), dtype_rows[dtype].bytes);
		rc = read_box(w, best_kind(w, q->part->name, kinds[k].name, dtype), q, dtype, host, e);
		if (!rc)
			exec_upload_part(x, q->value, q->first, piece_count(q), host);
		free(host);
	}
	free(list);
	return rc;
}

int state_load_weights(const struct program *t, struct exec *x, const struct weights *w, struct err *e)
{
	return load_kind(t, x, 0, w, e);
}

/* A weight of the checkpoint that the whole model has no place for means that the model is another one. */
static int refuse_unknown(const struct config *c, int rank, const struct ckpt *ckpt, struct err *e)
{
	struct program whole;
	int rc = rank ? 0 : program_build(&whole, c, MODEL_GENERATE, 1, 0, e);
	if (rank || rc)
		return rc;
	for (size_t i = 0; i < ckpt_count(ckpt) && !rc; i++) {
		const struct ckpt_entry *entry = ckpt_entry(ckpt, i);
		bool found = strcmp(entry->kind, kinds[0].name) != 0;
		for (size_t j = 0; j < whole.model.n_part && !found; j++)
			found = !strcmp(whole.model.part[j].name, entry->name);
		if (!found)
			rc = err_set(e, EXIT_CONFIG, "%s: holds %s, which this model does not have",
			             ckpt_path(ckpt), entry->name);
	}
	program_free(&whole);
	return rc;
}

int state_load(struct step *s, const struct weights *w, bool optimizer, struct err *e)
{
	const struct program *t = &s->program;
	int rc = s->config->checkpoint.strict && w->ckpt ? refuse_unknown(s->config, t->rank, w->ckpt, e) : 0;
	for (int k = 0; k < KINDS && !rc; k++)
		if (kinds[k].state <= SHARD_MASTER || optimizer)
			rc = load_kind(t, s->exec, k, w, e);
	return rc;
}

static struct scaler read_scaler(const struct json *meta)
{
	const struct json *m = json_get(meta, "loss_scale");
	return (struct scaler){.scale = json_get_number(m, "scale", 0),
	                       .clean = json_get_integer(m, "growth_tracker", 0),
	                       .left = json_get_integer(m, "hysteresis_tracker", 0)};
}

int position_read(const struct ckpt *c, struct position *out, struct err *e)
{
	const struct json *meta = ckpt_meta(c);
	struct position p = {.step = json_get_integer(meta, "step", -1),
	                     .updates = json_get_integer(meta, "updates", -1),
	                     .consumed_samples = (uint64_t)json_get_integer(meta, "consumed_samples", -1),
	                     .dataset_fingerprint =
	                             strtoull(json_get_string(meta, "dataset_fingerprint", "0"), NULL, 16),
	                     .scaler = read_scaler(meta)};
	if (p.step != ckpt_step(c) || p.updates < 0 || p.updates > p.step || (int64_t)p.consumed_samples < 0)
		return err_set(e, EXIT_BAD_DATA,
		               "%s: holds no position in a run (weights alone?); start from its weights with "
		               "checkpoint.pretrained_checkpoint and checkpoint.finetune: true",
		               ckpt_path(c));
	*out = p;
	return 0;
}
