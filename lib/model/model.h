/* A model as a program: builders emit its operations, and list its parameters by their logical names.
 *
 * A parameter value may hold several logical parameters side by side (query, key and value rows for one
 * matrix product); each part is a box of a global tensor that has heard of no layout. Floor: model. */
#ifndef PENTAD_MODEL_MODEL_H
#define PENTAD_MODEL_MODEL_H

#include "graph/exec.h"
#include "graph/prog.h"
#include "model/config.h"

enum init { INIT_NORMAL, INIT_ONE, INIT_ZERO };

struct part { /* rows [local_row, local_row + extent[0]) of a parameter value = a box of a global tensor; a
	       * rank whose share of the vocabulary is all padding holds an empty one */
	const char *name; /* "decoder.layers.7.attention.query.weight"; in the program's arena */
	int nd;
	int64_t shape[2], offset[2], extent[2];
	int64_t local_row;
	enum init init;
	double std;
};

/* A table that the first and the last stage of a pipeline both hold: its gradients are added up, and the
 * first stage's counts and is saved. */
enum tie { TIE_NONE, TIE_OWNER, TIE_COPY };

struct param {
	int32_t value;
	int32_t first_part, n_parts; /* in model.part */
	int32_t chunk, layer;        /* layer -1: embedding, final norm, output layer */
	bool decay;                  /* two or more dimensions */
	bool is_buffer;              /* no gradient: it is moved by an operation of its own */
	uint32_t partial; /* mesh axes, those of rows of the batch apart, along which its gradient comes as
	                     partial sums */
	enum tie tie;
};

struct model_chunk { /* what one virtual pipeline stage holds */
	int32_t first_layer, n_layers;
	bool has_embedding, has_head; /* head: final norm, output layer, loss */
};

/* What crosses the borders of a chunk, [rows,C] values; NONE where it begins or ends the model. */
struct model_edge {
	int32_t in, out;     /* activations: from the stage before, to the next */
	int32_t out_adjoint; /* the gradient of out, from the next stage; that of in is in value.grad after
	                        backward */
};

enum model_use {
	MODEL_TRAIN,    /* loss, with dropout; prog_backward may follow */
	MODEL_EVALUATE, /* loss, without dropout */
	MODEL_GENERATE, /* logits of one sequence through key-value caches */
};

/* How attention gets the keys of other context-parallel ranks. */
enum model_exchange { EXCHANGE_P2P, EXCHANGE_ALL_GATHER, EXCHANGE_A2A };

/* What the experts' layers add up over a step: f64 each. */
#define EXPERT_SUMS(X)                                                  \
	X(LOSS, "balancing losses of the tokens, coefficients applied") \
	X(Z, "squared logarithms of the routers' partition sums")       \
	X(ENTROPY, "entropies of the routers' scores, in nats")         \
	X(DROPPED, "choices dropped since their expert was full")       \
	X(OVERFLOW, "choices dropped since their expert's rank was full")
enum expert_sum {
#define EXPERT_SUM_ROW(name, doc) EXPERT_##name,
	EXPERT_SUMS(EXPERT_SUM_ROW)
#undef EXPERT_SUM_ROW
	        EXPERT_SUM_COUNT
};

struct model_spec {
	const struct model_config *config; /* checked; not owned, outlives the model */
	int64_t padded_vocab_size;
	enum dtype dtype; /* of weights and activations */
	bool fp8;         /* products of layers round their operands to 8 bits */
	enum model_use use;
	int32_t batch; /* B: samples of this rank's micro-batch */
	int32_t rows;  /* T: tokens a sample; under MODEL_GENERATE, rows a call */
	enum model_exchange exchange;
	bool resets_positions;  /* at the begin of a document: then positions are of the batch */
	bool resets_attention;  /* tokens see nothing of other documents */
	bool sequence_parallel; /* norms, dropout and residuals on the tensor-parallel rank's share of the
	                           rows */
	const struct model_chunk *chunk; /* [n_chunk] not owned; NULL: one chunk, the whole model */
	int32_t n_chunk;
};

struct model {
	struct model_spec spec;
	struct prog *prog; /* not owned */
	struct param *param;
	size_t n_param, cap_param;
	struct part *part;
	size_t n_part, cap_part;
	struct model_edge edge[PROG_MAX_CHUNKS];
	/* Inputs, NONE where the use or the stage has none, of the N rows of this rank's share of the
	 * sequences: i32 [N], i32 [N], i32 [rows], i32 [N], i64 [B], f32 [1]; row_positions: those of the
	 * rank's share of these under sequence parallelism. */
	int32_t tokens, positions, row_positions, targets, keys, loss_scale;
	/* i32 [N]: where each row's document begins in its sample; of all rows of the samples, [B·T], in
	 * order of their ranks. */
	int32_t begins, begins_of_all;
	/* Mixture of experts: which layers they are, and by layer the place among them, NONE where it is
	 * dense; f64 [EXPERT_SUM_COUNT] and its elements; i32 [layers,E], choices of each expert, and its
	 * rows; the bias of each layer's router, NONE where it is on another stage. */
	int32_t n_expert_layers, *expert_layer, *expert_at;
	int32_t expert_sums, expert_sum[EXPERT_SUM_COUNT], expert_load, *expert_load_of, *expert_bias;
	/* f64 [1], the sum over targets, accumulated over micro-batches; [N,V]; f32 [N]. */
	int32_t loss, logits, row_loss;
	int32_t rope_table; /* CONST f32 [P,R] */
};

/* Emits the forward pass. prog is initialised with its mesh sizes and outlives the model. Local. */
int model_build(struct model *m, struct prog *prog, const struct model_spec *spec, struct err *e);
void model_free(struct model *m);
/* Fills the CONST values. Local. */
void model_fill_constants(const struct model *m, struct exec *x);
/* The initial values of one part (or of any box of it) as f32, [extent[0], extent[1]], into out: a function
 * of (seed, logical name, global index), so the same under every layout. Local. */
void part_init(const struct part *part, uint64_t seed, float *out);
/* Parameters of the whole model, padded rows of the vocabulary among them. Local. */
int64_t model_count_parameters(const struct model_config *c, int64_t padded_vocab_size);
/* Floating-point operations of one training step of `tokens` tokens in samples of T, without recomputation:
 * Megatron-LM's num_floating_point_operations. Local. */
double model_flops(const struct model_config *c, int64_t padded_vocab_size, double tokens);
/* Factor of the scores before the softmax: 1 / sqrt(head width), times the square of YaRN's temperature under
 * multi-latent attention (DeepSeek-AI 2024). */
double model_attention_scale(const struct model_config *c);
/* The table of rotary cosines and sines, [positions, rotated]; f32. Su et al. 2021; scaling: Llama 3.1, or
 * YaRN, whose temperature both carry. */
void rope_fill_table(const struct model_config *c, int32_t positions, int32_t rotated, float *table);
/* Channels of a head that rotate: even. */
int32_t rope_rotated(const struct model_config *c);

#endif
