/* The passes over the real model's program and the debugging tools of its execution do what they say. Linked
 * with malloc wrapped, to see who allocates in the steady state. */
#include "base/err.h"
#include "base/rng.h"
#include "graph/rule.h"
#include "kernels/kernels.h"
#include "test/test.h"
#include "train/pieces.h"
#include "train/step.h"

#include <stdlib.h>
#include <unistd.h>

/* Allocations of this program's own objects. */

static long allocations;

#define WRAP(result, name, parameters, ...)        \
	result __real_##name parameters;           \
	result __wrap_##name parameters;           \
	result __wrap_##name parameters            \
	{                                          \
		allocations++;                     \
		return __real_##name(__VA_ARGS__); \
	}
WRAP(void *, malloc, (size_t n), n)
WRAP(void *, calloc, (size_t n, size_t size), n, size)
WRAP(void *, realloc, (void *p, size_t n), p, n)
WRAP(void *, aligned_alloc, (size_t alignment, size_t n), alignment, n)
WRAP(int, posix_memalign, (void **p, size_t alignment, size_t n), p, alignment, n)

#define CHEAP (1u << REPEAT_NORM | 1u << REPEAT_ACTIVATION)

struct how {
	bool fuse;
	uint32_t repeats; /* bit set of enum repeat */
	int32_t layers;
	const char *extra, *more; /* further settings, or NULL */
};

struct bench {
	struct config config;
	struct prog prog;
	struct model model;
	struct stream *stream;
	struct exec *exec;
	struct err e;
};

static bool open_config(struct config *c, const char *extra, const char *more, struct err *e)
{
	const char *sets[] = {"model.num_layers=3",
	                      "model.hidden_size=32",
	                      "model.num_attention_heads=4",
	                      "model.num_query_groups=2",
	                      "model.ffn_hidden_size=48",
	                      "model.vocab_size=131",
	                      "model.seq_length=16",
	                      "train.micro_batch_size=2",
	                      "train.global_batch_size=4",
	                      "train.train_iters=9",
	                      extra,
	                      more};
	struct config_source source = {.sets = sets, .n_sets = 10 + (extra != NULL) + (more != NULL)};
	bool good = !config_load(c, &source, e) && !config_check(c, 1, e);
	if (!good)
		test_failed(__FILE__, __LINE__, "%s", e->text);
	return good;
}

/* Initial values, rounded where weights have two bytes. */
static void fill_weights(struct bench *b)
{
	const struct model *m = &b->model;
	for (size_t k = 0; k < m->n_param; k++)
		for (int32_t i = 0; i < m->param[k].n_parts; i++) {
			const struct part *part = &m->part[m->param[k].first_part + i];
			int64_t n = part->extent[0] * part->extent[1],
			        first = part->local_row * part->extent[1];
			float *host = malloc((size_t)n * sizeof *host);
			part_init(part, 11, host);
			for (int64_t j = 0; j < n && dtype_is_half(m->spec.dtype); j++)
				((uint16_t *)host)[j] = half_from_f32(m->spec.dtype, host[j]);
			exec_upload_part(b->exec, m->param[k].value, first, n, host);
			free(host);
		}
}

static void fill_model(struct bench *b)
{
	const struct model *m = &b->model;
	int32_t tokens[32], targets[32], positions[32];
	for (int i = 0; i < 32; i++) {
		tokens[i] = (int32_t)(rng_bits(1, (uint64_t)i) % 131);
		targets[i] = (int32_t)(rng_bits(2, (uint64_t)i) % 131);
		positions[i] = i % 16;
	}
	exec_upload(b->exec, m->tokens, tokens);
	exec_upload(b->exec, m->targets, targets);
	exec_upload(b->exec, m->positions, positions);
	if (m->keys != NONE)
		exec_upload(b->exec, m->keys, (int64_t[]){5, 6});
	exec_upload(b->exec, m->loss_scale, (float[]){1.0f / 32});
	model_fill_constants(m, b->exec);
	fill_weights(b);
}

static bool open_model(struct bench *b, const struct how *how, const struct exec_options *options,
                       const struct backend *backend)
{
	*b = (struct bench){0};
	struct prog *p = &b->prog;
	prog_init(p);
	if (!open_config(&b->config, how->extra, how->more, &b->e) ||
	    !CHECK(!backend->open(&b->stream, THREADS(1), &b->e)))
		return false;
	struct model_spec spec = {.config = &b->config.model,
	                          .padded_vocab_size = b->config.derived.padded_vocab_size,
	                          .dtype = program_dtype(&b->config),
	                          .use = MODEL_TRAIN,
	                          .batch = 2,
	                          .rows = 16};
	model_build(&b->model, p, &spec, &b->e);
	prog_backward(p, &(struct seed){b->model.loss, b->model.loss_scale}, 1);
	if (how->fuse)
		prog_fuse(p, false);
	prog_recompute(p, how->repeats, how->layers);
	prog_plan(p);
	if (prog_check(p) || !CHECK(!exec_create(&b->exec, p, backend, b->stream, options, &b->e))) {
		test_failed(__FILE__, __LINE__, "%s", p->e.text);
		return false;
	}
	fill_model(b);
	return true;
}

static void close_model(struct bench *b)
{
	exec_free(b->exec);
	model_free(&b->model);
	prog_free(&b->prog);
	cpu_backend.close(b->stream);
	config_free(&b->config);
}

static int run_segment(struct bench *b, uint32_t segments)
{
	return exec_run(b->exec, &(struct exec_part){.segments = segments, .first = true}, &b->e);
}

static void run_model(struct bench *b)
{
	CHECK(!run_segment(b, SEG_BIT(FWD)));
	CHECK(!run_segment(b, SEG_BIT(BWD)));
	if (b->e.code)
		test_failed(__FILE__, __LINE__, "%s", b->e.text);
}

static const struct how plain = {.fuse = true, .layers = -1};

/* The largest difference of any gradient, relative to the largest of its parameter. */
static double gradient_gap(const struct bench *a, const struct bench *b)
{
	double gap = 0;
	for (size_t k = 0; k < a->model.n_param; k++) {
		int32_t u = a->prog.value[a->model.param[k].value].grad,
		        v = b->prog.value[b->model.param[k].value].grad;
		const float *x = exec_data(a->exec, u), *y = exec_data(b->exec, v);
		double scale = 0, worst = 0;
		for (int64_t i = 0; i < value_count(&a->prog.value[u]); i++) {
			scale = fmax(scale, fabs(x[i]));
			worst = fmax(worst, fabs((double)x[i] - y[i]));
		}
		CHECK(scale > 1e-6);
		gap = fmax(gap, worst / scale);
	}
	return gap;
}

static int count_nodes(const struct prog *p, enum op op, enum segment segment)
{
	int n = 0;
	for (size_t i = 0; i < p->n_node; i++)
		n += p->node[i].op == op && p->node[i].segment == segment;
	return n;
}

TEST(fusion_takes_the_additions_into_the_norms)
{
	static const char *const kinds[] = {"model.normalization=RMSNorm", "model.normalization=LayerNorm"};
	static const enum op ops[] = {OP_rmsnorm_bwd, OP_layernorm_bwd};
	static const int slot[] = {4, 5};
	for (int k = 0; k < 2; k++) {
		struct bench a, b;
		struct how without = {.layers = -1, .extra = kinds[k]}, with = without;
		with.fuse = true;
		if (open_model(&a, &without, NULL, &cpu_backend) &&
		    open_model(&b, &with, NULL, &cpu_backend)) {
			/* Two residual branches in each of three layers; the final norm has none. */
			CHECK_INT(count_nodes(&a.prog, OP_add, SEG_BWD), 6);
			CHECK_INT(count_nodes(&b.prog, OP_add, SEG_BWD), 0);
			CHECK_INT(b.prog.n_node, a.prog.n_node - 6);
			int taken = 0;
			for (size_t i = 0; i < b.prog.n_node; i++)
				taken += b.prog.node[i].op == ops[k] && b.prog.node[i].in[slot[k]] != NONE;
			CHECK_INT(taken, 6);
			run_model(&a);
			run_model(&b);
			CHECK_NEAR(gradient_gap(&a, &b), 0, 2e-6);
		}
		close_model(&a);
		close_model(&b);
	}
}

/* The forward flop of the nodes that a backward pass asks for again: all of a layer but the last product and
 * the addition behind it, whose results nothing reads. */
static double flop_again(const struct prog *p, int32_t layers)
{
	double flop = 0;
	for (size_t i = 0; i < p->n_node; i++) {
		const struct node *n = &p->node[i];
		if (n->segment != SEG_FWD || n->layer < 0 || n->layer >= layers)
			continue;
		bool last = p->node[i + 1].layer != n->layer, before_last = p->node[i + 2].layer != n->layer;
		flop += last || before_last ? 0 : rules[n->op]->cost(p, n).flop;
	}
	return flop;
}

static void check_recomputed(const struct how *how, int32_t layers, int64_t *saved, double *more)
{
	struct bench a, b;
	struct how without = {.fuse = true, .layers = -1, .extra = how->extra};
	if (open_model(&a, &without, NULL, &cpu_backend) && open_model(&b, how, NULL, &cpu_backend)) {
		run_model(&a);
		run_model(&b);
		CHECK(gradient_gap(&a, &b) == 0);
		*saved = b.prog.bytes[R_SAVED];
		*more = prog_cost(&b.prog, SEG_BWD).flop - prog_cost(&a.prog, SEG_BWD).flop;
		CHECK(prog_cost(&b.prog, SEG_FWD).flop == prog_cost(&a.prog, SEG_FWD).flop);
		if (layers)
			CHECK_NEAR(*more, flop_again(&a.prog, layers), 0.5);
	}
	close_model(&a);
	close_model(&b);
}

TEST(recomputation_keeps_less_and_changes_no_bit)
{
	static const struct how nothing = {.fuse = true, .layers = -1},
	                        cheap = {.fuse = true, .repeats = CHEAP, .layers = -1},
	                        one = {.fuse = true, .repeats = 1u << REPEAT_LAYERS, .layers = 1},
	                        two = {.fuse = true, .repeats = 1u << REPEAT_LAYERS, .layers = 2},
	                        all = {.fuse = true, .repeats = 1u << REPEAT_LAYERS, .layers = -1};
	int64_t saved[5] = {0};
	double more[5] = {0};
	check_recomputed(&nothing, 0, &saved[0], &more[0]);
	check_recomputed(&cheap, 0, &saved[1], &more[1]);
	check_recomputed(&one, 1, &saved[2], &more[2]);
	check_recomputed(&two, 2, &saved[3], &more[3]);
	check_recomputed(&all, 3, &saved[4], &more[4]);
	CHECK(more[0] == 0 && more[1] > 0 && more[1] < more[4]);
	CHECK(saved[0] > saved[1] && saved[1] > saved[4]);
	/* Each layer that is recomputed saves the same. */
	CHECK(saved[4] < saved[0]);
	CHECK_INT(saved[0] - saved[2], saved[2] - saved[3]);
	CHECK_INT(saved[2] - saved[3], saved[3] - saved[4]);
}

/* Every set of modules: with one more it keeps less and computes more, but for gathers, of which one rank has
 * none, and for what the feed-forward block covers; here are no experts. */
TEST(every_module_may_be_recomputed)
{
	int64_t saved[1 << REPEAT_LAYERS];
	double more[1 << REPEAT_LAYERS];
	const uint32_t experts = 1u << REPEAT_EXPERTS;
	for (uint32_t set = 0; set < 1u << REPEAT_LAYERS; set++) {
		if (set & experts)
			continue;
		struct how how = {
		        .fuse = true, .repeats = set, .layers = -1, .extra = "model.qk_layernorm=true"};
		check_recomputed(&how, 0, &saved[set], &more[set]);
	}
	for (uint32_t set = 0; set < 1u << REPEAT_LAYERS; set++)
		for (int one = 0; one < REPEAT_LAYERS; one++) {
			uint32_t part = set & ~(1u << one);
			bool covered =
			        one == REPEAT_GATHERS || (one == REPEAT_ACTIVATION && set >> REPEAT_MLP & 1);
			if (part == set || set & experts)
				continue;
			CHECK(covered ? saved[set] == saved[part] : saved[set] < saved[part]);
			CHECK(covered ? more[set] == more[part] : more[set] > more[part]);
		}
}

TEST(recomputation_repeats_the_dropout_it_made)
{
	static const struct how full = {.fuse = true,
	                                .repeats = 1u << REPEAT_LAYERS,
	                                .layers = -1,
	                                .extra = "model.hidden_dropout=0.3"},
	                        cheap = {.fuse = true,
	                                 .repeats = CHEAP,
	                                 .layers = -1,
	                                 .extra = "model.attention_dropout=0.3"};
	int64_t saved;
	double more;
	check_recomputed(&full, 0, &saved, &more);
	check_recomputed(&cheap, 0, &saved, &more);
}

static uint64_t hash_of(const char *extra)
{
	struct bench b;
	struct how how = {.fuse = true, .layers = -1, .extra = extra};
	uint64_t hash = open_model(&b, &how, NULL, &cpu_backend) ? prog_hash(&b.prog) : 0;
	close_model(&b);
	return hash;
}

TEST(the_fingerprint_tells_programs_apart)
{
	static const char *const others[] = {
	        "model.ffn_hidden_size=52",   "model.vocab_size=300",          "model.num_layers=2",
	        "model.num_query_groups=4",   "model.normalization=LayerNorm", "mixed_precision=bf16",
	        "model.add_bias_linear=true", "model.qk_layernorm=true",       "model.hidden_dropout=0.1",
	        "model.activation=gelu"};
	uint64_t seen[11] = {hash_of(NULL)};
	CHECK(seen[0] == hash_of(NULL) && seen[0]);
	CHECK(seen[0] == hash_of("optimizer.lr=0.5"));
	for (int i = 0; i < 10; i++) {
		seen[i + 1] = hash_of(others[i]);
		for (int j = 0; j <= i; j++)
			CHECK(seen[j] != seen[i + 1]);
	}
}

TEST(the_listing_shows_every_node_and_adds_up)
{
	struct bench b;
	struct buf text = {0};
	if (open_model(&b, &plain, NULL, &cpu_backend)) {
		prog_print(&b.prog, &text);
		const char *line = text.data;
		for (size_t i = 0; i < b.prog.n_node; i++) {
			const struct node *n = &b.prog.node[i];
			char layer[20], one[1000];
			snprintf(layer, sizeof layer, n->layer < 0 ? "  -  " : "L%d ", n->layer);
			snprintf(one, sizeof one, "%.*s", (int)strcspn(line, "\n"), line);
			CHECK_INT(atoi(one), i);
			CHECK_HAS(one, layer);
			CHECK_HAS(one, op_rows[n->op].name);
			CHECK_HAS(one, segment_names[n->segment]);
			CHECK_HAS(one, strrchr(n->where, '/') + 1);
			line += strcspn(line, "\n") + 1;
		}
		long long sum = 0, bytes;
		char name[20];
		for (int r = 0; r < R_COUNT; r++, line += strcspn(line, "\n") + 1) {
			CHECK(sscanf(line, "%19s %lld bytes", name, &bytes) == 2);
			CHECK_STR(name, region_names[r]);
			CHECK_INT(bytes, b.prog.bytes[r]);
			sum += bytes;
		}
		CHECK(!*line);
		CHECK_INT(sum, exec_bytes(b.exec));
	}
	buf_free(&text);
	close_model(&b);
}

/* The debugging tools. */

static const struct part *find_part(const struct model *m, const char *name, int32_t *value)
{
	for (size_t k = 0; k < m->n_param; k++)
		for (int32_t i = 0; i < m->param[k].n_parts; i++)
			if (!strcmp(m->part[m->param[k].first_part + i].name, name)) {
				*value = m->param[k].value;
				return &m->part[m->param[k].first_part + i];
			}
	return NULL;
}

TEST(the_hunt_names_the_first_node_that_is_not_finite)
{
	static const struct {
		const char *parameter, *where;
	} cases[] = {{"decoder.layers.1.mlp.fc2.weight", "layer 1, linear (builder.c:"},
	             {"decoder.layers.2.attention.key.weight", "layer 2, linear (attention.c:"},
	             {"decoder.layers.0.pre_mlp_layernorm.weight", "layer 0, rmsnorm (builder.c:"},
	             {"decoder.final_layernorm.weight", "layer -1, rmsnorm (builder.c:"}};
	/* The narrow one has no larger value than its logits of two bytes. */
	static const struct how hows[] = {
	        {.fuse = true, .layers = -1},
	        {.fuse = true, .layers = -1, .extra = "mixed_precision=bf16", .more = "model.hidden_size=8"},
	        {.fuse = true, .layers = -1, .extra = "mixed_precision=fp16", .more = "model.hidden_size=8"}};
	struct exec_options options = {.nan_hunt = true};
	for (int i = 0; i < 12; i++) {
		struct bench b;
		int32_t id = 0;
		if (open_model(&b, &hows[i / 4], &options, &cpu_backend)) {
			CHECK(!run_segment(&b, SEG_BIT(FWD)) && !run_segment(&b, SEG_BIT(BWD)));
			const struct part *part = find_part(&b.model, cases[i % 4].parameter, &id);
			MUST(part != NULL);
			int64_t at = part->local_row * part->extent[1] + 5;
			char *data = exec_data(b.exec, id);
			if (dtype_is_half(b.prog.value[id].dtype))
				((uint16_t *)data)[at] = half_from_f32(b.prog.value[id].dtype, NAN);
			else
				((float *)data)[at] = NAN;
			CHECK_INT(run_segment(&b, SEG_BIT(FWD)), EXIT_DIVERGED);
			CHECK_HAS(b.e.text, cases[i % 4].where);
			CHECK_HAS(b.e.text, "fwd node");
			CHECK_HAS(b.e.text, "is nan");
		}
		close_model(&b);
	}
}

static int glu_a_little_wrong(struct stream *s, const union op_arg *arg, const struct tensor *in,
                              const struct tensor *out, struct err *e)
{
	int rc = cpu_backend.kernel[OP_glu](s, arg, in, out, e);
	((float *)out[0].data)[77] *= 1.2f;
	return rc;
}

TEST(comparing_kernels_finds_the_wrong_one)
{
	kernel_fn *kernels[OP_COUNT];
	struct backend wrong = cpu_backend;
	struct exec_options options = {.reference = &cpu_reference_backend};
	struct bench b;
	memcpy(kernels, cpu_backend.kernel, sizeof kernels);
	kernels[OP_glu] = glu_a_little_wrong;
	wrong.kernel = kernels;
	if (open_model(&b, &plain, &options, &wrong)) {
		char node[60];
		size_t i = 0;
		while (b.prog.node[i].op != OP_glu)
			i++;
		snprintf(node, sizeof node, "fwd node %zu, layer 0, glu (builder.c:", i);
		CHECK_INT(run_segment(&b, SEG_BIT(FWD)), EXIT_SELF_CHECK);
		CHECK_HAS(b.e.text, node);
		CHECK_HAS(b.e.text, "element 77 ");
	}
	close_model(&b);
}

TEST(a_trace_has_a_line_a_node)
{
	struct exec_options options = {.trace = true};
	struct bench b;
	char path[200];
	double seconds[OP_COUNT];
	int64_t nodes[OP_COUNT];
	snprintf(path, sizeof path, "%s/trace", test_dir());
	if (open_model(&b, &plain, &options, &cpu_backend)) {
		fflush(stderr);
		int terminal = dup(2);
		MUST(freopen(path, "w", stderr) != NULL);
		int rc = run_segment(&b, SEG_BIT(FWD));
		fflush(stderr);
		dup2(terminal, 2);
		close(terminal);
		CHECK(!rc);
		size_t lines = 0, forward = 0;
		FILE *f = fopen(path, "r");
		for (char line[400]; fgets(line, sizeof line, f); lines++) {
			CHECK_HAS(line, op_rows[b.prog.node[lines].op].name);
			CHECK_HAS(line, ".c:");
		}
		fclose(f);
		while (b.prog.node[forward].segment == SEG_FWD)
			forward++;
		CHECK_INT(lines, forward);
		exec_take_times(b.exec, seconds, nodes);
		CHECK(seconds[OP_linear] > 0 && seconds[OP_linear_dw] == 0);
	}
	close_model(&b);
}

/* Whole training steps. */

static long allocations_of_steps(const char *extra, const struct backend *backend, int threads)
{
	struct config c;
	struct step s;
	struct step_result r;
	struct err e = {0};
	struct place_of_rank at = {.backend = backend};
	long before = 0;
	if (!open_config(&c, extra, NULL, &e) || !CHECK(!backend->open(&at.stream, THREADS(threads), &e)) ||
	    !CHECK(!step_create(&s, &c, MODEL_TRAIN, &at, NULL, &e)))
		return -1;
	pieces_init(&s.program, s.exec, 1);
	pieces_refresh_masters(&s.program, s.exec);
	for (int i = 0; i < 4; i++) {
		if (i == 1)
			before = allocations;
		CHECK(!step_gradients(&s, NULL, (uint64_t)i * 4, &r, &e));
		CHECK(!step_update(&s, i + 1, 1e-3, &e));
	}
	long during = allocations - before;
	if (e.code)
		test_failed(__FILE__, __LINE__, "%s", e.text);
	step_free(&s);
	backend->close(at.stream);
	config_free(&c);
	return during;
}

TEST(fast_kernels_agree_with_the_reference_through_whole_steps)
{
	allocations_of_steps("profiling.compare_kernels=true", &cpu_backend, 1);
}

TEST(nothing_is_allocated_after_the_first_step)
{
	static const char *const extra[] = {NULL, "mixed_precision=bf16", "model.hidden_dropout=0.1",
	                                    "recompute.granularity=full", "mixed_precision=fp16"};
	CHECK(allocations > 0);
	for (int i = 0; i < 5; i++)
		CHECK_INT(allocations_of_steps(extra[i], &cpu_backend, 1 + i % 2), 0);
}

int main(int argc, char **argv)
{
	return test_main(argc, argv);
}
