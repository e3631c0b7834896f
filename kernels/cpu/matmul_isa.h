/* Body: packing, register tiles and block products for one instruction set. Included several times by
 * matmul_tile.c, so no guard. The includer defines ISA(name), ISA_TARGET, ISA_LANES (floats of a vector) and
 * ISA_ROWS (rows of the register tile, a divisor of TILE_ROWS). */

typedef float ISA(vector) __attribute__((vector_size(ISA_LANES * 4)));
typedef float ISA(unaligned) __attribute__((vector_size(ISA_LANES * 4), aligned(4), may_alias));

#define PRODUCT(name) ISA(name)
#define TARGET ISA_TARGET
#define WORD float
#define MULTIPLY_ADD(sum, word, from) ((sum) += (word) * *(const ISA(unaligned) *)(from))
#include "kernels/cpu/matmul_product.h"
#undef MULTIPLY_ADD
#undef WORD
#undef TARGET
#undef PRODUCT

#define ISA_INLINE static inline __attribute__((always_inline)) ISA_TARGET

/* f16_to_f32 of eight at once. */
ISA_INLINE void ISA(widen)(word8 *w)
{
	const uint32_t bias = 112u << 23;
	word8 x = *w, exponent = x & 0x7c00, is_small = (word8)(exponent == 0);
	word8 small = (word8)(__builtin_convertvector((int8)(x & 0x3ff), float8) * 0x1p-24f);
	word8 normal = ((x & 0x7fff) << 13) + bias + ((word8)(exponent == 0x7c00) & bias);
	*w = (small & is_small) | (normal & ~is_small) | (x & 0x8000) << 16;
}

/* Eight words of depth of one lane; elements from `have` on count as zero. */
ISA_INLINE void ISA(load)(const enum tile_word kind, const void *data, int64_t at, int64_t have, word8 *w)
{
	const int64_t bytes = kind == WORD_F32 ? 4 : 2, full = kind == WORD_BF16_PAIR ? 16 : 8;
	const char *from = (const char *)data + at * bytes;
	char padded[32] = {0};
	if (have < full)
		from = memcpy(padded, from, (size_t)(have * bytes));
	if (kind == WORD_BF16_WIDE || kind == WORD_F16_WIDE) {
		half8 h;
		memcpy(&h, from, sizeof h);
		*w = __builtin_convertvector(h, word8);
		if (kind == WORD_F16_WIDE)
			ISA(widen)(w);
		else
			*w <<= 16;
	} else {
		memcpy(w, from, sizeof *w);
	}
}

/* Transposes 8 x 8 words in place. */
ISA_INLINE void ISA(transpose)(word8 r[8])
{
	static const word8 low = {0, 8, 1, 9, 4, 12, 5, 13}, high = {2, 10, 3, 11, 6, 14, 7, 15};
	static const word8 low2 = {0, 1, 8, 9, 4, 5, 12, 13}, high2 = {2, 3, 10, 11, 6, 7, 14, 15};
	static const word8 low4 = {0, 1, 2, 3, 8, 9, 10, 11}, high4 = {4, 5, 6, 7, 12, 13, 14, 15};
	word8 t[8], u[8];
#pragma GCC unroll 4
	for (int i = 0; i < 8; i += 2) {
		t[i] = __builtin_shuffle(r[i], r[i + 1], low);
		t[i + 1] = __builtin_shuffle(r[i], r[i + 1], high);
	}
#pragma GCC unroll 4
	for (int i = 0; i < 4; i++) {
		int from = (i & 1) + (i & 2) * 2;
		u[2 * i] = __builtin_shuffle(t[from], t[from + 2], low2);
		u[2 * i + 1] = __builtin_shuffle(t[from], t[from + 2], high2);
	}
#pragma GCC unroll 4
	for (int i = 0; i < 4; i++) {
		r[i] = __builtin_shuffle(u[i], u[i + 4], low4);
		r[i + 4] = __builtin_shuffle(u[i], u[i + 4], high4);
	}
}

/* Depth runs along memory: blocks of eight lanes are transposed; the last block of a width that is no
 * multiple of eight overlaps its neighbour. */
ISA_INLINE void ISA(pack_along)(const enum tile_word kind, const struct tile_source *s, int64_t first,
                                int lanes, int width, int64_t begin, int64_t end, uint32_t *panel)
{
	const int64_t step = kind == WORD_BF16_PAIR ? 16 : 8;
	int64_t words = kind == WORD_BF16_PAIR ? (end - begin + 1) / 2 : end - begin;
	for (int64_t k = begin; k < end; k += step, panel += 8 * width, words -= 8)
		for (int group = 0; group < width; group += 8) {
			int at = group + 8 > width ? width - 8 : group;
			word8 block[8];
			for (int i = 0; i < 8; i++)
				if (at + i < lanes)
					ISA(load)
			(kind, s->data, (first + at + i) * s->pitch + k, end - k, &block[i]);
			else block[i] = (word8){0};
			ISA(transpose)(block);
			for (int i = 0; i < 8 && i < words; i++)
				memcpy(panel + i * width + at, &block[i], sizeof block[i]);
		}
}

/* One row of a panel from lanes that lie side by side; `next` is the row below for pairs, NULL behind the
 * last. */
ISA_INLINE void ISA(pack_row)(const enum tile_word kind, const void *row, const void *next, int lanes,
                              uint32_t *to)
{
	if (kind == WORD_F32) {
		memcpy(to, row, (size_t)lanes * 4);
		return;
	}
	const uint16_t *even = row, *odd = next;
	if (kind == WORD_BF16_WIDE)
		for (int i = 0; i < lanes; i++)
			to[i] = (uint32_t)even[i] << 16;
	else if (kind == WORD_F16_WIDE)
		for (int i = 0; i < lanes; i++)
			((float *)to)[i] = f16_to_f32(even[i]);
	else if (odd)
		for (int i = 0; i < lanes; i++)
			to[i] = even[i] | (uint32_t)odd[i] << 16;
	else
		for (int i = 0; i < lanes; i++)
			to[i] = even[i];
}

ISA_INLINE void ISA(pack_across)(const enum tile_word kind, const struct tile_source *s, int64_t first,
                                 int lanes, int width, int64_t begin, int64_t end, uint32_t *panel)
{
	const int64_t bytes = kind == WORD_F32 ? 4 : 2, step = kind == WORD_BF16_PAIR ? 2 : 1;
	for (int64_t k = begin; k < end; k += step, panel += width) {
		const char *row = (const char *)s->data + (k * s->pitch + first) * bytes;
		const char *next = k + 1 < end ? row + s->pitch * bytes : NULL;
		if (lanes == TILE_ROWS && width == TILE_ROWS) { /* constant lengths vectorise better */
			ISA(pack_row)(kind, row, next, TILE_ROWS, panel);
		} else if (lanes == 2 * ISA_LANES) {
			ISA(pack_row)(kind, row, next, 2 * ISA_LANES, panel);
		} else {
			ISA(pack_row)(kind, row, next, lanes, panel);
			memset(panel + lanes, 0, (size_t)(width - lanes) * 4);
		}
	}
}

#define PACK(name, kind)                                                                                   \
	static ISA_TARGET void ISA(name)(const struct tile_source *s, int64_t first, int lanes, int width, \
	                                 int64_t begin, int64_t end, uint32_t *panel)                      \
	{                                                                                                  \
		if (s->lanes_adjacent)                                                                     \
			ISA(pack_across)(kind, s, first, lanes, width, begin, end, panel);                 \
		else                                                                                       \
			ISA(pack_along)(kind, s, first, lanes, width, begin, end, panel);                  \
	}
PACK(pack_f32, WORD_F32)
PACK(pack_wide, WORD_BF16_WIDE)
PACK(pack_f16, WORD_F16_WIDE)
PACK(pack_pair, WORD_BF16_PAIR)
#undef PACK

/* All rows of one column strip, so that its part of b stays in the first-level cache. */
ISA_INLINE void ISA(strip)(const int vectors, int m, int k, const float *a, int64_t a_row, int64_t a_depth,
                           const float *b, int64_t b_pitch, float *c, int64_t c_pitch, bool add)
{
	for (int i = 0; i < m; i += ISA_ROWS)
		ISA(registers)
	(ISA_ROWS, vectors, k, a + i * a_row, a_row, a_depth, b, b_pitch, c + i * c_pitch, c_pitch, add);
}

ISA_INLINE void ISA(strips)(int m, int n, int k, const float *a, int64_t a_row, int64_t a_depth,
                            const float *b, int64_t b_pitch, float *c, int64_t c_pitch, bool add)
{
	int j = 0;
	for (; j + 2 * ISA_LANES <= n; j += 2 * ISA_LANES)
		ISA(strip)(2, m, k, a, a_row, a_depth, b + j, b_pitch, c + j, c_pitch, add);
	if (j < n)
		ISA(strip)(1, m, k, a, a_row, a_depth, b + j, b_pitch, c + j, c_pitch, add);
}

static ISA_TARGET void ISA(multiply)(int m, int n, int k, const float *a, int64_t a_row, int64_t a_depth,
                                     const float *b, int64_t b_pitch, float *c, int64_t c_pitch, bool add)
{
	if (a_depth == 1)
		ISA(strips)(m, n, k, a, a_row, 1, b, b_pitch, c, c_pitch, add);
	else
		ISA(strips)(m, n, k, a, 1, a_depth, b, b_pitch, c, c_pitch, add);
}
