#include "kernels/cpu/mask.h"

#include "kernels/cpu/cpu.h"

enum { LANES = 16 }; /* philox blocks computed side by side */

/* word[4l + k] is word k of block counter + l: rng_philox, one lane a block. */
CPU_CLONES static void philox_lanes(uint64_t key, uint64_t counter, uint32_t salt, uint32_t word[4 * LANES])
{
	uint32_t c0[LANES], c1[LANES], c2[LANES], c3[LANES];
	uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
	for (int l = 0; l < LANES; l++) {
		c0[l] = (uint32_t)(counter + (uint64_t)l);
		c1[l] = (uint32_t)((counter + (uint64_t)l) >> 32);
		c2[l] = salt;
		c3[l] = 0;
	}
	for (int i = 0; i < 10; i++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
#pragma GCC unroll 1 /* or the lanes are unrolled before they are seen as a vector */
		for (int l = 0; l < LANES; l++) {
			uint64_t p0 = (uint64_t)0xD2511F53u * c0[l], p1 = (uint64_t)0xCD9E8D57u * c2[l];
			c0[l] = (uint32_t)(p1 >> 32) ^ c1[l] ^ k0;
			c2[l] = (uint32_t)(p0 >> 32) ^ c3[l] ^ k1;
			c1[l] = (uint32_t)p1;
			c3[l] = (uint32_t)p0;
		}
	}
	for (int l = 0; l < LANES; l++) {
		word[4 * l] = c0[l];
		word[4 * l + 1] = c1[l];
		word[4 * l + 2] = c2[l];
		word[4 * l + 3] = c3[l];
	}
}

CPU_CLONES static void select_survivors(const uint32_t *word, uint32_t threshold, float scale, float *out,
                                        int64_t n)
{
#pragma omp simd
	for (int64_t i = 0; i < n; i++)
		out[i] = word[i] >= threshold ? scale : 0;
}

CPU_CLONES static void jitter_words(const uint32_t *word, float p, float *out, int64_t n)
{
#pragma omp simd
	for (int64_t i = 0; i < n; i++)
		out[i] = mask_jitter(p, word[i]);
}

/* How many of the words of elements from i on, at most n, come with the blocks from i / 4 on: into word[i %
 * 4] and behind it. */
static int64_t draw(uint64_t key, uint32_t salt, uint64_t i, int64_t n, uint32_t word[4 * LANES])
{
	int64_t have = 4 * LANES - (int64_t)(i % 4);
	philox_lanes(key, i / 4, salt, word);
	return have < n ? have : n;
}

void mask_row(uint64_t key, uint32_t salt, uint64_t first, int64_t n, float p, float *out)
{
	uint32_t word[4 * LANES], threshold = mask_threshold(p);
	float scale = mask_scale(p);
	for (int64_t j = 0, have; j < n; j += have) {
		uint64_t i = first + (uint64_t)j;
		have = draw(key, salt, i, n - j, word);
		select_survivors(word + i % 4, threshold, scale, out + j, have);
	}
}

void mask_row_jitter(uint64_t key, uint32_t salt, uint64_t first, int64_t n, float p, float *out)
{
	uint32_t word[4 * LANES];
	for (int64_t j = 0, have; j < n; j += have) {
		uint64_t i = first + (uint64_t)j;
		have = draw(key, salt, i, n - j, word);
		jitter_words(word + i % 4, p, out + j, have);
	}
}
