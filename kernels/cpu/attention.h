/* What attention's forward and backward share: shapes, loading of heads, the mask of a block of scores.
 *
 * Scores are computed in blocks of queries times keys, so that they never leave the cache: Dao et al.,
 * "FlashAttention", 2022. Blocks that no query sees are left out. All arithmetic is f32. Local.
 * Floor: kernels. */
#ifndef PENTAD_KERNELS_CPU_ATTENTION_H
#define PENTAD_KERNELS_CPU_ATTENTION_H

#include "kernels/cpu/cpu.h"
#include "kernels/cpu/matmul_tile.h"

/* Multiples of TILE_ROWS and of 16, as tile->multiply wants rows and columns: keys are both. Spans of keys
 * are made of the smallest such number. */
enum { BLOCK_QUERIES = 48, BLOCK_KEYS = 96, SPAN = 48 };

#define ATTENTION_LOG2E 1.44269504088896340736f
#define ATTENTION_LN2 0.69314718055994530942f

/* The rows of a tensor: of each sample as many stretches of `length` rows at consecutive positions. */
struct attention_rows {
	struct context context;
	int64_t seq_length, samples, stretches, length;
};

/* Heads of `size` elements that lie side by side in the rows of t from `column` on. */
struct attention_heads {
	const struct tensor *t;
	int64_t row, column, size; /* row: elements of a whole row */
	int64_t padded;            /* size up to a multiple of 16 */
};

/* One call: T tokens a sample, H query heads, G key-value heads. */
struct attention {
	const struct tile *tile;
	const union op_arg *arg;
	const struct tensor *keys, *begins;
	struct attention_heads q, k, v;
	struct attention_rows queries, rows; /* rows: of keys and values */
	int64_t length, heads, groups;
	int64_t padded_length; /* of a stretch of keys, up to a multiple of BLOCK_KEYS */
};

struct attention attention_of(const union op_arg *arg, const struct tensor *qkv, const struct tensor *keys,
                              const struct tensor *begins);
struct attention attention_of_part(const union op_arg *arg, const struct tensor *q, const struct tensor *kv,
                                   const struct tensor *keys, const struct tensor *begins);
/* Fails unless queries, keys and values are f32, bf16 or f16. */
int attention_check(const struct attention *a, enum op op, struct err *e);
/* o, its gradient or what was before it: t[N, H·V]. */
struct attention_heads attention_output(const struct attention *a, const struct tensor *t);

/* Where stretch i of a sample begins: its position in the sample, its row in the tensor. */
int64_t attention_position(const struct attention_rows *r, int64_t i);
int64_t attention_row(const struct attention_rows *r, int64_t sample, int64_t i);

/* to[padded_rows][padded] <- one head of rows [row, row + rows) times scale; zeros around them. */
void attention_load(const struct attention_heads *h, int64_t row, int64_t head, int64_t rows,
                    int64_t padded_rows, float scale, float *to);
/* to[size][padded_length] <- one head of the stretch of keys or values that begins at `row`, transposed. */
void attention_load_transposed(const struct attention *a, const struct attention_heads *h, int64_t row,
                               int64_t head, float *to);
/* One head of rows [row, row + rows) <- from[][padded] times scale. */
void attention_store(const struct attention_heads *h, int64_t row, int64_t head, int64_t rows, float scale,
                     float *from);

/* A block of at most BLOCK_QUERIES queries of one head, and the first key that each of them sees. */
struct attention_block {
	int64_t sample, head, row, position;
	int64_t rows, padded; /* padded: up to a multiple of TILE_ROWS */
	int64_t first[BLOCK_QUERIES], lowest, highest;
};
/* How many blocks the queries of a sample are; block n of them. */
int64_t attention_blocks(const struct attention *a);
struct attention_block attention_block_of(const struct attention *a, int64_t sample, int64_t head, int64_t n);

/* Keys of a stretch that a block sees lie in its [begin, end), multiples of `unit`, a divisor of BLOCK_KEYS;
 * none where they are equal. */
struct attention_span {
	int64_t begin, end;
};
struct attention_span attention_span_of(const struct attention *a, const struct attention_block *b,
                                        int64_t stretch, int64_t unit);
/* Whether causality and window let any query see a key of the stretch. */
bool attention_sees(const struct attention *a, int64_t stretch);
/* -inf into scores s[BLOCK_QUERIES][BLOCK_KEYS] of keys [key, key + columns) of the stretch that the query
 * does not see. */
void attention_hide(const struct attention *a, const struct attention_block *b, int64_t stretch, int64_t key,
                    int columns, float *s);
/* x *= the dropout mask of these scores, where there is dropout. */
void attention_drop(const struct attention *a, const struct attention_block *b, int64_t stretch, int64_t key,
                    int columns, float *x);

#endif
