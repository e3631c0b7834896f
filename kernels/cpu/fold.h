/* Sums over rows that do not depend on the number of threads: the rows are cut into blocks by the shape
 * alone, each block has partial sums of its own, and these are added in the order of the blocks.
 * Uses the stream's shared scratch. Floor: kernels. */
#ifndef PENTAD_KERNELS_CPU_FOLD_H
#define PENTAD_KERNELS_CPU_FOLD_H

#include "kernels/cpu/cpu.h"

struct fold {
	int64_t rows, block_rows, blocks, width;
	float *partial; /* [blocks][width] */
};

/* At least 64 rows a block and at most 64 blocks; `width` sums each. */
void fold_open(struct fold *f, struct stream *s, int64_t rows, int64_t width);
/* What fold_open and fold_sum ask cpu_scratch for, where the largest sum has `most` elements and a part fills
 * whole blocks. */
struct cpu_space fold_space(const struct stream *s, int64_t rows, int64_t width, int64_t most);
/* The sums of block k, zeroed: call once a block, from the part that fills it. */
float *fold_block(const struct fold *f, int64_t k);
/* First row of block k; of block `blocks`: the number of rows. */
int64_t fold_first(const struct fold *f, int64_t k);
/* out (f32, acc) <- sums [first, first + its elements) over all blocks. */
void fold_sum(struct fold *f, struct stream *s, int64_t first, const struct tensor *out);

#endif
