/* Tensors for the tests of operations: built from a row of op_cases.def, with guard bytes around each. */
#ifndef PENTAD_TEST_OPS_FIXTURE_H
#define PENTAD_TEST_OPS_FIXTURE_H

#include <stdbool.h>

#include "op/op.h"
#include "test/test.h"

struct backend;

/* The letters of op_cases.def. */
enum { SIZES = 7 };

struct op_case {
	enum op op;
	const char *in, *out;
	void (*arg)(union op_arg *arg, int size, int variant);
	int variants;
	bool exact;
	double f32_tolerance, bf16_tolerance;
};

struct grad_case {
	enum op forward, backward;
	const char *in, *of;
};

extern const struct op_case op_cases[];
extern const int op_case_count;
extern const struct grad_case grad_cases[];
extern const int grad_case_count;

/* Which of a row's tensors and how. */
struct setup {
	int size, variant;
	enum dtype dtype; /* of kind t; f64 makes all floating-point tensors f64 */
	bool optional;    /* inputs marked ? or ~ are there */
	bool acc;         /* outputs marked + are added to */
};

struct fixture {
	const struct op_case *c;
	struct setup setup;
	union op_arg arg;
	struct tensor in[OP_MAX_IN], out[OP_MAX_OUT];
};

const struct op_case *op_case_of(enum op op);
/* Of a tensor of this type. */
double case_tolerance(const struct op_case *c, enum dtype dtype);
struct fixture fixture_open(const struct op_case *c, struct setup setup);
/* The same contents in memory of its own. */
struct fixture fixture_copy(const struct fixture *f);
void fixture_close(struct fixture *f);
/* Runs the operation in a fresh stream; in_place: the input that output 0 is put on, -1 none. Checks that it
 * returned 0, that guards stand, and that inputs are as they were where the row allows no change. */
void fixture_run(struct fixture *f, const struct backend *b, int num_threads, int in_place);
/* Equal inputs and outputs, bit for bit. */
bool fixture_same_bits(const struct fixture *a, const struct fixture *b);
/* Output 0 on top of an input that may be written over gives what `result` holds. */
void fixture_check_in_place(const struct fixture *start, const struct fixture *result,
                            const struct backend *b);
/* Inputs of a backward operation that its forward operation computes become what that gives. */
void fixture_consistent(struct fixture *f);
/* "layernorm, size 3, bf16, variant 0, with optional inputs, adding": static storage. */
const char *fixture_text(const struct fixture *f);

/* Guarded memory; the shape as given. Filled with normal numbers from `seed` where it is floating-point. */
struct tensor tensor_make(enum dtype dtype, int nd, const int32_t *dim, uint64_t seed);
struct tensor tensor_copy(const struct tensor *t);
void tensor_free(struct tensor *t);
bool tensor_guarded(const struct tensor *t);
double tensor_at(const struct tensor *t, int64_t i);
void tensor_put(const struct tensor *t, int64_t i, double x);
#define TENSOR(dtype, seed, ...)                                                      \
	tensor_make(dtype, (int)(sizeof((int32_t[]){__VA_ARGS__}) / sizeof(int32_t)), \
	            (int32_t[]){__VA_ARGS__}, seed)
/* Fails the test where b is further from a than allowed: |a-b| <= tolerance · (|a| + rms(a) + 0.01), the rms
 * of what is finite; what is infinite must be the same. */
void tensor_compare(const struct tensor *a, const struct tensor *b, double tolerance, const char *what);
/* Runs one operation on tensors at hand and checks that it succeeds. */
void op_run(const struct backend *b, enum op op, union op_arg arg, const struct tensor *in,
            const struct tensor *out);

#endif
