/* What follows from the values, and the rules between them. Floor: train. */
#include "base/err.h"
#include "train/config.h"

#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_LINES = 24 };

struct lines {
	const char *items[MAX_LINES];
	size_t n;
};

struct check {
	struct config *c;
	struct err *e;
	struct lines equations, notes;
	int code;
};

static void add_line(struct check *k, struct lines *to, const char *fmt, ...)
        __attribute__((format(printf, 3, 4)));
static void broken(struct check *k, const char *key, const char *fmt, ...)
        __attribute__((format(printf, 3, 4)));

static void add_line(struct check *k, struct lines *to, const char *fmt, ...)
{
	char line[400];
	va_list ap;
	va_start(ap, fmt);
	vsnprintf(line, sizeof line, fmt, ap);
	va_end(ap);
	ASSERT(to->n < MAX_LINES);
	to->items[to->n++] = arena_strdup(&k->c->arena, line);
}

static struct option_list keep(struct check *k, const struct lines *from)
{
	const char **items = arena_alloc(&k->c->arena, from->n, sizeof *items);
	memcpy(items, from->items, from->n * sizeof *items);
	return (struct option_list){items, from->n};
}

/* One violation, blamed on the place where `key` was set. */
static void broken(struct check *k, const char *key, const char *fmt, ...)
{
	char what[700];
	va_list ap;
	va_start(ap, fmt);
	vsnprintf(what, sizeof what, fmt, ap);
	va_end(ap);
	k->code = option_violation(&k->c->set, k->e, "%s: %s: %s", config_get_origin(k->c, key), key, what);
}

/* "model.num_layers 4 (a.yaml:3:5)" */
static const char *named(struct check *k, const char *key)
{
	const struct option *o = option_find(config_table(), key);
	struct buf b = {0};
	option_put_value(&k->c->set, o, &b);
	const char *s = arena_printf(&k->c->arena, "%s %s (%s)", key, b.data, config_get_origin(k->c, key));
	buf_free(&b);
	return s;
}

static void mark_derived(struct check *k, const char *key)
{
	const struct option *o = option_find(config_table(), key);
	k->c->set.origins[o - config_table()->rows] = (struct option_origin){OPTION_FROM_DERIVED, "derived"};
}

/* Fills *field, the value of `key`, where it is null. true where it did. */
static bool derive(struct check *k, const char *key, int64_t *field, int64_t value)
{
	if (*field != OPTION_NULL_INT || value == OPTION_NULL_INT)
		return false;
	*field = value;
	mark_derived(k, key);
	return true;
}

static void forget_derived(struct config *c)
{
	for (size_t i = 0; i < config_table()->n; i++)
		if (c->set.origins[i].source == OPTION_FROM_DERIVED)
			option_reset(&c->set, &config_table()->rows[i]);
}

/* "2 or 4": the divisors of n next to x. */
static const char *near_divisors(struct check *k, int64_t n, int64_t x)
{
	const int64_t farthest = 100000;
	int64_t low = x < n ? x : n, high = x;
	while (low > 1 && n % low && x - low < farthest)
		low--;
	while (high < n && n % high && high - x < farthest)
		high++;
	bool above = high <= n && n % high == 0 && high != low;
	const char *first = arena_printf(&k->c->arena, "%" PRId64, n % low ? 1 : low);
	return above ? arena_printf(&k->c->arena, "%s or %" PRId64, first, high) : first;
}

/* "24 or 32": the multiples of step next to x. */
static const char *near_multiples(struct check *k, int64_t step, int64_t x)
{
	int64_t low = x / step * step;
	return low ? arena_printf(&k->c->arena, "%" PRId64 " or %" PRId64, low, low + step)
	           : arena_printf(&k->c->arena, "%" PRId64, step);
}

/* Values that must be given. */

static void check_required(struct check *k)
{
	const struct option_table *t = config_table();
	for (size_t i = 0; i < t->n; i++) {
		const struct option *o = &t->rows[i];
		struct buf allowed = {0};
		option_put_allowed(o, &allowed);
		if (o->required && option_is_null(&k->c->set, o))
			k->code = option_violation(&k->c->set, k->e,
			                           "%s: required, and no file or --set gives it; allowed: %s",
			                           o->key, allowed.data);
		buf_free(&allowed);
	}
}

/* The model. */

static void check_heads(struct check *k)
{
	struct model_config *m = &k->c->model;
	int64_t heads = m->num_attention_heads;
	if (heads == OPTION_NULL_INT)
		return;
	if (derive(k, "model.num_query_groups", &m->num_query_groups, heads))
		add_line(k, &k->equations, "num_query_groups %" PRId64 " = num_attention_heads", heads);
	if (heads % m->num_query_groups)
		broken(k, "model.num_query_groups", "%s is not a multiple of %" PRId64 "; nearest: %s",
		       named(k, "model.num_attention_heads"), m->num_query_groups,
		       near_divisors(k, heads, m->num_query_groups));
	if (m->kv_channels != OPTION_NULL_INT || m->hidden_size == OPTION_NULL_INT)
		return;
	if (m->hidden_size % heads) {
		broken(k, "model.num_attention_heads",
		       "%s is not a multiple of %" PRId64 "; nearest: %s, or give model.kv_channels",
		       named(k, "model.hidden_size"), heads, near_divisors(k, m->hidden_size, heads));
		return;
	}
	derive(k, "model.kv_channels", &m->kv_channels, m->hidden_size / heads);
	add_line(k, &k->equations,
	         "kv_channels %" PRId64 " = hidden_size %" PRId64 " / num_attention_heads %" PRId64,
	         m->kv_channels, m->hidden_size, heads);
}

static void check_sizes(struct check *k)
{
	struct model_config *m = &k->c->model;
	if (m->hidden_size != OPTION_NULL_INT &&
	    derive(k, "model.ffn_hidden_size", &m->ffn_hidden_size, 4 * m->hidden_size))
		add_line(k, &k->equations, "ffn_hidden_size %" PRId64 " = 4 · hidden_size %" PRId64,
		         m->ffn_hidden_size, m->hidden_size);
	if (derive(k, "model.max_position_embeddings", &m->max_position_embeddings, m->seq_length))
		add_line(k, &k->equations, "max_position_embeddings %" PRId64 " = seq_length", m->seq_length);
	if (m->position_embedding_type == MODEL_POSITION_LEARNED_ABSOLUTE &&
	    m->seq_length > m->max_position_embeddings)
		broken(k, "model.seq_length",
		       "%" PRId64 " is more than %s, the rows of the learned position table", m->seq_length,
		       named(k, "model.max_position_embeddings"));
}

static void check_rope(struct check *k)
{
	const struct model_config *m = &k->c->model;
	if (m->position_embedding_type != MODEL_POSITION_ROPE) {
		if (m->use_rope_scaling)
			broken(k, "model.use_rope_scaling",
			       "true needs model.position_embedding_type rope, not %s",
			       named(k, "model.position_embedding_type"));
		return;
	}
	int64_t width = m->kv_channels == OPTION_NULL_INT ? 2 : m->kv_channels;
	int64_t rotated = (int64_t)((double)width * m->rotary_percent + 1e-9);
	if (width % 2)
		broken(k, "model.kv_channels",
		       "%" PRId64 " is odd, but rope rotates channels in pairs; nearest: %" PRId64
		       " or %" PRId64,
		       width, width > 1 ? width - 1 : 2, width + 1);
	else if (rotated < 2 || rotated % 2)
		broken(k, "model.rotary_percent",
		       "%g of kv_channels %" PRId64 " is %" PRId64
		       " rotated channels; an even number from 2 on is needed",
		       m->rotary_percent, width, rotated);
	if (m->use_rope_scaling && m->rope_scaling_low_freq_factor >= m->rope_scaling_high_freq_factor)
		broken(k, "model.rope_scaling_low_freq_factor", "%g must be below %s",
		       m->rope_scaling_low_freq_factor, named(k, "model.rope_scaling_high_freq_factor"));
}

static void check_vocabulary(struct check *k)
{
	const struct model_config *m = &k->c->model;
	int64_t *padded = &k->c->derived.padded_vocab_size, step = m->make_vocab_size_divisible_by;
	*padded = OPTION_NULL_INT;
	if (m->vocab_size == OPTION_NULL_INT)
		return;
	*padded = (m->vocab_size + step - 1) / step * step;
	add_line(k, &k->equations,
	         "padded_vocab_size %" PRId64 " = ⌈vocab_size %" PRId64 " / %" PRId64 "⌉ · %" PRId64, *padded,
	         m->vocab_size, step, step);
}

static void check_recompute(struct check *k)
{
	struct recompute_config *r = &k->c->recompute;
	bool full = r->granularity == RECOMPUTE_FULL;
	if (!full && r->num_layers != OPTION_NULL_INT)
		broken(k, "recompute.num_layers", "only recompute.granularity full reads it, not %s",
		       named(k, "recompute.granularity"));
	if (full && k->c->model.num_layers != OPTION_NULL_INT && r->num_layers > k->c->model.num_layers)
		broken(k, "recompute.num_layers", "%" PRId64 " is more than %s", r->num_layers,
		       named(k, "model.num_layers"));
	if (full)
		derive(k, "recompute.num_layers", &r->num_layers, k->c->model.num_layers);
}

/* The layout and the batch. */

static void check_layout(struct check *k)
{
	const struct parallel_config *p = &k->c->parallel;
	struct config_derived *d = &k->c->derived;
	int64_t dense =
	        p->tensor_model_parallel_size * p->context_parallel_size * p->pipeline_model_parallel_size;
	int64_t experts = p->expert_tensor_parallel_size * p->expert_model_parallel_size *
	                  p->pipeline_model_parallel_size;
	d->data_parallel_size = 0;
	if (d->world_size % dense) {
		broken(k, "parallel.tensor_model_parallel_size",
		       "world size %" PRId64 " is not a multiple of tensor %" PRId64 " · context %" PRId64
		       " · pipeline %" PRId64 " = %" PRId64 "; nearest world size: %s",
		       d->world_size, p->tensor_model_parallel_size, p->context_parallel_size,
		       p->pipeline_model_parallel_size, dense, near_multiples(k, dense, d->world_size));
		return;
	}
	if (d->world_size % experts)
		broken(k, "parallel.expert_model_parallel_size",
		       "world size %" PRId64 " is not a multiple of expert tensor %" PRId64
		       " · expert %" PRId64 " · pipeline %" PRId64 " = %" PRId64 "; nearest world size: %s",
		       d->world_size, p->expert_tensor_parallel_size, p->expert_model_parallel_size,
		       p->pipeline_model_parallel_size, experts, near_multiples(k, experts, d->world_size));
	d->data_parallel_size = d->world_size / dense;
	add_line(k, &k->equations,
	         "data_parallel %" PRId64 " = world %" PRId64 " / (tensor %" PRId64 " · context %" PRId64
	         " · pipeline %" PRId64 ")",
	         d->data_parallel_size, d->world_size, p->tensor_model_parallel_size,
	         p->context_parallel_size, p->pipeline_model_parallel_size);
}

static void check_batch(struct check *k)
{
	struct train_config *t = &k->c->train;
	struct config_derived *d = &k->c->derived;
	int64_t once = t->micro_batch_size * d->data_parallel_size;
	d->accumulation = 0;
	if (!once)
		return;
	derive(k, "train.global_batch_size", &t->global_batch_size, once);
	if (t->global_batch_size % once) {
		broken(k, "train.global_batch_size",
		       "%" PRId64 " = micro_batch_size %" PRId64 " (%s) · data_parallel %" PRId64
		       " · accumulation %.6g, and accumulation must be a whole number; nearest: %s",
		       t->global_batch_size, t->micro_batch_size,
		       config_get_origin(k->c, "train.micro_batch_size"), d->data_parallel_size,
		       (double)t->global_batch_size / (double)once,
		       near_multiples(k, once, t->global_batch_size));
		return;
	}
	d->accumulation = t->global_batch_size / once;
	add_line(k, &k->equations,
	         "global_batch_size %" PRId64 " = micro_batch_size %" PRId64 " · data_parallel %" PRId64
	         " · accumulation %" PRId64,
	         t->global_batch_size, t->micro_batch_size, d->data_parallel_size, d->accumulation);
}

static void check_transport(struct check *k)
{
	if (k->c->dist.transport == TRANSPORT_SELF && k->c->derived.world_size > 1)
		broken(k, "dist.transport", "self is for one rank, not for %" PRId64 "; allowed: auto|ucx",
		       k->c->derived.world_size);
}

/* The schedule. */

static void derive_warmup(struct check *k)
{
	struct scheduler_config *s = &k->c->scheduler;
	if (isnan(s->lr_warmup_fraction)) {
		derive(k, "scheduler.lr_warmup_iters", &s->lr_warmup_iters, 0);
		return;
	}
	int64_t iters = (int64_t)(s->lr_warmup_fraction * (double)s->lr_decay_iters);
	if (derive(k, "scheduler.lr_warmup_iters", &s->lr_warmup_iters, iters))
		add_line(k, &k->equations,
		         "lr_warmup_iters %" PRId64 " = lr_warmup_fraction %g · lr_decay_iters %" PRId64,
		         iters, s->lr_warmup_fraction, s->lr_decay_iters);
	else if (s->lr_warmup_iters != iters) /* a resolved configuration holds both, and they agree */
		broken(k, "scheduler.lr_warmup_fraction",
		       "%g of lr_decay_iters %" PRId64 " is %" PRId64 " steps, not %s; give one of the two",
		       s->lr_warmup_fraction, s->lr_decay_iters, iters,
		       named(k, "scheduler.lr_warmup_iters"));
}

static void check_warmup(struct check *k)
{
	struct scheduler_config *s = &k->c->scheduler;
	if (k->c->train.train_iters == OPTION_NULL_INT && s->lr_decay_iters == OPTION_NULL_INT)
		return;
	derive(k, "scheduler.lr_decay_iters", &s->lr_decay_iters, k->c->train.train_iters);
	derive_warmup(k);
	if (s->lr_warmup_iters >= s->lr_decay_iters)
		broken(k, "scheduler.lr_warmup_iters", "%" PRId64 " must be below %s", s->lr_warmup_iters,
		       named(k, "scheduler.lr_decay_iters"));
	else if (k->c->train.train_iters != OPTION_NULL_INT && s->lr_warmup_iters >= k->c->train.train_iters)
		broken(k, "scheduler.lr_warmup_iters", "%" PRId64 " must be below %s", s->lr_warmup_iters,
		       named(k, "train.train_iters"));
}

static void check_rates(struct check *k)
{
	const struct optimizer_config *o = &k->c->optimizer;
	if (o->min_lr > o->lr)
		broken(k, "optimizer.min_lr", "%g is more than %s", o->min_lr, named(k, "optimizer.lr"));
	if (k->c->scheduler.lr_warmup_init > o->lr)
		broken(k, "scheduler.lr_warmup_init", "%g is more than %s", k->c->scheduler.lr_warmup_init,
		       named(k, "optimizer.lr"));
}

static void check_wsd(struct check *k)
{
	const struct scheduler_config *s = &k->c->scheduler;
	if (s->lr_decay_style != LR_WSD)
		return;
	if (s->lr_wsd_decay_iters == OPTION_NULL_INT)
		broken(k, "scheduler.lr_wsd_decay_iters", "%s needs it: the steps of the decay at the end",
		       named(k, "scheduler.lr_decay_style"));
	else if (s->lr_decay_iters != OPTION_NULL_INT && s->lr_wsd_decay_iters > s->lr_decay_iters)
		broken(k, "scheduler.lr_wsd_decay_iters", "%" PRId64 " is more than %s",
		       s->lr_wsd_decay_iters, named(k, "scheduler.lr_decay_iters"));
}

/* The data. */

/* Three numbers from 0 on, one comma between them, blanks allowed. */
static bool read_split(const char *text, double split[3])
{
	for (int i = 0; i < 3; i++) {
		char *end;
		text += strspn(text, " ");
		if (!strchr("0123456789.", *text) || !*text)
			return false;
		split[i] = strtod(text, &end);
		end += strspn(end, " ");
		if (end == text || !isfinite(split[i]) || *end != (i < 2 ? ',' : 0))
			return false;
		text = end + 1;
	}
	return split[0] + split[1] + split[2] > 0;
}

static void check_split(struct check *k)
{
	double split[3], sum;
	struct config *c = k->c;
	memset(c->derived.split, 0, sizeof c->derived.split);
	if (!c->dataset.split || !read_split(c->dataset.split, split)) {
		broken(k, "dataset.split",
		       "'%.80s' is not three numbers for training, validation and test; example: \"98,2,0\"",
		       c->dataset.split ? c->dataset.split : "");
		return;
	}
	sum = split[0] + split[1] + split[2];
	for (int i = 0; i < 3; i++)
		c->derived.split[i] = split[i] / sum;
	if (split[0] == 0)
		broken(k, "dataset.split", "'%s' leaves nothing to train on", c->dataset.split);
	if (c->validation.eval_interval && split[1] == 0)
		broken(k, "dataset.split", "'%s' leaves nothing to validate on, but %s asks for it",
		       c->dataset.split, named(k, "validation.eval_interval"));
}

static bool is_weight(const char *s)
{
	char *end;
	double x = strtod(s, &end);
	return end != s && !*end && isfinite(x);
}

/* A list whose first element is a number is weight, path, weight, path … */
static void check_blend(struct check *k)
{
	const struct option_list *l = &k->c->dataset.data_path;
	if (!l->n || !is_weight(l->items[0]))
		return;
	if (l->n % 2)
		broken(k, "dataset.data_path", "%zu elements are not pairs of weight and path", l->n);
	for (size_t i = 0; i + 1 < l->n; i += 2)
		if (!is_weight(l->items[i]) || strtod(l->items[i], NULL) <= 0)
			broken(k, "dataset.data_path", "element %zu, '%.80s', is not a weight above 0", i + 1,
			       l->items[i]);
}

static void check_validation(struct check *k)
{
	if (k->c->validation.eval_interval && !k->c->validation.eval_iters)
		broken(k, "validation.eval_iters", "0 with %s; a whole number from 1 on is needed",
		       named(k, "validation.eval_interval"));
}

static void check_start(struct check *k)
{
	const struct checkpoint_config *p = &k->c->checkpoint;
	if (p->finetune && !p->pretrained_checkpoint && !p->load)
		broken(k, "checkpoint.finetune",
		       "true needs checkpoint.pretrained_checkpoint, the weights to begin with");
	derive(k, "dataset.random_seed", &k->c->dataset.random_seed, k->c->rng.seed);
}

static void derive_name(struct check *k)
{
	struct run_config *r = &k->c->run;
	if (r->name || !r->dir)
		return;
	size_t end = strlen(r->dir);
	while (end && r->dir[end - 1] == '/')
		end--;
	size_t begin = end;
	while (begin && r->dir[begin - 1] != '/')
		begin--;
	r->name = arena_strndup(&k->c->arena, r->dir + begin, end - begin);
	mark_derived(k, "run.name");
}

/* Values that were written down and that nothing reads under the others: no error, a base file may hold them.
 */
static void note_unused(struct check *k)
{
	const struct config *c = k->c;
	bool rope = c->model.position_embedding_type == MODEL_POSITION_ROPE;
	bool wsd = c->scheduler.lr_decay_style == LR_WSD;
	const struct {
		const char *key;
		bool used;
		const char *because;
	} list[] = {
	        {"model.rotary_base", rope, "model.position_embedding_type"},
	        {"model.rotary_percent", rope, "model.position_embedding_type"},
	        {"model.rope_scaling_factor", c->model.use_rope_scaling, "model.use_rope_scaling"},
	        {"model.rope_scaling_low_freq_factor", c->model.use_rope_scaling, "model.use_rope_scaling"},
	        {"model.rope_scaling_high_freq_factor", c->model.use_rope_scaling, "model.use_rope_scaling"},
	        {"model.rope_scaling_original_max_position_embeddings", c->model.use_rope_scaling,
	         "model.use_rope_scaling"},
	        {"scheduler.lr_wsd_decay_iters", wsd, "scheduler.lr_decay_style"},
	        {"scheduler.lr_wsd_decay_style", wsd, "scheduler.lr_decay_style"},
	        {"checkpoint.save_interval", c->checkpoint.save, "checkpoint.save"},
	        {"checkpoint.most_recent_k", c->checkpoint.save, "checkpoint.save"},
	};
	for (size_t i = 0; i < sizeof list / sizeof *list; i++) {
		const struct option_origin *from =
		        &c->set.origins[option_find(config_table(), list[i].key) - config_table()->rows];
		bool written = from->source == OPTION_FROM_FILE || from->source == OPTION_FROM_SET;
		if (written && !list[i].used)
			add_line(k, &k->notes, "%s has no effect with %s", named(k, list[i].key),
			         named(k, list[i].because));
	}
}

/* In this order: a rule may need what an earlier one derived. */
static void (*const rules[])(struct check *) = {
        check_required, check_heads, check_sizes,      check_rope,   check_vocabulary, check_recompute,
        check_layout,   check_batch, check_transport,  check_warmup, check_rates,      check_wsd,
        check_split,    check_blend, check_validation, check_start,  derive_name,      note_unused};

int config_check(struct config *c, int world_size, struct err *e)
{
	struct check k = {.c = c, .e = e};
	ASSERT(world_size > 0);
	forget_derived(c);
	c->derived = (struct config_derived){.world_size = world_size};
	for (size_t i = 0; i < sizeof rules / sizeof *rules; i++)
		rules[i](&k);
	c->derived.equations = keep(&k, &k.equations);
	c->derived.notes = keep(&k, &k.notes);
	option_end_violations(&c->set, e);
	return k.code;
}
