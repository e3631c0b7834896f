/* The vocabulary of programs: operations, their typed arguments, element types, and the tensor that a
 * kernel sees. It knows neither programs nor devices, so kernels are written and tested without either.
 * Local. Floor: op. */
#ifndef PENTAD_OP_OP_H
#define PENTAD_OP_OP_H

#include <stddef.h>
#include <stdint.h>

enum dtype {
#define DTYPE(name, bytes, doc) DT_##name,
#include "op/dtypes.def"
#undef DTYPE
	DT_COUNT
};

enum op_flag { IN_PLACE_0 = 1, IN_PLACE_1 = 2, UPDATES = 4, COMM = 8, ALIAS = 16 };

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
	} rope;
	struct {
		int32_t seq_length; /* T: rows of one sample are adjacent, N = B·T */
		int32_t heads, groups, head_dim;
		int32_t window;     /* a query sees itself and window-1 keys before it; 0 = all before it */
		float scale;        /* of q·k, before the softmax */
		float dropout;      /* of the probabilities */
		uint32_t salt;      /* tells this layer's mask from others' */
		int32_t first_head; /* number of head 0 in the whole model: masks are numbered by it */
	} attention;
	struct {
		int32_t kind; /* enum activation */
	} activation;
	struct {
		float p;
		uint32_t salt;
		int32_t seq_length;
		int32_t first_row; /* x holds rows [first_row, first_row + N) of the keys' samples */
		uint32_t axes;     /* bit set of the mesh axes that cut the rows but not the keys */
	} dropout;
	struct {
		int32_t vocab_size;   /* columns of the whole that count */
		int32_t first_column; /* logits hold columns [first_column, first_column + V) of the whole */
		uint32_t axes;        /* bit set of the mesh axes that cut the columns */
	} cross_entropy;
	struct {
		uint32_t axes;  /* bit set of mesh axes; one group */
		int32_t begins; /* 1: it goes on by itself, until the `wait` on its result */
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

/* hyper[] of adamw, f32: bias_1 = 1/(1-beta1^t), bias_2 = 1/(1-beta2^t); clip 0 = none. The update:
 * g *= clip/(sqrt(norm2)+1e-6) where that is below 1; m = b1 m + (1-b1) g; v = b2 v + (1-b2) g²;
 * w -= lr·decay·w; w -= lr · (m bias_1) / (sqrt(v bias_2) + eps). With a master, w is the master and the
 * parameter its rounded copy. */
enum hyper {
	HYPER_LR,
	HYPER_BETA1,
	HYPER_BETA2,
	HYPER_EPS,
	HYPER_DECAY,
	HYPER_CLIP,
	HYPER_BIAS1,
	HYPER_BIAS2,
	HYPER_COUNT
};

/* Random masks of dropout and attention dropout: element i of a sample whose key is k survives where word
 * i % 4 of philox block i / 4 under (k, counter_hi = salt) is at least min(floor(p·2^32), 2^32 - 1). For
 * attention, i = ((first_head + head)·T + query)·T + key position. */

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

static inline float bf16_to_f32(uint16_t x)
{
	union {
		uint32_t u;
		float f;
	} v = {(uint32_t)x << 16};
	return v.f;
}

/* Rounds to nearest, ties to even; a NaN stays one. */
static inline uint16_t bf16_from_f32(float x)
{
	union {
		float f;
		uint32_t u;
	} v = {x};
	uint32_t rounded = (v.u + 0x7fff + (v.u >> 16 & 1)) >> 16;
	return (uint16_t)((v.u & 0x7fffffff) > 0x7f800000 ? v.u >> 16 | 64 : rounded);
}

#endif
