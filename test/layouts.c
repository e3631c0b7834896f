#include "test/layouts.h"
#include "base/err.h"
#include "base/mem.h"
#include "comm/comm.h"
#include "kernels/kernels.h"
#include "test/ranks.h"
#include "test/test.h"
#include "test/walk.h"
#include "train/pieces.h"
#include "train/step.h"

#include <stdlib.h>

enum { MAX_SETS = 60 };

static const struct {
	const char *word, *key;
} words[] = {{"tp", "parallel.tensor_model_parallel_size"},
             {"sp", "parallel.sequence_parallel"},
             {"cp", "parallel.context_parallel_size"},
             {"exchange", "parallel.cp_comm_type"},
             {"ep", "parallel.expert_model_parallel_size"},
             {"etp", "parallel.expert_tensor_parallel_size"},
             {"dispatch", "model.moe_token_dispatcher_type"},
             {"share", "model.moe_shared_expert_overlap"},
             {"pp", "parallel.pipeline_model_parallel_size"},
             {"vpp", "parallel.virtual_pipeline_model_parallel_size"},
             {"schedule", "parallel.pipeline_schedule"},
             {"layout", "parallel.pipeline_model_parallel_layout"},
             {"zero", "ddp.zero_stage"},
             {"instances", "ddp.num_distributed_optimizer_instances"},
             {"bucket", "ddp.bucket_size"},
             {"fp32_reduce", "ddp.grad_reduce_in_fp32"},
             {"overlap", "ddp.overlap_grad_reduce"},
             {"tp_overlap", "comm_overlap.tp_comm_overlap"},
             {"mbs", "train.micro_batch_size"},
             {"recompute", "recompute.granularity"},
             {"modules", "recompute.modules"}};

struct rank { /* one thread */
	const struct config *config;
	const struct dataset *data;
	struct comm *comm;
	int index;
	struct outcome *out; /* shared */
	double loss[STEPS], norm[STEPS], validation;
	bool failed;
};

static size_t add_words(const char *text, const char **sets, size_t n, struct arena *a)
{
	char word[40], value[80];
	int used;
	while (sscanf(text, "%39s %79s%n", word, value, &used) == 2) {
		size_t k = 0;
		while (k < sizeof words / sizeof *words && strcmp(words[k].word, word))
			k++;
		ASSERT(k < sizeof words / sizeof *words && n < MAX_SETS);
		bool flag = !strcmp(word, "sp") || !strcmp(word, "share") || strstr(word, "overlap") ||
		            !strcmp(word, "fp32_reduce");
		const char *as = !flag ? value : !strcmp(value, "0") ? "false" : "true";
		sets[n++] = arena_printf(a, "%s=%s", words[k].key, as);
		text += used;
	}
	return n;
}

bool layout_config(struct config *c, const struct layout *l, const char *const *extra)
{
	static const char *const common[] = {"model.num_layers=4",
	                                     "model.hidden_size=24",
	                                     "model.num_attention_heads=4",
	                                     "model.num_query_groups=4",
	                                     "model.ffn_hidden_size=40",
	                                     "model.vocab_size=131",
	                                     "model.seq_length=12",
	                                     "model.add_qkv_bias=true",
	                                     "model.make_vocab_size_divisible_by=3",
	                                     "train.train_iters=5",
	                                     "optimizer.adam_eps=1e-3",
	                                     "optimizer.clip_grad=0.5",
	                                     "optimizer.weight_decay=0.1"};
	const char *sets[MAX_SETS];
	struct arena a = {0};
	size_t n = 0;
	for (; n < sizeof common / sizeof *common; n++)
		sets[n] = common[n];
	while (extra && *extra)
		sets[n++] = *extra++;
	sets[n++] = arena_printf(&a, "train.global_batch_size=%d", GLOBAL_BATCH);
	n = add_words(l->text, sets, n, &a);
	struct config_source source = {.sets = sets, .n_sets = n};
	struct err e = {0};
	bool good = !config_load(c, &source, &e) && !config_check(c, l->ranks, &e);
	arena_free(&a);
	if (!good)
		test_failed(__FILE__, __LINE__, "%d ranks, %s: %s", l->ranks, l->text, e.text);
	return good;
}

struct dataset *layout_data(bool shuffle, int64_t vocab_size, int64_t seq_length)
{
	struct dataset *d = NULL;
	struct err e = {0};
	const char *paths[] = {test_golden("llama/tokens")};
	struct dataset_spec spec = {.paths = paths,
	                            .n = 1,
	                            .split = {1, 0, 0},
	                            .seq_length = seq_length,
	                            .vocab_size = vocab_size,
	                            .shuffle = shuffle,
	                            .seed = 7};
	if (dataset_open(&spec, &d, &e))
		test_failed(__FILE__, __LINE__, "%s", e.text);
	return d;
}

static struct tensor_copy *tensor_of(struct outcome *o, const struct part *part)
{
	for (int i = 0; i < o->n_tensor; i++)
		if (!strcmp(o->tensor[i].name, part->name))
			return &o->tensor[i];
	ASSERT(o->n_tensor < MAX_TENSORS);
	struct tensor_copy *t = &o->tensor[o->n_tensor++];
	size_t count = (size_t)(part->shape[0] * part->shape[1]);
	snprintf(t->name, sizeof t->name, "%s", part->name);
	memcpy(t->shape, part->shape, sizeof t->shape);
	t->data = mem_array(count, sizeof *t->data);
	t->written = mem_array(count, sizeof *t->written);
	return t;
}

/* Owned pieces make the tensor up, each element once; copies are equal to them, bit for bit. */
static void keep_piece(struct rank *r, const struct step *s, const struct piece *q, bool owned)
{
	struct tensor_copy *t = tensor_of(r->out, q->part);
	float *host = mem_array((size_t)piece_count(q), sizeof *host);
	piece_read(&s->program, s->exec, q, host);
	for (int64_t i = 0; i < q->extent[0]; i++)
		for (int64_t j = 0; j < q->extent[1]; j++) {
			int64_t at = (q->offset[0] + i) * t->shape[1] + q->offset[1] + j;
			float x = host[i * q->extent[1] + j];
			if (owned) {
				t->data[at] = x;
				t->written[at]++;
			} else if (memcmp(&t->data[at], &x, sizeof x)) {
				test_failed(__FILE__, __LINE__, "%s: rank %d holds another copy", t->name,
				            r->index);
				i = q->extent[0];
				break;
			}
		}
	free(host);
}

static void keep_weights(struct rank *r, const struct step *s)
{
	struct piece *list;
	struct err e = {0};
	size_t n = pieces_list(&s->program, SHARD_PARAM, &list);
	for (int owned = 1; owned >= 0; owned--) {
		pthread_mutex_lock(&r->out->lock);
		for (size_t i = 0; i < n; i++)
			if (piece_is_owned(&s->program, &list[i], SHARD_PARAM) == owned)
				keep_piece(r, s, &list[i], owned);
		pthread_mutex_unlock(&r->out->lock);
		if (r->comm)
			CHECK(!comm_barrier(r->comm, &e));
	}
	free(list);
}

static void train(struct rank *r, struct step *s)
{
	struct err e = {0};
	pieces_init(&s->program, s->exec, 99);
	pieces_refresh_masters(&s->program, s->exec);
	for (int i = 0; i < STEPS; i++) {
		struct step_result result;
		if (step_gradients(s, r->data, (uint64_t)i * GLOBAL_BATCH, &result, &e) ||
		    step_update(s, i + 1, 1e-2, &e)) {
			r->failed = true;
			break;
		}
		CHECK(!result.skipped);
		r->loss[i] = result.lm_loss;
		r->norm[i] = result.grad_norm;
	}
	if (!r->failed)
		keep_weights(r, s);
	if (e.code)
		test_failed(__FILE__, __LINE__, "rank %d: %s", r->index, e.text);
}

static void run_rank(int index, struct comm *world, void *ranks)
{
	struct rank *r = (struct rank *)ranks + index;
	r->comm = world;
	struct err e = {0};
	struct step training, validation;
	struct groups groups = {0};
	struct place_of_rank at = {.backend = &cpu_backend, .world = r->comm, .groups = &groups};
	CHECK(!cpu_backend.open(&at.stream, THREADS(1), &e));
	r->failed = step_create(&training, r->config, MODEL_TRAIN, &at, NULL, &e);
	if (!r->failed) {
		train(r, &training);
		r->failed |= step_create(&validation, r->config, MODEL_EVALUATE, &at, &training, &e);
		if (!r->failed)
			r->failed = step_evaluate(&validation, r->data, 1000, 2, &r->validation, &e);
		step_free(&validation);
		step_free(&training);
	}
	groups_close(&groups);
	cpu_backend.close(at.stream);
	if (e.code)
		test_failed(__FILE__, __LINE__, "rank %d: %s", r->index, e.text);
}

void outcome_free(struct outcome *o)
{
	for (int i = 0; o && i < o->n_tensor; i++) {
		free(o->tensor[i].data);
		free(o->tensor[i].written);
	}
	free(o);
}

static const struct tensor_copy *find_tensor(const struct outcome *o, const char *name)
{
	for (int i = 0; i < o->n_tensor; i++)
		if (!strcmp(o->tensor[i].name, name))
			return &o->tensor[i];
	return NULL;
}

static void same_weights(const struct outcome *a, const struct outcome *b, double tolerance, const char *what)
{
	CHECK_INT(a->n_tensor, b->n_tensor);
	for (int i = 0; i < a->n_tensor; i++) {
		const struct tensor_copy *p = &a->tensor[i], *q = find_tensor(b, p->name);
		MUST(q && q->shape[0] == p->shape[0] && q->shape[1] == p->shape[1]);
		double scale = 0, worst = 0;
		for (int64_t j = 0; j < p->shape[0] * p->shape[1]; j++) {
			CHECK_INT(p->written[j], 1);
			scale = fmax(scale, fabs(p->data[j]));
			worst = fmax(worst, fabs((double)p->data[j] - q->data[j]));
		}
		CHECK(scale > 0);
		/* Key biases have no gradient but for rounding, which has no scale of its own. */
		if (!(worst <= tolerance * (scale + 1e-3)))
			test_failed(__FILE__, __LINE__, "%s: %s differs by %.3g, largest %.3g", what, p->name,
			            worst, scale);
	}
}

/* Trains in one layout; what rank 0 saw. All ranks must have seen the same, bit for bit. NULL where it
 * failed. */
struct outcome *layout_run(const struct layout *l, const char *const *extra, const struct dataset *data)
{
	struct config c;
	struct rank rank[MAX_RANKS];
	struct outcome *out = mem_array(1, sizeof *out);
	pthread_mutex_init(&out->lock, NULL);
	for (int i = 0; i < l->ranks; i++)
		rank[i] = (struct rank){.config = &c, .data = data, .index = i, .out = out};
	bool good = layout_config(&c, l, extra) && ranks_run(l->ranks, run_rank, rank);
	for (int i = 0; i < l->ranks && good; i++) {
		good = !rank[i].failed;
		CHECK(!memcmp(rank[0].loss, rank[i].loss, sizeof rank[0].loss));
		CHECK(!memcmp(rank[0].norm, rank[i].norm, sizeof rank[0].norm));
	}
	pthread_mutex_destroy(&out->lock);
	config_free(&c);
	if (!good) {
		test_failed(__FILE__, __LINE__, "%d ranks, %s: did not run", l->ranks, l->text);
		outcome_free(out);
		return NULL;
	}
	memcpy(out->loss, rank[0].loss, sizeof out->loss);
	memcpy(out->norm, rank[0].norm, sizeof out->norm);
	out->validation = rank[0].validation;
	return out;
}

static double relative(double a, double b)
{
	return fabs(a / b - 1);
}

void outcome_compare(const struct outcome *a, const struct outcome *b, const struct tolerance *t,
                     const char *what)
{
	double loss = relative(a->validation, b->validation), norm = 0;
	for (int i = 0; i < STEPS; i++) {
		loss = fmax(loss, relative(a->loss[i], b->loss[i]));
		norm = fmax(norm, relative(a->norm[i], b->norm[i]));
	}
	if (!(loss <= t->loss))
		test_failed(__FILE__, __LINE__, "%s: losses differ by %.3g", what, loss);
	if (!(norm <= t->norm))
		test_failed(__FILE__, __LINE__, "%s: gradient norms differ by %.3g", what, norm);
	same_weights(a, b, t->weights, what);
}

const struct tolerance layout_fp32 = {2e-6, 1e-5, 1e-5};

void layouts_compare(const struct layout *l, size_t n, const char *alone, int64_t seq_length,
                     const char *const *extra, bool shuffle, const struct tolerance *t)
{
	struct dataset *data = layout_data(shuffle, 131, seq_length);
	struct layout one = {1, alone};
	MUST(data != NULL);
	struct outcome *want = layout_run(&one, extra, data);
	MUST(want != NULL);
	CHECK(want->loss[STEPS - 1] < want->loss[0] - 0.1);
	for (size_t i = 0; i < n; i++) {
		struct outcome *have = layout_run(&l[i], extra, data);
		if (have)
			outcome_compare(have, want, t, l[i].text);
		outcome_free(have);
	}
	outcome_free(want);
	dataset_close(data);
}

static void walk_one(int ranks, const char *text, const struct outcome *want, const char *const *extra,
                     const struct dataset *data)
{
	struct layout l = {ranks, text};
	struct outcome *have = layout_run(&l, extra, data);
	if (have)
		outcome_compare(have, want, &layout_fp32, text);
	outcome_free(have);
}

int layouts_walk(struct walk *w, int more, int (*put)(const int *value, char *text, size_t cap),
                 const char *alone, int64_t seq_length, const char *const *extra)
{
	struct layout one = {1, alone};
	struct dataset *data = layout_data(true, 131, seq_length);
	struct outcome *want = data ? layout_run(&one, extra, data) : NULL;
	char text[400];
	int n = 0, value[WALK_AXES];
	for (; want && walk_on(w, value); n++)
		walk_one(put(value, text, sizeof text), text, want, extra, data);
	for (int i = 0; want && i < more; i++) {
		walk_anywhere(w, value);
		walk_one(put(value, text, sizeof text), text, want, extra, data);
	}
	printf("     %d layouts cover all pairs, %d more\n", n, more);
	outcome_free(want);
	dataset_close(data);
	return n;
}
