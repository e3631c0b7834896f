/* Any number of data-parallel ranks trains the same model: losses, gradient norms and weights are those of
 * one rank, and a layout repeats itself bit for bit. Ranks are threads. */
#include "base/err.h"
#include "base/mem.h"
#include "comm/comm.h"
#include "kernels/kernels.h"
#include "test/test.h"
#include "train/state.h"

#include <pthread.h>
#include <stdlib.h>

enum { STEPS = 5, GLOBAL_BATCH = 24, MAX_RANKS = 8, MAX_PARTS = 64, MAX_SETS = 30 };

struct layout {
	int ranks, micro_batch_size;
};

struct piece { /* one logical parameter after the last step */
	char name[100];
	int64_t count;
	float *data;
};

struct outcome {
	double loss[STEPS], norm[STEPS], validation;
	struct piece piece[MAX_PARTS];
	int n_piece;
};

struct rank { /* one thread */
	const struct config *config;
	const struct dataset *data;
	struct comm *comm;
	int index;
	struct outcome *out;
};

static bool open_config(struct config *c, const struct layout *l, const char *const *extra)
{
	static const char *const common[] = {"model.num_layers=2",
	                                     "model.hidden_size=24",
	                                     "model.num_attention_heads=4",
	                                     "model.num_query_groups=2",
	                                     "model.ffn_hidden_size=40",
	                                     "model.vocab_size=131",
	                                     "model.seq_length=12",
	                                     "model.add_qkv_bias=true",
	                                     "model.make_vocab_size_divisible_by=4",
	                                     "train.train_iters=5",
	                                     "optimizer.adam_eps=1e-3",
	                                     "optimizer.clip_grad=0.5",
	                                     "optimizer.weight_decay=0.1"};
	const char *sets[MAX_SETS];
	char batch[2][60];
	size_t n = 0;
	for (; n < sizeof common / sizeof *common; n++)
		sets[n] = common[n];
	snprintf(batch[0], sizeof batch[0], "train.micro_batch_size=%d", l->micro_batch_size);
	snprintf(batch[1], sizeof batch[1], "train.global_batch_size=%d", GLOBAL_BATCH);
	sets[n++] = batch[0];
	sets[n++] = batch[1];
	while (extra && *extra)
		sets[n++] = *extra++;
	struct config_source source = {.sets = sets, .n_sets = n};
	struct err e = {0};
	bool good = !config_load(c, &source, &e) && !config_check(c, l->ranks, &e);
	if (!good)
		test_failed(__FILE__, __LINE__, "%s", e.text);
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

static float weight(const struct step *s, int32_t id, int64_t i)
{
	const void *data = exec_data(s->exec, id);
	return s->program.prog.value[id].dtype == DT_bf16 ? bf16_to_f32(((const uint16_t *)data)[i])
	                                                  : ((const float *)data)[i];
}

static void keep_weights(const struct step *s, struct outcome *out)
{
	const struct model *m = &s->program.model;
	for (size_t k = 0; k < m->n_param; k++) {
		for (int32_t i = 0; i < m->param[k].n_parts; i++) {
			const struct part *p = &m->part[m->param[k].first_part + i];
			struct piece *q = &out->piece[out->n_piece++];
			ASSERT(out->n_piece <= MAX_PARTS);
			snprintf(q->name, sizeof q->name, "%s", p->name);
			q->count = p->extent[0] * p->extent[1];
			q->data = mem_array((size_t)q->count, sizeof *q->data);
			for (int64_t j = 0; j < q->count; j++)
				q->data[j] = weight(s, m->param[k].value, p->local_row * p->extent[1] + j);
		}
	}
}

static void train(struct rank *r, struct step *s)
{
	struct err e = {0};
	model_init(&s->program.model, s->exec, 99);
	state_refresh_masters(s);
	for (int i = 0; i < STEPS; i++) {
		struct step_result result;
		if (!CHECK(!step_gradients(s, r->data, (uint64_t)i * GLOBAL_BATCH, &result, &e)) ||
		    !CHECK(!step_update(s, i + 1, 1e-2, &e)))
			break;
		CHECK(!result.skipped);
		r->out->loss[i] = result.lm_loss;
		r->out->norm[i] = result.grad_norm;
	}
	keep_weights(s, r->out);
	if (e.code)
		fprintf(stderr, "rank %d: %s\n", r->index, e.text);
}

static void *run_rank(void *argument)
{
	struct rank *r = argument;
	struct err e = {0};
	struct step training, validation;
	struct place_of_rank at = {
	        .backend = &cpu_backend, .data_parallel = r->comm, .data_parallel_rank = r->index};
	CHECK(!cpu_backend.open(&at.stream, 1, &e));
	if (CHECK(!step_create(&training, r->config, MODEL_TRAIN, &at, NULL, &e))) {
		train(r, &training);
		if (CHECK(!step_create(&validation, r->config, MODEL_EVALUATE, &at, &training, &e)))
			CHECK(!step_evaluate(&validation, r->data, 1000, 2, &r->out->validation, &e));
		step_free(&validation);
		step_free(&training);
	}
	cpu_backend.close(at.stream);
	comm_close(r->comm);
	if (e.code)
		fprintf(stderr, "rank %d: %s\n", r->index, e.text);
	return NULL;
}

static void free_outcome(struct outcome *o)
{
	for (int i = 0; i < o->n_piece; i++)
		free(o->piece[i].data);
	free(o);
}

static const struct piece *find_piece(const struct outcome *o, const char *name)
{
	for (int i = 0; i < o->n_piece; i++)
		if (!strcmp(o->piece[i].name, name))
			return &o->piece[i];
	return NULL;
}

static void same_weights(const struct outcome *a, const struct outcome *b, double tolerance)
{
	CHECK_INT(a->n_piece, b->n_piece);
	for (int i = 0; i < a->n_piece; i++) {
		const struct piece *p = &a->piece[i], *q = find_piece(b, p->name);
		MUST(q && q->count == p->count);
		double scale = 0, worst = 0;
		for (int64_t j = 0; j < p->count; j++) {
			scale = fmax(scale, fabs(p->data[j]));
			worst = fmax(worst, fabs((double)p->data[j] - q->data[j]));
		}
		CHECK(scale > 0);
		/* Key biases have no gradient but for rounding, which has no scale of its own. */
		if (!(worst <= tolerance * (scale + 1e-3)))
			test_failed(__FILE__, __LINE__, "%s differs by %.3g, largest %.3g", p->name, worst,
			            scale);
	}
}

/* Trains in one layout; what rank 0 saw. All ranks must have seen the same, bit for bit. */
static struct outcome *run_layout(const struct layout *l, const char *const *extra,
                                  const struct dataset *data)
{
	struct config c;
	struct err e = {0};
	struct comm *world[MAX_RANKS] = {NULL};
	struct rank rank[MAX_RANKS];
	pthread_t thread[MAX_RANKS];
	if (open_config(&c, l, extra) &&
	    (l->ranks == 1 || CHECK(!comm_thread_world(l->ranks, NULL, world, &e)))) {
		for (int i = 0; i < l->ranks; i++) {
			rank[i] = (struct rank){&c, data, world[i], i, mem_array(1, sizeof(struct outcome))};
			CHECK(!pthread_create(&thread[i], NULL, run_rank, &rank[i]));
		}
		for (int i = 0; i < l->ranks; i++)
			pthread_join(thread[i], NULL);
		for (int i = 1; i < l->ranks; i++) {
			CHECK(!memcmp(rank[0].out->loss, rank[i].out->loss, sizeof rank[0].out->loss));
			CHECK(!memcmp(rank[0].out->norm, rank[i].out->norm, sizeof rank[0].out->norm));
			same_weights(rank[0].out, rank[i].out, 0);
			free_outcome(rank[i].out);
		}
	}
	config_free(&c);
	return rank[0].out;
}

struct tolerance {
	double loss, norm, weights;
};

static void same_outcome(const struct outcome *a, const struct outcome *b, const struct tolerance *t)
{
	for (int i = 0; i < STEPS; i++) {
		CHECK_NEAR(a->loss[i] / b->loss[i], 1, t->loss);
		CHECK_NEAR(a->norm[i] / b->norm[i], 1, t->norm);
	}
	CHECK_NEAR(a->validation / b->validation, 1, t->loss);
	same_weights(a, b, t->weights);
}

static const struct tolerance fp32 = {2e-6, 1e-5, 1e-5};

static void compare_layouts(const struct layout *l, size_t n, const char *const *extra, bool shuffle,
                            const struct tolerance *t)
{
	struct dataset *data = open_data(shuffle, 131);
	struct layout one = {1, 6};
	MUST(data != NULL);
	struct outcome *want = run_layout(&one, extra, data);
	CHECK(want->loss[STEPS - 1] < want->loss[0] - 0.1);
	for (size_t i = 0; i < n; i++) {
		struct outcome *have = run_layout(&l[i], extra, data);
		same_outcome(have, want, t);
		free_outcome(have);
	}
	free_outcome(want);
	dataset_close(data);
}

TEST(every_number_of_ranks_trains_the_same_model)
{
	static const struct layout in_order[] = {{2, 3}, {3, 2}, {4, 6}, {8, 1}};
	static const struct layout shuffled[] = {{1, 1}, {2, 12}, {3, 8}, {8, 3}};
	compare_layouts(in_order, 4, NULL, false, &fp32);
	compare_layouts(shuffled, 4, NULL, true, &fp32);
}

TEST(accumulation_changes_nothing)
{
	static const struct layout layouts[] = {{1, 24}, {1, 3}, {2, 12}, {2, 3}};
	compare_layouts(layouts, 4, NULL, true, &fp32);
}

TEST(dropout_masks_belong_to_samples_not_to_ranks)
{
	static const char *const extra[] = {"model.hidden_dropout=0.2", "model.attention_dropout=0.1", NULL};
	static const struct layout layouts[] = {{1, 1}, {2, 3}, {4, 3}, {8, 1}};
	compare_layouts(layouts, 4, extra, true, &fp32);
}

TEST(other_models_too)
{
	static const char *const gpt[] = {
	        "model.normalization=LayerNorm", "model.position_embedding_type=learned_absolute",
	        "model.activation=gelu",         "model.add_bias_linear=true",
	        "model.hidden_dropout=0.1",      "model.untie_embeddings_and_output_weights=false",
	        "recompute.granularity=full",    NULL};
	static const struct layout layouts[] = {{3, 4}};
	compare_layouts(layouts, 1, gpt, true, &fp32);
}

TEST(a_layout_repeats_itself_bit_for_bit)
{
	static const struct layout layouts[] = {{1, 4}, {3, 2}, {4, 1}};
	static const struct tolerance bits = {0, 0, 0};
	struct dataset *data = open_data(true, 131);
	MUST(data != NULL);
	for (size_t i = 0; i < 3; i++) {
		struct outcome *a = run_layout(&layouts[i], NULL, data),
		               *b = run_layout(&layouts[i], NULL, data);
		same_outcome(a, b, &bits);
		free_outcome(a);
		free_outcome(b);
	}
	dataset_close(data);
}

/* Weights are rounded after every step, so layouts agree within that rounding alone. */
TEST(bf16_agrees_within_its_rounding)
{
	static const char *const extra[] = {"mixed_precision=bf16", NULL};
	static const struct tolerance rounding = {1e-4, 5e-3, 1e-2};
	static const struct layout layouts[] = {{1, 2}, {2, 6}, {4, 3}};
	compare_layouts(layouts, 3, extra, true, &rounding);
}

struct mishap { /* one thread of a layout in which something goes wrong on one rank */
	const struct config *config;
	const struct dataset *data; /* this rank's */
	struct comm *comm;
	bool poisoned; /* a weight that is not a number */
	int rc;
	struct step_result result;
	struct err e;
};

static void *run_mishap(void *argument)
{
	struct mishap *m = argument;
	struct step s;
	struct place_of_rank at = {
	        .backend = &cpu_backend, .data_parallel = m->comm, .data_parallel_rank = m->comm->rank};
	float nan = NAN;
	CHECK(!cpu_backend.open(&at.stream, 1, &m->e));
	if (CHECK(!step_create(&s, m->config, MODEL_TRAIN, &at, NULL, &m->e))) {
		model_init(&s.program.model, s.exec, 99);
		if (m->poisoned)
			memcpy(exec_data(s.exec, s.program.model.param[3].value), &nan, sizeof nan);
		m->rc = step_gradients(&s, m->data, 0, &m->result, &m->e);
		step_free(&s);
	}
	cpu_backend.close(at.stream);
	comm_close(m->comm);
	return NULL;
}

/* Four ranks; rank 2 reads bad data or holds a broken weight. */
static void run_mishaps(struct mishap m[4], bool bad_data, bool poisoned)
{
	static const struct layout four = {4, 3};
	struct config c;
	struct err e = {0};
	struct comm *world[4];
	pthread_t thread[4];
	struct dataset *good = open_data(true, 131), *bad = open_data(true, 7);
	if (good && bad && open_config(&c, &four, NULL) && CHECK(!comm_thread_world(4, NULL, world, &e))) {
		for (int i = 0; i < 4; i++) {
			m[i] = (struct mishap){.config = &c,
			                       .data = bad_data && i == 2 ? bad : good,
			                       .comm = world[i],
			                       .poisoned = poisoned && i == 2};
			CHECK(!pthread_create(&thread[i], NULL, run_mishap, &m[i]));
		}
		for (int i = 0; i < 4; i++)
			pthread_join(thread[i], NULL);
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
