/* Guesses at layouts that nobody has built, to know which deserve to be: of memory and traffic they count
 * matrices and tensors as wide as these. Floor: train. */
#include "train/auto_links.h"

#include <math.h>

struct sizes { /* of the model and its batch; bytes and elements as double */
	const struct config *c;
	double layers, expert_layers;
	double tables, experts, rest; /* parameters: of one table, of all experts, of what else layers have */
	double n_tables;
	double tokens; /* of a micro-batch of a data-parallel rank */
	double hidden, queries, keys, width, expert_width, shared_width; /* columns */
	double parts;                             /* matrices side by side: gate and up, or one */
	double weight, gradient, optimizer, type; /* bytes of a parameter, of an element */
	double flop, head_flop;                   /* of a sample */
	double batch;                             /* 0: not given */
};

static double told(int64_t number)
{
	return number == OPTION_NULL_INT ? 0 : (double)number;
}

static struct sizes sizes_of(const struct config *c)
{
	const struct model_config *m = &c->model;
	bool rounded = c->mixed_precision.precision != PRECISION_FP32;
	int64_t vocabulary = c->derived.padded_vocab_size;
	double heads = (double)m->num_attention_heads, channels = (double)m->kv_channels;
	struct sizes z = {.c = c,
	                  .layers = (double)m->num_layers,
	                  .expert_layers = (double)model_count_moe_layers(m),
	                  .tokens = (double)c->train.micro_batch_size * (double)m->seq_length,
	                  .hidden = (double)m->hidden_size,
	                  .queries = heads * channels,
	                  .keys = 2 * told(m->num_query_groups) * channels,
	                  .width = told(m->ffn_hidden_size),
	                  .expert_width = told(m->moe_ffn_hidden_size),
	                  .shared_width = told(m->moe_shared_expert_intermediate_size),
	                  .parts = model_is_gated(m) ? 2 : 1,
	                  .weight = rounded ? 2 : 4,
	                  .gradient = 4,
	                  .optimizer = rounded ? 12 : 8,
	                  .type = rounded ? 2 : 4,
	                  .batch = told(c->train.global_batch_size)};
	if (m->multi_latent_attention)
		z.keys = heads * (channels + (double)m->v_head_dim);
	z.n_tables = m->untie_embeddings_and_output_weights ? 2 : 1;
	z.tables = told(vocabulary) * z.hidden;
	z.experts = z.expert_layers * told(m->num_experts) * (z.parts + 1) * z.hidden * z.expert_width;
	z.rest = (double)model_count_parameters(m, vocabulary) - z.experts - z.n_tables * z.tables;
	z.flop = model_flops(m, vocabulary, (double)m->seq_length);
	z.head_flop = 6 * z.tables * (double)m->seq_length;
	return z;
}

struct guess { /* one layout */
	const struct sizes *z;
	const struct auto_machine *m;
	const struct auto_layout *l;
	double tp, cp, pp, ep, etp, edp;
	double data, dp;   /* of the data-parallel ranks, dp share what zero_stage shares out */
	double stage_part; /* of the layers, on the fullest stage */
	double micro_batches;
};

static struct guess guess_at(const struct sizes *z, const struct auto_machine *m, const struct auto_layout *l)
{
	struct guess g = {.z = z,
	                  .m = m,
	                  .l = l,
	                  .tp = (double)l->tp,
	                  .cp = (double)l->cp,
	                  .pp = (double)l->pp,
	                  .ep = (double)l->ep,
	                  .etp = (double)l->etp};
	double n = g.pp * (double)l->chunks;
	g.data = m->world / (g.tp * g.cp * g.pp);
	g.dp = g.data / (double)z->c->ddp.num_distributed_optimizer_instances;
	g.edp = m->world / (g.etp * g.ep * g.pp);
	g.stage_part = ceil(z->layers / n) * (double)l->chunks / z->layers;
	g.micro_batches = z->batch > 0 ? z->batch / (g.data * (double)z->c->train.micro_batch_size) : 1;
	return g;
}

/* Weights, gradients and optimizer state of so many parameters, of which `ranks` hold the same. */
static double held_bytes(const struct sizes *z, double parameters, double ranks)
{
	int64_t stage = z->c->ddp.zero_stage;
	return parameters * (z->weight / (stage > 2 ? ranks : 1) + z->gradient / (stage > 1 ? ranks : 1) +
	                     z->optimizer / (stage > 0 ? ranks : 1));
}

/* `part`: of the layers; tables: how many. */
static double static_bytes(const struct guess *g, double part, double tables)
{
	const struct sizes *z = g->z;
	return held_bytes(z, (z->rest * part + z->tables * tables) / g->tp, g->cp * g->dp) +
	       held_bytes(z, z->experts * part / (g->ep * g->etp), g->edp);
}

/* Choices of experts that a rank has room for. */
static double room_for_rows(const struct guess *g)
{
	const struct model_config *m = &g->z->c->model;
	double own = g->z->tokens / (g->cp * g->tp) * g->etp, topk = (double)m->moe_router_topk;
	double capacity = m->moe_expert_rank_capacity_factor, here = told(m->num_experts) / g->ep;
	return isnan(capacity) ? own * g->ep * fmin(topk, here) : own * topk * capacity;
}

/* Elements that backward finds of one layer, without recomputation in `all`, with it in `kept`. */
static void layer_elements(const struct guess *g, bool experts, double *all, double *kept)
{
	const struct sizes *z = g->z;
	double rows = z->tokens / g->cp, stream = rows * z->hidden / (g->l->sequence_parallel ? g->tp : 1);
	double wide = (experts ? z->shared_width : z->width) * rows / g->tp, core = rows * z->queries / g->tp;
	double choices = experts ? room_for_rows(g) : 0, expert = choices * z->expert_width / g->etp;
	double block = z->parts * (wide + expert) + choices * z->hidden, activation = wide + expert;
	uint32_t again = config_recompute_modules(z->c);
	*all = *kept = 4 * stream + 2 * core + rows * z->keys / g->tp + block + activation;
	if (z->c->recompute.granularity == RECOMPUTE_FULL)
		*kept = stream;
	*kept -= again >> REPEAT_CORE & 1 ? core : 0;
	*kept -= again >> REPEAT_NORM & 1 ? 2 * stream : 0;
	*kept -= again >> REPEAT_MLP & 1          ? block + activation
	         : again >> REPEAT_ACTIVATION & 1 ? activation
	                                          : 0;
	if (g->l->schedule ==
	    PARALLEL_ZERO_BUBBLE) /* operands wait for their weight slot, computed again or not */
		*kept = *all + 2 * stream + choices * z->hidden;
}

/* Micro-batches of the whole fullest stage at once (schedule.h). */
static double in_flight(const struct guess *g)
{
	double most = g->pp;
	if (g->l->schedule == PARALLEL_INTERLEAVED)
		most += (g->pp - 1) / (double)g->l->chunks;
	return fmin(most, g->micro_batches);
}

/* Of the loss: logits or their gradient, beside the layers, waiting for their weight slot as above. */
static double head_elements(const struct guess *g)
{
	double logits = g->z->tokens / g->cp * g->z->tables / g->z->hidden / g->tp;
	return g->l->schedule == PARALLEL_ZERO_BUBBLE ? logits * in_flight(g) : g->pp > 1 ? 0 : logits;
}

static double guess_bytes(const struct guess *g)
{
	const struct sizes *z = g->z;
	double dense = z->layers - z->expert_layers, all, kept, sum = 0, once = 0;
	if (dense > 0) {
		layer_elements(g, false, &all, &kept);
		sum += dense * kept;
		once = all;
	}
	if (z->expert_layers > 0) {
		layer_elements(g, true, &all, &kept);
		sum += z->expert_layers * kept;
		once = fmax(once, all);
	}
	return static_bytes(g, g->stage_part, g->pp > 1 ? 1 : z->n_tables) +
	       z->type * (sum * g->stage_part * in_flight(g) + head_elements(g) + once);
}

static double sent(double whole, double ranks, double passes)
{
	return passes * whole * (ranks - 1) / ranks;
}

/* What the exchanges of one layer of a micro-batch take, forward and backward. */

static double again(const struct guess *g, double what)
{
	return g->z->c->recompute.granularity == RECOMPUTE_FULL ? 1.5 * what : what;
}

static double tensor_seconds(const struct guess *g, bool experts)
{
	const struct sizes *z = g->z;
	double stream = z->tokens / g->cp * z->hidden * z->type;
	double regions = experts && z->shared_width == 0 ? 1 : 2; /* attention, feed-forward block */
	bool sequence = g->l->sequence_parallel;
	if (g->l->tp == 1)
		return 0;
	return group_seconds(g->m, group_apart(g->m, 1, g->l->tp), false,
	                     again(g, regions * sent(stream, g->tp, sequence ? 5 : 4)),
	                     again(g, regions * (sequence ? 5 : 2)));
}

static double context_seconds(const struct guess *g)
{
	const struct sizes *z = g->z;
	bool heads = g->l->exchange == PARALLEL_CP_A2A;
	double columns = (heads ? 2 * z->queries + z->keys : g->cp * z->keys) / g->tp;
	double calls = g->l->exchange == PARALLEL_CP_P2P ? 3 * (g->cp - 1) : 4;
	if (g->l->cp == 1)
		return 0;
	return group_seconds(
	        g->m, group_apart(g->m, g->l->tp, g->l->cp), g->l->exchange != PARALLEL_CP_ALL_GATHER,
	        again(g, sent(z->tokens / g->cp * columns * z->type, g->cp, heads ? 2 : 3)), again(g, calls));
}

/* One of the four exchanges of tokens with other ranks may run beside the shared expert. */
static double expert_seconds(const struct guess *g)
{
	const struct sizes *z = g->z;
	double rows = z->tokens / (g->cp * g->tp), own = rows * g->etp * z->hidden * z->type, sum = 0;
	double shared = 2 * rows * z->hidden * (z->parts + 1) * z->shared_width / g->m->rate;
	if (g->l->ep > 1) {
		sum = group_seconds(g->m, group_apart(g->m, g->l->etp, g->l->ep), true,
		                    again(g, sent(own * (double)z->c->model.moe_router_topk, g->ep, 4)),
		                    again(g, 6));
		sum -= z->c->model.moe_shared_expert_overlap ? fmin(sum / 4, shared) : 0;
	}
	if (g->l->etp > 1)
		sum += group_seconds(g->m, group_apart(g->m, 1, g->l->etp), false,
		                     again(g, sent(own, g->etp, 4)), again(g, 8));
	return sum;
}

/* Gradients and weights, once a step; under zero_stage 2 and 3 with every micro-batch. */
static double data_seconds(const struct guess *g)
{
	const struct sizes *z = g->z;
	int64_t stage = z->c->ddp.zero_stage;
	double reduced = z->gradient * (stage == 0 ? 2 : stage == 1 ? 1 : g->micro_batches);
	double gathered = z->weight * (stage == 0 ? 0 : stage < 3 ? 1 : 2 * g->micro_batches);
	double dense = (z->rest * g->stage_part + z->tables) / g->tp, ranks = g->cp * g->dp;
	double expert = z->experts * g->stage_part / (g->ep * g->etp), sum = 0;
	if (ranks > 1)
		sum += group_seconds(g->m, group_apart(g->m, g->l->tp, (int64_t)ranks), false,
		                     sent(dense * (reduced + gathered), ranks, 1), 2);
	if (expert > 0 && g->edp > 1)
		sum += group_seconds(g->m, group_apart(g->m, g->l->etp * g->l->ep, (int64_t)g->edp), false,
		                     sent(expert * (reduced + gathered), g->edp, 1), 2);
	return sum;
}

/* Slots that the pipeline is idle for, of a micro-batch of a stage each: schedule.h, three passes alike. */
static double idle_slots(const struct guess *g)
{
	static const double part[] = {
	        [PARALLEL_1F1B] = 1, [PARALLEL_INTERLEAVED] = 1, [PARALLEL_ZERO_BUBBLE] = 1.0 / 3};
	return (g->pp - 1) * part[g->l->schedule] / (double)g->l->chunks;
}

/* The loss is on the last stage, which has a layer less where layers do not come out even. */
static double slot_work(const struct guess *g)
{
	const struct sizes *z = g->z;
	double passes = z->c->recompute.granularity == RECOMPUTE_FULL ? 4.0 / 3 : 1;
	double layers = z->layers * g->stage_part, layer = passes * (z->flop - z->head_flop) / z->layers;
	bool even = layers * g->pp == z->layers;
	double sample = layers * layer + (even ? z->head_flop : fmax(0, z->head_flop - layer));
	return sample * (double)z->c->train.micro_batch_size / (g->tp * g->cp);
}

static double guess_seconds(const struct guess *g)
{
	const struct sizes *z = g->z;
	double experts = z->expert_layers * g->stage_part, dense = z->layers * g->stage_part - experts;
	double slot = slot_work(g) / g->m->rate + (dense + experts) * context_seconds(g) +
	              dense * tensor_seconds(g, false) +
	              experts * (tensor_seconds(g, true) + expert_seconds(g));
	double step = slot * (g->micro_batches + idle_slots(g)) + data_seconds(g);
	return step / (g->micro_batches * g->data * (double)z->c->train.micro_batch_size);
}

void auto_guess(struct auto_candidate *list, size_t n, const struct auto_machine *m, const struct config *c)
{
	struct sizes z = sizes_of(c);
	for (size_t i = 0; i < n; i++) {
		struct guess g = guess_at(&z, m, &list[i].layout);
		list[i].guessed_s = guess_seconds(&g);
		list[i].least_bytes = static_bytes(&g, 1 / g.pp, z.n_tables / g.pp);
		list[i].guessed_bytes = guess_bytes(&g);
	}
}
