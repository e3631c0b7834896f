/* Every layout trains the same model: losses, gradient norms and weights are those of one rank, and a layout
 * repeats itself bit for bit. Ranks are threads. */
#include "base/err.h"
#include "base/mem.h"
#include "base/rng.h"
#include "comm/comm.h"
#include "kernels/kernels.h"
#include "test/ranks.h"
#include "test/test.h"
#include "train/pieces.h"
#include "train/step.h"

#include <pthread.h>
#include <stdlib.h>

enum { STEPS = 5, GLOBAL_BATCH = 24, MAX_RANKS = 16, MAX_TENSORS = 200, MAX_SETS = 40 };

/* "tp 2 pp 2 mbs 3 zero 1 sp 1 …": words and numbers, see `words`; the rest of the ranks is data-parallel. */
struct layout {
	int ranks;
	const char *text;
};

static const struct {
	const char *word, *key;
} words[] = {{"tp", "parallel.tensor_model_parallel_size"},
             {"sp", "parallel.sequence_parallel"},
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

struct tensor_copy { /* one logical parameter after the last step, put together from all ranks' pieces */
	char name[100];
	int64_t shape[2];
	float *data;
	uint8_t *written; /* by element: how often */
};

struct outcome {
	double loss[STEPS], norm[STEPS], validation;
	struct tensor_copy tensor[MAX_TENSORS];
	int n_tensor;
	pthread_mutex_t lock;
};

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
		bool flag = !strcmp(word, "sp") || strstr(word, "overlap") || !strcmp(word, "fp32_reduce");
		const char *as = !flag ? value : !strcmp(value, "0") ? "false" : "true";
		sets[n++] = arena_printf(a, "%s=%s", words[k].key, as);
		text += used;
	}
	return n;
}

static bool open_config(struct config *c, const struct layout *l, const char *const *extra)
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

static struct dataset *open_data(bool shuffle, int64_t vocab_size)
{
	struct dataset *d = NULL;
	struct err e = {0};
	const char *paths[] = {test_golden("llama/tokens")};
	struct dataset_spec spec = {.paths = paths,
	                            .n = 1,
	                            .split = {1, 0, 0},
	                            .seq_length = 12,
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
	CHECK(!cpu_backend.open(&at.stream, 1, &e));
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

static void free_outcome(struct outcome *o)
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
static struct outcome *run_layout(const struct layout *l, const char *const *extra,
                                  const struct dataset *data)
{
	struct config c;
	struct rank rank[MAX_RANKS];
	struct outcome *out = mem_array(1, sizeof *out);
	pthread_mutex_init(&out->lock, NULL);
	for (int i = 0; i < l->ranks; i++)
		rank[i] = (struct rank){.config = &c, .data = data, .index = i, .out = out};
	bool good = open_config(&c, l, extra) && ranks_run(l->ranks, run_rank, rank);
	for (int i = 0; i < l->ranks && good; i++) {
		good = !rank[i].failed;
		CHECK(!memcmp(rank[0].loss, rank[i].loss, sizeof rank[0].loss));
		CHECK(!memcmp(rank[0].norm, rank[i].norm, sizeof rank[0].norm));
	}
	pthread_mutex_destroy(&out->lock);
	config_free(&c);
	if (!good) {
		test_failed(__FILE__, __LINE__, "%d ranks, %s: did not run", l->ranks, l->text);
		free_outcome(out);
		return NULL;
	}
	memcpy(out->loss, rank[0].loss, sizeof out->loss);
	memcpy(out->norm, rank[0].norm, sizeof out->norm);
	out->validation = rank[0].validation;
	return out;
}

struct tolerance {
	double loss, norm, weights;
};

static double relative(double a, double b)
{
	return fabs(a / b - 1);
}

static void same_outcome(const struct outcome *a, const struct outcome *b, const struct tolerance *t,
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

static const struct tolerance fp32 = {2e-6, 1e-5, 1e-5};

static void compare_layouts(const struct layout *l, size_t n, const char *const *extra, bool shuffle,
                            const struct tolerance *t)
{
	struct dataset *data = open_data(shuffle, 131);
	struct layout one = {1, "mbs 6"};
	MUST(data != NULL);
	struct outcome *want = run_layout(&one, extra, data);
	MUST(want != NULL);
	CHECK(want->loss[STEPS - 1] < want->loss[0] - 0.1);
	for (size_t i = 0; i < n; i++) {
		struct outcome *have = run_layout(&l[i], extra, data);
		if (have)
			same_outcome(have, want, t, l[i].text);
		free_outcome(have);
	}
	free_outcome(want);
	dataset_close(data);
}
#define COMPARE(layouts, extra, shuffle, tolerance) \
	compare_layouts(layouts, sizeof(layouts) / sizeof *(layouts), extra, shuffle, tolerance)

TEST(every_number_of_ranks_trains_the_same_model)
{
	static const struct layout in_order[] = {{2, "mbs 3"}, {3, "mbs 2"}, {4, "mbs 6"}, {8, "mbs 1"}};
	static const struct layout shuffled[] = {{1, "mbs 1"}, {2, "mbs 12"}, {3, "mbs 8"}, {8, "mbs 3"}};
	COMPARE(in_order, NULL, false, &fp32);
	COMPARE(shuffled, NULL, true, &fp32);
}

TEST(accumulation_changes_nothing)
{
	static const struct layout layouts[] = {{1, "mbs 24"}, {1, "mbs 3"}, {2, "mbs 12"}, {2, "mbs 3"}};
	COMPARE(layouts, NULL, true, &fp32);
}

TEST(tensor_parallel_ranks_share_the_layers)
{
	static const struct layout layouts[] = {{2, "tp 2 mbs 6"},      {4, "tp 4 mbs 3"},
	                                        {4, "tp 2 mbs 2"},      {2, "tp 2 sp 1 mbs 6"},
	                                        {4, "tp 4 sp 1 mbs 2"}, {8, "tp 4 sp 1 mbs 3"}};
	COMPARE(layouts, NULL, true, &fp32);
}

TEST(pipeline_stages_share_the_layers)
{
	static const struct layout layouts[] = {
	        {2, "pp 2 mbs 6"},
	        {4, "pp 4 mbs 2"},
	        {4, "pp 2 mbs 3"},
	        {2, "pp 2 vpp 2 schedule interleaved mbs 6"},
	        {4, "pp 2 vpp 2 schedule interleaved mbs 3"},
	        {2, "pp 2 schedule zero_bubble mbs 3"},
	        {4, "pp 4 schedule zero_bubble mbs 3"},
	        {3, "pp 3 layout Et|tt|tL mbs 4"},
	};
	COMPARE(layouts, NULL, true, &fp32);
}

TEST(data_parallel_ranks_share_the_optimizer)
{
	static const struct layout layouts[] = {{2, "zero 0 mbs 3"},
	                                        {2, "zero 1 mbs 3"},
	                                        {2, "zero 2 mbs 3"},
	                                        {2, "zero 3 mbs 3"},
	                                        {4, "zero 1 instances 2 mbs 3"},
	                                        {4, "zero 2 instances 2 mbs 3"},
	                                        {4, "zero 3 instances 2 mbs 3"},
	                                        {3, "zero 3 mbs 2 bucket 100"},
	                                        {3, "zero 2 mbs 2 bucket 1000"},
	                                        {3, "zero 1 mbs 2 bucket 1000"}};
	COMPARE(layouts, NULL, true, &fp32);
}

TEST(axes_together)
{
	static const struct layout layouts[] = {
	        {8, "tp 2 sp 1 pp 2 vpp 2 schedule interleaved zero 1 mbs 3"},
	        {8, "tp 4 zero 3 mbs 3"},
	        {4, "pp 4 schedule zero_bubble mbs 1"},
	        {8, "tp 2 pp 2 schedule zero_bubble zero 2 mbs 2"},
	        {8, "tp 2 pp 2 zero 3 sp 1 recompute full mbs 3"},
	        {12, "tp 2 pp 3 layout Et|tt|tL zero 2 mbs 3"},
	        {16, "tp 2 sp 1 pp 2 zero 3 instances 2 mbs 1"},
	};
	COMPARE(layouts, NULL, true, &fp32);
}

TEST(communication_runs_beside_computation)
{
	static const struct layout layouts[] = {
	        {4, "zero 0 mbs 3 overlap 1 bucket 1000"},
	        {4, "zero 1 mbs 3 overlap 1 bucket 1000"},
	        {4, "zero 1 mbs 3 overlap 1 instances 2"},
	        {4, "tp 2 mbs 3 tp_overlap 1"},
	        {4, "tp 4 sp 1 mbs 3 tp_overlap 1"},
	        {8, "tp 2 pp 2 sp 1 overlap 1 tp_overlap 1 mbs 3 bucket 500"},
	        {4, "pp 2 schedule zero_bubble overlap 1 mbs 3"},
	        {4, "pp 2 vpp 2 schedule interleaved overlap 1 zero 2 mbs 3"}};
	COMPARE(layouts, NULL, true, &fp32);
}

TEST(dropout_masks_belong_to_samples_not_to_ranks)
{
	static const char *const extra[] = {"model.hidden_dropout=0.2", "model.attention_dropout=0.1", NULL};
	static const struct layout layouts[] = {
	        {1, "mbs 1"},      {2, "mbs 3"},           {8, "mbs 1"},
	        {4, "tp 4 mbs 3"}, {4, "tp 4 sp 1 mbs 2"}, {4, "tp 2 sp 1 pp 2 mbs 3 recompute full"}};
	COMPARE(layouts, extra, true, &fp32);
}

TEST(other_models_too)
{
	static const char *const gpt[] = {"model.normalization=LayerNorm",
	                                  "model.position_embedding_type=learned_absolute",
	                                  "model.activation=gelu",
	                                  "model.add_bias_linear=true",
	                                  "model.hidden_dropout=0.1",
	                                  "model.untie_embeddings_and_output_weights=false",
	                                  NULL};
	static const char *const qwen[] = {"model.qk_layernorm=true", "model.num_query_groups=2", NULL};
	static const struct layout layouts[] = {
	        {3, "mbs 4 recompute full"},
	        {2, "tp 2 mbs 4"},
	        {2, "tp 2 sp 1 mbs 4 recompute selective"},
	        {2, "pp 2 mbs 4 recompute full"},
	        {4, "pp 2 zero 2 mbs 4"},
	        {4, "pp 2 zero 3 mbs 4 schedule zero_bubble"},
	        {8, "tp 2 pp 2 vpp 2 schedule interleaved sp 1 zero 1 mbs 2"}};
	static const struct layout pairs[] = {{2, "tp 2 mbs 4"}, {4, "tp 2 sp 1 pp 2 mbs 4"}};
	COMPARE(layouts, gpt, true, &fp32);
	COMPARE(pairs, qwen, true, &fp32);
}

/* The walk: every pair of choices of two axes that can go together is run at least once, and many triples. */

enum { AXES = 9, MAX_CHOICES = 4, WALK_RANKS = 12, WALK_MORE = 24 };
static const struct {
	const char *name;
	int n, choice[MAX_CHOICES];
} axes[AXES] = {
        {"tp", 3, {1, 2, 4}},        {"pp", 3, {1, 2, 3}},
        {"dp", 3, {1, 2, 3}},        {"zero", 4, {0, 1, 2, 3}},
        {"sp", 2, {0, 1}},           {"schedule", 3, {0, 1, 2}}, /* enum parallel_schedule */
        {"recompute", 3, {0, 1, 2}}, {"mbs", 3, {1, 2, 4}},
        {"overlap", 2, {0, 1}},
};
enum { TP, PP, DP, ZERO, SP, SCHEDULE, RECOMPUTE, MBS, OVERLAP };

struct walk {
	bool covered[AXES][MAX_CHOICES][AXES][MAX_CHOICES];
	int pick[AXES];
};

static int value_of(const int *pick, int axis)
{
	return axes[axis].choice[pick[axis]];
}

static bool is_legal(const int *pick)
{
	int tp = value_of(pick, TP), pp = value_of(pick, PP), dp = value_of(pick, DP);
	int accumulation = GLOBAL_BATCH / (dp * value_of(pick, MBS));
	bool interleaved = value_of(pick, SCHEDULE) == PARALLEL_INTERLEAVED;
	return tp * pp * dp <= WALK_RANKS && (!value_of(pick, SP) || tp > 1) &&
	       (value_of(pick, SCHEDULE) == PARALLEL_1F1B || pp > 1) &&
	       (!interleaved || accumulation % pp == 0) && (!value_of(pick, ZERO) || dp > 1);
}

static bool next_pick(int *pick)
{
	for (int a = 0; a < AXES; a++) {
		if (++pick[a] < axes[a].n)
			return true;
		pick[a] = 0;
	}
	return false;
}

/* Pairs of choices that this pick covers and none before did; marks them where asked. */
static int news_in(struct walk *w, const int *pick, bool mark)
{
	int news = 0;
	for (int a = 0; a < AXES; a++)
		for (int b = a + 1; b < AXES; b++) {
			bool *seen = &w->covered[a][pick[a]][b][pick[b]];
			news += !*seen;
			*seen |= mark;
		}
	return news;
}

static void walk_text(const int *pick, char *text, size_t cap)
{
	static const char *const recompute[] = {"none", "selective", "full"};
	int pp = value_of(pick, PP), schedule = value_of(pick, SCHEDULE);
	int n = snprintf(text, cap, "tp %d pp %d zero %d sp %d mbs %d recompute %s overlap %d tp_overlap %d",
	                 value_of(pick, TP), pp, value_of(pick, ZERO), value_of(pick, SP),
	                 value_of(pick, MBS), recompute[value_of(pick, RECOMPUTE)], value_of(pick, OVERLAP),
	                 value_of(pick, OVERLAP));
	if (schedule == PARALLEL_INTERLEAVED) /* six layers: one each chunk */
		snprintf(text + n, cap - (size_t)n, " schedule interleaved vpp %d", 6 / pp);
	if (schedule == PARALLEL_ZERO_BUBBLE)
		snprintf(text + n, cap - (size_t)n, " schedule zero_bubble");
}

static void walk_one(const int *pick, const struct outcome *want, const char *const *extra,
                     const struct dataset *data)
{
	char text[300];
	walk_text(pick, text, sizeof text);
	struct layout l = {value_of(pick, TP) * value_of(pick, PP) * value_of(pick, DP), text};
	struct outcome *have = run_layout(&l, extra, data);
	if (have)
		same_outcome(have, want, &fp32, text);
	free_outcome(have);
}

/* The legal pick that covers most pairs not covered yet; how many. */
static int best_pick(struct walk *w, int *best)
{
	int pick[AXES] = {0}, most = 0;
	do {
		int news = is_legal(pick) ? news_in(w, pick, false) : 0;
		if (news > most) {
			most = news;
			memcpy(best, pick, sizeof pick);
		}
	} while (next_pick(pick));
	return most;
}

TEST(all_pairs_of_axes_and_many_triples)
{
	static const char *const extra[] = {"model.num_layers=6", "model.hidden_dropout=0.1", NULL};
	static struct walk w;
	struct layout one = {1, "mbs 4"};
	struct dataset *data = open_data(true, 131);
	MUST(data != NULL);
	struct outcome *want = run_layout(&one, extra, data);
	MUST(want != NULL);
	int n = 0;
	for (int best[AXES]; best_pick(&w, best) > 0; n++) {
		news_in(&w, best, true);
		walk_one(best, want, extra, data);
	}
	CHECK(n >= 12);
	uint64_t turn = 0;
	for (int more = 0; more < WALK_MORE;) {
		int pick[AXES];
		for (int a = 0; a < AXES; a++)
			pick[a] = (int)(rng_bits(2026, turn++) % (uint64_t)axes[a].n);
		if (!is_legal(pick))
			continue;
		walk_one(pick, want, extra, data);
		more++;
	}
	printf("     %d layouts cover all pairs, %d more\n", n, WALK_MORE);
	free_outcome(want);
	dataset_close(data);
}

TEST(a_layout_repeats_itself_bit_for_bit)
{
	static const struct layout layouts[] = {{1, "mbs 4"},
	                                        {3, "mbs 2"},
	                                        {4, "tp 2 sp 1 zero 2 mbs 3"},
	                                        {4, "pp 4 schedule zero_bubble mbs 2"}};
	static const struct tolerance bits = {0, 0, 0};
	struct dataset *data = open_data(true, 131);
	MUST(data != NULL);
	for (size_t i = 0; i < sizeof layouts / sizeof *layouts; i++) {
		struct outcome *a = run_layout(&layouts[i], NULL, data),
		               *b = run_layout(&layouts[i], NULL, data);
		if (CHECK(a && b))
			same_outcome(a, b, &bits, layouts[i].text);
		free_outcome(a);
		free_outcome(b);
	}
	dataset_close(data);
}

/* Weights are rounded after every step, so layouts agree within that rounding alone: two units in the last of
 * a bfloat16's eight bits, of the largest weight. */
TEST(bf16_agrees_within_its_rounding)
{
	static const char *const extra[] = {"mixed_precision=bf16", NULL};
	static const struct tolerance rounding = {1e-4, 5e-3, 1.6e-2};
	static const struct layout layouts[] = {{1, "mbs 2"},
	                                        {2, "mbs 6"},
	                                        {4, "tp 2 sp 1 mbs 3"},
	                                        {4, "pp 2 zero 3 mbs 3"},
	                                        {4, "zero 2 fp32_reduce 0 mbs 3"},
	                                        {4, "zero 1 fp32_reduce 0 overlap 1 instances 2 mbs 3"}};
	COMPARE(layouts, extra, true, &rounding);
}

struct mishap { /* one thread of a layout in which something goes wrong on one rank */
	const struct config *config;
	const struct dataset *data; /* this rank's */
	bool poisoned;              /* a weight that is not a number */
	int rc;
	struct step_result result;
	struct err e;
};

static void run_mishap(int rank, struct comm *world, void *mishaps)
{
	struct mishap *m = (struct mishap *)mishaps + rank;
	struct step s;
	struct groups groups = {0};
	struct place_of_rank at = {.backend = &cpu_backend, .world = world, .groups = &groups};
	float nan = NAN;
	CHECK(!cpu_backend.open(&at.stream, 1, &m->e));
	if (CHECK(!step_create(&s, m->config, MODEL_TRAIN, &at, NULL, &m->e))) {
		pieces_init(&s.program, s.exec, 99);
		if (m->poisoned)
			exec_upload_part(s.exec, s.program.model.param[3].value, 0, 1, &nan);
		m->rc = step_gradients(&s, m->data, 0, &m->result, &m->e);
		step_free(&s);
	}
	groups_close(&groups);
	cpu_backend.close(at.stream);
}

/* Four ranks; rank 2 reads bad data or holds a broken weight. */
static void run_mishaps(struct mishap m[4], bool bad_data, bool poisoned)
{
	static const struct layout four = {4, "mbs 3"};
	struct config c;
	struct dataset *good = open_data(true, 131), *bad = open_data(true, 7);
	if (good && bad && open_config(&c, &four, NULL)) {
		for (int i = 0; i < 4; i++)
			m[i] = (struct mishap){.config = &c,
			                       .data = bad_data && i == 2 ? bad : good,
			                       .poisoned = poisoned && i == 2};
		ranks_run(4, run_mishap, m);
	}
	config_free(&c);
	dataset_close(good);
	dataset_close(bad);
}

TEST(one_ranks_bad_data_end_the_step_on_all)
{
	static struct mishap m[4];
	run_mishaps(m, true, false);
	for (int i = 0; i < 4; i++) {
		CHECK_INT(m[i].rc, EXIT_BAD_DATA);
		CHECK_HAS(m[i].e.text, i == 2 ? "allowed is 0 to 6" : "rank 2");
	}
}

TEST(one_ranks_broken_weight_skips_the_step_on_all)
{
	static struct mishap m[4];
	run_mishaps(m, false, true);
	for (int i = 0; i < 4; i++) {
		CHECK_INT(m[i].rc, 0);
		CHECK(m[i].result.skipped);
	}
}

int main(int argc, char **argv)
{
	return test_main(argc, argv);
}
