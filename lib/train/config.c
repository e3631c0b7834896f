#include "train/config.h"
#include "base/err.h"
#include "base/yaml.h"
#include "graph/prog.h"

#include <stdio.h>
#include <string.h>

OPTION_ENUM_DEFINE(optimizer_kind, OPTIMIZERS)
OPTION_ENUM_DEFINE(lr_decay_style, LR_DECAY_STYLES)
OPTION_ENUM_DEFINE(lr_wsd_decay_style, LR_WSD_DECAY_STYLES)
OPTION_ENUM_DEFINE(precision, PRECISIONS)
OPTION_ENUM_DEFINE(moment_type, MOMENT_TYPES)
OPTION_ENUM_DEFINE(recompute_granularity, RECOMPUTE_GRANULARITIES)
OPTION_ENUM_DEFINE(device_choice, DEVICES)
OPTION_ENUM_DEFINE(transport_choice, TRANSPORTS)

static const struct option rows[] = {
#define OPTION_VALUES struct config
#include "base/option_rows.h"

#define OPTION_GROUP run
#include "train/keys/run.def"
#undef OPTION_GROUP
#define OPTION_GROUP model
#include "model/config.def"
#undef OPTION_GROUP
#define OPTION_GROUP parallel
#include "parallel/config.def"
#undef OPTION_GROUP
#define OPTION_GROUP ddp
#include "train/keys/ddp.def"
#undef OPTION_GROUP
#define OPTION_GROUP optimizer
#include "train/keys/optimizer.def"
#undef OPTION_GROUP
#define OPTION_GROUP scheduler
#include "train/keys/scheduler.def"
#undef OPTION_GROUP
#define OPTION_GROUP mixed_precision
#include "train/keys/mixed_precision.def"
#undef OPTION_GROUP
#define OPTION_GROUP recompute
#include "train/keys/recompute.def"
#undef OPTION_GROUP
#define OPTION_GROUP comm_overlap
#include "train/keys/comm_overlap.def"
#undef OPTION_GROUP
#define OPTION_GROUP dataset
#include "train/keys/dataset.def"
#undef OPTION_GROUP
#define OPTION_GROUP tokenizer
#include "train/keys/tokenizer.def"
#undef OPTION_GROUP
#define OPTION_GROUP train
#include "train/keys/train.def"
#undef OPTION_GROUP
#define OPTION_GROUP validation
#include "train/keys/validation.def"
#undef OPTION_GROUP
#define OPTION_GROUP checkpoint
#include "train/keys/checkpoint.def"
#undef OPTION_GROUP
#define OPTION_GROUP logger
#include "train/keys/logger.def"
#undef OPTION_GROUP
#define OPTION_GROUP rng
#include "train/keys/rng.def"
#undef OPTION_GROUP
#define OPTION_GROUP dist
#include "train/keys/dist.def"
#undef OPTION_GROUP
#define OPTION_GROUP profiling
#include "train/keys/profiling.def"
#undef OPTION_GROUP

#include "base/option_end.h"
#undef OPTION_VALUES
};
enum { N_ROWS = sizeof rows / sizeof *rows, MAX_OPEN = 16 };

static const struct option_group groups[] = {
#define CONFIG_GROUP(name, shorthand, doc) {#name, doc, shorthand, NULL},
        TRAIN_GROUPS(CONFIG_GROUP)
#undef CONFIG_GROUP
                {"peft", "adapters", NULL, "adapters are not built yet"},
};

static const struct option_alias aliases[] = {
#define SAME(foreign, ours) {foreign, ours, NULL},
#define NOTE(foreign, ours, remark) {foreign, ours, remark},
#include "train/rosetta.def"
#undef SAME
#undef NOTE
};

static const struct option_table table = {
        rows, N_ROWS, groups, sizeof groups / sizeof *groups, aliases, sizeof aliases / sizeof *aliases};

const struct option_table *config_table(void)
{
	return &table;
}

/* Lays one file over the values; the error's own code: EXIT_CONFIG, or that of an unreadable file. */
static int load_file(struct config *c, const char *path, struct err *e)
{
	struct yaml_node *root;
	struct err cause = {0};
	int rc = yaml_parse_file(&c->arena, path, &root, &cause);
	if (rc)
		option_violation(&c->set, e, "%s", cause.text);
	if (root && option_set_tree(&c->set, root, e))
		rc = EXIT_CONFIG;
	return rc;
}

int config_load(struct config *c, const struct config_source *src, struct err *e)
{
	int code = 0;
	*c = (struct config){0};
	c->set = (struct option_set){.table = &table, .values = c, .arena = &c->arena};
	c->set.origins = arena_alloc(&c->arena, N_ROWS, sizeof *c->set.origins);
	option_set_defaults(&c->set);
	for (size_t i = 0; i < src->n_files; i++) {
		int rc = load_file(c, src->files[i], e);
		code = rc && code != EXIT_CONFIG ? rc : code;
	}
	for (size_t i = 0; i < src->n_sets; i++)
		if (option_set_text(&c->set, src->sets[i], OPTION_FROM_SET,
		                    arena_printf(&c->arena, "--set %s", src->sets[i]), e))
			code = EXIT_CONFIG;
	if (option_check_later(&c->set, e))
		code = EXIT_CONFIG;
	option_end_violations(&c->set, e);
	return e->code = code;
}

void config_free(struct config *c)
{
	arena_free(&c->arena);
	*c = (struct config){0};
}

static const struct option_origin *origin_of(const struct config *c, const char *key)
{
	const struct option *o = option_find(&table, key);
	return o ? &c->set.origins[o - rows] : NULL;
}

const char *config_get_origin(const struct config *c, const char *key)
{
	const struct option_origin *from = origin_of(c, key);
	return from ? from->text : NULL;
}

bool config_is_given(const struct config *c, const char *key)
{
	const struct option_origin *from = origin_of(c, key);
	return from && from->source != OPTION_FROM_DEFAULT && from->source != OPTION_FROM_DERIVED;
}

int config_replace(struct config *c, const char *key, const char *text, const char *origin, struct err *e)
{
	if (!option_find(&table, key))
		return err_set(e, EXIT_INTERNAL, "%s: %s: there is no such key", origin, key);
	if (option_set_text(&c->set, arena_printf(&c->arena, "%s=%s", key, text), OPTION_FROM_OTHER,
	                    arena_strdup(&c->arena, origin), e))
		return option_end_violations(&c->set, e);
	return option_check_later(&c->set, e);
}

int config_override(struct config *c, const char *key, const char *text, const char *origin, struct err *e)
{
	const struct option *o = option_find(&table, key);
	const struct option_origin *from = origin_of(c, key);
	if (!o || (from->source != OPTION_FROM_FILE && from->source != OPTION_FROM_SET))
		return config_replace(c, key, text, origin, e);
	struct option_origin user = *from;
	struct buf said = {0}, found = {0};
	option_put_value(&c->set, o, &said);
	int rc = config_replace(c, key, text, origin, e);
	if (!rc) {
		option_put_value(&c->set, o, &found);
		if (strcmp(said.data, found.data)) {
			config_replace(c, key, said.data, user.text, e);
			rc = err_set(e, EXIT_CONFIG, "%s: %s: %s differs from %s of %s", user.text, key,
			             said.data, found.data, origin);
		}
		c->set.origins[o - rows] = user;
	}
	buf_free(&said);
	buf_free(&found);
	return rc;
}

const char *const config_layout_keys[] = {"parallel.tensor_model_parallel_size",
                                          "parallel.context_parallel_size",
                                          "parallel.pipeline_model_parallel_size",
                                          "parallel.virtual_pipeline_model_parallel_size",
                                          "parallel.expert_model_parallel_size",
                                          "parallel.expert_tensor_parallel_size",
                                          NULL};

const char *const config_layout_words[] = {"parallel.sequence_parallel", "parallel.cp_comm_type",
                                           "parallel.pipeline_schedule", NULL};

bool config_layout_is_open(const struct config *c)
{
	size_t i = 0;
	while (config_layout_keys[i] && config_is_given(c, config_layout_keys[i]))
		i++;
	return c->parallel.layout == PARALLEL_AUTO && config_layout_keys[i];
}

void config_copy(struct config *to, const struct config *from)
{
	*to = *from;
	to->arena = (struct arena){0};
	to->set.values = to;
	to->set.arena = &to->arena;
	to->set.origins = arena_alloc(&to->arena, N_ROWS, sizeof *to->set.origins);
	memcpy(to->set.origins, from->set.origins, N_ROWS * sizeof *to->set.origins);
}

void config_choose(struct config *c, const char *key, int64_t value)
{
	const struct option *o = option_find(&table, key);
	ASSERT(o && o->type == OPTION_INT && !config_is_given(c, key));
	ASSERT((double)value >= o->min && (double)value <= o->max);
	*(int64_t *)option_field(&c->set, o) = value;
	c->set.origins[o - rows] = (struct option_origin){OPTION_FROM_OTHER, "parallel.layout auto"};
}

static size_t add_open(const struct config *c, const char *key, const char **open, size_t n)
{
	ASSERT(n < MAX_OPEN);
	if (!config_is_given(c, key))
		open[n++] = key;
	return n;
}

void config_write_yaml(const struct config *c, struct buf *b)
{
	const char *open[MAX_OPEN + 1] = {0};
	size_t n = 0;
	for (size_t i = 0; config_layout_is_open(c) && config_layout_keys[i]; i++)
		n = add_open(c, config_layout_keys[i], open, n);
	for (size_t i = 0; config_layout_is_open(c) && config_layout_words[i]; i++)
		n = add_open(c, config_layout_words[i], open, n);
	option_put_yaml(&c->set, open, b);
}

uint64_t config_hash(const struct config *c)
{
	return option_hash(&c->set);
}
