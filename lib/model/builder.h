/* What the builders of a model's blocks share: parameters, and the few pieces that every block is made of.
 * Letters: N rows, C width, H heads, G groups, D head size, V value head size, F ffn, E experts, K chosen
 * ones. Floor: model. */
#ifndef PENTAD_MODEL_BUILDER_H
#define PENTAD_MODEL_BUILDER_H

#include "model/model.h"

struct builder {
	struct model *m;
	struct prog *p;
	const struct model_config *c;
	const char *prefix;      /* "decoder.layers.7." */
	int32_t ranks, rank;     /* tensor-parallel */
	struct context context;  /* this rank's share of the sequences; ranks 0 where they are whole */
	int32_t block_rows;      /* of that share, B·T/cp, */
	int32_t rows, first_row; /* and of the residual stream: fewer under sequence parallelism */
	uint32_t row_axes;       /* mesh axes that cut rows of the same sample */
};

/* One logical parameter among those of a value. */
struct rows {
	const char *name;
	int64_t rows;
};
#define ROWS(...)                           \
	(const struct rows[]){__VA_ARGS__}, \
	        (int)(sizeof((const struct rows[]){__VA_ARGS__}) / sizeof(struct rows))

enum cut { WHOLE, BY_ROWS, BY_COLUMNS }; /* of a parameter, over the tensor-parallel ranks */

/* A value that holds these parameters side by side: [sum of rows, columns], or a vector where nd is 1. */
int32_t build_param(struct builder *b, int nd, int64_t columns, enum cut cut, const struct rows *rows, int n,
                    enum init init, double std);
int32_t build_vector(struct builder *b, enum cut cut, enum init init, const struct rows *rows, int n);
/* The same parameters of every expert on this rank, "mlp.experts.E.<name>", expert after expert; cut over the
 * expert-tensor-parallel ranks. */
int32_t build_expert_param(struct builder *b, int64_t columns, enum cut cut, const struct rows *rows, int n,
                           double std);
/* A parameter of the newest value's type, as f32 whatever the model's type; a buffer gets no gradient. */
int32_t build_f32_param(struct builder *b, int64_t columns, const struct rows *rows, enum init init,
                        double std, bool is_buffer);
/* Of projections back into the residual stream: init_method_std / sqrt(2 · layers). */
double build_output_std(const struct builder *b);

/* The argument of a product of a layer; routers and the head have none: they are never rounded to 8 bits. */
#define LAYER_PRODUCT(b) ARG(.linear = {.fp8 = (b)->m->spec.fp8})

/* The residual stream comes to all tensor-parallel ranks, each works on its own columns (heads, ffn,
 * vocabulary), and their sums go back: Shoeybi et al. 2019; Korthikanti et al. 2022 where the stream is cut
 * by rows. */
int32_t build_enter(struct builder *b, int32_t x);
int32_t build_add_up(struct builder *b, int32_t y);
/* A product over the columns that ranks share; its bias comes once, after the sum. */
int32_t build_linear_back(struct builder *b, int32_t h, int32_t w, int32_t bias);
/* Of rows of `width`, with parameters of these names; `bias` is used by LayerNorm alone. */
int32_t build_norm(struct builder *b, const char *weight, const char *bias, int64_t width, int32_t x);
int32_t build_dropout(struct builder *b, const char *site, int32_t x);
/* x -> x · (1 ± eps) */
int32_t build_jitter(struct builder *b, const char *site, int32_t x, double eps);
/* A mask belongs to a site by name, so that it is the same however layers are spread over ranks. */
uint32_t build_salt(const struct builder *b, const char *site);
/* Rows of the batch: cut over data- and context-parallel ranks. */
void build_place_rows(struct builder *b, int32_t v);

/* Blocks: [rows,C] -> its like. */
int32_t build_attention(struct builder *b, int32_t x);
int32_t build_mlp(struct builder *b, int32_t x);
int32_t build_experts(struct builder *b, int32_t x); /* layer p->layer */
/* A feed-forward network of width F whose parameters are called <name>gate.weight …, without biases where
 * `biases` is false. */
int32_t build_feed_forward(struct builder *b, const char *name, int64_t F, bool biases, int32_t x);
/* Which layers are mixtures of experts, and the sums of the step that they keep; before anything else. */
void build_expert_sums(struct builder *b);

/* How MODEL_… activations are made of enum activation. */
struct activation_kind {
	int32_t kind;
	bool gated;
};
struct activation_kind build_activation_kind(const struct model_config *c);

#endif
