/* Hugging Face folders: config.json and safetensors of GPT-2, Llama, Mistral, Mixtral, Qwen2 and Qwen3 (with
 * experts or without) and DeepSeek-V3, as logical parameters of ours and back. One table of rows (HF name,
 * our name, shape, transposed or not) serves both ways.
 *
 * Our weights are [out, in]. GPT-2 keeps them [in, out], with query, key and value side by side; experts are
 * a tensor each, as the hub has them, or, read alone, all experts of a layer in one, as transformers 5 holds
 * them in memory; the padded rows of the vocabulary exist on our side alone, as zeros. Nothing here is
 * collective. Floor: model. */
#ifndef PENTAD_MODEL_HF_H
#define PENTAD_MODEL_HF_H

#include "ckpt/safetensors.h"
#include "model/config.h"
#include "op/op.h"

struct buf;
struct ckpt;
struct err;
struct json;

/* Name in "model_type", class in "architectures". */
#define HF_FAMILIES(X)                                      \
	X(HF_GPT2, "gpt2", "GPT2LMHeadModel")               \
	X(HF_LLAMA, "llama", "LlamaForCausalLM")            \
	X(HF_MISTRAL, "mistral", "MistralForCausalLM")      \
	X(HF_QWEN2, "qwen2", "Qwen2ForCausalLM")            \
	X(HF_QWEN3, "qwen3", "Qwen3ForCausalLM")            \
	X(HF_MIXTRAL, "mixtral", "MixtralForCausalLM")      \
	X(HF_QWEN2_MOE, "qwen2_moe", "Qwen2MoeForCausalLM") \
	X(HF_QWEN3_MOE, "qwen3_moe", "Qwen3MoeForCausalLM") \
	X(HF_DEEPSEEK_V3, "deepseek_v3", "DeepseekV3ForCausalLM")
enum hf_family {
#define HF_FAMILY_ROW(id, type, class) id,
	HF_FAMILIES(HF_FAMILY_ROW)
#undef HF_FAMILY_ROW
	        HF_FAMILY_COUNT
};
const char *hf_family_name(enum hf_family f);
const char *hf_family_class(enum hf_family f);

/* One logical parameter and where it lies in a Hugging Face tensor: rows (its first dimension)
 * [first_row, first_row + rows) of the tensor's output dimension, which is the second where `transposed`. */
struct hf_part {
	const char *name,
	        *hf_name; /* "decoder.layers.7.mlp.fc2.weight", "model.layers.7.mlp.down_proj.weight" */
	int nd;
	int64_t shape[2];    /* ours; the vocabulary padded */
	int64_t hf_shape[2]; /* of the whole HF tensor */
	int64_t hf_blocks;   /* 0, or it is [hf_blocks, hf_shape[0] / hf_blocks, hf_shape[1]] */
	int64_t rows, first_row;
	bool transposed;
};

/* All parts of a model, those of one HF tensor side by side. Strings live in the arena. */
struct hf_plan {
	struct arena *arena;
	struct hf_part *parts;
	size_t n, cap;
};
int64_t hf_padded_vocab(const struct model_config *c);
/* *plan is zero but for its arena. parts is the caller's to free(), whatever is returned. `fused`: all
 * experts of a layer lie in one tensor. EXIT_BAD_DATA: more parts than any model has, or moe_layer_freq
 * cannot be read. */
int hf_plan_make(struct hf_plan *plan, const struct model_config *c, enum hf_family family, bool fused,
                 struct err *e);

/* config.json -> the group `model`; every value is range-checked against model/config.def. `name` is what
 * messages call it. Strings of *out live in *keep. EXIT_BAD_DATA: no such family, a feature that is not
 * built, a value out of range. */
int hf_config_read(const struct json *config, const char *name, struct arena *keep, struct model_config *out,
                   enum hf_family *family, struct err *e);
/* The group `model` as an object of JSON, as train stores it in a checkpoint's meta data, and back; strings
 * as above. EXIT_BAD_DATA. */
void hf_model_put_json(const struct model_config *c, struct buf *b);
int hf_model_read_json(const struct json *model, const char *name, struct arena *keep,
                       struct model_config *out, struct err *e);
/* The same as lines of YAML below "model:". */
void hf_model_put_yaml(const struct model_config *c, struct buf *b);
/* Whether a family can express the model; `why_not` is set where it cannot. */
bool hf_family_fits(enum hf_family f, const struct model_config *c, const char **why_not);
/* config.json, both spellings of what transformers 5 renamed. `extra` (bos_token_id …) may be NULL. */
void hf_config_put(const struct model_config *c, enum hf_family f, enum dtype dtype, const struct json *extra,
                   struct buf *b);

/* An open folder for reading alone. */
struct hf;
/* config.json, and weights whose names and shapes are just those that it promises. EXIT_NO_INPUT,
 * EXIT_BAD_DATA. */
int hf_open(const char *dir, struct hf **out, struct err *e);
void hf_close(struct hf *h); /* NULL is allowed */
/* true where `path` is a folder with a config.json that has a "model_type". */
bool hf_is_folder(const char *path);
const struct model_config *hf_model(const struct hf *h);
enum hf_family hf_family_of(const struct hf *h);
const struct json *hf_config_json(const struct hf *h);
size_t hf_count(const struct hf *h);
const struct hf_part *hf_part(const struct hf *h, size_t i);
/* Type of a part's elements: that of the file; half precision (F16) becomes f32, which holds it exactly. */
enum dtype hf_dtype(const struct hf *h, size_t i);
/* Box of a logical parameter into out[extent…], as f32, bf16 or f16. Rows that only pad the vocabulary are
 * zero. EXIT_BAD_DATA: no such parameter, box outside of its shape. */
int hf_read_box(const struct hf *h, const char *name, const int64_t *offset, const int64_t *extent,
                enum dtype dtype, void *out, struct err *e);

/* Writes step 0 with the weights alone below `dir` ("FOLDER/checkpoints"); its meta data say what model it is
 * ("model") and where it came from ("hf"). EXIT_IO. */
int hf_import(const struct hf *h, const char *dir, struct err *e);
/* Writes config.json and model.safetensors (files of at most max_shard_bytes each) of an open checkpoint's
 * "model" tensors into `dir`, tensor by tensor. The model is what the checkpoint's meta data say ("model").
 * EXIT_BAD_DATA: no family fits, a tensor is missing or has another shape. EXIT_IO. */
int hf_export(struct ckpt *c, const char *dir, size_t max_shard_bytes, struct err *e);

#endif
