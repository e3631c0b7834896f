/* What a model is: the values of the configuration's group `model`. Floor: model.
 *
 * The fields are the rows of model/config.def. Sizes that may be null (num_query_groups, kv_channels,
 * ffn_hidden_size, max_position_embeddings) hold numbers once the configuration is checked; vocab_size
 * stays OPTION_NULL_INT until a tokenizer or a checkpoint told it; window_size OPTION_NULL_INT is no window;
 * num_experts OPTION_NULL_INT is a model without experts, whose other keys of experts then mean nothing.
 */
#ifndef PENTAD_MODEL_CONFIG_H
#define PENTAD_MODEL_CONFIG_H

#include "base/option.h"

struct err;

#define MODEL_ARCHITECTURES(X)                         \
	X(MODEL_GPT, "gpt", NULL)                      \
	X(MODEL_BERT, "bert", "bert is not built yet") \
	X(MODEL_T5, "t5", "t5 is not built yet")
OPTION_ENUM_DECLARE(model_architecture, MODEL_ARCHITECTURES)

#define MODEL_POSITIONS(X)                                                             \
	X(MODEL_POSITION_LEARNED_ABSOLUTE, "learned_absolute", NULL)                   \
	X(MODEL_POSITION_ROPE, "rope", NULL)                                           \
	X(MODEL_POSITION_RELATIVE, "relative", "relative positions are not built yet") \
	X(MODEL_POSITION_NONE, "none", NULL)
OPTION_ENUM_DECLARE(model_position, MODEL_POSITIONS)

#define MODEL_NORMALIZATIONS(X)               \
	X(MODEL_LAYERNORM, "LayerNorm", NULL) \
	X(MODEL_RMSNORM, "RMSNorm", NULL)
OPTION_ENUM_DECLARE(model_normalization, MODEL_NORMALIZATIONS)

/* swiglu and geglu are gated: act(gate) · up, with silu and gelu. */
#define MODEL_ACTIVATIONS(X)                        \
	X(MODEL_GELU, "gelu", NULL)                 \
	X(MODEL_GELU_EXACT, "gelu_exact", NULL)     \
	X(MODEL_RELU, "relu", NULL)                 \
	X(MODEL_SQUARED_RELU, "squared_relu", NULL) \
	X(MODEL_SWIGLU, "swiglu", NULL)             \
	X(MODEL_GEGLU, "geglu", NULL)
OPTION_ENUM_DECLARE(model_activation, MODEL_ACTIVATIONS)

#define MODEL_ROPES(X)                    \
	X(MODEL_ROPE_PLAIN, "rope", NULL) \
	X(MODEL_ROPE_YARN, "yarn", NULL)
OPTION_ENUM_DECLARE(model_rope, MODEL_ROPES)

/* In the order of enum score. */
#define MODEL_SCORES(X)                         \
	X(MODEL_SCORE_SOFTMAX, "softmax", NULL) \
	X(MODEL_SCORE_SIGMOID, "sigmoid", NULL) \
	X(MODEL_SCORE_SQRTSOFTPLUS, "sqrtsoftplus", NULL)
OPTION_ENUM_DECLARE(model_score, MODEL_SCORES)

#define MODEL_BALANCINGS(X)                                \
	X(MODEL_BALANCING_AUX, "aux_loss", NULL)           \
	X(MODEL_BALANCING_SEQ, "seq_aux_loss", NULL)       \
	X(MODEL_BALANCING_GLOBAL, "global_aux_loss", NULL) \
	X(MODEL_BALANCING_NONE, "none", NULL)
OPTION_ENUM_DECLARE(model_balancing, MODEL_BALANCINGS)

#define MODEL_DROPS(X)                     \
	X(MODEL_DROP_PROBS, "probs", NULL) \
	X(MODEL_DROP_POSITION, "position", NULL)
OPTION_ENUM_DECLARE(model_drop, MODEL_DROPS)

#define MODEL_DISPATCHERS(X)                           \
	X(MODEL_DISPATCHER_ALLTOALL, "alltoall", NULL) \
	X(MODEL_DISPATCHER_ALLGATHER, "allgather", NULL)
OPTION_ENUM_DECLARE(model_dispatcher, MODEL_DISPATCHERS)

struct model_config {
#include "base/option_fields.h"
#include "model/config.def"
#include "base/option_end.h"
};

/* Reads moe_layer_freq: N makes a mixture of experts of the first of every N layers, a pattern says it of
 * each layer, with lists and repeats as Python writes them: "([0]*3+[1]*58)", "([1]+[0]*2)*4".
 * moe[num_layers] is filled; without num_experts with false. EXIT_CONFIG: the byte (counted from 0) and what
 * is allowed there, or a pattern of another length. */
int model_moe_layers(const struct model_config *c, bool *moe, struct err *e);
/* The same of one layer; false where moe_layer_freq cannot be read. Loops over many layers read it once. */
bool model_is_moe_layer(const struct model_config *c, int64_t layer);
int64_t model_count_moe_layers(const struct model_config *c);
/* How much sharper YaRN makes attention to a stretched context, where it is `mscale` strong. */
double model_yarn_temperature(const struct model_config *c, double mscale);
/* swiglu, geglu: the feed-forward block has gate and up */
bool model_is_gated(const struct model_config *c);

#endif
