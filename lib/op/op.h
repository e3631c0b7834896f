/* The vocabulary of programs: operations, their typed arguments, element types, and the tensor that a
 * kernel sees. It knows neither programs nor devices, so kernels are written and tested without either.
 * Local. Floor: op. */
#ifndef PENTAD_OP_OP_H
#define PENTAD_OP_OP_H

#include "base/inline.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum dtype {
#define DTYPE(name, bytes, doc) DT_##name,
#include "op/dtypes.def"
#undef DTYPE
	DT_COUNT
};

enum op_flag { IN_PLACE_0 = 1, IN_PLACE_1 = 2, UPDATES = 4, COMM = 8, ALIAS = 16, COUNTED = 32 };

enum op {
#define OP(name, n_in, n_out, flags, doc) OP_##name,
#include "op/ops.def"
#undef OP
	OP_COUNT
};

enum { OP_MAX_IN = 8, OP_MAX_OUT = 3, TENSOR_MAX_DIM = 4 };

struct op_row {
	const char *name;
	uint8_t n_in, n_out, flags;
	const char *doc;
};
extern const struct op_row op_rows[OP_COUNT];

struct dtype_row {
	const char *name;
	uint8_t bytes;
};
extern const struct dtype_row dtype_rows[DT_COUNT];

#define ACTIVATIONS(X)                                     \
	X(gelu, "x Φ(x) by tanh: Hendrycks & Gimpel 2016") \
	X(gelu_exact, "x Φ(x) by erf")                     \
	X(relu, "max(0, x)")                               \
	X(squared_relu, "max(0, x)²: So et al. 2021")      \
	X(silu, "x sigmoid(x)")
enum activation {
#define ACTIVATION_ROW(name, doc) ACT_##name,
	ACTIVATIONS(ACTIVATION_ROW)
#undef ACTIVATION_ROW
	        ACT_COUNT
};

/* How a router turns logits into scores. */
#define SCORES(X)                               \
	X(softmax, "softmax")                   \
	X(sigmoid, "sigmoid: DeepSeek-AI 2024") \
	X(sqrtsoftplus, "square root of ln(1 + exp)")
enum score {
#define SCORE_ROW(name, doc) SCORE_##name,
	SCORES(SCORE_ROW)
#undef SCORE_ROW
	        SCORE_COUNT
};

/* How context-parallel ranks share samples of T tokens: each sample is cut into 2·ranks chunks, and rank r
 * holds chunks r and 2·ranks-1-r of all samples, its block of rows [B, T/ranks]. A tensor holds the blocks of
 * `count` ranks, first, first+1, … (around the end), one behind the other. ranks 0: whole samples, as 1. */
struct context {
	int32_t ranks, first, count;
};

/* What a kernel needs besides its tensors; the member is named after the operation's family. */
union op_arg {
	struct {
		int32_t first_row; /* the table holds rows [first_row, first_row + V) of the whole */
		uint32_t axes;     /* bit set of the mesh axes that cut the table */
	} embedding;
	struct {
		float eps;
		int32_t heads, groups, head_dim; /* qk_norm only */
	} norm;
	struct {
		int32_t heads, groups, head_dim;
		int32_t inverse; /* 1 rotates back: the gradient */
		int32_t interleaved;
	} rope;
	struct {
		int32_t heads, head_dim, value_dim; /* D = head_dim, rotated part included */
		int32_t interleaved;
	} mla;
	struct {
		int32_t seq_length; /* T of a whole sample */
		int32_t heads, groups, head_dim;
		int32_t value_dim;  /* 0: head_dim */
		int32_t window;     /* a query sees itself and window-1 keys before it; 0 = all before it */
		float scale;        /* of q·k, before the softmax */
		float dropout;      /* of the probabilities */
		uint32_t salt;      /* tells this layer's mask from others' */
		int32_t first_head; /* number of head 0 in the whole model: masks are numbered by it */
		struct context queries, rows; /* whose queries; attention_part: whose keys and values */
		int32_t covered; /* attention_part: ranks whose keys have been seen, these included */
		int32_t goes_on; /* attention_part: others follow */
		uint32_t axes;   /* bit set of the mesh axes that cut the rows but not the keys */
	} attention;
	struct {
		int32_t first;
	} columns;
	struct {
		int32_t ranks, part[3]; /* widths in x; those that are 0 are not there */
	} heads;
	struct {
		int32_t kind; /* enum activation */
	} activation;
	struct {
		int32_t fp8;  /* operands are rounded to 8 bits first: x and w to e4m3, gradients to e5m2 */
		int32_t kind; /* enum activation, of linear_act and linear_dx_act */
	} linear;
	struct {
		float p;
		uint32_t salt;
		int32_t seq_length;
		int32_t first_row;   /* x holds rows [first_row, first_row + N) of the block of rows */
		struct context rows; /* that one rank holds of the keys' samples */
		uint32_t axes;       /* bit set of the mesh axes that cut the rows but not the keys */
		int32_t jitter;
	} dropout;
	struct {
		int32_t score; /* enum score */
		int32_t topk;
		int32_t num_groups, group_topk; /* 0, or: the best group_topk of equal groups of experts,
		                                   by the sum of each one's best topk / group_topk */
		int32_t pre_softmax;            /* softmax over all experts; 0: over the chosen */
		float scaling_factor;
	} route;
	struct {
		int32_t experts;
		int32_t score; /* enum score */
		float aux_coeff, z_coeff;
		int32_t sequences;                /* S; 1: one for all rows */
		int32_t sequence_rows, first_row; /* row i belongs to sequence (first_row + i) /
		                                     sequence_rows, where S > 1 */
		uint32_t axes; /* bit set of the mesh axes over which `counts` are complete */
	} balance;
	struct {
		float rate;
	} bias_update;
	struct {
		int32_t experts, limit;
		int32_t by_position;   /* the first come stay; else those with the largest weight */
		int32_t ranks, rank;   /* the inputs hold `ranks` equal blocks of rows, the
		                          outputs are of block `rank` */
		int32_t context_ranks; /* rows of the inputs lie as context {it, 0, it} says */
		int32_t seq_length;
		uint32_t axes; /* bit set of the mesh axes that the inputs were gathered over */
	} capacity;
	struct {
		int32_t experts, ranks, rank;
		int32_t capacity;     /* rows that a rank takes at most; 0: all */
		int32_t first, count; /* slots for choices of these experts alone; count 0: of all */
		int32_t counts;       /* 0: another rank has the same rows and counts what they lose */
		uint32_t axes;        /* bit set of the mesh axes that share the experts */
	} dispatch;
	struct {
		int32_t rows; /* of y, at least as many as slots are used */
		int32_t back;
	} permute;
	struct {
		int32_t first, count; /* own experts, e = count */
		int32_t pad;          /* rows that every expert has; 0: as many as sizes say */
		int32_t back;         /* regroup */
		int32_t rows;         /* regroup: of y */
		int32_t expected;     /* rows that are likely to count: for estimates */
		int32_t kind;         /* enum activation */
		int32_t gated;
	} expert;
	struct {
		int32_t vocab_size;   /* columns of the whole that count */
		int32_t first_column; /* logits hold columns [first_column, first_column + V) of the whole */
		uint32_t axes;        /* bit set of the mesh axes that cut the columns */
	} cross_entropy;
	struct {
		uint32_t axes;      /* bit set of mesh axes; one group */
		int32_t begins;     /* 1: it goes on by itself, until the `wait` on its result */
		int32_t step;       /* shift */
		int32_t back, rows; /* all_to_all with sizes: rows of y, at most; home again */
	} comm;
	struct {
		int32_t counts; /* 0: another rank holds the same x and counts it, this one adds nothing */
	} square_sum;
	struct {
		int32_t dtype; /* enum dtype of y */
	} cast;
	struct {
		int32_t decay; /* 1: weight decay applies to this tensor */
	} adamw;
};

/* hyper[] of adamw, f32: bias_1 = 1/(1-beta1^t), bias_2 = 1/(1-beta2^t); clip 0 = none; unscale: 1 over what
 * the loss was multiplied by, so 1 changes nothing. The update: g *= unscale; norm = sqrt(norm2)·unscale; g
 * *= clip/(norm+1e-6) where that is below 1; m = b1 m + (1-b1) g; v = b2 v + (1-b2) g²; w -= lr·decay·w; w -=
 * lr · (m bias_1) / (sqrt(v bias_2) + eps). With a master, w is the master and the parameter its rounded
 * copy. */
enum hyper {
	HYPER_LR,
	HYPER_BETA1,
	HYPER_BETA2,
	HYPER_EPS,
	HYPER_DECAY,
	HYPER_CLIP,
	HYPER_BIAS1,
	HYPER_BIAS2,
	HYPER_UNSCALE,
	HYPER_COUNT
};

/* Router. Scores s: softmax over all E (pre_softmax) or, of the chosen logits, over these; sigmoid(logit);
 * sqrt(ln(1 + exp(logit))). Experts are chosen by s + bias, for the softmax over the chosen by the logit;
 * ties go to the lower number. Weights are s of the chosen; of sigmoid and sqrtsoftplus, where K > 1, over
 * (their sum + 1e-20); times scaling_factor. */

/* Random masks of dropout and attention dropout: element i of a sample whose key is k survives where word
 * i % 4 of philox block i / 4 under (k, counter_hi = salt) is at least min(floor(p·2^32), 2^32 - 1). For
 * attention, i = ((first_head + head)·T + query)·T + key position. Jitter: u = word / 2^32. Positions are
 * those in the whole sample, whichever rank holds them. */

struct tensor {
	void *data; /* contiguous, row-major, 64-byte-aligned; NULL = absent */
	int32_t dim[TENSOR_MAX_DIM];
	uint8_t nd, dtype; /* unused dimensions are 1 */
	uint8_t acc;       /* an output that is added to */
};

/* Elements, bytes, product of all dimensions but the first. */
int64_t tensor_count(const struct tensor *t);
int64_t tensor_bytes(const struct tensor *t);
int64_t tensor_row(const struct tensor *t);

/* Where row j of a rank's block of one sample, 0 <= j < T/ranks, stands in the sample. */
ANYWHERE int32_t context_position(int32_t seq_length, int32_t ranks, int32_t rank, int32_t j)
{
	if (ranks <= 1)
		return j;
	int32_t chunk = seq_length / (2 * ranks);
	return j < chunk ? rank * chunk + j : (2 * ranks - 1 - rank) * chunk + j - chunk;
}

/* Rows of own expert i, 0 <= i < arg.expert.count, in tensors in order of expert: how many, and which is the
 * first. With i = count: none, and how many rows there are in all. */
int64_t expert_rows(const union op_arg *arg, const struct tensor *sizes, int32_t i, int64_t *first);

ANYWHERE float bf16_to_f32(uint16_t x)
{
	union {
		uint32_t u;
		float f;
	} v = {(uint32_t)x << 16};
	return v.f;
}

/* Rounds to nearest, ties to even; a NaN stays one. */
ANYWHERE uint16_t bf16_from_f32(float x)
{
	union {
		float f;
		uint32_t u;
	} v = {x};
	uint32_t rounded = (v.u + 0x7fff + (v.u >> 16 & 1)) >> 16;
	return (uint16_t)((v.u & 0x7fffffff) > 0x7f800000 ? v.u >> 16 | 64 : rounded);
}

/* A subnormal half is a whole number of 2^-24; the other exponents move by 127 - 15, that of infinity twice.
 */
ANYWHERE float f16_to_f32(uint16_t x)
{
	const uint32_t bias = 112u << 23, exponent = x & 0x7c00u;
	union {
		float f;
		uint32_t u;
	} small = {(float)(x & 0x3ff) * 0x1p-24f}, v;
	uint32_t normal = ((uint32_t)(x & 0x7fff) << 13) + bias + (exponent == 0x7c00 ? bias : 0);
	v.u = (exponent ? normal : small.u) | (uint32_t)(x & 0x8000) << 16;
	return v.f;
}

/* Rounds to nearest, ties to even; from 65520 on it is infinity; a NaN stays one. Below 2^-14 the sum with a
 * half rounds to whole numbers of 2^-24. */
ANYWHERE uint16_t f16_from_f32(float x)
{
	const uint32_t bias = 112u << 23, infinity = 0x7c00;
	union {
		float f;
		uint32_t u;
	} v = {x}, small;
	uint32_t sign = v.u >> 16 & 0x8000, size = v.u & 0x7fffffff;
	v.u = size;
	small.f = v.f + 0.5f;
	uint32_t rounded = (size - bias + 0xfff + (size >> 13 & 1)) >> 13;
	uint32_t finite = size < 0x38800000 ? small.u - 0x3f000000 : rounded < infinity ? rounded : infinity;
	return (uint16_t)(sign | (size > 0x7f800000 ? 0x7e00 | (size >> 13 & 0x1ff) : finite));
}

/* The types of two bytes: bf16 and f16. */
ANYWHERE bool dtype_is_half(int dtype)
{
	return dtype == DT_bf16 || dtype == DT_f16;
}

ANYWHERE float half_to_f32(int dtype, uint16_t x)
{
	return dtype == DT_bf16 ? bf16_to_f32(x) : f16_to_f32(x);
}

ANYWHERE uint16_t half_from_f32(int dtype, float x)
{
	return dtype == DT_bf16 ? bf16_from_f32(x) : f16_from_f32(x);
}

#endif
