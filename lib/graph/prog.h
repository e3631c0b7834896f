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
	X(SAVED, "saved", "activations kept for backward, one slot a micro-batch in flight") \
	X(TEMP, "temp", "everything else, reused")
enum region {
#define REGION_ROW(name, word, doc) R_##name,
	REGIONS(REGION_ROW)
#undef REGION_ROW
	        R_COUNT
};

#define SEGMENTS(X) X(FWD, "fwd") X(BWD, "bwd") X(REDUCE, "reduce") X(STEP, "step")
enum segment {
#define SEGMENT_ROW(name, word) SEG_##name,
	SEGMENTS(SEGMENT_ROW)
#undef SEGMENT_ROW
	        SEG_COUNT
};

extern const char *const place_names[PLACE_COUNT], *const region_names[R_COUNT],
                                                           *const segment_names[SEG_COUNT];

enum { NONE = -1 }; /* no value: an absent optional input */

struct value { /* one tensor, written by one node; accumulators in GRAD and STAT by several */
	const char *name;
	int32_t dim[TENSOR_MAX_DIM]; /* this rank's share */
	uint8_t nd, dtype, region, want_grad;
	uint8_t place[AXIS_COUNT];
	int32_t def, last;    /* first writer and last reader, node indices; NONE = outside */
	int32_t grad;         /* the value that holds the adjoint, or NONE */
	int32_t home;         /* the value whose memory this one uses; itself where it has its own */
	int64_t offset_bytes; /* from the region's base; set by prog_plan */
};

struct node { /* index order is execution order */
	uint8_t op, segment;
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
	int32_t layer;                 /* what the next nodes belong to */
	uint8_t segment;
	int64_t bytes[R_COUNT]; /* set by prog_plan: known before any device is touched */
	struct err e;           /* the first refusal; e.code 0 = none */
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
/* Says how an outside value lies along an axis. Axes of one rank are always REPLICATED. */
void prog_place(struct prog *p, int32_t value, enum mesh_axis axis, enum place place);
int32_t prog_emit(struct prog *p, enum op op, const union op_arg *arg, const char *where, const int32_t *in,
                  size_t n_in, const int32_t *out);
/* Output k of the newest node. */
int32_t prog_out(const struct prog *p, int k);
/* Records the first error; later ones are consequences. */
void prog_refuse(struct prog *p, const struct node *n, const char *why);
int64_t value_bytes(const struct value *v);
int64_t value_count(const struct value *v);
/* Recomputes def and last of every value after nodes were moved. */
void prog_refresh(struct prog *p);

/* Passes. Each returns 0 or the code in p->e; each leaves a program that prog_check accepts. */

/* Appends the adjoints of everything that `loss` depends on, in SEG_BWD; `seed` [1] f32 is the gradient of
 * the loss. Parameters (region PARAM) get f32 accumulators in GRAD. */
int prog_backward(struct prog *p, int32_t loss, int32_t seed);
/* Folds residual-gradient additions into the norm gradients that precede them. */
int prog_fuse(struct prog *p);
/* Keeps less and computes again, in the first `layers` layers (-1 = all): REPEAT_CHEAP operations, or whole
 * layers but for their inputs (Chen et al. 2016; Korthikanti et al. 2022). */
enum repeat { REPEAT_NOTHING, REPEAT_CHEAP, REPEAT_LAYERS };
int prog_recompute(struct prog *p, enum repeat what, int32_t layers);
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
