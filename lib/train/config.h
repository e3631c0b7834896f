/* The configuration: every group of keys as a plain struct, where each value came from, and the numbers that
 * follow from them. Floor: train.
 *
 * Fields are the rows of model/config.def, parallel/config.def and train/keys/GROUP.def (grep there for
 * defaults and docs). Ints that may be null hold OPTION_NULL_INT, doubles NaN, strings NULL, lists n = 0.
 *
 *	struct config c;
 *	config_load(&c, &source, e) → config_override(&c, "model.vocab_size", …) → config_check(&c, world, e)
 */
#ifndef PENTAD_TRAIN_CONFIG_H
#define PENTAD_TRAIN_CONFIG_H

#include "base/mem.h"
#include "base/option.h"
#include "model/config.h"
#include "parallel/config.h"

#define OPTIMIZERS(X) X(OPTIMIZER_ADAM, "adam", NULL)
OPTION_ENUM_DECLARE(optimizer_kind, OPTIMIZERS)

#define LR_DECAY_STYLES(X)                                     \
	X(LR_CONSTANT, "constant", NULL)                       \
	X(LR_LINEAR, "linear", NULL)                           \
	X(LR_COSINE, "cosine", NULL)                           \
	X(LR_INVERSE_SQUARE_ROOT, "inverse-square-root", NULL) \
	X(LR_WSD, "WSD", NULL)
OPTION_ENUM_DECLARE(lr_decay_style, LR_DECAY_STYLES)

#define LR_WSD_DECAY_STYLES(X)                  \
	X(WSD_EXPONENTIAL, "exponential", NULL) \
	X(WSD_LINEAR, "linear", NULL)           \
	X(WSD_COSINE, "cosine", NULL)           \
	X(WSD_MINUS_SQRT, "minus_sqrt", NULL)
OPTION_ENUM_DECLARE(lr_wsd_decay_style, LR_WSD_DECAY_STYLES)

#define PRECISIONS(X)                   \
	X(PRECISION_FP32, "fp32", NULL) \
	X(PRECISION_BF16, "bf16", NULL) \
	X(PRECISION_FP16, "fp16", NULL) \
	X(PRECISION_FP8, "fp8", NULL)
OPTION_ENUM_DECLARE(precision, PRECISIONS)

#define MOMENT_TYPES(X)              \
	X(MOMENT_FP32, "fp32", NULL) \
	X(MOMENT_BF16, "bf16", NULL)
OPTION_ENUM_DECLARE(moment_type, MOMENT_TYPES)

#define RECOMPUTE_GRANULARITIES(X)                \
	X(RECOMPUTE_NONE, "none", NULL)           \
	X(RECOMPUTE_SELECTIVE, "selective", NULL) \
	X(RECOMPUTE_FULL, "full", NULL)
OPTION_ENUM_DECLARE(recompute_granularity, RECOMPUTE_GRANULARITIES)

#define DEVICES(X)                   \
	X(DEVICE_AUTO, "auto", NULL) \
	X(DEVICE_CPU, "cpu", NULL)   \
	X(DEVICE_CUDA, "cuda", NULL)
OPTION_ENUM_DECLARE(device_choice, DEVICES)

#define TRANSPORTS(X)                   \
	X(TRANSPORT_AUTO, "auto", NULL) \
	X(TRANSPORT_SELF, "self", NULL) \
	X(TRANSPORT_UCX, "ucx", NULL)
OPTION_ENUM_DECLARE(transport_choice, TRANSPORTS)

enum { DDP_MAX_BUCKET_ELEMENTS = 1 << 30 };

/* Group, the key that a scalar in place of the mapping sets ("mixed_precision: bf16"), doc. The structs, the
 * table and the YAML that is written follow this order. */
#define TRAIN_GROUPS(X)                                                              \
	X(run, NULL, "where the run's files go")                                     \
	X(model, NULL, "the model")                                                  \
	X(parallel, "parallel.layout", "how ranks share the model and the data")     \
	X(ddp, NULL, "data parallelism")                                             \
	X(optimizer, NULL, "the update of the weights")                              \
	X(scheduler, NULL, "the learning rate over time")                            \
	X(mixed_precision, "mixed_precision.precision", "number formats")            \
	X(recompute, NULL, "activations computed again in backward instead of kept") \
	X(comm_overlap, NULL, "communication beside computation")                    \
	X(dataset, NULL, "tokens to train on")                                       \
	X(tokenizer, NULL, "text to tokens")                                         \
	X(train, NULL, "batches and steps")                                          \
	X(validation, NULL, "evaluation while training")                             \
	X(checkpoint, NULL, "saving and loading")                                    \
	X(logger, NULL, "progress lines and metrics")                                \
	X(rng, NULL, "random numbers")                                               \
	X(dist, NULL, "device, transport, time limits")                              \
	X(profiling, NULL, "debugging aids")

#include "base/option_fields.h"
struct run_config {
#include "train/keys/run.def"
};
struct ddp_config {
#include "train/keys/ddp.def"
};
struct optimizer_config {
#include "train/keys/optimizer.def"
};
struct scheduler_config {
#include "train/keys/scheduler.def"
};
struct mixed_precision_config {
#include "train/keys/mixed_precision.def"
};
struct recompute_config {
#include "train/keys/recompute.def"
};
struct comm_overlap_config {
#include "train/keys/comm_overlap.def"
};
struct dataset_config {
#include "train/keys/dataset.def"
};
struct tokenizer_config {
#include "train/keys/tokenizer.def"
};
struct train_config {
#include "train/keys/train.def"
};
struct validation_config {
#include "train/keys/validation.def"
};
struct checkpoint_config {
#include "train/keys/checkpoint.def"
};
struct logger_config {
#include "train/keys/logger.def"
};
struct rng_config {
#include "train/keys/rng.def"
};
struct dist_config {
#include "train/keys/dist.def"
};
struct profiling_config {
#include "train/keys/profiling.def"
};
#include "base/option_end.h"

/* What follows from the values; config_check fills it. */
struct config_derived {
	int64_t world_size;
	int64_t data_parallel_size;        /* world / (tensor · context · pipeline) */
	int64_t expert_data_parallel_size; /* world / (expert tensor · expert · pipeline) */
	int64_t optimizer_shards;          /* data_parallel_size / ddp.num_distributed_optimizer_instances */
	int64_t accumulation;              /* micro-batches of one rank in a step */
	int64_t padded_vocab_size;         /* OPTION_NULL_INT while vocab_size is null */
	double split[3];                   /* training, validation, test; sums to 1 */
	struct option_list stages; /* of a pipeline, a line each: "stage 0 chunk 1: layers 4-5"; else none */
	struct option_list notes;  /* given values that have no effect, a sentence each; for a warning */
	struct option_list equations; /* "global_batch_size 32 = micro_batch_size 4 · data_parallel 2 · …" */
};

struct config {
#define CONFIG_GROUP(name, shorthand, doc) struct name##_config name;
	TRAIN_GROUPS(CONFIG_GROUP)
#undef CONFIG_GROUP
	struct config_derived derived;
	struct option_set
	        set;        /* rows and origins; `values` is this struct, which therefore must not be moved */
	struct arena arena; /* every string above */
};

struct config_source {
	const char *const *files; /* laid over the defaults in this order … */
	size_t n_files;
	const char *const *sets; /* … then these, "a.b=c" */
	size_t n_sets;
};

/* The rows, groups and foreign spellings; constant. */
const struct option_table *config_table(void);

/* Fills *c with defaults and the layers of *src. All violations of all layers are reported at once, a line
 * each: EXIT_CONFIG; a missing file: EXIT_NO_INPUT. config_free is due whatever it returns. Local. */
int config_load(struct config *c, const struct config_source *src, struct err *e);
void config_free(struct config *c);

/* Sets one value from elsewhere; `text` as in YAML, `origin` for people: "tokenizer data/t.json". A value
 * that the user wrote down (file or --set) and that differs is EXIT_CONFIG naming both; use config_replace
 * where the other source wins whatever the user wrote. Local. */
int config_override(struct config *c, const char *key, const char *text, const char *origin, struct err *e);
int config_replace(struct config *c, const char *key, const char *text, const char *origin, struct err *e);

/* Derives what was left null, fills c->derived, and reports every rule that the values break together, a
 * line each with the equation filled in and the nearest legal values: EXIT_CONFIG. May be called again, with
 * another world size or after an override: derived values are derived anew. Prints nothing. Local. */
int config_check(struct config *c, int world_size, struct err *e);

/* parallel.layout auto. The sizes that a search may choose, ended by NULL. While one of them is not given the
 * layout is open: config_check derives and checks all but the layout (of config_derived, data_parallel_size,
 * expert_data_parallel_size, optimizer_shards and accumulation stay 0), and nothing can be built from it. A
 * search copies the configuration, chooses all open sizes in the copy, and checks it: EXIT_CONFIG and the
 * rules that they break, which nobody prints, or a configuration like any other. */
extern const char *const config_layout_keys[];
/* Words that it may choose besides, ended by NULL. They open nothing. */
extern const char *const config_layout_words[];
bool config_layout_is_open(const struct config *c);
/* A copy to change and check; strings are those of *from, which outlives it. config_free is due. Local. */
void config_copy(struct config *to, const struct config *from);
/* Gives `key`, a whole number that is not given, a value within its range. Local. */
void config_choose(struct config *c, const char *key, int64_t value);

/* "default", "a.yaml:12:3", "--set a.b=c", "derived", or what an override said. NULL for an unknown key. */
const char *config_get_origin(const struct config *c, const char *key);
/* true where the user, a checkpoint or a tokenizer set the key (not default, not derived). */
bool config_is_given(const struct config *c, const char *key);

/* Appends the resolved configuration as YAML, origins as comments; loads again to the same values. What an
 * open layout leaves to be chosen is a comment. */
void config_write_yaml(const struct config *c, struct buf *b);
/* Fingerprint of all values that define the training: not the run folder, logging, checkpointing, device, nor
 * the layout, under which numbers are the same within rounding and any checkpoint resumes. */
uint64_t config_hash(const struct config *c);
/* What recompute.granularity selective computes again: a bit set of enum repeat (graph/prog.h) out of
 * REPEAT_CORE, REPEAT_NORM, REPEAT_ACTIVATION, REPEAT_MLP; 0 under the other granularities. After
 * config_check. Local. */
uint32_t config_recompute_modules(const struct config *c);

#endif
