/* parallel.layout auto: which layouts are legal, against the rules themselves; what they cost; which is
 * chosen. */
#include "base/err.h"
#include "comm/comm.h"
#include "test/ranks.h"
#include "test/test.h"
#include "train/auto_links.h"

#include <stdlib.h>

enum { MAX_SETS = 40, GIB = 1 << 30 };

#define TP "parallel.tensor_model_parallel_size"
#define CP "parallel.context_parallel_size"
#define PP "parallel.pipeline_model_parallel_size"
#define VPP "parallel.virtual_pipeline_model_parallel_size"
#define EP "parallel.expert_model_parallel_size"
#define ETP "parallel.expert_tensor_parallel_size"
#define SEQUENCE "parallel.sequence_parallel"
#define EXCHANGE "parallel.cp_comm_type"
#define SCHEDULE "parallel.pipeline_schedule"
#define SPLIT "parallel.pipeline_model_parallel_layout"

#define DENSE                                                                                            \
	"model.num_layers=4 model.hidden_size=24 model.num_attention_heads=12 model.num_query_groups=6 " \
	"model.ffn_hidden_size=48 model.vocab_size=96 model.make_vocab_size_divisible_by=1 "             \
	"model.seq_length=12 train.train_iters=5 train.global_batch_size=24 "
#define EXPERTS                                                                          \
	DENSE "model.num_experts=4 model.moe_ffn_hidden_size=16 model.moe_layer_freq=2 " \
	      "model.moe_shared_expert_intermediate_size=8 "
#define LATENT                                                                                      \
	EXPERTS "model.num_query_groups=12 model.multi_latent_attention=true model.q_lora_rank=16 " \
	        "model.kv_lora_rank=16 "                                                            \
	        "model.qk_head_dim=4 model.qk_pos_emb_head_dim=2 model.v_head_dim=4 model.moe_layer_freq=1 "
/* Large enough for its times to mean something; never built as tensors. */
#define LARGE                                                                          \
	"model.num_layers=32 model.hidden_size=4096 model.num_attention_heads=32 "     \
	"model.num_query_groups=8 model.ffn_hidden_size=14336 model.vocab_size=32000 " \
	"model.seq_length=4096 mixed_precision=bf16 train.train_iters=5 train.global_batch_size=256 "
#define LARGE_EXPERTS                                                                                       \
	LARGE "model.num_experts=8 model.moe_expert_rank_capacity_factor=2 model.moe_ffn_hidden_size=7168 " \
	      "model.num_layers=16 "

static int load(struct config *c, const char *text, int world, struct err *e)
{
	const char *sets[MAX_SETS];
	char *copy = mem_strdup(text), *rest = copy;
	size_t n = 0;
	for (char *word; (word = strsep(&rest, " "));)
		if (*word)
			sets[n++] = word;
	struct config_source source = {.sets = sets, .n_sets = n};
	*e = (struct err){0};
	int rc = config_load(c, &source, e);
	if (!rc)
		rc = config_check(c, world, e);
	free(copy);
	return rc;
}

static bool open_config(struct config *c, const char *text, int world)
{
	struct err e;
	char all[2000];
	snprintf(all, sizeof all, "%s parallel=auto", text);
	if (!load(c, all, world, &e) && config_layout_is_open(c))
		return true;
	test_failed(__FILE__, __LINE__, "%s: %s", text, e.text);
	return false;
}

static struct auto_machine machine(const struct config *c, int world, int ranks_per_node)
{
	struct auto_machine m = auto_machine_of(c, world, ranks_per_node);
	m.rate = 400e12;
	m.within_node = 300e9;
	m.between_nodes = 40e9;
	m.node_bytes = (int64_t)ranks_per_node * 80 * GIB;
	return m;
}

/* Legality: every tuple of divisors is put to the rules. */

struct tuples {
	const struct config *c;
	int world;
	struct auto_layout *list;
	size_t n, cap;
};

/* The same layers in other words than auto_list's: the first stages get what is left over. */
static const char *uneven(struct config *copy, int64_t stages)
{
	int64_t layers = copy->model.num_layers;
	struct buf b = {0};
	buf_puts(&b, "E");
	for (int64_t s = 0; s < stages; s++)
		buf_printf(&b, "%st*%d", s ? "|" : "", (int)(layers / stages + (s < layers % stages)));
	buf_puts(&b, "L");
	const char *text = arena_strdup(&copy->arena, b.data);
	buf_free(&b);
	return text;
}

static bool set_word(struct config *c, const char *key, const char *word)
{
	struct err e = {0};
	return config_is_given(c, key) || !config_replace(c, key, word, "test", &e);
}

/* Whether the rules accept it as it stands. Given values win. */
static bool obeys(const struct tuples *t, struct auto_layout *l, bool sequence)
{
	const int64_t sizes[] = {l->tp, l->cp, l->pp, l->chunks, l->ep, l->etp};
	struct config copy;
	struct err e = {0};
	config_copy(&copy, t->c);
	bool good = set_word(&copy, SEQUENCE, sequence ? "true" : "false") &&
	            set_word(&copy, EXCHANGE, parallel_cp_comm_choices[l->exchange].name) &&
	            set_word(&copy, SCHEDULE, parallel_schedule_choices[l->schedule].name);
	if (l->pp > 1 && l->pp * l->chunks <= copy.model.num_layers &&
	    copy.model.num_layers % (l->pp * l->chunks) && l->chunks <= 4 &&
	    !copy.parallel.account_for_loss_in_pipeline_split)
		good = good && set_word(&copy, SPLIT, uneven(&copy, l->pp * l->chunks));
	for (int i = 0; config_layout_keys[i]; i++)
		if (!config_is_given(&copy, config_layout_keys[i]))
			config_choose(&copy, config_layout_keys[i], sizes[i]);
	good = good && !config_check(&copy, t->world, &e);
	struct auto_layout is = auto_layout_of(&copy);
	is.sequence_parallel = l->sequence_parallel =
	        sequence; /* said or not, it is the same with one rank */
	good = good && !memcmp(&is, l, sizeof is);
	config_free(&copy);
	return good;
}

static bool contradicts_given(const struct tuples *t, const struct auto_layout *l)
{
	const struct auto_layout says = auto_layout_of(t->c);
	const int64_t given[] = {says.tp, says.cp, says.pp, says.chunks, says.ep, says.etp};
	const int64_t size[] = {l->tp, l->cp, l->pp, l->chunks, l->ep, l->etp};
	for (int i = 0; config_layout_keys[i]; i++)
		if (config_is_given(t->c, config_layout_keys[i]) && given[i] != size[i])
			return true;
	return false;
}

static void try(struct tuples *t, struct auto_layout l)
{
	if (contradicts_given(t, &l))
		return;
	bool given = config_is_given(t->c, SEQUENCE), says = t->c->parallel.sequence_parallel;
	bool with = given ? says : l.tp > 1;
	if (!obeys(t, &l, with) && (given || !with || !obeys(t, &l, false)))
		return;
	t->list = mem_grow(t->list, t->n, &t->cap, sizeof *t->list);
	t->list[t->n++] = l;
}

static void try_experts(struct tuples *t, struct auto_layout l)
{
	for (l.ep = 1; l.ep <= t->world; l.ep++)
		for (l.etp = 1; l.etp <= t->world; l.etp++)
			if (t->world % (l.ep * l.etp * l.pp) == 0)
				try(t, l);
}

static void try_words(struct tuples *t, struct auto_layout l)
{
	int64_t given = t->c->parallel.cp_comm_type;
	int64_t most = l.pp == 1 ? 2 : PROG_MAX_CHUNKS; /* more than one is wrong there: two say so */
	bool any = l.cp > 1 && !config_is_given(t->c, EXCHANGE);
	for (l.exchange = any ? 0 : given; l.exchange <= (any ? PARALLEL_CP_A2A : given); l.exchange++)
		for (l.schedule = 0; l.schedule <= PARALLEL_ZERO_BUBBLE; l.schedule++)
			for (l.chunks = 1; l.pp * l.chunks <= t->c->model.num_layers + 2 && l.chunks <= most;
			     l.chunks++)
				try_experts(t, l);
}

static void try_all(struct tuples *t)
{
	struct auto_layout l = {0};
	for (l.tp = 1; l.tp <= t->world; l.tp++)
		for (l.cp = 1; l.cp <= t->world; l.cp++)
			for (l.pp = 1; l.pp <= t->world; l.pp++)
				if (t->world % (l.tp * l.cp * l.pp) == 0)
					try_words(t, l);
}

static int by_bytes(const void *a, const void *b)
{
	return memcmp(a, b, sizeof(struct auto_layout));
}

/* Without experts an open etp is 1, which is no choice; the rules accept tp too. */
static size_t leave_out_other_names(const struct config *c, struct auto_layout *list, size_t n)
{
	size_t kept = 0;
	bool experts = c->model.num_experts != OPTION_NULL_INT;
	for (size_t i = 0; i < n; i++)
		if (experts || config_is_given(c, ETP) || list[i].etp == 1)
			list[kept++] = list[i];
	return kept;
}

static const struct {
	int world;
	const char *text;
} spaces[] = {
        {1, DENSE},
        {6, DENSE},
        {8, DENSE "model.num_layers=6 " TP "=2 train.micro_batch_size=2 model.seq_length=16"},
        {7, DENSE "train.global_batch_size=14 model.num_layers=7"},
        {4, DENSE "model.num_layers=5 parallel.account_for_loss_in_pipeline_split=true"},
        {4, DENSE "train.global_batch_size=null ddp.num_distributed_optimizer_instances=2"},
        {8, DENSE SEQUENCE "=false " PP "=2"},
        {4, DENSE SCHEDULE "=interleaved " EXCHANGE "=a2a"},
        {4, DENSE "model.seq_length=9 " SEQUENCE "=true " VPP "=1"},
        {6, DENSE "model.ffn_hidden_size=50 " PP "=1"},
        {6, DENSE "model.vocab_size=2 " PP "=1"},
        {6, EXPERTS},
        {8, EXPERTS "model.num_query_groups=12 " CP "=1 " PP "=1 " SCHEDULE "=1f1b"},
        {8, EXPERTS TP "=2 " ETP "=1 " EP "=2"},
        {4, LATENT},
        {8, LATENT SEQUENCE "=false " PP "=1 " SCHEDULE "=1f1b " VPP "=1"},
};

TEST(layouts_are_those_that_the_rules_accept)
{
	for (size_t i = 0; i < sizeof spaces / sizeof *spaces; i++) {
		struct config c;
		struct auto_layout *list;
		MUST(open_config(&c, spaces[i].text, spaces[i].world));
		struct tuples t = {.c = &c, .world = spaces[i].world};
		try_all(&t);
		t.n = leave_out_other_names(&c, t.list, t.n);
		size_t n = auto_list(&c, spaces[i].world, &list);
		CHECK_INT(auto_is_possible(&c, spaces[i].world), n > 0);
		qsort(list, n, sizeof *list, by_bytes);
		qsort(t.list, t.n, sizeof *list, by_bytes);
		if (n != t.n || (n && memcmp(list, t.list, n * sizeof *list)))
			test_failed(__FILE__, __LINE__, "%d ranks, %s: %zu layouts, the rules accept %zu",
			            spaces[i].world, spaces[i].text, n, t.n);
		free(list);
		free(t.list);
		config_free(&c);
	}
}

TEST(layouts_that_are_applied_say_so)
{
	struct config c, again;
	struct err e = {0};
	struct buf yaml = {0};
	const struct auto_layout l = {2, 2, 2, 1, 1, 1, 1, PARALLEL_CP_ALL_GATHER, PARALLEL_ZERO_BUBBLE};
	MUST(open_config(&c, DENSE "model.num_layers=5 " TP "=2", 8));
	MUST(!auto_apply(&c, &l, 8, &e));
	CHECK(!config_layout_is_open(&c));
	CHECK_STR(config_get_origin(&c, TP), "--set " TP "=2");
	CHECK_STR(config_get_origin(&c, CP), "parallel.layout auto");
	CHECK_STR(config_get_origin(&c, SCHEDULE), "parallel.layout auto");
	CHECK_STR(config_get_origin(&c, SPLIT), "parallel.layout auto");
	CHECK_INT(c.derived.stages.n, 2);
	CHECK_STR(c.derived.stages.items[0], "stage 0: embedding, layers 0-2");
	CHECK_STR(c.derived.stages.items[1], "stage 1: layers 3-4, loss");
	config_write_yaml(&c, &yaml);
	char path[400];
	snprintf(path, sizeof path, "%s/chosen.yaml", test_dir());
	FILE *f = fopen(path, "w");
	MUST(f && fwrite(yaml.data, 1, yaml.length, f) == yaml.length && !fclose(f));
	const char *files[] = {path};
	MUST(!config_load(&again, &(struct config_source){.files = files, .n_files = 1}, &e));
	CHECK_INT(config_check(&again, 8, &e), 0);
	struct auto_layout as_chosen = auto_layout_of(&again);
	CHECK(!memcmp(&as_chosen, &l, sizeof l));
	buf_free(&yaml);
	config_free(&again);
	config_free(&c);
}

/* What an open layout leaves to be chosen is no value of the resolved file. */
TEST(open_layouts_stay_open)
{
	struct config c, again;
	struct err e = {0};
	struct buf yaml = {0};
	char path[400];
	MUST(open_config(&c, DENSE CP "=2", 8));
	config_write_yaml(&c, &yaml);
	snprintf(path, sizeof path, "%s/open.yaml", test_dir());
	FILE *f = fopen(path, "w");
	MUST(f && fwrite(yaml.data, 1, yaml.length, f) == yaml.length && !fclose(f));
	const char *files[] = {path};
	MUST(!config_load(&again, &(struct config_source){.files = files, .n_files = 1}, &e));
	CHECK(config_layout_is_open(&again) && config_is_given(&again, CP));
	for (size_t i = 0; config_layout_words[i]; i++)
		CHECK(!config_is_given(&again, config_layout_words[i]));
	MUST(!config_check(&again, 8, &e));
	struct auto_layout *a, *b;
	size_t n = auto_list(&c, 8, &a), n_again = auto_list(&again, 8, &b);
	CHECK(n == n_again && n > 0 && !memcmp(a, b, n * sizeof *a));
	free(a);
	free(b);
	buf_free(&yaml);
	config_free(&again);
	config_free(&c);
}

TEST(a_search_forgets_the_layout_of_the_files)
{
	struct config c;
	struct err e = {0};
	const char *sets[] = {"model.num_layers=4", TP "=2"}; /* what --set says stays */
	MUST(!config_load(&c, &(struct config_source){.sets = sets, .n_sets = 2}, &e));
	MUST(!config_override(&c, PP, "2", "a file", &e) && config_is_given(&c, PP));
	MUST(!auto_open(&c, &e));
	CHECK(config_layout_is_open(&c) && config_is_given(&c, TP) && !config_is_given(&c, PP));
	CHECK_INT(c.parallel.pipeline_model_parallel_size, 1);
	config_free(&c);
}

static const struct {
	const char *text;
	int64_t ranks;
} fewest[] = {{DENSE TP "=2 " PP "=3", 6},
              {DENSE TP "=2 ddp.num_distributed_optimizer_instances=2 " CP "=2", 8},
              {EXPERTS SEQUENCE "=true " TP "=2 " EP "=4", 8}, /* etp is tp */
              {EXPERTS SEQUENCE "=true " TP "=3 " EP "=4 " ETP "=1", 12}};

TEST(the_fewest_ranks_fill_both_grids)
{
	for (size_t i = 0; i < sizeof fewest / sizeof *fewest; i++) {
		struct config c;
		struct err e;
		load(&c, fewest[i].text, 1, &e);
		CHECK_INT(auto_smallest_world(&c, 100), fewest[i].ranks);
		CHECK_INT(auto_smallest_world(&c, fewest[i].ranks - 1), fewest[i].ranks);
		config_free(&c);
	}
}

/* Cost */

TEST(groups_know_their_links)
{
	struct auto_machine m = {
	        .world = 32, .ranks_per_node = 8, .within_node = 80, .between_nodes = 10, .latency_s = 1};
	static const struct {
		int64_t stride, ranks, on_node;
	} rows[] = {{1, 8, 8},  {1, 2, 2}, {4, 2, 2}, {8, 4, 1}, {4, 4, 2},
	            {1, 16, 8}, {1, 3, 1}, {3, 2, 1}, {2, 8, 4}};
	for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
		CHECK_INT(group_apart(&m, rows[i].stride, rows[i].ranks).on_node, rows[i].on_node);
	CHECK_NEAR(group_seconds(&m, group_apart(&m, 1, 8), false, 160, 3), 3 + 2, 1e-9);
	CHECK_NEAR(group_seconds(&m, group_apart(&m, 8, 4), false, 160, 1), 1 + 16, 1e-9);
	CHECK_NEAR(group_seconds(&m, group_apart(&m, 4, 4), false, 160, 1), 1 + 8, 1e-9); /* two ways out */
	CHECK_NEAR(group_seconds(&m, group_apart(&m, 1, 16), true, 150, 1), 1 + 8,
	           1e-9); /* 8 of 15 are away */
	m.ranks_per_node = 32;
	CHECK_INT(group_apart(&m, 3, 5).on_node, 5);
}

/* Traffic by group is the traffic by axis, but for what goes between stages. */
TEST(traffic_by_group_is_all_traffic)
{
	struct config c;
	struct err e = {0};
	struct estimate x;
	const struct auto_layout l = {2, 2, 2, 1, 2, 1, 1, PARALLEL_CP_P2P, PARALLEL_1F1B};
	MUST(open_config(&c,
	                 EXPERTS "ddp.overlap_grad_reduce=true model.moe_shared_expert_overlap=true "
	                         "validation.eval_interval=0",
	                 16));
	MUST(!auto_apply(&c, &l, 16, &e) && !estimate_layout(&x, &c, 8, &e));
	for (int s = 0; s < x.n_stage; s++) {
		const struct estimate_stage *stage = &x.stage[s];
		double micro_batches = (double)c.derived.accumulation, by_group = 0, by_axis = 0, hidden = 0;
		for (size_t i = 0; i < stage->n_traffic; i++) {
			const struct estimate_traffic *t = &stage->traffic[i];
			by_group += t->bytes * (t->segment <= SEG_WGRAD ? micro_batches : 1);
			hidden += t->flop;
			CHECK(t->bytes > 0 && t->calls > 0 && (t->beside || t->flop == 0));
		}
		for (int a = 0; a < AXIS_COUNT; a++)
			by_axis += stage->wire_bytes[a];
		double edges = 2 * micro_batches * stage->chunk[0].edge_bytes / 2;
		CHECK(edges > 0 && hidden > 0);
		CHECK_NEAR(by_group + edges, by_axis, 1);
	}
	estimate_free(&x);
	config_free(&c);
}

/* The search trusts guesses that far. */
static void check_guesses(const char *text, int world)
{
	struct config c;
	struct err e = {0};
	struct auto_search s;
	MUST(open_config(&c, text, world));
	struct auto_machine m = machine(&c, world, 8);
	MUST(!auto_search(&s, &c, &m, &e));
	CHECK(s.n >= 8);
	for (size_t i = 0; i < s.n; i++) {
		const struct auto_candidate *k = &s.examined[i];
		double time = k->guessed_s / k->cost.sample_s,
		       bytes = k->guessed_bytes / (double)k->cost.rank_bytes;
		if (time < 0.7 || time > 1.25 || bytes < 0.55 || bytes > 1.6 ||
		    k->least_bytes > (double)k->cost.rank_bytes) {
			struct buf b = {0};
			auto_put_layout(&b, &c, &k->layout, world);
			test_failed(__FILE__, __LINE__, "%s: guessed time %.2f, memory %.2f of what it is",
			            b.data, time, bytes);
			buf_free(&b);
		}
	}
	auto_free(&s);
	config_free(&c);
}

TEST(guesses_are_near_what_is_built)
{
	check_guesses(LARGE, 16);
	check_guesses(LARGE "recompute.granularity=full ddp.zero_stage=3", 32);
	check_guesses(LARGE_EXPERTS "recompute.granularity=selective", 32);
}

/* Choices */

static struct auto_candidate chosen(const char *text, int world, const struct auto_machine *how,
                                    size_t *fitting)
{
	struct config c;
	struct err e = {0};
	struct auto_search s = {0};
	struct auto_candidate best = {0};
	*fitting = 0;
	if (!open_config(&c, text, world))
		return best;
	struct auto_machine m = how ? *how : machine(&c, world, 8);
	if (CHECK(!auto_search(&s, &c, &m, &e)) && CHECK(s.n > 0)) {
		best = *auto_best(&s);
		*fitting = s.fitting;
	}
	auto_free(&s);
	config_free(&c);
	return best;
}

TEST(small_models_share_the_data_alone)
{
	size_t fitting;
	struct auto_layout l =
	        chosen(DENSE "model.hidden_size=240 model.ffn_hidden_size=480", 4, NULL, &fitting).layout;
	CHECK(fitting && l.tp == 1 && l.cp == 1 && l.pp == 1);
	l = chosen(LARGE "model.num_layers=64", 8, NULL, &fitting)
	            .layout; /* 14G parameters, 6 bytes each and more */
	CHECK(fitting && l.tp * l.cp * l.pp > 1);
}

/* The less memory there is, the more ranks share the model; and it does fit. */
TEST(large_models_are_shared_out)
{
	struct config c;
	size_t fitting;
	MUST(open_config(&c, LARGE, 64));
	struct auto_machine m = machine(&c, 64, 8);
	config_free(&c);
	int64_t shared = 1;
	for (int64_t gib = 640; gib >= 80; gib /= 2) {
		m.node_bytes = gib * GIB;
		struct auto_candidate k = chosen(LARGE, 64, &m, &fitting);
		struct auto_layout l = k.layout;
		CHECK(fitting && k.cost.fits && k.cost.node_bytes <= m.node_bytes);
		CHECK(l.tp * l.cp * l.pp >= shared);
		shared = l.tp * l.cp * l.pp;
	}
	CHECK(shared > 1);
}

TEST(the_same_is_chosen_again)
{
	struct config c;
	struct err e = {0};
	struct auto_search a, b;
	MUST(open_config(&c, LARGE_EXPERTS, 32));
	struct auto_machine m = machine(&c, 32, 8);
	MUST(!auto_search(&a, &c, &m, &e) && !auto_search(&b, &c, &m, &e));
	CHECK(a.n == b.n && a.legal == b.legal && a.too_large == b.too_large);
	for (size_t i = 0; i < a.n && i < b.n; i++)
		CHECK(!memcmp(&a.examined[i].layout, &b.examined[i].layout, sizeof a.examined[i].layout));
	for (size_t i = 1; i < a.n; i++)
		CHECK(a.examined[i - 1].cost.fits >= a.examined[i].cost.fits);
	auto_free(&a);
	auto_free(&b);
	config_free(&c);
}

/* The chosen one is as fast as the fastest within a hundredth, and no layout that is so too is shared by
 * fewer. */
TEST(of_equals_the_plainest_is_chosen)
{
	struct config c;
	struct err e = {0};
	struct auto_search s;
	size_t equals = 0;
	MUST(open_config(&c, LARGE_EXPERTS, 32));
	struct auto_machine m = machine(&c, 32, 8);
	MUST(!auto_search(&s, &c, &m, &e) && s.fitting > 1);
	const struct auto_layout *best = &s.examined[0].layout;
	double fastest = fmin(s.examined[0].cost.sample_s, s.examined[1].cost.sample_s);
	CHECK(s.examined[0].cost.sample_s <= 1.01 * fastest);
	for (size_t i = 1; i < s.fitting; i++) {
		const struct auto_layout *l = &s.examined[i].layout;
		CHECK(s.examined[i].cost.sample_s >= fastest);
		if (s.examined[i].cost.sample_s > 1.01 * fastest)
			continue;
		CHECK(l->tp * l->cp * l->pp >= best->tp * best->cp * best->pp);
		equals++;
	}
	CHECK(equals > 0);
	auto_free(&s);
	config_free(&c);
}

/* Seconds of a sample that hang on the links between nodes. */
static double between_nodes(const char *text, const struct auto_layout *l, struct auto_machine m)
{
	double s[2] = {0};
	for (int i = 0; i < 2; i++, m.between_nodes /= 2) {
		struct config c;
		struct err e = {0};
		struct estimate x = {0};
		struct auto_cost cost = {0};
		if (open_config(&c, text, m.world))
			CHECK(!auto_apply(&c, l, m.world, &e) &&
			      !estimate_layout(&x, &c, m.ranks_per_node, &e) &&
			      !auto_price(&cost, &m, &c, &x, &e));
		s[i] = cost.sample_s;
		estimate_free(&x);
		config_free(&c);
	}
	return s[1] - s[0];
}

/* As the links between nodes get slower, no layout wins that sends more over them. */
TEST(slower_links_carry_less)
{
	static const char *const models[] = {LARGE, LARGE_EXPERTS};
	for (size_t i = 0; i < 2; i++) {
		struct config c;
		size_t fitting;
		double first = 0, before = INFINITY;
		MUST(open_config(&c, models[i], 32));
		struct auto_machine m = machine(&c, 32, 8), fixed = m;
		fixed.between_nodes = 1e9; /* where it counts for every layout */
		config_free(&c);
		for (m.between_nodes = 64e9; m.between_nodes > 1e9; m.between_nodes /= 4) {
			struct auto_candidate k = chosen(models[i], 32, &m, &fitting);
			double sends = between_nodes(models[i], &k.layout, fixed);
			CHECK(fitting && sends <= before * (1 + 1e-9));
			first = first ? first : sends;
			before = sends;
		}
		CHECK(before < first / 2);
	}
}

/* What cannot be */

TEST(no_layout_is_one_message)
{
	struct config c;
	struct err e = {0};
	const char *why;
	MUST(open_config(&c, DENSE, 7)); /* 4 layers, 24 samples, 12 heads */
	CHECK_INT(auto_choose(&c, NULL, 7, (struct rank_on_host){0, 7}, &why, &e), EXIT_CONFIG);
	CHECK_HAS(e.text, "no layout of 7 ranks is legal; nearest numbers of ranks that have one: 6 or 8;");
	CHECK_HAS(e.text, "train.global_batch_size: 24 = micro_batch_size 1");
	CHECK(!why && config_layout_is_open(&c));
	config_free(&c);
	MUST(open_config(&c, DENSE TP "=5", 5));
	CHECK_INT(auto_choose(&c, NULL, 5, (struct rank_on_host){0, 5}, &why, &e), EXIT_CONFIG);
	CHECK_HAS(e.text, "model.num_attention_heads: 12 is not a multiple of " TP " 5");
	config_free(&c);
}

TEST(what_does_not_fit_says_what_would)
{
	struct config c;
	struct err e = {0};
	struct auto_search s;
	struct buf b = {0};
	const char *why;
	MUST(open_config(&c,
	                 LARGE "train.micro_batch_size=8 dist.memory_per_node_gib=200 train.train_iters=9 "
	                       "dataset.data_path=x",
	                 4));
	struct auto_machine m = machine(&c, 4, 4);
	m.node_bytes = 200LL * GIB;
	MUST(!auto_search(&s, &c, &m, &e));
	CHECK(s.n > 0 && s.fitting == 0);
	auto_put_remedies(&b, &s, &c);
	CHECK_HAS(b.data, "legal layouts of 4 ranks fits a node of 4 ranks and 200 GiB");
	CHECK_HAS(b.data, "would fit: recompute.granularity: full (");
	CHECK_HAS(b.data, "or train.micro_batch_size: 1 (");
	CHECK_HAS(b.data, "or 8 ranks (");
	CHECK_INT(auto_choose(&c, NULL, 4, (struct rank_on_host){0, 4}, &why, &e), EXIT_CONFIG);
	CHECK_HAS(e.text, "parallel.layout auto: none of the");
	buf_free(&b);
	auto_free(&s);
	config_free(&c);
}

TEST(nothing_is_built_from_an_open_layout)
{
	struct config c;
	struct err e = {0};
	struct program t;
	struct estimate x;
	MUST(open_config(&c, DENSE, 2));
	CHECK_INT(program_build(&t, &c, MODEL_TRAIN, 0, 0, &e), EXIT_INTERNAL);
	CHECK_HAS(e.text, "nobody has chosen the layout");
	program_free(&t);
	CHECK_INT(estimate_layout(&x, &c, 1, &e), EXIT_INTERNAL);
	estimate_free(&x);
	config_free(&c);
}

/* Ranks together */

struct meeting {
	struct auto_layout layout[4];
	struct err error[4];
	bool told[4];
};

static void choose_together(int rank, struct comm *world, void *shared)
{
	struct meeting *m = shared;
	struct config c;
	const char *why = NULL;
	if (!open_config(&c, DENSE "dist.num_threads=1", 4))
		return;
	auto_choose(&c, world, 0, (struct rank_on_host){rank, 4}, &why, &m->error[rank]);
	m->layout[rank] = auto_layout_of(&c);
	m->told[rank] = why && strstr(why, "layout: tp ") && strstr(why, " a step, ");
	config_free(&c);
}

TEST(all_ranks_choose_what_rank_0_chooses)
{
	struct meeting m = {0};
	MUST(ranks_run(4, choose_together, &m));
	for (int r = 0; r < 4; r++) {
		CHECK_INT(m.error[r].code, 0);
		CHECK(!memcmp(&m.layout[r], &m.layout[0], sizeof m.layout[0]) && m.layout[r].tp > 0);
		CHECK_INT(m.told[r], r == 0);
	}
}

int main(int argc, char **argv)
{
	return test_main(argc, argv);
}
