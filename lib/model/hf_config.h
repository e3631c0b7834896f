/* What hf_config.c and hf_experts.c share: a configuration on its way in from config.json, or out to it.
 * Local. Floor: model. */
#ifndef PENTAD_MODEL_HF_CONFIG_H
#define PENTAD_MODEL_HF_CONFIG_H

#include "base/mem.h"
#include "model/hf.h"

struct hf_values {
	struct model_config model;
};

/* Values under construction; `from` is config.json, `name` what messages call it. Strings live in *keep. */
struct config_reader {
	struct hf_values values;
	struct option_origin *origins;
	struct arena arena, *keep;
	struct option_set set;
	const struct json *from;
	const char *name;
	enum hf_family family;
	struct err *e;
};

/* EXIT_BAD_DATA with a sentence that begins with the file and the key. */
int hf_refuse(struct config_reader *r, const char *key, const char *what);
/* model.KEY = x, within the ranges of model/config.def. */
int hf_set_text(struct config_reader *r, const char *key, const char *text);
int hf_set_number(struct config_reader *r, const char *key, double x);
int hf_set_integer(struct config_reader *r, const char *key, int64_t x);

struct config_writer {
	struct arena arena;
	struct hf_member {
		const char *key;
		char *text;
	} * members;
	size_t n, cap;
};

void hf_put(struct config_writer *w, const char *key, char *text);
void hf_put_word(struct config_writer *w, const char *key, const char *word);
void hf_put_bool(struct config_writer *w, const char *key, bool x);
void hf_put_integer(struct config_writer *w, const char *key, int64_t x);
/* With a point or an exponent, as Python writes what it will read as a float. */
char *hf_float_text(struct arena *a, double x);

/* A set of families. */
#define HF_BIT(f) (1u << (f))
enum {
	HF_ALL = HF_BIT(HF_FAMILY_COUNT) - 1,
	HF_LLAMAS = HF_ALL & ~HF_BIT(HF_GPT2), /* named and built as Llama, but for what each changes */
	HF_QWENS_MOE = HF_BIT(HF_QWEN2_MOE) | HF_BIT(HF_QWEN3_MOE),
	HF_MOES = HF_BIT(HF_MIXTRAL) | HF_QWENS_MOE | HF_BIT(HF_DEEPSEEK_V3),
	HF_QWENS = HF_BIT(HF_QWEN2) | HF_BIT(HF_QWEN3) | HF_QWENS_MOE,
};
static inline bool hf_is_one_of(enum hf_family f, unsigned families)
{
	return families >> f & 1;
}

/* hf_experts.c: what mixtures of experts and latent attention have beyond the table of keys, and why a model
 * with or without them does not fit a family, NULL where it does. */
int hf_read_experts(struct config_reader *r);
void hf_put_experts(struct config_writer *w, const struct model_config *c, enum hf_family f);
const char *hf_experts_need(const struct model_config *c, enum hf_family f);

#endif
