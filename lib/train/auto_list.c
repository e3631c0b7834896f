/* Which layouts are legal: the facts of check_layout.c, walked through size by size. Floor: train. */
#include "base/err.h"
#include "parallel/stages.h"
#include "train/auto.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char SEQUENCE[] = "parallel.sequence_parallel", EXCHANGE[] = "parallel.cp_comm_type",
                  SCHEDULE[] = "parallel.pipeline_schedule",
                  SPLIT[] = "parallel.pipeline_model_parallel_layout";
static const char ORIGIN[] = "parallel.layout auto";

enum {
	MAX_SIZE = 65536,
	MAX_DIVISORS = 4096,
	MAX_UNEVEN_CHUNKS = 4, /* stages differ by a layer then; more chunks do not make up for it */
	MAX_UNEVEN_STAGES = STAGES_MAX_LAYOUT_BYTES / 10 /* "t*123456|" and the ends */
};

/* In the order of config_layout_keys. */
enum size { TP, CP, PP, CHUNKS, EP, ETP, N_SIZES };

struct lister {
	const struct config *c;
	int64_t world;
	int64_t divisor[MAX_DIVISORS]; /* of world, ascending */
	size_t n_divisors;
	int64_t given[N_SIZES]; /* 0: open */
	bool expert_tensor_as_tensor, dense_layers, experts;
	struct auto_layout now;
	struct auto_layout *list;
	size_t n, cap, most;
};

static int64_t gcd(int64_t a, int64_t b)
{
	return b ? gcd(b, a % b) : a;
}

static int64_t told(int64_t number)
{
	return number == OPTION_NULL_INT ? 0 : number;
}

static bool divides(int64_t size, int64_t whole)
{
	return whole % size == 0;
}

static bool is_wanted(const struct lister *l, enum size which, int64_t size)
{
	return l->given[which] ? size == l->given[which] : size <= MAX_SIZE;
}

/* Stages */

static bool split_is_open(const struct config *c)
{
	const struct parallel_config *p = &c->parallel;
	return !p->pipeline_model_parallel_layout && !p->account_for_embedding_in_pipeline_split &&
	       !p->account_for_loss_in_pipeline_split &&
	       p->num_layers_in_first_pipeline_stage == OPTION_NULL_INT &&
	       p->num_layers_in_last_pipeline_stage == OPTION_NULL_INT;
}

static bool needs_split(const struct config *c, const struct auto_layout *l)
{
	return l->pp > 1 && split_is_open(c) && c->model.num_layers % (l->pp * l->chunks);
}

/* Virtual stage v of n gets layers / n, rounded up or down: down the last, which has the loss, the first,
 * which has the embedding, then from the last but one on to the front. */
static int64_t layers_of_stage(int64_t layers, int64_t n, int64_t v)
{
	int64_t most = (layers + n - 1) / n, fewer = most * n - layers;
	int64_t turn = v == n - 1 ? 0 : v == 0 ? 1 : n - v;
	return most - (turn < fewer);
}

static const char *make_split(struct config *c, const struct auto_layout *l)
{
	struct buf b = {0};
	int64_t n = l->pp * l->chunks;
	buf_puts(&b, "E");
	for (int64_t v = 0; v < n; v++) {
		int64_t layers = layers_of_stage(c->model.num_layers, n, v);
		buf_puts(&b, v ? "|" : "");
		if (layers)
			buf_printf(&b, layers > 1 ? "t*%lld" : "t", (long long)layers);
	}
	buf_puts(&b, "L");
	const char *text = arena_strdup(&c->arena, b.data);
	buf_free(&b);
	return text;
}

static bool told_split_fits(const struct config *c, int64_t pp, int64_t chunks)
{
	const struct parallel_config *p = &c->parallel;
	struct stages_spec spec = {.num_layers = c->model.num_layers,
	                           .pipeline = (int)pp,
	                           .chunks = (int)chunks,
	                           .account_for_embedding = p->account_for_embedding_in_pipeline_split,
	                           .account_for_loss = p->account_for_loss_in_pipeline_split,
	                           .first_stage_layers = told(p->num_layers_in_first_pipeline_stage),
	                           .last_stage_layers = told(p->num_layers_in_last_pipeline_stage),
	                           .layout = p->pipeline_model_parallel_layout};
	struct stage *stage = mem_array((size_t)(pp * chunks), sizeof *stage);
	struct err ignored = {0};
	bool fits = !stages_split(&spec, stage, &ignored);
	free(stage);
	return fits;
}

static bool stages_fit(const struct lister *l)
{
	int64_t layers = l->c->model.num_layers, n = l->now.pp * l->now.chunks;
	if (l->now.pp == 1)
		return l->now.chunks == 1;
	if (n > layers + 2) /* a stage may have the embedding or the loss alone */
		return false;
	if (!split_is_open(l->c))
		return told_split_fits(l->c, l->now.pp, l->now.chunks);
	return divides(n, layers) || (n <= layers && n <= MAX_UNEVEN_STAGES &&
	                              (l->now.chunks <= MAX_UNEVEN_CHUNKS || l->given[CHUNKS]));
}

static bool schedule_fits(const struct lister *l, int kind)
{
	const struct auto_layout *now = &l->now;
	if (config_is_given(l->c, SCHEDULE) && kind != (int)l->c->parallel.pipeline_schedule)
		return false;
	if (kind == PARALLEL_INTERLEAVED || now->chunks > 1)
		return kind == PARALLEL_INTERLEAVED && now->chunks > 1 && now->pp > 1;
	return kind == PARALLEL_1F1B || now->pp > 1;
}

/* The rest of the dense grid */

static int64_t heads(const struct config *c)
{
	return gcd(c->model.num_attention_heads, told(c->model.num_query_groups));
}

static int64_t rows(const struct lister *l)
{
	return l->c->train.micro_batch_size * (l->c->model.seq_length / l->now.cp);
}

/* Sequence parallelism wherever it can be: it saves memory and costs no traffic. */
static bool sequence_fits(struct lister *l)
{
	bool can = divides(l->now.tp, rows(l)), given = config_is_given(l->c, SEQUENCE);
	l->now.sequence_parallel = given ? l->c->parallel.sequence_parallel : l->now.tp > 1 && can;
	return (can || !l->now.sequence_parallel) &&
	       (l->now.sequence_parallel || l->now.tp == 1 || !l->experts);
}

static bool batch_fits(const struct lister *l)
{
	const struct auto_layout *now = &l->now;
	int64_t data = l->world / (now->tp * now->cp * now->pp), once = l->c->train.micro_batch_size * data;
	int64_t batch = told(l->c->train.global_batch_size);
	return divides(l->c->ddp.num_distributed_optimizer_instances, data) &&
	       divides(once * (now->schedule == PARALLEL_INTERLEAVED ? now->pp : 1), batch ? batch : once);
}

static bool tensor_fits(const struct lister *l)
{
	const struct model_config *m = &l->c->model;
	int64_t tp = l->now.tp, vocabulary = l->c->derived.padded_vocab_size;
	bool whole_heads = l->now.cp > 1 && l->now.exchange == PARALLEL_CP_A2A;
	return divides(whole_heads ? tp * l->now.cp : tp, heads(l->c)) &&
	       (!l->dense_layers || divides(tp, told(m->ffn_hidden_size))) &&
	       (!l->experts || divides(tp, told(m->moe_shared_expert_intermediate_size))) &&
	       (vocabulary == OPTION_NULL_INT || vocabulary >= tp);
}

static bool exchange_fits(const struct lister *l, int kind)
{
	bool is_set = kind == (int)l->c->parallel.cp_comm_type;
	return is_set || (l->now.cp > 1 && !config_is_given(l->c, EXCHANGE));
}

/* The expert grid */

static bool expert_tensor_fits(const struct lister *l, int64_t size)
{
	int64_t tensor = l->now.tp;
	if (l->expert_tensor_as_tensor)
		return size == (l->experts ? tensor : 1);
	if (!is_wanted(l, ETP, size))
		return false;
	if (l->experts)
		return divides(size, told(l->c->model.moe_ffn_hidden_size));
	return size == 1 || (l->given[ETP] && size == tensor);
}

static bool experts_fit(const struct lister *l, int64_t size)
{
	return is_wanted(l, EP, size) && divides(size, l->experts ? l->c->model.num_experts : 1);
}

/* The walk: each level fixes a size and goes on to the next. */

static bool goes_on(const struct lister *l, size_t i)
{
	return i < l->n_divisors && l->n < l->most;
}

static void keep(struct lister *l)
{
	l->list = mem_grow(l->list, l->n, &l->cap, sizeof *l->list);
	l->list[l->n++] = l->now;
}

static void list_experts(struct lister *l)
{
	int64_t stage = l->world / l->now.pp;
	for (size_t i = 0; goes_on(l, i); i++) {
		l->now.ep = l->divisor[i];
		if (!divides(l->now.ep, stage) || !experts_fit(l, l->now.ep))
			continue;
		for (size_t j = 0; goes_on(l, j); j++) {
			l->now.etp = l->divisor[j];
			if (divides(l->now.etp * l->now.ep, stage) && expert_tensor_fits(l, l->now.etp))
				keep(l);
		}
	}
}

static void list_tensors(struct lister *l)
{
	for (size_t i = 0; goes_on(l, i); i++) {
		l->now.tp = l->divisor[i];
		if (divides(l->now.tp * l->now.cp * l->now.pp, l->world) && is_wanted(l, TP, l->now.tp) &&
		    tensor_fits(l) && sequence_fits(l) && batch_fits(l))
			list_experts(l);
	}
}

static void list_contexts(struct lister *l)
{
	for (size_t i = 0; goes_on(l, i); i++) {
		l->now.cp = l->divisor[i];
		if (!divides(l->now.cp * l->now.pp, l->world) || !is_wanted(l, CP, l->now.cp) ||
		    (l->now.cp > 1 && !divides(2 * l->now.cp, l->c->model.seq_length)))
			continue;
		for (int kind = 0; parallel_cp_comm_choices[kind].name; kind++) {
			l->now.exchange = kind;
			if (exchange_fits(l, kind))
				list_tensors(l);
		}
	}
}

static void list_schedules(struct lister *l)
{
	for (int kind = 0; parallel_schedule_choices[kind].name; kind++) {
		l->now.schedule = kind;
		if (schedule_fits(l, kind))
			list_contexts(l);
	}
}

static void list_pipelines(struct lister *l)
{
	for (size_t i = 0; goes_on(l, i); i++) {
		l->now.pp = l->divisor[i];
		if (!is_wanted(l, PP, l->now.pp))
			continue;
		for (l->now.chunks = 1; l->now.chunks <= PROG_MAX_CHUNKS; l->now.chunks++)
			if (is_wanted(l, CHUNKS, l->now.chunks) && stages_fit(l))
				list_schedules(l);
	}
}

static void find_divisors(struct lister *l)
{
	for (int64_t d = 1; d <= l->world && l->n_divisors < MAX_DIVISORS; d++)
		if (divides(d, l->world))
			l->divisor[l->n_divisors++] = d;
}

static struct lister *begin(const struct config *c, int world)
{
	struct lister *l = mem_array(1, sizeof *l);
	const struct parallel_config *p = &c->parallel;
	const int64_t values[N_SIZES] = {
	        p->tensor_model_parallel_size,   p->context_parallel_size,
	        p->pipeline_model_parallel_size, p->virtual_pipeline_model_parallel_size,
	        p->expert_model_parallel_size,   p->expert_tensor_parallel_size};
	*l = (struct lister){
	        .c = c, .world = world, .experts = c->model.num_experts != OPTION_NULL_INT, .most = SIZE_MAX};
	for (int i = 0; i < N_SIZES; i++)
		l->given[i] = config_is_given(c, config_layout_keys[i]) ? told(values[i]) : 0;
	l->expert_tensor_as_tensor = config_is_given(c, config_layout_keys[ETP]) && !l->given[ETP];
	l->dense_layers = !l->experts || model_count_moe_layers(&c->model) < c->model.num_layers;
	find_divisors(l);
	return l;
}

size_t auto_list(const struct config *c, int world, struct auto_layout **out)
{
	struct lister *l = begin(c, world);
	list_pipelines(l);
	*out = l->list;
	size_t n = l->n;
	free(l);
	return n;
}

bool auto_is_possible(const struct config *c, int world)
{
	struct lister *l = begin(c, world);
	l->most = 1;
	list_pipelines(l);
	bool possible = l->n > 0;
	free(l->list);
	free(l);
	return possible;
}

/* Applying one */

static int choose_word(struct config *c, const char *key, const char *word, struct err *e)
{
	return config_is_given(c, key) ? 0 : config_replace(c, key, word, ORIGIN, e);
}

static int choose_words(struct config *c, const struct auto_layout *l, struct err *e)
{
	int rc = 0;
	if (l->tp > 1)
		rc = choose_word(c, SEQUENCE, l->sequence_parallel ? "true" : "false", e);
	if (!rc && l->cp > 1)
		rc = choose_word(c, EXCHANGE, parallel_cp_comm_choices[l->exchange].name, e);
	if (!rc && l->pp > 1)
		rc = choose_word(c, SCHEDULE, parallel_schedule_choices[l->schedule].name, e);
	if (!rc && needs_split(c, l))
		rc = config_replace(c, SPLIT, make_split(c, l), ORIGIN, e);
	return rc;
}

int auto_apply(struct config *c, const struct auto_layout *l, int world, struct err *e)
{
	const int64_t sizes[N_SIZES] = {l->tp, l->cp, l->pp, l->chunks, l->ep, l->etp};
	int rc = choose_words(c, l, e);
	if (rc)
		return rc;
	for (int i = 0; i < N_SIZES; i++)
		if (!config_is_given(c, config_layout_keys[i]))
			config_choose(c, config_layout_keys[i], sizes[i]);
	return config_check(c, world, e);
}

struct auto_layout auto_layout_of(const struct config *c)
{
	const struct parallel_config *p = &c->parallel;
	return (struct auto_layout){.tp = p->tensor_model_parallel_size,
	                            .cp = p->context_parallel_size,
	                            .pp = p->pipeline_model_parallel_size,
	                            .chunks = p->virtual_pipeline_model_parallel_size,
	                            .ep = p->expert_model_parallel_size,
	                            .etp = p->expert_tensor_parallel_size,
	                            .sequence_parallel = p->sequence_parallel,
	                            .exchange = p->cp_comm_type,
	                            .schedule = p->pipeline_schedule};
}

int auto_open(struct config *c, struct err *e)
{
	const struct option_table *t = config_table();
	if (c->parallel.layout == PARALLEL_AUTO)
		return 0;
	for (size_t i = 0; i < t->n; i++)
		if (!strncmp(t->rows[i].key, "parallel.", 9) && c->set.origins[i].source != OPTION_FROM_SET)
			option_reset(&c->set, &t->rows[i]);
	return config_replace(c, "parallel.layout", "auto", "--search", e);
}

/* Worlds */

static int64_t times(int64_t a, int64_t b)
{
	return b <= 1 ? a : a > INT32_MAX / b ? INT32_MAX : a * b;
}

int64_t auto_smallest_world(const struct config *c, int64_t most)
{
	const struct parallel_config *p = &c->parallel;
	int64_t stages = p->pipeline_model_parallel_size, etp = p->expert_tensor_parallel_size;
	if (etp == OPTION_NULL_INT && c->model.num_experts != OPTION_NULL_INT && !config_layout_is_open(c))
		etp = p->tensor_model_parallel_size;
	int64_t dense = times(times(stages, p->tensor_model_parallel_size), p->context_parallel_size);
	int64_t expert = times(times(stages, etp), p->expert_model_parallel_size);
	dense = times(dense, c->ddp.num_distributed_optimizer_instances);
	int64_t both = times(dense, expert / gcd(expert, dense));
	return both > most ? most + 1 : both;
}
