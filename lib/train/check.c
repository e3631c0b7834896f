/* What follows from the values, and the rules between them. Floor: train. */
#include "train/check.h"
#include "base/err.h"
#include "base/text.h"
#include "graph/prog.h"

#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void add_line(struct check *k, struct check_lines *to, const char *fmt, va_list ap)
{
	char line[600];
	vsnprintf(line, sizeof line, fmt, ap);
	ASSERT(to->n < CHECK_MAX_LINES);
	to->items[to->n++] = arena_strdup(&k->c->arena, line);
}

void check_equation(struct check *k, const char *fmt, ...)
{
	va_list ap;
	va_start(ap, fmt);
	add_line(k, &k->equations, fmt, ap);
	va_end(ap);
}

void check_note(struct check *k, const char *fmt, ...)
{
	va_list ap;
	va_start(ap, fmt);
	add_line(k, &k->notes, fmt, ap);
	va_end(ap);
}

static struct option_list keep(struct check *k, const struct check_lines *from)
{
	const char **items = arena_alloc(&k->c->arena, from->n, sizeof *items);
	memcpy(items, from->items, from->n * sizeof *items);
	return (struct option_list){items, from->n};
}

void check_broken(struct check *k, const char *key, const char *fmt, ...)
{
	char what[900];
	va_list ap;
	va_start(ap, fmt);
	vsnprintf(what, sizeof what, fmt, ap);
	va_end(ap);
	k->code = option_violation(&k->c->set, k->e, "%s: %s: %s", config_get_origin(k->c, key), key, what);
}

const char *check_named(struct check *k, const char *key)
{
	const struct option *o = option_find(config_table(), key);
	struct buf b = {0};
	option_put_value(&k->c->set, o, &b);
	const char *s = arena_printf(&k->c->arena, "%s %s (%s)", key, b.data, config_get_origin(k->c, key));
	buf_free(&b);
	return s;
}

void check_unused(struct check *k, const char *key, bool used, const char *because)
{
	enum option_source from =
	        k->c->set.origins[option_find(config_table(), key) - config_table()->rows].source;
	if (!used && (from == OPTION_FROM_FILE || from == OPTION_FROM_SET) &&
	    !option_is_default(&k->c->set, option_find(config_table(), key)))
		check_note(k, "%s has no effect with %s", check_named(k, key), because);
}

void check_mark_derived(struct check *k, const char *key)
{
	const struct option *o = option_find(config_table(), key);
	k->c->set.origins[o - config_table()->rows] = (struct option_origin){OPTION_FROM_DERIVED, "derived"};
}

bool check_derive(struct check *k, const char *key, int64_t *field, int64_t value)
{
	if (*field != OPTION_NULL_INT || value == OPTION_NULL_INT)
		return false;
	*field = value;
	check_mark_derived(k, key);
	return true;
}

static void forget_derived(struct config *c)
{
	for (size_t i = 0; i < config_table()->n; i++)
		if (c->set.origins[i].source == OPTION_FROM_DERIVED)
			option_reset(&c->set, &config_table()->rows[i]);
}

const char *check_near(struct check *k, int64_t step, int64_t of, int64_t x)
{
	const int64_t farthest = 100000; /* steps */
	int64_t low = x / step * step, high = (x / step + 1) * step, i = 0;
	while (of && low && of % low)
		low -= step;
	while (of && high <= of && of % high && i++ < farthest)
		high += step;
	bool above = !of || (high <= of && of % high == 0);
	if (low && above)
		return arena_printf(&k->c->arena, "%" PRId64 " or %" PRId64, low, high);
	return low || above ? arena_printf(&k->c->arena, "%" PRId64, low ? low : high) : NULL;
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

/* Recomputation. */

static const char *const module_words[REPEAT_COUNT] = {
#define MODULE_WORD(name, word, doc) [REPEAT_##name] = word,
        REPEATS(MODULE_WORD)
#undef MODULE_WORD
};
/* The modules that a user may name are all but the first and the last. */
enum { FIRST_MODULE = REPEAT_GATHERS + 1, N_MODULES = REPEAT_LAYERS - FIRST_MODULE };
_Static_assert(REPEAT_GATHERS == 0 && REPEAT_LAYERS == REPEAT_COUNT - 1,
               "the modules that a user may name lie side by side");

/* The repeat that a word of recompute.modules names, or REPEAT_COUNT. */
static int module_of(const char *word)
{
	for (int r = FIRST_MODULE; r < FIRST_MODULE + N_MODULES; r++)
		if (!strcmp(word, module_words[r]))
			return r;
	return REPEAT_COUNT;
}

uint32_t config_recompute_modules(const struct config *c)
{
	uint32_t set = 0;
	if (c->recompute.granularity == RECOMPUTE_SELECTIVE)
		for (size_t i = 0; i < c->recompute.modules.n; i++)
			set |= 1u << module_of(c->recompute.modules.items[i]);
	return set;
}

/* "core_attn|layernorm|…" */
static const char *all_modules(struct check *k)
{
	const char *all = module_words[FIRST_MODULE];
	for (int r = FIRST_MODULE + 1; r < FIRST_MODULE + N_MODULES; r++)
		all = arena_printf(&k->c->arena, "%s|%s", all, module_words[r]);
	return all;
}

static void check_modules(struct check *k)
{
	static const char *const usual[] = {"layernorm", "activation"};
	struct option_list *l = &k->c->recompute.modules;
	for (size_t i = 0; i < l->n; i++) {
		if (module_of(l->items[i]) != REPEAT_COUNT)
			continue;
		const char *meant = text_nearest(l->items[i], &module_words[FIRST_MODULE], N_MODULES,
		                                 sizeof *module_words);
		check_broken(k, "recompute.modules", "element %zu, unknown module '%.80s'; allowed: %s%s%s%s",
		             i + 1, l->items[i], all_modules(k), meant ? "; did you mean " : "",
		             meant ? meant : "", meant ? "?" : "");
	}
	if (k->c->recompute.granularity == RECOMPUTE_SELECTIVE && !l->n) {
		*l = (struct option_list){usual, sizeof usual / sizeof *usual};
		check_mark_derived(k, "recompute.modules");
	}
}

static void check_recompute(struct check *k)
{
	struct recompute_config *r = &k->c->recompute;
	bool full = r->granularity == RECOMPUTE_FULL;
	if (!full && r->num_layers != OPTION_NULL_INT)
		check_broken(k, "recompute.num_layers", "only recompute.granularity full reads it, not %s",
		             check_named(k, "recompute.granularity"));
	if (full && k->c->model.num_layers != OPTION_NULL_INT && r->num_layers > k->c->model.num_layers)
		check_broken(k, "recompute.num_layers", "%" PRId64 " is more than %s", r->num_layers,
		             check_named(k, "model.num_layers"));
	if (full)
		check_derive(k, "recompute.num_layers", &r->num_layers, k->c->model.num_layers);
	check_modules(k);
}

static void check_transport(struct check *k)
{
	if (k->c->dist.transport == TRANSPORT_SELF && k->c->derived.world_size > 1)
		check_broken(k, "dist.transport",
		             "self is for one rank, not for %" PRId64 "; allowed: auto|ucx",
		             k->c->derived.world_size);
}

/* The schedule. */

static void derive_warmup(struct check *k)
{
	struct scheduler_config *s = &k->c->scheduler;
	if (isnan(s->lr_warmup_fraction)) {
		check_derive(k, "scheduler.lr_warmup_iters", &s->lr_warmup_iters, 0);
		return;
	}
	int64_t iters = (int64_t)(s->lr_warmup_fraction * (double)s->lr_decay_iters);
	if (check_derive(k, "scheduler.lr_warmup_iters", &s->lr_warmup_iters, iters))
		check_equation(
		        k, "lr_warmup_iters %" PRId64 " = lr_warmup_fraction %g · lr_decay_iters %" PRId64,
		        iters, s->lr_warmup_fraction, s->lr_decay_iters);
	else if (s->lr_warmup_iters != iters) /* a resolved configuration holds both, and they agree */
		check_broken(k, "scheduler.lr_warmup_fraction",
		             "%g of lr_decay_iters %" PRId64 " is %" PRId64
		             " steps, not %s; give one of the two",
		             s->lr_warmup_fraction, s->lr_decay_iters, iters,
		             check_named(k, "scheduler.lr_warmup_iters"));
}

static void check_warmup(struct check *k)
{
	struct scheduler_config *s = &k->c->scheduler;
	if (k->c->train.train_iters == OPTION_NULL_INT && s->lr_decay_iters == OPTION_NULL_INT)
		return;
	check_derive(k, "scheduler.lr_decay_iters", &s->lr_decay_iters, k->c->train.train_iters);
	derive_warmup(k);
	if (s->lr_warmup_iters >= s->lr_decay_iters)
		check_broken(k, "scheduler.lr_warmup_iters", "%" PRId64 " must be below %s",
		             s->lr_warmup_iters, check_named(k, "scheduler.lr_decay_iters"));
	else if (k->c->train.train_iters != OPTION_NULL_INT && s->lr_warmup_iters >= k->c->train.train_iters)
		check_broken(k, "scheduler.lr_warmup_iters", "%" PRId64 " must be below %s",
		             s->lr_warmup_iters, check_named(k, "train.train_iters"));
}

static void check_rates(struct check *k)
{
	const struct optimizer_config *o = &k->c->optimizer;
	if (o->min_lr > o->lr)
		check_broken(k, "optimizer.min_lr", "%g is more than %s", o->min_lr,
		             check_named(k, "optimizer.lr"));
	if (k->c->scheduler.lr_warmup_init > o->lr)
		check_broken(k, "scheduler.lr_warmup_init", "%g is more than %s",
		             k->c->scheduler.lr_warmup_init, check_named(k, "optimizer.lr"));
}

static void check_wsd(struct check *k)
{
	const struct scheduler_config *s = &k->c->scheduler;
	if (s->lr_decay_style != LR_WSD)
		return;
	if (s->lr_wsd_decay_iters == OPTION_NULL_INT)
		check_broken(k, "scheduler.lr_wsd_decay_iters",
		             "%s needs it: the steps of the decay at the end",
		             check_named(k, "scheduler.lr_decay_style"));
	else if (s->lr_decay_iters != OPTION_NULL_INT && s->lr_wsd_decay_iters > s->lr_decay_iters)
		check_broken(k, "scheduler.lr_wsd_decay_iters", "%" PRId64 " is more than %s",
		             s->lr_wsd_decay_iters, check_named(k, "scheduler.lr_decay_iters"));
}

static void check_loss_scale(struct check *k)
{
	const struct mixed_precision_config *m = &k->c->mixed_precision;
	bool half = m->precision == PRECISION_FP16, searches = half && isnan(m->loss_scale);
	static const char *const keys[] = {"mixed_precision.initial_loss_scale",
	                                   "mixed_precision.min_loss_scale",
	                                   "mixed_precision.loss_scale_window", "mixed_precision.hysteresis"};
	const char *because = half ? "mixed_precision.loss_scale" : "mixed_precision.precision";
	check_unused(k, "mixed_precision.loss_scale", half, check_named(k, because));
	for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
		check_unused(k, keys[i], searches, check_named(k, because));
	if (searches && m->min_loss_scale > m->initial_loss_scale)
		check_broken(k, "mixed_precision.min_loss_scale", "%g is more than %s", m->min_loss_scale,
		             check_named(k, "mixed_precision.initial_loss_scale"));
	if (searches && k->c->profiling.nan_hunt)
		check_note(k,
		           "profiling.nan_hunt stops at the first overflow that the search for a loss scale "
		           "would have passed over: give mixed_precision.loss_scale, 1 for example");
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
		check_broken(
		        k, "dataset.split",
		        "'%.80s' is not three numbers for training, validation and test; example: \"98,2,0\"",
		        c->dataset.split ? c->dataset.split : "");
		return;
	}
	sum = split[0] + split[1] + split[2];
	for (int i = 0; i < 3; i++)
		c->derived.split[i] = split[i] / sum;
	if (split[0] == 0)
		check_broken(k, "dataset.split", "'%s' leaves nothing to train on", c->dataset.split);
	if (c->validation.eval_interval && split[1] == 0)
		check_broken(k, "dataset.split", "'%s' leaves nothing to validate on, but %s asks for it",
		             c->dataset.split, check_named(k, "validation.eval_interval"));
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
		check_broken(k, "dataset.data_path", "%zu elements are not pairs of weight and path", l->n);
	for (size_t i = 0; i + 1 < l->n; i += 2)
		if (!is_weight(l->items[i]) || strtod(l->items[i], NULL) <= 0)
			check_broken(k, "dataset.data_path", "element %zu, '%.80s', is not a weight above 0",
			             i + 1, l->items[i]);
}

/* A tokenizer says which token ends a document, once it is read. */
static void check_documents(struct check *k)
{
	const struct dataset_config *d = &k->c->dataset;
	int64_t eod = k->c->tokenizer.eod_id, vocabulary = k->c->model.vocab_size;
	bool known = eod != OPTION_NULL_INT || k->c->tokenizer.tokenizer_model;
	const struct {
		const char *key;
		bool set;
	} needs[] = {{"dataset.reset_position_ids", d->reset_position_ids},
	             {"dataset.reset_attention_mask", d->reset_attention_mask}};
	for (size_t i = 0; i < sizeof needs / sizeof *needs; i++)
		if (needs[i].set && !known)
			check_broken(
			        k, needs[i].key,
			        "true needs to know which token ends a document: give tokenizer.eod_id, or "
			        "tokenizer.tokenizer_model, which says it");
	if (eod != OPTION_NULL_INT && vocabulary != OPTION_NULL_INT && eod >= vocabulary)
		check_broken(k, "tokenizer.eod_id", "%" PRId64 " is not below %s", eod,
		             check_named(k, "model.vocab_size"));
}

static void check_validation(struct check *k)
{
	if (k->c->validation.eval_interval && !k->c->validation.eval_iters)
		check_broken(k, "validation.eval_iters", "0 with %s; a whole number from 1 on is needed",
		             check_named(k, "validation.eval_interval"));
}

static void check_start(struct check *k)
{
	const struct checkpoint_config *p = &k->c->checkpoint;
	if (p->finetune && !p->pretrained_checkpoint && !p->load)
		check_broken(k, "checkpoint.finetune",
		             "true needs checkpoint.pretrained_checkpoint, the weights to begin with");
	check_derive(k, "dataset.random_seed", &k->c->dataset.random_seed, k->c->rng.seed);
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
	check_mark_derived(k, "run.name");
}

static void note_unused(struct check *k)
{
	const struct config *c = k->c;
	bool wsd = c->scheduler.lr_decay_style == LR_WSD;
	bool modules = c->recompute.granularity == RECOMPUTE_SELECTIVE || !c->recompute.modules.n;
	const struct {
		const char *key;
		bool used;
		const char *because;
	} list[] = {
	        {"scheduler.lr_wsd_decay_iters", wsd, "scheduler.lr_decay_style"},
	        {"scheduler.lr_wsd_decay_style", wsd, "scheduler.lr_decay_style"},
	        {"recompute.modules", modules, "recompute.granularity"},
	        {"checkpoint.save_interval", c->checkpoint.save, "checkpoint.save"},
	        {"checkpoint.most_recent_k", c->checkpoint.save, "checkpoint.save"},
	};
	for (size_t i = 0; i < sizeof list / sizeof *list; i++)
		check_unused(k, list[i].key, list[i].used, check_named(k, list[i].because));
}

/* In this order: a rule may need what an earlier one derived. */
static void (*const rules[])(struct check *) = {
        check_required,   check_model, check_recompute,  check_layout, check_transport, check_warmup,
        check_rates,      check_wsd,   check_loss_scale, check_split,  check_blend,     check_documents,
        check_validation, check_start, derive_name,      note_unused};

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
