/* Matrix products of the processor backend: one problem, several implementations behind one table.
 *
 * Results of the own kernel do not depend on the number of threads: the depth is cut by the shape alone.
 * Safe where several streams call at once. Floor: kernels. */
#ifndef PENTAD_KERNELS_CPU_MATMUL_H
#define PENTAD_KERNELS_CPU_MATMUL_H

#include <stdbool.h>
#include <stdint.h>

#include "op/op.h"

struct stream;
struct tile;
struct cpu_space;
struct err;

/* C[m,n] <- (acc: +=) A[m,k] B[k,n] (+ bias[n]), row-major and contiguous. A transposed operand is stored
 * the other way round: A as [k,m], B as [n,k]. */
struct matmul {
	int64_t m, n, k;
	const void *a, *b;
	bool a_transposed, b_transposed;
	enum dtype dtype; /* of both operands: DT_f32, DT_bf16 or DT_f16 */
	void *c;
	enum dtype c_dtype; /* of these too; sums are f32 until they are written */
	bool acc;
	const struct tensor *bias; /* NULL = none */
	int64_t a_pitch;           /* elements from a row of A, as it is stored, to the next; 0: no gap */
};

static inline int64_t matmul_a_pitch(const struct matmul *g)
{
	return g->a_pitch ? g->a_pitch : g->a_transposed ? g->m : g->k;
}

typedef void matmul_fn(struct stream *s, const struct matmul *g);

struct matmul_impl {
	const char *name; /* "own kernels", "oneDNN 2.6.3"; static storage */
	matmul_fn
	        *run[DT_COUNT]; /* by the type of the operands; NULL where it has none or is not the faster */
	/* What run asks cpu_scratch for. */
	struct cpu_space (*space)(const struct stream *s, const struct matmul *g);
	/* The most that it asks for any product that is not larger in m, n or k. */
	struct cpu_space (*most)(const struct stream *s, const struct matmul *g);
};

const struct matmul_impl *matmul_blocked(void);
/* NULL in a build without oneDNN. */
const struct matmul_impl *matmul_onednn(void);
/* Row i, in order of preference, of those that this build has; NULL behind the last. */
const struct matmul_impl *matmul_at(int i);

/* Runs the product by the first row that has one for its type; no rows or no depth: a sum of nothing. */
void matmul_run(struct stream *s, const struct matmul *g);
struct cpu_space matmul_most(const struct stream *s, const struct matmul *g);
/* EXIT_INTERNAL where the types are none that a product takes: in[0] and in[1] are its operands. */
int matmul_check(const char *op, const struct tensor *in, const struct tensor *out, struct err *e);

/* The own kernel with a given register tile: what tests and `bench` ask for. */
void matmul_blocked_with(struct stream *s, const struct matmul *g, const struct tile *tile);

/* c[i] for columns [column, column + n) of row `row` <- sums (+ bias) (acc: + c): the end of a product whose
 * sums lie elsewhere, or in c itself. */
void matmul_write_row(const struct matmul *g, int64_t row, int64_t column, int64_t n, float *sums);

#endif
