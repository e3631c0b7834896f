/* A training step as a static program: a list of operations with every shape and placement known.
 *
 * Builders emit nodes; each node passes its shape and its placement rule as it is emitted, and the first
 * refusal is kept in prog.e with the layer and the source line. Passes turn a program into a better one:
 * build → prog_backward → prog_fuse → prog_recompute → prog_plan, with prog_check after each. What runs
 * (exec.h) is what was planned. Local. Floor: graph. */
#ifndef PENTAD_GRAPH_PROG_H
#define PENTAD_GRAPH_PROG_H

#include "base/err.h"
#include "base/mem.h"
#include "comm/mesh.h"
#include "op/op.h"

#include <stdbool.h>

/* Where a value's elements are along one axis: on every rank, summed over ranks, or cut on a dimension. */
#define PLACES(X) X(REPLICATED, "repl") X(PARTIAL, "partial") X(SHARD0, "shard0") X(SHARD1, "shard1")
enum place {
#define PLACE_ROW(name, word) PLACE_##name,
	PLACES(PLACE_ROW)
#undef PLACE_ROW
	        PLACE_COUNT
};

/* Which memory a value lives in. What outlives a step comes first. */
#define REGIONS(X)                                                                           \
	X(PARAM, "param", "weights")                                                         \
	X(GRAD, "grad", "accumulated gradients")                                             \
	X(OPT, "opt", "master weights and moments")                                          \
	X(CONST, "const", "tables filled once")                                              \
	X(INPUT, "input", "tokens, positions, keys, scales: written by the host")            \
	X(STAT, "stat", "sums read by the host")                                             \
	X(STATE, "state", "key-value caches")                                                \
	X(BATCH, "batch", "inputs of one micro-batch, one slot each in flight")              \
	X(EDGE, "edge", "activations and gradients on their way between stages")             \
	X(SAVED, "saved", "activations kept for backward, one slot a micro-batch in flight") \
	X(TEMP, "temp", "everything else, reused")
enum region {
#define REGION_ROW(name, word, doc) R_##name,
	REGIONS(REGION_ROW)
#undef REGION_ROW
	        R_COUNT
};

/* FWD, BWD and WGRAD run once a micro-batch (WGRAD: what of backward gives weight gradients alone, where it
 * is split off), REDUCE with the last BWD or WGRAD of its chunk, NORM and STEP once a step. */
#define SEGMENTS(X) \
	X(FWD, "fwd") X(BWD, "bwd") X(WGRAD, "wgrad") X(REDUCE, "reduce") X(NORM, "norm") X(STEP, "step")
enum segment {
#define SEGMENT_ROW(name, word) SEG_##name,
	SEGMENTS(SEGMENT_ROW)
#undef SEGMENT_ROW
	        SEG_COUNT
};
#define SEG_BIT(name) (1u << SEG_##name)

extern const char *const place_names[PLACE_COUNT], *const region_names[R_COUNT],
                                                           *const segment_names[SEG_COUNT];

enum { NONE = -1 }; /* no value: an absent optional input */
enum { PROG_MAX_CHUNKS = 64, PROG_ALIGN_BYTES = 64 };

/* What part of a layer a node belongs to: recomputation is chosen by it. */
#define BLOCKS(X) X(NONE, "") X(ATTENTION, "attention") X(MLP, "mlp") X(EXPERTS, "moe")
enum block {
#define BLOCK_ROW(name, word) BLOCK_##name,
	BLOCKS(BLOCK_ROW)
#undef BLOCK_ROW
};

struct value { /* one tensor, written by one node; accumulators in GRAD and STAT by several */
	const char *name;
	int32_t dim[TENSOR_MAX_DIM]; /* this rank's share */
	uint8_t nd, dtype, region, want_grad;
	uint8_t sums;   /* an accumulator: each writer but the first adds */
	uint8_t weight; /* a parameter, or a copy that was gathered */
	uint8_t given;  /* filled from outside although its region is not: what another stage sent */
	uint8_t grid;   /* enum mesh_grid: the axes that `place` speaks of; on the others it says nothing */
	uint8_t place[AXIS_COUNT];
	int32_t def, last;    /* first writer and last reader, node indices; NONE = outside */
	int32_t grad;         /* the value that holds the adjoint, or NONE */
	int32_t of;           /* the value this one is a part of (prog_pack, prog_view), or NONE */
	int64_t at_bytes;     /* where in it */
	int32_t home;         /* the value whose memory this one uses; itself where it has its own */
	int64_t offset_bytes; /* from the region's base, in slot 0; set by prog_plan */
};

struct node { /* index order is execution order within a segment of a chunk */
	uint8_t op, segment, chunk, block;
	int32_t in[OP_MAX_IN], out[OP_MAX_OUT];
	union op_arg arg;
	int32_t layer;     /* -1 outside the layers */
	const char *where; /* "file.c:line" of the builder */
};

struct prog {
	struct arena arena;
	struct node *node;
	size_t n_node, cap_node;
	struct value *value;
	size_t n_value, cap_value;
	int32_t axis_size[AXIS_COUNT]; /* ranks along each axis, at least 1 */
	int32_t axis_rank[AXIS_COUNT]; /* this rank's place on each; never decides a shape */
	int32_t layer;                 /* what the next nodes belong to */
	uint8_t segment, chunk, block;
	const char
	        *where; /* what the next nodes give as their builder's line; NULL: where they are emitted */
	/* How many micro-batches are in flight; 0 counts as 1. Set before prog_plan. */
	int32_t batch_slots, edge_slots, saved_slots[PROG_MAX_CHUNKS];
	/* Set by prog_plan: known before any device is touched. */
	int64_t bytes[R_COUNT];
	int64_t batch_stride, edge_stride, saved_stride[PROG_MAX_CHUNKS]; /* bytes of one slot */
	int64_t saved_base[PROG_MAX_CHUNKS];                              /* slot 0 of a chunk */
	struct err e; /* the first refusal; e.code 0 = none */
};

#define HERE_(line) #line
#define HERE__(line) HERE_(line)
#define HERE __FILE__ ":" HERE__(__LINE__)
#define ARG(...) (&(union op_arg){__VA_ARGS__})
#define NO_ARG NULL
/* h = EMIT(p, linear, NO_ARG, x, w, NONE): appends a node, returns its first output. Missing trailing inputs
 * are NONE. The further outputs: prog_out. */
#define EMIT(p, name, arg, ...)                                                                            \
	prog_emit(p, OP_##name, arg, HERE, (int32_t[]){__VA_ARGS__}, sizeof((int32_t[]){__VA_ARGS__}) / 4, \
	          NULL)
/* The same with outputs that exist already (accumulators), NONE where a new one is wanted. */
#define EMIT_INTO(p, name, arg, outs, ...)                                                                 \
	prog_emit(p, OP_##name, arg, HERE, (int32_t[]){__VA_ARGS__}, sizeof((int32_t[]){__VA_ARGS__}) / 4, \
	          outs)

void prog_init(struct prog *p);
void prog_free(struct prog *p);
/* A value from outside: parameter, input, constant, state. Placed REPLICATED; see prog_place. */
int32_t prog_value(struct prog *p, const char *name, enum region region, enum dtype dtype, int nd,
                   const int32_t *dim);
/* `count` elements without a shape of their own: [count] or, where 32 divides it, [count/32,32], so that it
 * may be longer than a dimension. */
int32_t prog_flat(struct prog *p, const char *name, enum region region, enum dtype dtype, int64_t count);
/* One flat value that holds the members side by side, each from a multiple of `align` elements
 * on, its length a multiple of `multiple`: collectives and the optimizer work on packs, the layers on their
 * members. The members are of one type and region and so far of nobody. */
int32_t prog_pack(struct prog *p, const char *name, const int32_t *member, size_t n, int64_t align,
                  int64_t multiple);
/* Elements [first, first + count) of a value, as a flat value. */
int32_t prog_view(struct prog *p, const char *name, int32_t of, int64_t first, int64_t count);
/* Says how an outside value lies along an axis, which moves it to the axis' grid (GRID_DENSE until then).
 * Axes of one rank are always REPLICATED. */
void prog_place(struct prog *p, int32_t value, enum mesh_axis axis, enum place place);
int32_t prog_emit(struct prog *p, enum op op, const union op_arg *arg, const char *where, const int32_t *in,
                  size_t n_in, const int32_t *out);
/* Output k of the newest node. */
int32_t prog_out(const struct prog *p, int k);
/* Records the first error; later ones are consequences. */
void prog_refuse(struct prog *p, const struct node *n, const char *why);
static inline int64_t prog_aligned(int64_t bytes)
{
	return (bytes + PROG_ALIGN_BYTES - 1) / PROG_ALIGN_BYTES * PROG_ALIGN_BYTES;
}
/* A sum to which every rank adds its own: partial along all axes of both grids. */
void prog_place_sum(struct prog *p, int32_t value);
/* Does `place` speak of the axis? Nothing is placed along pp: a value is on one stage alone. */
bool prog_lies_along(const struct value *v, int axis);
/* Replicated along all axes of its grid, so the same in the other grid too. */
bool prog_is_everywhere(const struct prog *p, const struct value *v);
/* Of a set of axes: those of more than one rank; the ranks of their group; this rank's place in it, the first
 * axis fastest, as communicators count. */
uint32_t prog_axes(const struct prog *p, uint32_t axes);
int32_t prog_ranks(const struct prog *p, uint32_t axes);
int32_t prog_place_among(const struct prog *p, uint32_t axes);
int64_t value_bytes(const struct value *v);
int64_t value_count(const struct value *v);
/* Recomputes def and last of every value after nodes were moved. */
void prog_refresh(struct prog *p);
/* Moves the nodes from `first` on, which a pass has appended, to their places: node first + k in front of
 * what was node before[k], 0 <= before[k] <= first; those with one place keep their order. Refreshes. */
void prog_insert(struct prog *p, size_t first, const int32_t *before);

/* Passes. Each returns 0 or the code in p->e; each leaves a program that prog_check accepts. */

/* Appends the adjoints of everything that the seeds' values depend on, in SEG_BWD. adjoint: the gradient that
 * a value comes with: the scale [1] f32 of a loss, or what the next stage sends. Parameters (region PARAM)
 * get f32 accumulators in GRAD; a given value that wants one finds its adjoint in value.grad. */
struct seed {
	int32_t value, adjoint;
};
int prog_backward(struct prog *p, const struct seed *seed, size_t n);
/* Folds into one node what one kernel can do: residual-gradient additions into the norm gradients that
 * precede them; activations, their slopes and column sums into products. Where activations will be computed
 * again they stay nodes of their own: a product would have to be repeated with them. */
int prog_fuse(struct prog *p, bool repeats_activations);
/* Computes again instead of keeping, in the first `layers` layers (-1 = all): the modules of the set, or
 * whole layers but for their inputs (Chen et al. 2016; Korthikanti et al. 2022). */
#define REPEATS(X)                                                                               \
	X(GATHERS, "gathers", "what an all-gather of the sequence gave")                         \
	X(CORE, "core_attn", "attention itself, rotary positions and query/key norms before it") \
	X(NORM, "layernorm", "norms, dropout, biases")                                           \
	X(ACTIVATION, "activation", "activations of the feed-forward block")                     \
	X(MLP, "mlp", "the feed-forward block")                                                  \
	X(EXPERTS, "moe", "the mixture-of-experts block, its exchanges between ranks too")       \
	X(LAYERS, "layers", "whole layers")
enum repeat {
#define REPEAT_ROW(name, word, doc) REPEAT_##name,
	REPEATS(REPEAT_ROW)
#undef REPEAT_ROW
	        REPEAT_COUNT
};
int prog_recompute(struct prog *p, uint32_t repeats /* bit set of enum repeat */, int32_t layers);
/* Moves the nodes of BWD that give nothing but weight gradients to WGRAD (Qi et al. 2023). */
int prog_split_backward(struct prog *p);
/* Lets the collectives of these segments (a bit set), and those with arg.comm.begins, run beside what
 * follows, each waited for where its result is needed first; in BWD weight gradients are put there. */
int prog_overlap(struct prog *p, uint32_t segments);
/* Decides what is saved, what shares memory, and every offset; fills p->bytes. */
int prog_plan(struct prog *p);
/* The invariants: definitions precede uses, rules hold again, no two live values overlap. */
int prog_check(struct prog *p);

struct cost {
	double flop, bytes, wire_bytes[AXIS_COUNT]; /* bytes read and written; sent per rank and axis */
};
struct cost prog_cost(const struct prog *p, enum segment segment);
/* Equal on ranks that run the same program: operations, inputs, shapes, placements (not arguments). */
uint64_t prog_hash(const struct prog *p);
/* The listing, one line a node. */
void prog_print(const struct prog *p, struct buf *out);

#endif
