/* Stages and schedules as data: layouts against a second parser, orders against lines written by hand and
 * what every order must keep, the play against a plain fixed point and the papers' formulas. */
#include "base/err.h"
#include "base/mem.h"
#include "base/rng.h"
#include "parallel/schedule.h"
#include "parallel/stages.h"
#include "test/test.h"

#include <ctype.h>
#include <inttypes.h>
#include <stdlib.h>

static uint64_t drawn;

static int draw(int limit)
{
	return (int)(rng_bits(20211, drawn++) % (uint64_t)limit);
}

/* Stages. */

enum { MANY_STAGES = 64 };

/* Layers, pipeline ranks, chunks, and what else is said. */
#define SIZES(l, p, c) .num_layers = l, .pipeline = p, .chunks = c
#define ACCOUNT(embedding, loss) .account_for_embedding = embedding, .account_for_loss = loss
#define ENDS(first, last) .first_stage_layers = first, .last_stage_layers = last

/* "E3 2 0L": what each virtual stage holds. */
static const char *shown(const struct stage *s, int n)
{
	static char out[8 * MANY_STAGES + 1];
	int length = 0;
	for (int v = 0; v < n; v++)
		length += snprintf(out + length, sizeof out - (size_t)length, "%s%s%d%s", v ? " " : "",
		                   s[v].has_embedding ? "E" : "", s[v].n_layers, s[v].has_loss ? "L" : "");
	return out;
}

/* Each layer once and in order, the ends where they belong, nothing empty. */
static bool is_a_split(const struct stages_spec *spec, const struct stage *s)
{
	int n = spec->pipeline * spec->chunks;
	int64_t layer = 0;
	bool good = true;
	for (int v = 0; v < n; v++) {
		good = good && s[v].first_layer == layer && s[v].n_layers >= 0 &&
		       s[v].has_embedding == (v == 0) && s[v].has_loss == (v == n - 1) &&
		       s[v].n_layers + s[v].has_embedding + s[v].has_loss > 0;
		layer += s[v].n_layers;
	}
	return good && layer == spec->num_layers;
}

TEST(legal_splits)
{
	static const struct {
		struct stages_spec spec;
		const char *holds;
	} cases[] = {
	        {{SIZES(5, 1, 1)}, "E5L"},
	        {{SIZES(8, 4, 1)}, "E2 2 2 2L"},
	        {{SIZES(12, 2, 3)}, "E2 2 2 2 2 2L"},
	        {{SIZES(7, 4, 1), ACCOUNT(true, false)}, "E1 2 2 2L"},
	        {{SIZES(7, 2, 2), ACCOUNT(false, true)}, "E2 2 2 1L"},
	        {{SIZES(6, 4, 2), ACCOUNT(true, true)}, "E0 1 1 1 1 1 1 0L"},
	        {{SIZES(3, 1, 1), ACCOUNT(true, true)}, "E3L"},
	        {{SIZES(10, 4, 1), ENDS(1, 0)}, "E1 3 3 3L"},
	        {{SIZES(10, 4, 1), ENDS(0, 1)}, "E3 3 3 1L"},
	        /* Each chunk of the first rank has one layer, of the last three. */
	        {{SIZES(16, 4, 2), ENDS(2, 6)}, "E1 2 2 3 1 2 2 3L"},
	        {{SIZES(9, 2, 1), ENDS(4, 5)}, "E4 5L"},
	        {{SIZES(3, 1, 1), .layout = "EtttL"}, "E3L"},
	        {{SIZES(3, 1, 1), .layout = "E,t*03,L"}, "E3L"},
	        {{SIZES(3, 2, 2), .layout = "E|tt|t|L"}, "E0 2 1 0L"},
	        {{SIZES(7, 3, 1), .layout = "Et(t|t)*2tt,L"}, "E2 2 3L"},
	        {{SIZES(6, 4, 1), .layout = "E(|tt)*2|*1(t)*2L"}, "E0 2 2 2L"},
	        {{SIZES(8, 3, 1), .layout = "E((t)*2t|)*2ttL"}, "E3 3 2L"},
	        {{SIZES(62, 16, 2), .layout = "Et*3|(tt|)*29,t|L"},
	         "E3 2 2 2 2 2 2 2 2 2 2 2 2 2 2 2 2 2 2 2 2 2 2 2 2 2 2 2 2 2 1 0L"},
	};
	for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
		const struct stages_spec *s = &cases[i].spec;
		struct stage stage[MANY_STAGES];
		struct err e = {0};
		if (stages_split(s, stage, &e))
			test_failed(__FILE__, __LINE__, "case %zu: %s", i, e.text);
		else if (CHECK(is_a_split(s, stage)))
			CHECK_STR(shown(stage, s->pipeline * s->chunks), cases[i].holds);
	}
}

static void refused(const struct stages_spec *s, const char *says)
{
	struct stage stage[MANY_STAGES];
	struct err e = {0};
	CHECK_INT(stages_split(s, stage, &e), EXIT_CONFIG);
	CHECK_INT(e.code, EXIT_CONFIG);
	CHECK_HAS(e.text, says);
}

TEST(illegal_splits)
{
	static const struct {
		struct stages_spec spec;
		const char *says;
	} cases[] = {
	        {{SIZES(30, 4, 2)}, "(num_layers 30) / (pipeline 4 · chunks 2) = 30 / 8 = 3.75"},
	        {{SIZES(30, 4, 2)}, "nearest num_layers: 24 or 32"},
	        {{SIZES(3, 4, 2)}, "nearest num_layers: 8,"},
	        {{SIZES(31, 4, 2), ACCOUNT(true, true)},
	         "(num_layers 31 + embedding 1 + loss 1) / (pipeline 4 · chunks 2) = 33 / 8"},
	        {{SIZES(31, 4, 2), ACCOUNT(true, true)}, "nearest num_layers: 30 or 38"},
	        {{SIZES(1, 2, 1), ACCOUNT(true, true)}, "nearest num_layers: 2,"},
	        {{SIZES(0, 1, 1)}, "num_layers is 0; allowed: 1 to"},
	        {{SIZES(-4, 4, 1)}, "num_layers is -4; allowed: 1 to"},
	        {{SIZES(INT64_MAX, 1, 1)}, "num_layers is 9223372036854775807"},
	        {{SIZES(4, 0, 1)}, "pipeline_model_parallel_size is 0"},
	        {{SIZES(4, 1, -1)}, "virtual_pipeline_model_parallel_size is -1"},
	        {{SIZES(4, 65536, 65536)}, "is 4294967296; allowed: 1 to 1048576"},
	        {{SIZES(4, 2, 1), ENDS(-1, 0)}, "num_layers_in_first_pipeline_stage is -1; allowed: 0 to"},
	        {{SIZES(4, 1, 1), ENDS(4, 0)}, "need pipeline_model_parallel_size 2 or more"},
	        {{SIZES(16, 4, 2), ENDS(3, 0)}, "num_layers_in_first_pipeline_stage 3 / chunks 2 = 1.5"},
	        {{SIZES(16, 4, 2), ENDS(0, 5)}, "nearest: 4 or 6"},
	        {{SIZES(30, 4, 2), ENDS(4, 4)},
	         "(num_layers 30 - first 4 - last 4) / ((pipeline 4 - 2) · chunks 2) = 22 / 4 = 5.5"},
	        {{SIZES(30, 4, 2), ENDS(4, 4)}, "nearest num_layers: 28 or 32"},
	        /* Nothing is left for the middle. */
	        {{SIZES(8, 4, 1), ENDS(4, 4)}, "nearest num_layers: 10"},
	        {{SIZES(6, 3, 1), ENDS(9, 0)}, "nearest num_layers: 11"},
	        {{SIZES(8, 2, 1), ENDS(3, 4)}, "first 3 + last 4 = 7 layers, but num_layers is 8"},
	        {{SIZES(8, 2, 1), ACCOUNT(false, true), ENDS(4, 0)},
	         "allowed beside them: neither account_for_embedding"},
	        {{SIZES(2, 1, 1), ACCOUNT(false, true), .layout = "EttL"}, "allowed beside it: none of"},
	        {{SIZES(2, 2, 1), ENDS(0, 1), .layout = "Et|tL"}, "allowed beside it: none of"},
	};
	for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
		refused(&cases[i].spec, cases[i].says);
}

TEST(illegal_layouts_name_the_byte)
{
	/* Three layers on two virtual stages. */
	static const char *const cases[][2] = {
	        {"", "byte 0: virtual stage 0 (pipeline rank 0, chunk 0) ends empty"},
	        {"tE|ttL", "byte 0: 't' before E"},
	        {"Et|EttL", "byte 3: a second E"},
	        {"E*2t|ttL", "byte 0: a second E"},
	        {"Ettt|tL", "byte 5: more layers (t) than num_layers 3"},
	        {"Et*4|L", "byte 1: more layers (t) than num_layers 3"},
	        {"Et*1048576|L", "byte 1: more layers"},
	        {"E(t)*1048576|L", "byte 2: more layers"},
	        {"E(t|)*1048576|L", "byte 3: '|' begins virtual stage 2, but pipeline 2 · chunks 1 = 2"},
	        {"Et|t|tL", "byte 4: '|' begins virtual stage 2"},
	        {"EtttL", "byte 5: the end, with 1 virtual stages, but pipeline 2 · chunks 1 = 2"},
	        {"Et|tL", "byte 5: the end, with 2 layers (t), but num_layers is 3"},
	        {"Et|tt", "byte 5: the end, without L"},
	        {"Et|ttL*2", "byte 5: a second L"},
	        {"Et|ttLL", "byte 6: 'L' behind L"},
	        {"EtttL|", "byte 5: '|' behind L"},
	        {"Ettt|", "byte 5: virtual stage 1 (pipeline rank 1, chunk 0) ends empty"},
	        {"E|*2tttL", "byte 1: virtual stage 1 (pipeline rank 1, chunk 0) ends empty"},
	        {"Et|tmL", "byte 4: m, multi-token prediction, is not supported; allowed: E (embedding)"},
	        {"Et|tX", "byte 4: 'X' means nothing; allowed: E (embedding), t (layer), L (loss), |"},
	        {"Et| ttL", "byte 3: 0x20 means nothing"},
	        {"Et|\xc3\xa9", "byte 3: 0xc3 means nothing"},
	        {"Et|2tL", "byte 3: '2' means nothing"},
	        {"*2E", "byte 0: nothing stands before '*'"},
	        {"E(*2t)*1", "byte 2: nothing stands before '*'"},
	        {"Et*1*2", "byte 4: nothing stands before '*'"},
	        {"Et*|", "byte 3: allowed behind '*': a whole number, 1 to 1048576"},
	        {"Et*0|", "byte 3: allowed behind '*'"},
	        {"Et*-1|", "byte 3: allowed behind '*'"},
	        {"Et*1048577|", "byte 3: allowed behind '*'"},
	        {"Et*99999999999999999999999999", "byte 3: allowed behind '*'"},
	        {"Et)*2", "byte 2: ')' without '('"},
	        {"E(t|tt", "byte 1: '(' is never closed"},
	        {"E((t)*2", "byte 1: '(' is never closed"},
	        {"E(t)|ttL", "byte 3: *N must follow the ')'"},
	        {"E()*9t|tt", "byte 2: the group is empty"},
	        {"E((,)*9)*9", "byte 4: the group is empty"},
	        {"((((((((((((((((E)*1)*1)*1)*1)*1)*1)*1)*1)*1)*1)*1)*1)*1)*1)*1)*1ttt|L", NULL},
	        {"(((((((((((((((((E)*1", "byte 16: groups nest deeper than the 16 allowed"},
	};
	for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
		struct stages_spec s = {.num_layers = 3, .pipeline = 2, .chunks = 1, .layout = cases[i][0]};
		struct stage stage[2];
		struct err e = {0};
		if (cases[i][1])
			refused(&s, cases[i][1]);
		else
			CHECK_INT(stages_split(&s, stage, &e), 0);
	}
	char longest[STAGES_MAX_LAYOUT_BYTES + 2] = "E";
	memset(longest + 1, ',', sizeof longest - 2);
	struct stages_spec s = {.num_layers = 3, .pipeline = 2, .chunks = 1, .layout = longest};
	refused(&s, "4097 bytes long; allowed: at most 4096");
	longest[sizeof longest - 2] = 0;
	refused(&s, "byte 4096: the end, with 0 layers");
}

/* Whatever is asked for is a split, or refused with values that are one. */
static void check_nearest(const struct stages_spec *asked)
{
	struct stage stage[MANY_STAGES];
	struct err e = {0};
	if (!stages_split(asked, stage, &e)) {
		CHECK(is_a_split(asked, stage));
		return;
	}
	const char *near = strstr(e.text, "nearest num_layers: ");
	int64_t value[2];
	MUST(near != NULL);
	int n = sscanf(near, "nearest num_layers: %" SCNd64 " or %" SCNd64, &value[0], &value[1]);
	MUST(n >= 1);
	CHECK(n == 1 || (value[0] < asked->num_layers && value[1] > asked->num_layers));
	for (int i = 0; i < n; i++) {
		struct stages_spec s = *asked;
		s.num_layers = value[i];
		if (stages_split(&s, stage, &e))
			test_failed(__FILE__, __LINE__, "the nearest %" PRId64 " is refused: %s", value[i],
			            e.text);
		else
			CHECK(is_a_split(&s, stage));
	}
}

TEST(the_nearest_values_are_legal)
{
	for (int pipeline = 1; pipeline <= 6; pipeline++)
		for (int chunks = 1; chunks <= 4; chunks++)
			for (int layers = 1; layers <= 40; layers++) {
				struct stages_spec s = {
				        .num_layers = layers, .pipeline = pipeline, .chunks = chunks};
				for (int flags = 0; flags < 4; flags++) {
					s.account_for_embedding = flags & 1;
					s.account_for_loss = flags & 2;
					check_nearest(&s);
				}
				s.account_for_embedding = s.account_for_loss = false;
				for (int i = 0; i < 9 && pipeline > 1; i++) {
					s.first_stage_layers = i % 3 * chunks;
					s.last_stage_layers = i / 3 * 2 * chunks;
					check_nearest(&s);
				}
			}
}

/* A second reading of the layout: unrolled into one string. *out grows to at most UNROLLED bytes. */

enum { UNROLLED = 400 };

static bool unroll_times(const char **text, int *times)
{
	while (**text == ',')
		++*text;
	*times = 0;
	if (**text != '*')
		return true;
	char *end;
	if (!isdigit((unsigned char)*++*text))
		return false;
	long value = strtol(*text, &end, 10); /* saturates */
	*text = end;
	*times = value > STAGES_MAX_LAYERS ? 0 : (int)value;
	return *times > 0;
}

static bool unroll(const char **text, char *out, int depth)
{
	for (out[0] = 0; **text && **text != ')';) {
		char body[UNROLLED + 1] = {**text}, c = *(*text)++;
		int times;
		if (c == ',')
			continue;
		if (c == '(' &&
		    (depth == 16 || !unroll(text, body, depth + 1) || !body[0] || *(*text)++ != ')'))
			return false;
		if ((c != '(' && !strchr("EtL|", c)) || !unroll_times(text, &times) || (c == '(' && !times))
			return false;
		for (int i = 0; i < times + !times; i++) {
			if (strlen(out) + strlen(body) > UNROLLED)
				return false; /* legal ones are shorter here */
			strcat(out, body);
		}
	}
	return depth > 0 || !**text;
}

/* "E3 2 0L" of an unrolled layout, NULL where it is no split. */
static const char *read_unrolled(const struct stages_spec *s, const char *flat)
{
	struct stage stage[MANY_STAGES + 1] = {0};
	int v = 0, n = s->pipeline * s->chunks;
	int64_t layer = 0;
	size_t length = strlen(flat);
	if (!length || flat[0] != 'E' || flat[length - 1] != 'L')
		return NULL;
	for (const char *c = flat; *c && v < n; c++) {
		if ((*c == 'E' && c != flat) || (*c == 'L' && c[1]))
			return NULL;
		stage[v].has_embedding |= *c == 'E';
		stage[v].has_loss |= *c == 'L';
		stage[v].n_layers += *c == 't';
		layer += *c == 't';
		if (*c == '|')
			stage[++v].first_layer = (int32_t)layer;
	}
	return v + 1 == n && is_a_split(s, stage) ? shown(stage, n) : NULL;
}

static void mutate(char *text, size_t cap)
{
	static const char letters[] = "EtL|()*,0123456789m \xff";
	size_t n = strlen(text), at = (size_t)draw((int)n + 1), to = (size_t)draw((int)n + 1);
	char c = letters[draw((int)sizeof letters - 1)];
	int how = draw(4);
	if (how == 0 && at < n) {
		text[at] = c;
	} else if (how == 1 && at < n) {
		memmove(text + at, text + at + 1, n - at);
	} else if (how == 2 && n + 1 < cap) {
		memmove(text + at + 1, text + at, n - at + 1);
		text[at] = c;
	} else if (at < n && to < n) {
		char swap = text[at];
		text[at] = text[to];
		text[to] = swap;
	}
}

TEST(mutated_layouts_agree_with_a_second_parser)
{
	static const struct stages_spec seeds[] = {
	        {SIZES(62, 16, 2), .layout = "Et*3|(tt|)*29,t|L"},
	        {SIZES(8, 3, 1), .layout = "E((t)*2t|)*2,ttL"},
	        {SIZES(6, 2, 2), .layout = "E(t|t)*3ttL"},
	        {SIZES(4, 2, 1), .layout = "Et,t|t*2,L"},
	        {SIZES(5, 1, 1), .layout = "E(t*2)*2tL"},
	};
	int accepted = 0, rejected = 0;
	for (int i = 0; i < 40000; i++) {
		struct stages_spec s = seeds[i % 5];
		char text[64], flat[UNROLLED + 1];
		snprintf(text, sizeof text, "%s", s.layout);
		for (int k = draw(5); k >= 0; k--)
			mutate(text, sizeof text);
		s.layout =
		        strcpy(mem_array(strlen(text) + 1, 1), text); /* so that a read behind it is seen */
		struct stage stage[MANY_STAGES];
		struct err e = {0};
		const char *rest = text;
		bool legal = !stages_split(&s, stage, &e);
		const char *expected = unroll(&rest, flat, 0) ? read_unrolled(&s, flat) : NULL;
		char said[8 * MANY_STAGES + 1];
		snprintf(said, sizeof said, "%s", expected ? expected : "");
		if (legal != (expected != NULL) ||
		    (legal && strcmp(said, shown(stage, s.pipeline * s.chunks)) != 0))
			test_failed(__FILE__, __LINE__, "%s: %s, not %s", text, legal ? "legal" : e.text,
			            said);
		if (!legal)
			CHECK_HAS(e.text, "pipeline_model_parallel_layout: byte ");
		accepted += legal;
		rejected += !legal;
		free((char *)(uintptr_t)s.layout);
	}
	CHECK(accepted > 1000 && rejected > 1000);
}

/* Schedules. */

enum { MOST_STAGES = 8, MOST_CHUNKS = 4, MOST_MICRO_BATCHES = 24 };

static bool is_legal(const struct schedule_spec *s)
{
	return s->kind == PARALLEL_INTERLEAVED ? s->chunks > 1 && s->micro_batches % s->stages == 0
	                                       : s->chunks == 1;
}

static void for_each_spec(void (*check)(const struct schedule_spec *s))
{
	int n = 0;
	for (int i = 0; i < 3 * 2 * MOST_STAGES * MOST_CHUNKS * MOST_MICRO_BATCHES; i++) {
		int left = i / 6;
		struct schedule_spec s = {.kind = (enum parallel_schedule)(i % 3),
		                          .forward_only = i / 3 % 2,
		                          .stages = left % MOST_STAGES + 1,
		                          .chunks = left / MOST_STAGES % MOST_CHUNKS + 1,
		                          .micro_batches = left / MOST_STAGES / MOST_CHUNKS + 1};
		if (is_legal(&s)) {
			check(&s);
			n++;
		}
	}
	CHECK_INT(n, 2 * (2 * 8 * 24 + 3 * (24 + 12 + 8 + 6 + 4 + 4 + 3 + 3)));
}

static int last_kind(const struct schedule_spec *s)
{
	return s->forward_only ? SLOT_FORWARD : s->kind == PARALLEL_ZERO_BUBBLE ? SLOT_WEIGHT : SLOT_BACKWARD;
}

static void open_schedule(struct schedule *s, const struct schedule_spec *spec, int stage)
{
	struct err e = {0};
	if (schedule_build(s, spec, stage, &e))
		test_failed(__FILE__, __LINE__, "%s", e.text);
}

static const char *told(const struct schedule_spec *s)
{
	static char out[100];
	snprintf(out, sizeof out, "%s, %d stages, %d chunks, %" PRId64 " micro-batches%s",
	         parallel_schedule_choices[s->kind].name, s->stages, s->chunks, s->micro_batches,
	         s->forward_only ? ", forward only" : "");
	return out;
}

/* Every (kind, chunk, micro-batch) once, each kind of a chunk ascending, F(m) before B(m) before W(m). */
static void check_complete(const struct schedule *s)
{
	int next[N_SLOT_KINDS][16] = {{0}}, kinds = last_kind(&s->spec) + 1;
	bool good = s->n == (size_t)(s->spec.micro_batches * s->spec.chunks * kinds);
	for (size_t i = 0; i < s->n && good; i++) {
		const struct slot *slot = &s->slot[i];
		int k = slot->kind, c = slot->chunk;
		good = k < kinds && c < s->spec.chunks && slot->micro_batch == next[k][c]++ &&
		       (!k || slot->micro_batch < next[k - 1][c]);
	}
	for (int i = 0; i < kinds * s->spec.chunks; i++)
		good = good && next[i % kinds][i / kinds] == s->spec.micro_batches;
	if (!good)
		test_failed(__FILE__, __LINE__, "stage %d is not complete and in order: %s", s->stage,
		            told(&s->spec));
}

static void check_complete_stages(const struct schedule_spec *spec)
{
	for (int stage = 0; stage < spec->stages; stage++) {
		struct schedule s;
		open_schedule(&s, spec, stage);
		check_complete(&s);
		schedule_free(&s);
	}
}

TEST(every_slot_once_and_in_order)
{
	for_each_spec(check_complete_stages);
}

/* The largest sizes, whose lists must still be made in milliseconds. */
TEST(large_schedules)
{
	static const struct schedule_spec specs[] = {{PARALLEL_1F1B, 64, 1, 4096, false},
	                                             {PARALLEL_INTERLEAVED, 64, 16, 4096, false},
	                                             {PARALLEL_ZERO_BUBBLE, 64, 1, 4096, false}};
	for (int i = 0; i < 3; i++)
		for (int stage = 0; stage < 64; stage += 21) {
			struct schedule s;
			open_schedule(&s, &specs[i], stage);
			check_complete(&s);
			schedule_free(&s);
		}
}

/* "F0 F1 B0 …"; with chunks "F1.0" is chunk 1, micro-batch 0. */
static const char *order(const struct schedule *s)
{
	static char out[1000];
	size_t n = 0;
	out[0] = 0;
	for (size_t i = 0; i < s->n && n < sizeof out - 12; i++) {
		n += (size_t)snprintf(out + n, sizeof out - n, "%s%c", i ? " " : "", "FBW"[s->slot[i].kind]);
		if (s->spec.chunks > 1)
			n += (size_t)snprintf(out + n, sizeof out - n, "%d.", s->slot[i].chunk);
		n += (size_t)snprintf(out + n, sizeof out - n, "%d", s->slot[i].micro_batch);
	}
	return out;
}

/* Figures of the papers, and Megatron-LM's warm-up, by hand. */
TEST(known_orders)
{
	static const struct {
		struct schedule_spec spec;
		int stage;
		const char *order;
	} cases[] = {
	        {{PARALLEL_1F1B, 1, 1, 3, false}, 0, "F0 B0 F1 B1 F2 B2"},
	        {{PARALLEL_ZERO_BUBBLE, 1, 1, 3, false}, 0, "F0 B0 W0 F1 B1 W1 F2 B2 W2"},
	        {{PARALLEL_1F1B, 4, 1, 5, false}, 0, "F0 F1 F2 F3 B0 F4 B1 B2 B3 B4"},
	        {{PARALLEL_1F1B, 4, 1, 5, false}, 2, "F0 F1 B0 F2 B1 F3 B2 F4 B3 B4"},
	        {{PARALLEL_1F1B, 4, 1, 5, false}, 3, "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4"},
	        {{PARALLEL_1F1B, 4, 1, 2, false}, 0, "F0 F1 B0 B1"},
	        {{PARALLEL_1F1B, 4, 1, 3, true}, 1, "F0 F1 F2"},
	        {{PARALLEL_ZERO_BUBBLE, 4, 1, 3, true}, 1, "F0 F1 F2"},
	        {{PARALLEL_ZERO_BUBBLE, 4, 1, 6, false},
	         0,
	         "F0 F1 F2 F3 B0 W0 F4 B1 W1 F5 B2 W2 B3 W3 B4 W4 B5 W5"},
	        {{PARALLEL_ZERO_BUBBLE, 4, 1, 6, false},
	         1,
	         "F0 F1 F2 B0 F3 B1 W0 F4 B2 W1 F5 B3 W2 B4 W3 B5 W4 W5"},
	        {{PARALLEL_ZERO_BUBBLE, 4, 1, 6, false},
	         3,
	         "F0 B0 F1 B1 F2 B2 F3 B3 W0 F4 B4 W1 F5 B5 W2 W3 W4 W5"},
	        {{PARALLEL_INTERLEAVED, 2, 2, 4, false},
	         0,
	         "F0.0 F0.1 F1.0 F1.1 F0.2 B1.0 F0.3 B1.1 F1.2 B0.0 F1.3 B0.1 B1.2 B1.3 B0.2 B0.3"},
	        {{PARALLEL_INTERLEAVED, 2, 2, 4, false},
	         1,
	         "F0.0 F0.1 F1.0 B1.0 F1.1 B1.1 F0.2 B0.0 F0.3 B0.1 F1.2 B1.2 F1.3 B1.3 B0.2 B0.3"},
	        {{PARALLEL_INTERLEAVED, 2, 2, 2, false}, 1, "F0.0 F0.1 F1.0 F1.1 B1.0 B1.1 B0.0 B0.1"},
	        {{PARALLEL_INTERLEAVED, 2, 3, 4, true},
	         0,
	         "F0.0 F0.1 F1.0 F1.1 F2.0 F2.1 F0.2 F0.3 F1.2 F1.3 F2.2 F2.3"},
	        {{PARALLEL_INTERLEAVED, 1, 2, 2, false}, 0, "F0.0 F1.0 B1.0 F0.1 B0.0 F1.1 B1.1 B0.1"},
	};
	for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
		struct schedule s;
		open_schedule(&s, &cases[i].spec, cases[i].stage);
		CHECK_STR(order(&s), cases[i].order);
		schedule_free(&s);
	}
}

/* Forwards before the first backward: the published warm-up, plus the one beside the first backward. */
static void check_warm_up(const struct schedule_spec *spec)
{
	int p = spec->stages, total = (int)spec->micro_batches * spec->chunks;
	for (int stage = 0; stage < p && !spec->forward_only; stage++) {
		int warm = spec->kind != PARALLEL_INTERLEAVED ? p - stage - 1
		           : spec->micro_batches == p         ? total
		                                              : (p - stage - 1) * 2 + (spec->chunks - 1) * p;
		struct schedule s;
		open_schedule(&s, spec, stage);
		int before = 0;
		while (s.slot[before].kind == SLOT_FORWARD)
			before++;
		CHECK_INT(before, warm + 1 < total ? warm + 1 : total);
		schedule_free(&s);
	}
}

TEST(warm_up_is_the_published_one)
{
	for_each_spec(check_warm_up);
}

TEST(peers)
{
	static const struct schedule_spec spec = {PARALLEL_INTERLEAVED, 3, 2, 3, false};
	/* Of chunk 0 and 1 on each stage: from, to of a forward; a backward goes the other way round. */
	static const int peers[3][2][2] = {{{-1, 1}, {2, 1}}, {{0, 2}, {0, 2}}, {{1, 0}, {1, -1}}};
	for (int stage = 0; stage < 3; stage++) {
		struct schedule s;
		open_schedule(&s, &spec, stage);
		for (uint8_t c = 0; c < 2; c++) {
			struct slot f = {SLOT_FORWARD, c, 0}, b = {SLOT_BACKWARD, c, 0};
			CHECK_INT(schedule_source(&s, &f), peers[stage][c][0]);
			CHECK_INT(schedule_target(&s, &f), peers[stage][c][1]);
			CHECK_INT(schedule_source(&s, &b), peers[stage][c][1]);
			CHECK_INT(schedule_target(&s, &b), peers[stage][c][0]);
		}
		schedule_free(&s);
	}
	struct schedule s;
	open_schedule(&s, &(struct schedule_spec){PARALLEL_ZERO_BUBBLE, 3, 1, 2, false}, 1);
	struct slot w = {SLOT_WEIGHT, 0, 0};
	CHECK_INT(schedule_source(&s, &w), -1);
	CHECK_INT(schedule_target(&s, &w), -1);
	schedule_free(&s);
}

/* First and last slot of micro-batch m, of all chunks or of one. */
static void span(const struct schedule *s, int chunk, int m, size_t *first, size_t *last)
{
	*first = s->n;
	for (size_t i = 0; i < s->n; i++)
		if (s->slot[i].micro_batch == m && (chunk < 0 || s->slot[i].chunk == chunk)) {
			if (*first == s->n)
				*first = i;
			*last = i;
		}
}

/* in_flight and window from their definition. */
static void check_in_flight(const struct schedule_spec *spec)
{
	int m = (int)spec->micro_batches;
	for (int stage = 0; stage < spec->stages; stage++) {
		struct schedule s;
		open_schedule(&s, spec, stage);
		for (int c = -1; c < spec->chunks; c++) {
			size_t first[MOST_MICRO_BATCHES] = {0}, last[MOST_MICRO_BATCHES] = {0};
			int most = 0, widest = 0;
			for (int k = 0; k < m; k++)
				span(&s, c, k, &first[k], &last[k]);
			for (size_t i = 0; i < s.n; i++) {
				int open = 0, oldest = m, newest = -1;
				for (int k = m - 1; k >= 0; k--) {
					open += first[k] <= i && i <= last[k];
					oldest = i <= last[k] ? k : oldest;
					newest = first[k] <= i && newest < 0 ? k : newest;
				}
				most = open > most ? open : most;
				widest = newest - oldest + 1 > widest ? newest - oldest + 1 : widest;
			}
			CHECK_INT(c < 0 ? s.window : s.in_flight[c], c < 0 ? widest : most);
		}
		if (spec->kind == PARALLEL_1F1B && !spec->forward_only)
			CHECK_INT(s.in_flight[0], m < spec->stages - stage ? m : spec->stages - stage);
		if (spec->kind == PARALLEL_ZERO_BUBBLE && !spec->forward_only)
			CHECK_INT(s.in_flight[0], m < spec->stages ? m : spec->stages);
		schedule_free(&s);
	}
}

TEST(in_flight_is_its_definition)
{
	for_each_spec(check_in_flight);
}

/* The play. */

static struct schedule_times times[MOST_STAGES * MOST_CHUNKS];

static void equal_times(double forward, double backward, double weight)
{
	for (int i = 0; i < MOST_STAGES * MOST_CHUNKS; i++)
		times[i] = (struct schedule_times){forward, backward, weight, 0};
}

static struct schedule_result play(const struct schedule_spec *spec, int buffers)
{
	struct schedule_result r = {-1, -1};
	struct err e = {0};
	if (schedule_play(spec, times, buffers, &r, &e))
		test_failed(__FILE__, __LINE__, "%s, %d buffers: %s", told(spec), buffers, e.text);
	return r;
}

/* Whole seconds, so that sums are exact. */
static void check_formula(const struct schedule_spec *spec)
{
	double m = (double)spec->micro_batches * spec->chunks, p = spec->stages;
	bool zero = spec->kind == PARALLEL_ZERO_BUBBLE && !spec->forward_only, exact = !zero || m >= p;
	equal_times(3, 4, 2);
	double work = spec->forward_only ? 3 : 3 + 4 + 2, lost = zero ? 3 + 4 - 2 : work;
	for (int buffers = 1; buffers <= 3; buffers++) {
		struct schedule_result r = play(spec, buffers);
		if (exact)
			CHECK_NEAR(r.makespan, m * work + (p - 1) * lost, 0);
		CHECK_NEAR(r.bubble, 1 - m * work / r.makespan, 1e-12);
		if (zero && p > 1)
			CHECK(r.makespan < m * work + (p - 1) * work);
	}
}

TEST(bubbles_are_the_published_ones)
{
	for_each_spec(check_formula);
	equal_times(1, 1, 1);
	struct schedule_spec s = {PARALLEL_1F1B, 8, 1, 24, false};
	double bubble = play(&s, 2).makespan - 72;
	s.kind = PARALLEL_ZERO_BUBBLE;
	CHECK_NEAR(play(&s, 2).makespan - 72, bubble / 3, 0);
	s = (struct schedule_spec){PARALLEL_INTERLEAVED, 8, 4, 24, false};
	equal_times(0.25, 0.25, 0.25);
	CHECK_NEAR(play(&s, 2).makespan - 72, bubble / 4, 0);
}

TEST(zero_bubble_is_never_slower)
{
	int exact = 0;
	for (int i = 0; i < 1000; i++) {
		int f = 1 + draw(8), b = 1 + draw(8), w = 1 + draw(8), transfer = draw(3);
		int p = 1 + draw(MOST_STAGES), m = 1 + draw(MOST_MICRO_BATCHES);
		equal_times(f, b, w);
		for (int v = 0; v < p; v++)
			times[v].transfer = transfer;
		struct schedule_spec s = {PARALLEL_ZERO_BUBBLE, p, 1, m, false};
		double zero = play(&s, 2).makespan;
		if (m >= p && w <= f && w <= b && !transfer) {
			CHECK_NEAR(zero, m * (f + b + w) + (p - 1) * (f + b - w), 0);
			exact++;
		}
		s.kind = PARALLEL_1F1B;
		CHECK(zero <= play(&s, 2).makespan);
	}
	CHECK(exact > 30);
}

/* The same by a plain fixed point: every slot begins at the earliest time its conditions allow, again and
 * again until nothing changes. */

enum { MOST_SLOTS = N_SLOT_KINDS * MOST_CHUNKS * MOST_MICRO_BATCHES };

static struct schedule lists[2 * MOST_STAGES];
static double ends[MOST_STAGES][MOST_SLOTS];

/* When rank v % p comes to the slot, or ends it, of virtual stage v; 0 where v is none. */
static double when(int kind, int v, int m, bool end)
{
	int p = lists[0].spec.stages, r = v % p;
	if (v < 0 || v >= p * lists[0].spec.chunks)
		return 0;
	for (size_t i = 0; i < lists[r].n; i++) {
		const struct slot *s = &lists[r].slot[i];
		if (s->kind == kind && s->chunk == v / p && s->micro_batch == m)
			return end ? ends[r][i] + times[v].transfer : i ? ends[r][i - 1] : 0;
	}
	test_failed(__FILE__, __LINE__, "rank %d has no slot of kind %d, micro-batch %d", r, kind, m);
	return 0;
}

static double end_of(int r, size_t i, int buffers)
{
	const struct slot *s = &lists[r].slot[i];
	int v = s->chunk * lists[0].spec.stages + r, step = s->kind == SLOT_FORWARD ? 1 : -1;
	double begin = i ? ends[r][i - 1] : 0, whole = times[v].backward + times[v].weight;
	if (s->kind == SLOT_WEIGHT)
		return begin + times[v].weight;
	begin = fmax(begin, when(s->kind, v - step, s->micro_batch, true));
	if (s->micro_batch >= buffers)
		begin = fmax(begin, when(s->kind, v + step, s->micro_batch - buffers, false));
	return begin + (s->kind == SLOT_FORWARD                      ? times[v].forward
	                : lists[0].spec.kind == PARALLEL_ZERO_BUBBLE ? times[v].backward
	                                                             : whole);
}

static double fixed_point(const struct schedule_spec *spec, int buffers)
{
	double makespan = 0;
	memset(ends, 0, sizeof ends);
	for (int r = 0; r < spec->stages; r++)
		open_schedule(&lists[r], spec, r);
	for (bool moved = true; moved;) {
		moved = false;
		for (int r = 0; r < spec->stages; r++)
			for (size_t i = 0; i < lists[r].n; i++) {
				double end = end_of(r, i, buffers);
				moved = moved || end > ends[r][i];
				ends[r][i] = end;
				makespan = fmax(makespan, end);
			}
	}
	for (int r = 0; r < spec->stages; r++)
		schedule_free(&lists[r]);
	return makespan;
}

TEST(random_times_agree_with_a_fixed_point)
{
	for (int i = 0; i < 300; i++) {
		enum parallel_schedule kind = (enum parallel_schedule)draw(3);
		bool inter = kind == PARALLEL_INTERLEAVED;
		int p = 1 + draw(5), buffers = 1 + draw(3);
		struct schedule_spec s = {kind, p, inter ? 2 + draw(2) : 1, 1 + draw(8), draw(8) == 0};
		if (inter)
			s.micro_batches = p * (1 + draw(3));
		for (int v = 0; v < MOST_STAGES * MOST_CHUNKS; v++)
			times[v] = (struct schedule_times){draw(9), draw(9), draw(9), draw(4)};
		double expected = fixed_point(&s, buffers);
		if (fabs(play(&s, buffers).makespan - expected) > 1e-9)
			test_failed(__FILE__, __LINE__, "%s, %d buffers: %g s, not %g s", told(&s), buffers,
			            play(&s, buffers).makespan, expected);
	}
}

TEST(no_time_at_all_has_no_bubble)
{
	equal_times(0, 0, 0);
	struct schedule_result r = play(&(struct schedule_spec){PARALLEL_1F1B, 2, 1, 2, false}, 2);
	CHECK_NEAR(r.makespan, 0, 0);
	CHECK_NEAR(r.bubble, 0, 0);
}

/* Lists that cannot run. */

static void swap_slots(struct schedule *s, int a, int b)
{
	struct slot swap = s->slot[a];
	s->slot[a] = s->slot[b];
	s->slot[b] = swap;
}

/* Plays lists[]; an error in *e replaces the older one. */
static int play_lists(int buffers, struct err *e)
{
	struct schedule_result r;
	equal_times(1, 1, 1);
	*e = (struct err){EXIT_IO, "older"};
	int code = schedule_play_lists(lists, times, buffers, &r, e);
	CHECK_INT(e->code, code ? code : EXIT_IO);
	return code;
}

static void open_two(enum parallel_schedule kind)
{
	struct schedule_spec spec = {kind, 2, 1, 4, false};
	open_schedule(&lists[0], &spec, 0);
	open_schedule(&lists[1], &spec, 1);
}

static void close_two(void)
{
	schedule_free(&lists[0]);
	schedule_free(&lists[1]);
}

TEST(a_deadlock_is_told_by_name)
{
	struct err e;
	open_two(PARALLEL_1F1B); /* F0 F1 B0 … and F0 B0 F1 … */
	CHECK_INT(play_lists(2, &e), 0);
	swap_slots(&lists[0], 1, 2);
	CHECK_INT(play_lists(2, &e), 0); /* slower, but it runs */
	swap_slots(&lists[1], 1, 2);
	CHECK_INT(play_lists(2, &e), EXIT_INTERNAL);
	CHECK_STR(e.text, "stage 0 waits at slot 1 (backward, chunk 0, micro-batch 0) for the backward of "
	                  "chunk 0 on stage 1\n"
	                  "stage 1 waits at slot 1 (forward, chunk 0, micro-batch 1) for the forward of "
	                  "chunk 0 on stage 0");
	close_two();

	open_two(PARALLEL_1F1B);
	swap_slots(&lists[1], 0, 1);
	CHECK_INT(play_lists(2, &e), EXIT_INTERNAL);
	CHECK_HAS(e.text, "stage 1 waits at slot 0 (backward, chunk 0, micro-batch 0) for its own forward");
	close_two();

	open_two(PARALLEL_ZERO_BUBBLE); /* F0 B0 F1 B1 W0 … on stage 1 */
	swap_slots(&lists[1], 3, 4);
	CHECK_INT(play_lists(2, &e), 0);
	swap_slots(&lists[1], 1, 3);
	CHECK_INT(play_lists(2, &e), EXIT_INTERNAL);
	CHECK_HAS(e.text, "stage 1 waits at slot 1 (weight, chunk 0, micro-batch 0) for its own backward");
	close_two();
}

TEST(a_deadlock_of_many_names_eight)
{
	struct schedule_spec spec = {PARALLEL_1F1B, 12, 1, 4, false};
	struct err e;
	int lines = 1;
	for (int r = 0; r < 12; r++)
		open_schedule(&lists[r], &spec, r);
	swap_slots(&lists[11], 0, 1);
	CHECK_INT(play_lists(2, &e), EXIT_INTERNAL);
	for (const char *c = e.text; *c; c++)
		lines += *c == '\n';
	CHECK_INT(lines, 8);
	for (int r = 0; r < 12; r++)
		schedule_free(&lists[r]);
}

/* All forwards first on stage 0: with one buffer both ranks wait to write. */
TEST(a_deadlock_of_buffers_is_told_by_name)
{
	struct err e;
	open_two(PARALLEL_1F1B);
	for (int i = 0; i < 8; i++)
		lists[0].slot[i] = (struct slot){i < 4 ? SLOT_FORWARD : SLOT_BACKWARD, 0, i % 4};
	CHECK_INT(play_lists(2, &e), 0);
	CHECK_INT(play_lists(1, &e), EXIT_INTERNAL);
	CHECK_STR(e.text, "stage 0 waits at slot 3 (forward, chunk 0, micro-batch 3) for stage 1 to receive "
	                  "that of micro-batch 2: all 1 places are full\n"
	                  "stage 1 waits at slot 3 (backward, chunk 0, micro-batch 1) for stage 0 to receive "
	                  "that of micro-batch 0: all 1 places are full");
	close_two();
}

TEST(a_slot_out_of_order_is_told)
{
	struct err e;
	open_two(PARALLEL_1F1B);
	swap_slots(&lists[0], 0, 1);
	CHECK_INT(play_lists(2, &e), EXIT_INTERNAL);
	CHECK_STR(e.text, "stage 0 has micro-batch 1 at slot 0 (forward, chunk 0); allowed: 0, the next in "
	                  "order");
	close_two();
}

TEST(illegal_schedules)
{
	static const struct {
		struct schedule_spec spec;
		const char *says;
	} cases[] = {
	        {{PARALLEL_1F1B, 4, 2, 8, false},
	         "pipeline_schedule 1f1b with virtual_pipeline_model_parallel_size 2; allowed: 1, or "
	         "pipeline_schedule interleaved"},
	        {{PARALLEL_ZERO_BUBBLE, 4, 2, 8, false}, "pipeline_schedule zero_bubble with virtual"},
	        {{PARALLEL_INTERLEAVED, 4, 1, 8, false}, "allowed: 2 to 256, or pipeline_schedule 1f1b"},
	        {{PARALLEL_INTERLEAVED, 4, 2, 10, false},
	         "micro-batches 10 / pipeline_model_parallel_size 4 = 2.5, and interleaved needs whole "
	         "groups; "
	         "nearest: 8 or 12 micro-batches"},
	        {{PARALLEL_INTERLEAVED, 4, 2, 3, false}, "nearest: 4 micro-batches"},
	        {{PARALLEL_INTERLEAVED, 4, 2, 10, true}, "nearest: 8 or 12 micro-batches"},
	        {{PARALLEL_1F1B, 4, 1, 0, false}, "the number of micro-batches is 0; allowed: 1 to 16777216"},
	        {{PARALLEL_1F1B, 4, 1, INT64_MAX, false}, "allowed: 1 to 16777216"},
	        {{PARALLEL_INTERLEAVED, 4, 256, 65540, false}, "is 65540; allowed: 1 to 65536"},
	        {{PARALLEL_1F1B, 0, 1, 4, false}, "pipeline_model_parallel_size is 0; allowed: 1 to 65536"},
	        {{PARALLEL_INTERLEAVED, 4, 257, 4, false}, "is 257; allowed: 1 to 256"},
	        {{PARALLEL_INTERLEAVED, 4, -1, 4, false}, "is -1; allowed: 1 to 256"},
	};
	for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
		struct err e = {0};
		struct schedule s;
		struct schedule_result r;
		CHECK_INT(schedule_build(&s, &cases[i].spec, 0, &e), EXIT_CONFIG);
		CHECK(!s.slot && !s.n && !s.in_flight);
		CHECK_HAS(e.text, cases[i].says);
		e = (struct err){0};
		CHECK_INT(schedule_play(&cases[i].spec, times, 2, &r, &e), EXIT_CONFIG);
		CHECK_HAS(e.text, cases[i].says);
	}
}

int main(int argc, char **argv)
{
	return test_main(argc, argv);
}
