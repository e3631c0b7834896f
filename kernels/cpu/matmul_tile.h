/* The innermost loops of matmul and attention: a few rows times a few vectors, held in registers.
 *
 * One table per instruction set, chosen once at run time by what the processor has; matmul_isa.h and
 * attention_isa.h are its body, compiled for each. The form follows Goto & van de Geijn, "Anatomy of
 * high-performance matrix multiplication", ACM TOMS 2008. All functions are Local, run on one thread and
 * allocate nothing. Floor: kernels. */
#ifndef PENTAD_KERNELS_CPU_MATMUL_TILE_H
#define PENTAD_KERNELS_CPU_MATMUL_TILE_H

#include <stdbool.h>
#include <stdint.h>

#include "op/op.h"

enum { TILE_ROWS = 12, TILE_MAX_COLUMNS = 32 };

/* How matrix elements become the 32-bit words of a packed panel: f32 as it is; bf16 and f16 widened to f32;
 * two bf16 of neighbouring depth in one word, for processors that multiply such pairs. */
enum tile_word { WORD_F32, WORD_BF16_WIDE, WORD_F16_WIDE, WORD_BF16_PAIR, WORD_COUNT };

/* The words of f32 that elements of this type become. */
static inline enum tile_word tile_word_of(enum dtype dtype)
{
	return dtype == DT_f32 ? WORD_F32 : dtype == DT_bf16 ? WORD_BF16_WIDE : WORD_F16_WIDE;
}

/* Lane i, depth k of a matrix is element i + k · pitch where the lanes are adjacent, else i · pitch + k. */
struct tile_source {
	const void *data;
	int64_t pitch;
	bool lanes_adjacent;
};

/* panel[words of depth][width] <- lanes [first, first + lanes) at depths [begin, end); lanes up to width and
 * the second half of an odd last pair are zero. width 8 or more; begin even for pairs. */
typedef void tile_pack_fn(const struct tile_source *s, int64_t first, int lanes, int width, int64_t begin,
                          int64_t end, uint32_t *panel);
/* c[TILE_ROWS, columns] <- (add: +=) a[words][TILE_ROWS]' b[words][columns], both packed. */
typedef void tile_product_fn(int64_t words, const uint32_t *a, const uint32_t *b, float *c, int64_t c_pitch,
                             bool add);

struct tile {
	const char *name;
	int columns; /* of a panel of b: two vectors */
	tile_pack_fn *pack[WORD_COUNT];
	tile_product_fn *product;      /* of f32 words */
	tile_product_fn *product_pair; /* of pairs; NULL where it would not be faster than widening */
	/* c[m,n] <- (add: +=) A[m,k] b[k,n], A(i,k) = a[i · a_row + k · a_depth], one of which is 1; m a
	 * multiple of TILE_ROWS, n of 16. For operands that fit in the second-level cache. */
	void (*multiply)(int m, int n, int k, const float *a, int64_t a_row, int64_t a_depth, const float *b,
	                 int64_t b_pitch, float *c, int64_t c_pitch, bool add);
	/* Scores s[rows, columns] in powers of two, columns a multiple of 16: top[i] becomes the largest so
	 * far, s <- 2^(s - top), sum[i] is brought up to date, shrink[i] = what older terms are multiplied
	 * by: Milakov & Gimelshein, "Online normalizer calculation for softmax", 2018. */
	void (*softmax)(int rows, int columns, float *s, int64_t pitch, float *top, float *sum,
	                float *shrink);
	/* s <- 2^(s - lse[i]). */
	void (*exponent)(int rows, int columns, float *s, int64_t pitch, const float *lse);
	/* ds <- p · (ds - delta[i]). */
	void (*score_grad)(int rows, int columns, const float *p, float *ds, int64_t pitch,
	                   const float *delta);
	/* Sum of a[i] b[i]; y += x · scale; n any. */
	float (*dot)(int64_t n, const float *a, const float *b);
	void (*add_scaled)(int64_t n, float scale, const float *x, float *y);
};

/* The best table that this processor runs; static storage. */
const struct tile *tile_best(void);
/* Table i in order of preference, NULL behind the last; *runs says whether this processor can. For tests. */
const struct tile *tile_at(int i, bool *runs);

#endif
