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

/* C[m,n] <- (acc: +=) A[m,k] B[k,n] (+ bias[n]), row-major and contiguous. A transposed operand is stored
 * the other way round: A as [k,m], B as [n,k]. */
struct matmul {
	int64_t m, n, k;
	const void *a, *b;
	bool a_transposed, b_transposed;
	enum dtype dtype; /* of both operands: DT_f32 or DT_bf16 */
	void *c;
	enum dtype c_dtype; /* DT_f32 or DT_bf16; sums are f32 until they are written */
	bool acc;
	const struct tensor *bias; /* f32 or bf16; NULL = none */
};

typedef void matmul_fn(struct stream *s, const struct matmul *g);

struct matmul_impl {
	const char *name; /* "own kernels", "oneDNN 2.6.3"; static storage */
	matmul_fn
	        *run[DT_COUNT]; /* by the type of the operands; NULL where it has none or is not the faster */
	/* What run asks cpu_scratch for. */
	struct cpu_space (*space)(const struct stream *s, const struct matmul *g);
};

const struct matmul_impl *matmul_blocked(void);
/* NULL in a build without oneDNN. */
const struct matmul_impl *matmul_onednn(void);
/* Row i, in order of preference, of those that this build has; NULL behind the last. */
const struct matmul_impl *matmul_at(int i);

/* The own kernel with a given register tile: what tests and `bench` ask for. */
void matmul_blocked_with(struct stream *s, const struct matmul *g, const struct tile *tile);

/* c[i] for columns [column, column + n) of row `row` <- sums (+ bias) (acc: + c): the end of a product whose
 * sums lie elsewhere, or in c itself. */
void matmul_write_row(const struct matmul *g, int64_t row, int64_t column, int64_t n, float *sums);

#endif
