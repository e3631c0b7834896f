/* Body: the register tile for one instruction set and kind of word. Included several times, so no guard.
 * The includer defines PRODUCT(name), TARGET, WORD, and MULTIPLY_ADD(sum, word, vector pointer). */

/* c[rows, vectors] <- (add: +=) A b; rows and vectors are constants after inlining, so sums stay in
 * registers. */
static inline __attribute__((always_inline)) TARGET void
PRODUCT(registers)(const int rows, const int vectors, int64_t depth, const WORD *a, int64_t a_row,
                   int64_t a_depth, const WORD *b, int64_t b_pitch, float *c, int64_t c_pitch, bool add)
{
	ISA(vector) sum[TILE_ROWS][2];
#pragma GCC unroll 12
	for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
		for (int v = 0; v < vectors; v++)
			sum[i][v] = (ISA(vector)){0};
	for (int64_t k = 0; k < depth; k++, a += a_depth, b += b_pitch) {
#pragma GCC unroll 12
		for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
			for (int v = 0; v < vectors; v++)
				MULTIPLY_ADD(sum[i][v], a[i * a_row], b + v * ISA_LANES);
	}
#pragma GCC unroll 12
	for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
		for (int v = 0; v < vectors; v++) {
			ISA(unaligned) *to = (ISA(unaligned) *)(c + i * c_pitch + v * ISA_LANES);
			if (add)
				sum[i][v] += *to;
			*to = sum[i][v];
		}
}

static TARGET void PRODUCT(product)(int64_t words, const uint32_t *a, const uint32_t *b, float *c,
                                    int64_t c_pitch, bool add)
{
	for (int i = 0; i < TILE_ROWS; i += ISA_ROWS)
		PRODUCT(registers)
	(ISA_ROWS, 2, words, (const WORD *)a + i, 1, TILE_ROWS, (const WORD *)b, 2 * ISA_LANES,
	 c + i * c_pitch, c_pitch, add);
}
