/* What attention's forward and backward share: shapes, loading of heads, the mask of a block of scores.
 *
 * Scores are computed in blocks of queries times keys, so that they never leave the cache: Dao et al.,
 * "FlashAttention", 2022. All arithmetic is f32. Local. Floor: kernels. */
#ifndef PENTAD_KERNELS_CPU_ATTENTION_H
#define PENTAD_KERNELS_CPU_ATTENTION_H

#include "kernels/cpu/cpu.h"
#include "kernels/cpu/matmul_tile.h"

/* Multiples of TILE_ROWS and of 16, as tile->multiply wants rows and columns. */
enum { BLOCK_QUERIES = 48, BLOCK_KEYS = 96 };

#define ATTENTION_LOG2E 1.44269504088896340736f
#define ATTENTION_LN2 0.69314718055994530942f

/* One call: T tokens a sample, H query heads, G key-value heads, D the head's size. */
struct attention {
	const struct tile *tile;
	const union op_arg *arg;
	const struct tensor *qkv, *keys;
	int64_t samples, length, heads, groups, size;
	int64_t row;           /* elements of a row of qkv */
	int64_t padded_size;   /* D up to a multiple of 16 */
	int64_t padded_length; /* T up to a multiple of BLOCK_KEYS */
};

struct attention attention_of(const union op_arg *arg, const struct tensor *qkv, const struct tensor *keys);

/* Where the first of D elements lies in qkv. */
static inline int64_t attention_query_at(const struct attention *a, int64_t sample, int64_t t, int64_t head)
{
	return (sample * a->length + t) * a->row + head * a->size;
}
static inline int64_t attention_key_at(const struct attention *a, int64_t sample, int64_t t, int64_t group)
{
	return attention_query_at(a, sample, t, a->heads + group);
}
static inline int64_t attention_value_at(const struct attention *a, int64_t sample, int64_t t, int64_t group)
{
	return attention_query_at(a, sample, t, a->heads + a->groups + group);
}

/* to[padded_rows][padded_size] <- `rows` rows of D elements, `pitch` apart from `at` on, times scale; zeros
 * around them. */
void attention_load(const struct attention *a, const struct tensor *t, int64_t at, int64_t pitch,
                    int64_t rows, int64_t padded_rows, float scale, float *to);
/* to[D][padded_length] <- the T keys or values of a sample that begin at `at`, transposed. */
void attention_load_transposed(const struct attention *a, int64_t at, float *to);
/* `rows` rows of D elements of t, `pitch` apart from `at` on, <- from[][padded_size] times scale. */
void attention_store(const struct attention *a, const struct tensor *t, int64_t at, int64_t pitch,
                     int64_t rows, float scale, float *from);

/* Keys that queries [query, query + BLOCK_QUERIES) see lie in [begin, end): begin a multiple of BLOCK_KEYS,
 * end of BLOCK_QUERIES. */
struct attention_span {
	int64_t begin, end;
};
struct attention_span attention_span_of(const struct attention *a, int64_t query);
/* -inf into scores s[BLOCK_QUERIES][BLOCK_KEYS] of keys [key, key + columns) that the query does not see. */
void attention_hide(const struct attention *a, int64_t query, int64_t key, int columns, float *s);
/* x *= the dropout mask of the block, where there is dropout. */
void attention_drop(const struct attention *a, int64_t sample, int64_t head, int64_t query, int64_t key,
                    int columns, float *x);

#endif
