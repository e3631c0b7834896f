/* What a model is: the values of the configuration's group `model`. Floor: model.
 *
 * The fields are the rows of model/config.def. Sizes that may be null (num_query_groups, kv_channels,
 * ffn_hidden_size, max_position_embeddings) hold numbers once the configuration is checked; vocab_size
 * stays OPTION_NULL_INT until a tokenizer or a checkpoint told it; window_size OPTION_NULL_INT is no window.
 */
#ifndef PENTAD_MODEL_CONFIG_H
#define PENTAD_MODEL_CONFIG_H

#include "base/option.h"

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

struct model_config {
#include "base/option_fields.h"
#include "model/config.def"
#include "base/option_end.h"
};

#endif
