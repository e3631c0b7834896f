/* Placement rules by force: an operation, or a block of several, is built with its operands placed in every
 * combination there is. What the rules accept is run on two ranks and on four, as threads, and the results,
 * put together as their placements say, must be those of one rank. */
#ifndef PENTAD_TEST_PLACEMENT_H
#define PENTAD_TEST_PLACEMENT_H

#include "graph/prog.h"

enum { AXES = 2, RANKS = 4, PIECES = 3, MOST = 16 * 24, RESULTS = 6, UNTRIED = -1, TOGETHER = -2 };

/* What an operation is tried along: what the first axis has cut, the second cuts again. Each stands for as
 * many ranks of the other grid, its twin; where there is no second grid, an axis is its own twin. */
struct mesh_pair {
	enum mesh_axis axis[AXES], twin[AXES];
};

/* How a value is cut where it is no plain matrix. */
struct layout {
	int32_t piece[PIECES]; /* widths of what lies side by side in a row and is cut piece by piece */
	int32_t blocks;        /* of rows, one behind the other; 0 counts as 1 */
	uint32_t between; /* bit set of the axes that cut between blocks; others cut each (cp: context) */
	bool choices;     /* along SHARD1 every rank has all columns, and its own choices among them */
};

struct shape {
	int32_t dim[2]; /* dim[1] 0: a vector */
	struct layout lies;
};

struct trial;
/* Element i of the whole of operand k, as a rank has it. */
typedef double content_fn(const struct trial *t, int k, int rank, int64_t i);

struct operand {
	uint8_t region, dtype;
	struct shape shape; /* dim[0] 0: absent */
	int32_t below;      /* integers: the limit; -1: floats above 0 */
	content_fn *content;
	bool twin; /* it lies along the twins of the axes */
};

/* Emits nodes; returns how many values of out[RESULTS] are to be compared. */
typedef int build_fn(struct prog *p, enum op op, const union op_arg *arg, const int32_t *in, size_t n_in,
                     int32_t *out);

struct operation {
	build_fn *build;
	enum op op;
	const char *name;
	/* Combinations of placements along each axis that must be accepted, so many, no more; or UNTRIED; or
	 * TOGETHER, and the number of those along both at once. */
	int accepted[AXES];
	union op_arg arg;
	struct operand in[OP_MAX_IN];
	struct layout out[RESULTS];
};

struct list { /* operations that are tried along the same axes */
	struct mesh_pair along;
	const struct operation *operation;
	size_t n;
};

struct result { /* of one rank */
	struct shape shape;
	uint8_t place[AXES];
	double data[MOST];
};

struct trial { /* an operation on the ranks of a mesh, its operands placed in some way */
	const struct operation *o;
	const struct mesh_pair *along;
	int size[AXES];
	uint8_t at[OP_MAX_IN][AXES];
	struct result result[RANKS][RESULTS];
	int n_result;
};

/* Tries every combination along either axis, and along both; `met` (bit of OP_COUNT) is told which operations
 * were on ranks that had accepted. */
void placement_try(const struct operation *o, const struct mesh_pair *along, bool *met);

/* Of attention: a query sees keys from some position on that is not behind its own. */
content_fn placement_begins;

int placement_coordinate(const struct trial *t, int rank, int axis);

/* What differs in the argument of an operation on these operands from rank to rank. */
void placement_argument(const struct prog *p, enum op op, const int32_t *in, union op_arg *arg);
/* The operation itself. */
build_fn one_node;

/* For blocks: the gradients of y, of which `adjoint` is the adjoint; 0 once a rule has refused. */
int32_t differentiate(struct prog *p, int32_t y, int32_t adjoint);
int32_t gradient(const struct prog *p, int32_t v);
/* The gradient of what a stage receives: it must lie as the value does. */
int32_t adjoint_of(const struct prog *p, int32_t v);

/* clang-format off */
#define OF(n, c, ...) {{n, c}, {.piece = {__VA_ARGS__}}}
#define ROWS(n, c) {.region = R_TEMP, .dtype = DT_f32, .shape = OF(n, c, c)}
#define PACKED(n, c, ...) {.region = R_TEMP, .dtype = DT_f32, .shape = OF(n, c, __VA_ARGS__)}
#define PER_ROW(n) {.region = R_TEMP, .dtype = DT_f32, .shape = OF(n, 0, 0)}
#define WEIGHT(m, k) {.region = R_PARAM, .dtype = DT_f32, .shape = OF(m, k, k)}
#define TABLE(m, k) {.region = R_CONST, .dtype = DT_f32, .shape = OF(m, k, k)}
#define HOST(n) {.region = R_INPUT, .dtype = DT_f32, .shape = OF(n, 0, 0)}
#define IDS(n, limit) {.region = R_INPUT, .dtype = DT_i32, .shape = OF(n, 0, 0), .below = limit}
#define KEYS(n) {.region = R_INPUT, .dtype = DT_i64, .shape = OF(n, 0, 0), .below = 1 << 30}
#define COLUMNS(...) {.piece = {__VA_ARGS__}}
#define NODE(name) one_node, OP_##name, #name
#define BLOCK(build, name) build, OP_##name, #build " by " #name
#define LIST(operations, ...) {__VA_ARGS__, operations, sizeof(operations) / sizeof *(operations)}
/* clang-format on */

extern const struct list context_lists[], experts_lists[];
enum { CONTEXT_LISTS = 2, EXPERTS_LISTS = 8 };

#endif
