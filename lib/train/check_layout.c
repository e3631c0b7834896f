/* The rules of the layout: how world, model and batch are shared out. Floor: train. */
#include "train/check.h"
#include "base/err.h"
#include "parallel/stages.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static const char TENSOR[] = "parallel.tensor_model_parallel_size",
                  CONTEXT[] = "parallel.context_parallel_size",
                  EXPERT[] = "parallel.expert_model_parallel_size",
                  EXPERT_TENSOR[] = "parallel.expert_tensor_parallel_size",
                  PIPELINE[] = "parallel.pipeline_model_parallel_size",
                  CHUNKS[] = "parallel.virtual_pipeline_model_parallel_size",
                  SCHEDULE[] = "parallel.pipeline_schedule",
                  LAYOUT[] = "parallel.pipeline_model_parallel_layout";

static int64_t gcd(int64_t a, int64_t b)
{
	return b ? gcd(b, a % b) : a;
}

static int64_t lcm(int64_t a, int64_t b)
{
	return a / gcd(a, b) * b;
}

static int64_t or_nothing(int64_t value)
{
	return value == OPTION_NULL_INT ? 0 : value;
}

static bool has_experts(const struct config *c)
{
	return c->model.num_experts != OPTION_NULL_INT;
}

/* Whether any layer has a feed-forward block that all tokens go to; yes where moe_layer_freq cannot be read.
 */
static bool has_dense_layers(const struct config *c)
{
	const struct model_config *m = &c->model;
	return !has_experts(c) || m->num_layers == OPTION_NULL_INT ||
	       model_count_moe_layers(m) < m->num_layers;
}

/* Ranks that share the heads of attention. */
static int64_t ranks_of_heads(const struct parallel_config *p)
{
	return p->cp_comm_type == PARALLEL_CP_A2A ? p->tensor_model_parallel_size * p->context_parallel_size
	                                          : p->tensor_model_parallel_size;
}

static int64_t all_heads(const struct config *c)
{
	return gcd(or_nothing(c->model.num_attention_heads), or_nothing(c->model.num_query_groups));
}

/* world / parts; 0 where that is no whole number. */
static int64_t world_over(const struct check *k, int64_t parts)
{
	int64_t world = k->c->derived.world_size;
	return world % parts ? 0 : world / parts;
}

/* What tensor-parallel ranks share evenly: every legal number of them divides it. 0: nothing is known yet. */
static int64_t tensor_shares(const struct check *k)
{
	const struct model_config *m = &k->c->model;
	const struct parallel_config *p = &k->c->parallel;
	int64_t others = ranks_of_heads(p) / p->tensor_model_parallel_size, shares = all_heads(k->c);
	shares = shares % others ? shares : shares / others;
	shares = gcd(shares, world_over(k, p->context_parallel_size * p->pipeline_model_parallel_size));
	if (has_dense_layers(k->c))
		shares = gcd(shares, or_nothing(m->ffn_hidden_size));
	if (!has_experts(k->c))
		return shares;
	shares = gcd(shares, or_nothing(m->moe_shared_expert_intermediate_size));
	if (config_is_given(k->c, EXPERT_TENSOR))
		return shares;
	shares = gcd(shares, or_nothing(m->moe_ffn_hidden_size));
	return gcd(shares, world_over(k, p->expert_model_parallel_size * p->pipeline_model_parallel_size));
}

/* "1, 2 or 4": the legal tensor-parallel sizes. */
static const char *tensor_sizes(struct check *k)
{
	int64_t shares = tensor_shares(k), rows = k->c->derived.padded_vocab_size, last = 1;
	struct buf b = {0};
	for (int64_t t = 2; t <= shares && (rows == OPTION_NULL_INT || t <= rows); t++)
		if (shares % t == 0) {
			buf_printf(&b, "%s%" PRId64, b.length ? ", " : "", last);
			last = t;
		}
	const char *s = arena_printf(&k->c->arena, "%s%s%" PRId64, b.length ? b.data : "",
	                             b.length ? " or " : "", last);
	buf_free(&b);
	return s;
}

/* The world. */

/* What context-parallel ranks share evenly, as tensor_shares. */
static int64_t context_shares(const struct check *k)
{
	const struct parallel_config *p = &k->c->parallel;
	int64_t tensor = p->tensor_model_parallel_size, heads = all_heads(k->c);
	int64_t shares = world_over(k, tensor * p->pipeline_model_parallel_size);
	int64_t length = or_nothing(k->c->model.seq_length);
	shares = gcd(shares, length % 2 ? 1 : length / 2);
	return p->cp_comm_type == PARALLEL_CP_A2A && heads % tensor == 0 ? gcd(shares, heads / tensor)
	                                                                 : shares;
}

/* The axis that a world which does not divide is blamed on: the first that cuts it. */
static const char *first_cut(const struct parallel_config *p, int64_t *size)
{
	const struct {
		const char *key;
		int64_t size;
	} axes[] = {{TENSOR, p->tensor_model_parallel_size},
	            {CONTEXT, p->context_parallel_size},
	            {PIPELINE, p->pipeline_model_parallel_size}};
	size_t i = 0;
	while (i < 2 && axes[i].size == 1)
		i++;
	*size = axes[i].size;
	return axes[i].key;
}

static void refuse_world(struct check *k, int64_t dense)
{
	const struct parallel_config *p = &k->c->parallel;
	int64_t world = k->c->derived.world_size, size;
	const char *key = first_cut(p, &size), *other = "";
	int64_t rest = dense / size, of = world / rest;
	if (key != PIPELINE)
		of = key == TENSOR ? tensor_shares(k) : context_shares(k);
	if (world % rest == 0)
		other = arena_printf(&k->c->arena, ", or %s %s", key, check_near(k, 1, of, size));
	check_broken(k, key,
	             "world size %" PRId64 " is not a multiple of tensor %" PRId64 " · context %" PRId64
	             " · pipeline %" PRId64 " = %" PRId64 "; nearest world size: %s%s",
	             world, p->tensor_model_parallel_size, p->context_parallel_size,
	             p->pipeline_model_parallel_size, dense, check_near(k, dense, 0, world), other);
}

/* data_parallel_size stays 0 where the world does not divide. */
static void check_world(struct check *k)
{
	const struct parallel_config *p = &k->c->parallel;
	struct config_derived *d = &k->c->derived;
	int64_t dense =
	        p->tensor_model_parallel_size * p->context_parallel_size * p->pipeline_model_parallel_size;
	if (d->world_size % dense) {
		refuse_world(k, dense);
		return;
	}
	d->data_parallel_size = d->world_size / dense;
	check_equation(k,
	               "data_parallel %" PRId64 " = world %" PRId64 " / (tensor %" PRId64
	               " · context %" PRId64 " · pipeline %" PRId64 ")",
	               d->data_parallel_size, d->world_size, p->tensor_model_parallel_size,
	               p->context_parallel_size, p->pipeline_model_parallel_size);
}

/* Experts: another grid over the same ranks of a stage. */

static void check_no_experts(struct check *k)
{
	struct parallel_config *p = &k->c->parallel;
	int64_t tensor = p->tensor_model_parallel_size;
	const char *none = "there are no experts to share: give model.num_experts";
	if (p->expert_model_parallel_size > 1)
		check_broken(k, EXPERT, "%" PRId64 ", but %s; allowed: 1", p->expert_model_parallel_size,
		             none);
	if (check_derive(k, EXPERT_TENSOR, &p->expert_tensor_parallel_size, 1))
		return;
	if (p->expert_tensor_parallel_size != 1 && p->expert_tensor_parallel_size != tensor)
		check_broken(k, EXPERT_TENSOR, "%" PRId64 ", but %s; allowed: 1, or leave it out",
		             p->expert_tensor_parallel_size, none);
}

/* The value of `key` must be a multiple of the ranks of an expert. */
static void check_expert_width(struct check *k)
{
	int64_t width = k->c->model.moe_ffn_hidden_size, ranks = k->c->parallel.expert_tensor_parallel_size;
	if (width == OPTION_NULL_INT || width % ranks == 0)
		return;
	check_broken(k, "model.moe_ffn_hidden_size", "%" PRId64 " is not a multiple of %s; nearest: %s",
	             width, check_named(k, EXPERT_TENSOR), check_near(k, ranks, 0, width));
}

/* ", or KEY 2 or 4": legal numbers of ranks, which divide `of`; 0: there are none. */
static const char *other_ranks(struct check *k, const char *key, int64_t of, int64_t ranks)
{
	return of ? arena_printf(&k->c->arena, ", or %s %s", key, check_near(k, 1, of, ranks)) : "";
}

/* `one`: the ranks of one expert in all stages. */
static void refuse_expert_grid(struct check *k, int64_t one)
{
	const struct parallel_config *p = &k->c->parallel;
	int64_t world = k->c->derived.world_size, grid = one * p->expert_model_parallel_size;
	int64_t width = or_nothing(k->c->model.moe_ffn_hidden_size);
	int64_t rest = world_over(k, p->pipeline_model_parallel_size * p->expert_model_parallel_size);
	bool cuts_experts = world % one != 0;
	const char *other = cuts_experts ? other_ranks(k, EXPERT_TENSOR, rest ? gcd(rest, width) : 0,
	                                               p->expert_tensor_parallel_size)
	                                 : other_ranks(k, EXPERT, gcd(world / one, k->c->model.num_experts),
	                                               p->expert_model_parallel_size);
	check_broken(k, cuts_experts ? EXPERT_TENSOR : EXPERT,
	             "world size %" PRId64 " is not a multiple of expert tensor %" PRId64 " · expert %" PRId64
	             " · pipeline %" PRId64 " = %" PRId64 "; nearest world size: %s%s",
	             world, p->expert_tensor_parallel_size, p->expert_model_parallel_size,
	             p->pipeline_model_parallel_size, grid, check_near(k, grid, 0, world), other);
}

static void check_expert_grid(struct check *k)
{
	const struct parallel_config *p = &k->c->parallel;
	struct config_derived *d = &k->c->derived;
	int64_t one = p->expert_tensor_parallel_size * p->pipeline_model_parallel_size;
	int64_t grid = one * p->expert_model_parallel_size;
	if (!d->data_parallel_size) /* the world is blamed already */
		return;
	if (d->world_size % grid) {
		refuse_expert_grid(k, one);
		return;
	}
	d->expert_data_parallel_size = d->world_size / grid;
	if (has_experts(k->c))
		check_equation(k,
		               "expert_data_parallel %" PRId64 " = world %" PRId64
		               " / (expert_tensor %" PRId64 " · expert %" PRId64 " · pipeline %" PRId64 ")",
		               d->expert_data_parallel_size, d->world_size, p->expert_tensor_parallel_size,
		               p->expert_model_parallel_size, p->pipeline_model_parallel_size);
}

static void check_experts(struct check *k)
{
	struct parallel_config *p = &k->c->parallel;
	int64_t experts = k->c->model.num_experts, tensor = p->tensor_model_parallel_size;
	if (!has_experts(k->c)) {
		check_no_experts(k);
		check_expert_grid(k);
		return;
	}
	if (check_derive(k, EXPERT_TENSOR, &p->expert_tensor_parallel_size, tensor) && tensor > 1)
		check_equation(k, "expert_tensor_parallel_size %" PRId64 " = tensor_model_parallel_size",
		               tensor);
	if (experts % p->expert_model_parallel_size)
		check_broken(k, EXPERT, "%s is not a multiple of %" PRId64 "; nearest: %s",
		             check_named(k, "model.num_experts"), p->expert_model_parallel_size,
		             check_near(k, 1,
		                        gcd(experts, world_over(k, p->expert_tensor_parallel_size *
		                                                           p->pipeline_model_parallel_size)),
		                        p->expert_model_parallel_size));
	if (tensor > 1 && !p->sequence_parallel)
		check_broken(k, "parallel.sequence_parallel",
		             "false with %s and %s: every tensor-parallel rank sends rows of its own to the "
		             "experts; allowed: true",
		             check_named(k, TENSOR), check_named(k, "model.num_experts"));
	check_expert_width(k);
	check_expert_grid(k);
}

/* Tensor and sequence parallelism. */

/* The value of `key` must be a multiple of the tensor-parallel ranks. What else binds it: `step` divides it,
 * it divides `of`; where no value keeps to that, `otherwise` says what must give way. */
static void check_multiple(struct check *k, const char *key, int64_t value, int64_t step, int64_t of,
                           const char *otherwise)
{
	int64_t ranks = k->c->parallel.tensor_model_parallel_size;
	if (value == OPTION_NULL_INT || value % ranks == 0)
		return;
	const char *near = check_near(k, lcm(ranks, step), of, value);
	if (near)
		otherwise = "";
	else
		near = check_near(k, lcm(ranks, step), 0, value);
	check_broken(k, key,
	             "%" PRId64
	             " is not a multiple of %s; nearest: %s%s; legal tensor_model_parallel_size: %s",
	             value, check_named(k, TENSOR), near, otherwise, tensor_sizes(k));
}

static void check_tensor(struct check *k)
{
	const struct model_config *m = &k->c->model;
	int64_t ranks = k->c->parallel.tensor_model_parallel_size, heads = m->num_attention_heads;
	int64_t rows = k->c->derived.padded_vocab_size;
	bool groups_given = config_is_given(k->c, "model.num_query_groups");
	bool width_given = config_is_given(k->c, "model.kv_channels") || m->multi_latent_attention;
	check_multiple(k, "model.num_attention_heads", heads, groups_given ? m->num_query_groups : 1,
	               width_given ? 0 : or_nothing(m->hidden_size), " (give model.kv_channels)");
	if (groups_given) /* else it is the number of heads */
		check_multiple(k, "model.num_query_groups", m->num_query_groups, 1, or_nothing(heads),
		               " (with other heads)");
	if (has_dense_layers(k->c))
		check_multiple(k, "model.ffn_hidden_size", m->ffn_hidden_size, 1, 0, "");
	if (has_experts(k->c))
		check_multiple(k, "model.moe_shared_expert_intermediate_size",
		               m->moe_shared_expert_intermediate_size, 1, 0, "");
	if (rows != OPTION_NULL_INT && rows < ranks)
		check_broken(k, TENSOR,
		             "%" PRId64 " ranks are more than the padded_vocab_size %" PRId64
		             " rows of the embedding; nearest: %s",
		             ranks, rows, tensor_sizes(k));
}

/* What seq_length must be a multiple of: a context-parallel rank holds two chunks of every sample, and its
 * tensor-parallel ranks may share their rows. */
static int64_t length_step(const struct check *k)
{
	const struct parallel_config *p = &k->c->parallel;
	int64_t context = p->context_parallel_size, ranks = p->tensor_model_parallel_size * context;
	int64_t rows = p->sequence_parallel ? ranks / gcd(ranks, k->c->train.micro_batch_size) : 1;
	return lcm(context > 1 ? 2 * context : 1, rows);
}

/* All-to-all hands whole heads from one context-parallel rank to another. */
static void check_shared_heads(struct check *k)
{
	const struct model_config *m = &k->c->model;
	const struct parallel_config *p = &k->c->parallel;
	int64_t heads = all_heads(k->c), tensor = p->tensor_model_parallel_size;
	if (p->cp_comm_type != PARALLEL_CP_A2A || heads % tensor || heads % ranks_of_heads(p) == 0)
		return;
	check_broken(k, "parallel.cp_comm_type",
	             "a2a shares heads among tensor %" PRId64 " · %s = %" PRId64
	             " ranks, and num_attention_heads %" PRId64 ", num_query_groups %" PRId64
	             " are not both multiples of it; allowed: p2p|all_gather, or %s %s",
	             tensor, check_named(k, CONTEXT), ranks_of_heads(p), m->num_attention_heads,
	             m->num_query_groups, CONTEXT,
	             check_near(k, 1, context_shares(k), p->context_parallel_size));
}

static void check_context(struct check *k)
{
	int64_t ranks = k->c->parallel.context_parallel_size, length = k->c->model.seq_length;
	if (ranks == 1)
		return;
	if (length != OPTION_NULL_INT && length % (2 * ranks))
		check_broken(k, "model.seq_length",
		             "%" PRId64 " is not a multiple of 2 · %s = %" PRId64
		             ": every rank holds two chunks of a sample; nearest: %s",
		             length, check_named(k, CONTEXT), 2 * ranks,
		             check_near(k, length_step(k), 0, length));
	check_shared_heads(k);
}

static void check_sequence(struct check *k)
{
	const struct parallel_config *p = &k->c->parallel;
	int64_t ranks = p->tensor_model_parallel_size, samples = k->c->train.micro_batch_size,
	        length = k->c->model.seq_length, context = p->context_parallel_size;
	if (!p->sequence_parallel || length == OPTION_NULL_INT || (context > 1 && length % (2 * context)))
		return;
	int64_t rows = length / context;
	if (samples * rows % ranks == 0)
		return;
	const char *shared = context > 1 ? arena_printf(&k->c->arena, " / context %" PRId64, context) : "";
	check_broken(k, "model.seq_length",
	             "micro_batch_size %" PRId64 " (%s) · seq_length %" PRId64 "%s = %" PRId64
	             " tokens is not a multiple of %s, and %s cuts them; nearest: %s, or micro_batch_size %s",
	             samples, config_get_origin(k->c, "train.micro_batch_size"), length, shared,
	             samples * rows, check_named(k, TENSOR), check_named(k, "parallel.sequence_parallel"),
	             check_near(k, length_step(k), 0, length),
	             check_near(k, ranks / gcd(ranks, rows), 0, samples));
}

/* The pipeline. */

/* Chunks ask for the interleaved schedule, and it for chunks (Narayanan et al. 2021, section 2.2). */
static void check_chunks(struct check *k)
{
	struct parallel_config *p = &k->c->parallel;
	int64_t stages = p->pipeline_model_parallel_size, chunks = p->virtual_pipeline_model_parallel_size;
	bool given = config_is_given(k->c, SCHEDULE);
	if (chunks > 1 && stages < 2)
		check_broken(k, CHUNKS, "%" PRId64 " chunks need %s to be 2 or more; nearest: 1", chunks,
		             check_named(k, PIPELINE));
	if (chunks > 1 && given && p->pipeline_schedule != PARALLEL_INTERLEAVED)
		check_broken(k, SCHEDULE,
		             "%s has one chunk a rank, not %s; allowed: interleaved, or "
		             "virtual_pipeline_model_parallel_size 1",
		             parallel_schedule_choices[p->pipeline_schedule].name, check_named(k, CHUNKS));
	if (chunks > 1 && stages > 1 && !given) {
		p->pipeline_schedule = PARALLEL_INTERLEAVED;
		check_mark_derived(k, SCHEDULE);
		check_equation(k,
		               "pipeline_schedule interleaved = virtual_pipeline_model_parallel_size %" PRId64
		               " > 1",
		               chunks);
	}
}

static void check_schedule(struct check *k)
{
	const struct parallel_config *p = &k->c->parallel;
	check_chunks(k);
	if (p->pipeline_schedule == PARALLEL_INTERLEAVED && p->virtual_pipeline_model_parallel_size < 2)
		check_broken(k, SCHEDULE,
		             "interleaved needs virtual_pipeline_model_parallel_size 2 or more and "
		             "pipeline_model_parallel_size 2 or more, not %s and %s; allowed: %s",
		             check_named(k, CHUNKS), check_named(k, PIPELINE),
		             p->pipeline_model_parallel_size > 1 ? "1f1b|zero_bubble" : "1f1b");
	if (p->pipeline_schedule == PARALLEL_ZERO_BUBBLE && p->pipeline_model_parallel_size < 2)
		check_broken(
		        k, SCHEDULE,
		        "zero_bubble needs pipeline_model_parallel_size 2 or more, not %s; allowed: 1f1b",
		        check_named(k, PIPELINE));
}

/* "stage 0 chunk 1: layers 4-5, loss" */
static const char *stage_line(struct check *k, int64_t v, const struct stage *s)
{
	const struct parallel_config *p = &k->c->parallel;
	const char *separator = ": ";
	struct buf b = {0};
	buf_printf(&b, "stage %" PRId64, v % p->pipeline_model_parallel_size);
	if (p->virtual_pipeline_model_parallel_size > 1)
		buf_printf(&b, " chunk %" PRId64, v / p->pipeline_model_parallel_size);
	if (s->has_embedding) {
		buf_printf(&b, "%sembedding", separator);
		separator = ", ";
	}
	if (s->n_layers) {
		buf_printf(&b, "%slayer%s %d", separator, s->n_layers > 1 ? "s" : "", s->first_layer);
		separator = ", ";
	}
	if (s->n_layers > 1)
		buf_printf(&b, "-%d", s->first_layer + s->n_layers - 1);
	if (s->has_loss)
		buf_printf(&b, "%sloss", separator);
	const char *line = arena_strdup(&k->c->arena, b.data);
	buf_free(&b);
	return line;
}

static void keep_stages(struct check *k, const struct stage *stage, int64_t n)
{
	const char **items = arena_alloc(&k->c->arena, (size_t)n, sizeof *items);
	for (int64_t v = 0; v < n; v++)
		items[v] = stage_line(k, v, &stage[v]);
	k->c->derived.stages = (struct option_list){items, (size_t)n};
}

/* ", or parallel.pipeline_model_parallel_size 2 or 4": where nothing but the even split decides. */
static const char *other_pipelines(struct check *k)
{
	const struct parallel_config *p = &k->c->parallel;
	int64_t layers = k->c->model.num_layers + p->account_for_embedding_in_pipeline_split +
	                 p->account_for_loss_in_pipeline_split;
	int64_t rest = p->tensor_model_parallel_size * p->context_parallel_size,
	        world = k->c->derived.world_size;
	bool even = !p->pipeline_model_parallel_layout &&
	            p->num_layers_in_first_pipeline_stage == OPTION_NULL_INT &&
	            p->num_layers_in_last_pipeline_stage == OPTION_NULL_INT;
	if (!even || p->virtual_pipeline_model_parallel_size > 1 || p->pipeline_schedule != PARALLEL_1F1B ||
	    world % rest)
		return "";
	return arena_printf(&k->c->arena, ", or %s %s", PIPELINE,
	                    check_near(k, 1, gcd(layers, world / rest), p->pipeline_model_parallel_size));
}

/* What is said of a layout begins with its key, and check_broken begins with it too. */
static const char *without_key(const char *text)
{
	static const char key[] = "pipeline_model_parallel_layout: ";
	return text + (strncmp(text, key, sizeof key - 1) ? 0 : sizeof key - 1);
}

static void check_stages(struct check *k)
{
	const struct parallel_config *p = &k->c->parallel;
	int64_t n = p->pipeline_model_parallel_size * p->virtual_pipeline_model_parallel_size;
	if (p->pipeline_model_parallel_size < 2 || k->c->model.num_layers == OPTION_NULL_INT)
		return;
	struct stages_spec spec = {
	        .num_layers = k->c->model.num_layers,
	        .pipeline = (int)p->pipeline_model_parallel_size,
	        .chunks = (int)p->virtual_pipeline_model_parallel_size,
	        .account_for_embedding = p->account_for_embedding_in_pipeline_split,
	        .account_for_loss = p->account_for_loss_in_pipeline_split,
	        .first_stage_layers = or_nothing(p->num_layers_in_first_pipeline_stage),
	        .last_stage_layers = or_nothing(p->num_layers_in_last_pipeline_stage),
	        .layout = p->pipeline_model_parallel_layout,
	};
	struct stage *stage = mem_array((size_t)n, sizeof *stage);
	struct err e = {0};
	if (stages_split(&spec, stage, &e))
		check_broken(k, spec.layout ? LAYOUT : PIPELINE, "%s%s", without_key(e.text),
		             other_pipelines(k));
	else
		keep_stages(k, stage, n);
	free(stage);
}

/* The batch. */

/* What accumulation must be a multiple of. */
static int64_t accumulation_step(const struct parallel_config *p)
{
	return p->pipeline_schedule == PARALLEL_INTERLEAVED ? p->pipeline_model_parallel_size : 1;
}

static void refuse_batch(struct check *k, int64_t once)
{
	const struct train_config *t = &k->c->train;
	bool whole = t->global_batch_size % once == 0;
	const char *must = whole ? arena_printf(&k->c->arena, "a multiple of %s under %s",
	                                        check_named(k, PIPELINE), check_named(k, SCHEDULE))
	                         : "a whole number";
	check_broken(k, "train.global_batch_size",
	             "%" PRId64 " = micro_batch_size %" PRId64 " (%s) · data_parallel %" PRId64
	             " · accumulation %.6g, and accumulation must be %s; nearest: %s",
	             t->global_batch_size, t->micro_batch_size,
	             config_get_origin(k->c, "train.micro_batch_size"), k->c->derived.data_parallel_size,
	             (double)t->global_batch_size / (double)once, must,
	             check_near(k, once * accumulation_step(&k->c->parallel), 0, t->global_batch_size));
}

/* Dimensions of a rank's tensors are 32-bit. */
static void check_extent(struct check *k, const char *key, const char *what, double extent)
{
	if (extent > INT32_MAX)
		check_broken(k, key, "%s would be %.4g, at most %d are possible", what, extent, INT32_MAX);
}

/* Rows that a rank brings to its experts. */
static double expert_tokens(const struct config *c)
{
	const struct parallel_config *p = &c->parallel;
	return (double)c->train.micro_batch_size * (double)c->model.seq_length *
	       (double)p->expert_tensor_parallel_size /
	       ((double)p->tensor_model_parallel_size * (double)p->context_parallel_size);
}

/* Rows that a rank's experts get where every token of all ranks comes to them, unless they are bounded; and
 * those that it sends away, which are not. */
static double most_expert_rows(const struct config *c)
{
	double ranks = (double)c->parallel.expert_model_parallel_size, tokens = expert_tokens(c);
	double here = (double)c->model.num_experts / ranks, topk = (double)c->model.moe_router_topk;
	double worst = tokens * ranks * fmin(topk, here), factor = c->model.moe_expert_rank_capacity_factor;
	return isnan(factor) ? worst : fmax(tokens * topk, fmin(worst, factor * tokens * topk));
}

/* Rows of a rank's experts that are filled up to their capacity, of as many micro-batches as may meet. */
static double most_filled_rows(const struct config *c)
{
	const struct model_config *m = &c->model;
	double tokens = (double)c->train.micro_batch_size * (double)m->seq_length;
	double average = tokens * (double)m->moe_router_topk / (double)m->num_experts;
	double meet = ceil(expert_tokens(c) * (double)c->parallel.expert_model_parallel_size / tokens) + 1;
	double here = (double)m->num_experts / (double)c->parallel.expert_model_parallel_size;
	return here * meet * fmin(tokens, ceil(average * m->moe_expert_capacity_factor));
}

static void check_expert_extents(struct check *k)
{
	static const char capacity[] = "model.moe_expert_rank_capacity_factor";
	const struct model_config *m = &k->c->model;
	double here = (double)m->num_experts / (double)k->c->parallel.expert_model_parallel_size;
	if (!has_experts(k->c))
		return;
	check_extent(k, "model.moe_ffn_hidden_size",
	             "rows of a rank's experts = num_experts / expert_model_parallel_size · 2 · "
	             "moe_ffn_hidden_size",
	             here * 2 * (double)m->moe_ffn_hidden_size);
	const char *bound =
	        isnan(m->moe_expert_rank_capacity_factor)
	                ? "without it"
	                : arena_printf(&k->c->arena, "%g is too much", m->moe_expert_rank_capacity_factor);
	check_extent(k, capacity,
	             arena_printf(&k->c->arena, "%s: the rows that a rank's experts may get", bound),
	             most_expert_rows(k->c));
	if (m->moe_pad_expert_input_to_capacity && !isnan(m->moe_expert_capacity_factor))
		check_extent(k, "model.moe_pad_expert_input_to_capacity",
		             arena_printf(&k->c->arena,
		                          "true with %s: the rows of a rank's experts, filled up",
		                          check_named(k, "model.moe_expert_capacity_factor")),
		             most_filled_rows(k->c));
}

static void check_extents(struct check *k)
{
	const struct model_config *m = &k->c->model;
	double rows = (double)k->c->train.micro_batch_size * (double)m->seq_length;
	double packed = (double)(m->num_attention_heads + 2 * m->num_query_groups) * (double)m->kv_channels;
	if (m->multi_latent_attention)
		packed = (double)m->num_attention_heads * (double)(2 * m->kv_channels + m->v_head_dim);
	check_extent(k, "train.micro_batch_size", "rows of a micro-batch = micro_batch_size · seq_length",
	             rows);
	check_extent(k, "train.micro_batch_size",
	             "statistics = micro_batch_size · seq_length · num_attention_heads",
	             rows * (double)(2 * m->num_attention_heads));
	check_extent(k, m->multi_latent_attention ? "model.v_head_dim" : "model.kv_channels",
	             m->multi_latent_attention
	                     ? "a row of queries, keys and values = heads · (2 kv_channels + v_head_dim)"
	                     : "a row of queries, keys and values = (heads + 2 groups) · kv_channels",
	             packed);
	check_extent(k, "model.ffn_hidden_size", "a row of gate and up = 2 · ffn_hidden_size",
	             2 * (double)m->ffn_hidden_size);
	check_expert_extents(k);
}

static void check_batch(struct check *k)
{
	struct train_config *t = &k->c->train;
	struct config_derived *d = &k->c->derived;
	check_extents(k);
	int64_t once = t->micro_batch_size * d->data_parallel_size;
	if (!once)
		return;
	check_derive(k, "train.global_batch_size", &t->global_batch_size, once);
	if (t->global_batch_size % (once * accumulation_step(&k->c->parallel))) {
		refuse_batch(k, once);
		return;
	}
	d->accumulation = t->global_batch_size / once;
	check_equation(k,
	               "global_batch_size %" PRId64 " = micro_batch_size %" PRId64 " · data_parallel %" PRId64
	               " · accumulation %" PRId64,
	               t->global_batch_size, t->micro_batch_size, d->data_parallel_size, d->accumulation);
}

/* Fewer micro-batches than stages never fill the pipeline. */
static void note_bubble(struct check *k)
{
	int64_t stages = k->c->parallel.pipeline_model_parallel_size, m = k->c->derived.accumulation;
	if (!m || m >= stages)
		return;
	int64_t idle = stages - 1, all = m + stages - 1;
	check_note(k,
	           "accumulation %" PRId64 " is less than %s: 1f1b leaves a stage idle for (%" PRId64
	           " - 1) / (%" PRId64 " + %" PRId64
	           " - 1) = %.0f%% of a step; train.global_batch_size %" PRId64 " fills the pipeline",
	           m, check_named(k, PIPELINE), stages, m, stages, 100.0 * (double)idle / (double)all,
	           stages * k->c->train.micro_batch_size * k->c->derived.data_parallel_size);
}

/* Data parallelism. */

static void check_replicas(struct check *k)
{
	const struct ddp_config *p = &k->c->ddp;
	struct config_derived *d = &k->c->derived;
	int64_t replicas = p->num_distributed_optimizer_instances;
	if (d->data_parallel_size % replicas) {
		check_broken(k, "ddp.num_distributed_optimizer_instances",
		             "data_parallel %" PRId64 " / %" PRId64 " = %.6g, and the ranks that share an "
		             "optimizer must be a whole number; nearest: %s",
		             d->data_parallel_size, replicas,
		             (double)d->data_parallel_size / (double)replicas,
		             check_near(k, 1, d->data_parallel_size, replicas));
		return;
	}
	d->optimizer_shards = d->data_parallel_size / replicas;
	if (replicas > 1)
		check_equation(k,
		               "optimizer_shards %" PRId64 " = data_parallel %" PRId64
		               " / num_distributed_optimizer_instances %" PRId64,
		               d->optimizer_shards, d->data_parallel_size, replicas);
}

static void check_data(struct check *k)
{
	const int64_t least = 40000000, a_rank = 1000000, most = DDP_MAX_BUCKET_ELEMENTS;
	int64_t ranks = k->c->derived.data_parallel_size, size = ranks * a_rank;
	if (!ranks)
		return;
	check_replicas(k);
	size = size < least ? least : size > most ? most : size;
	if (check_derive(k, "ddp.bucket_size", &k->c->ddp.bucket_size, size) && ranks > 1)
		check_equation(k,
		               "bucket_size %" PRId64 " = max(%" PRId64 ", %" PRId64
		               " · data_parallel %" PRId64 ")%s",
		               size, least, a_rank, ranks, size == most ? ", at most 2^30" : "");
}

static void note_unused(struct check *k)
{
	const struct parallel_config *p = &k->c->parallel;
	const struct ddp_config *d = &k->c->ddp;
	bool tensor = p->tensor_model_parallel_size > 1, stages = p->pipeline_model_parallel_size > 1,
	     data = k->c->derived.data_parallel_size != 1;
	const char *one_rank = check_named(k, TENSOR), *one_stage = check_named(k, PIPELINE);
	check_unused(k, "parallel.sequence_parallel", tensor || !p->sequence_parallel, one_rank);
	check_unused(k, "parallel.cp_comm_type", p->context_parallel_size > 1, check_named(k, CONTEXT));
	check_unused(k, "comm_overlap.tp_comm_overlap", tensor || !k->c->comm_overlap.tp_comm_overlap,
	             one_rank);
	check_unused(k, "parallel.account_for_embedding_in_pipeline_split",
	             stages || !p->account_for_embedding_in_pipeline_split, one_stage);
	check_unused(k, "parallel.account_for_loss_in_pipeline_split",
	             stages || !p->account_for_loss_in_pipeline_split, one_stage);
	check_unused(k, "parallel.num_layers_in_first_pipeline_stage",
	             stages || p->num_layers_in_first_pipeline_stage == OPTION_NULL_INT, one_stage);
	check_unused(k, "parallel.num_layers_in_last_pipeline_stage",
	             stages || p->num_layers_in_last_pipeline_stage == OPTION_NULL_INT, one_stage);
	check_unused(k, LAYOUT, stages || !p->pipeline_model_parallel_layout, one_stage);
	check_unused(k, "ddp.overlap_grad_reduce", data || !d->overlap_grad_reduce, "data_parallel 1");
	check_unused(k, "ddp.grad_reduce_in_fp32", data || d->grad_reduce_in_fp32, "data_parallel 1");
	check_unused(k, "ddp.num_distributed_optimizer_instances",
	             d->zero_stage || d->num_distributed_optimizer_instances == 1,
	             check_named(k, "ddp.zero_stage"));
}

void check_layout(struct check *k)
{
	/* In this order: the batch needs the data-parallel size and the schedule. */
	static void (*const rules[])(struct check *) = {
	        check_world,  check_experts, check_tensor, check_context, check_sequence, check_schedule,
	        check_stages, check_batch,   note_bubble,  check_data,    note_unused};
	if (config_layout_is_open(k->c))
		return;
	for (size_t i = 0; i < sizeof rules / sizeof *rules; i++)
		rules[i](k);
}
