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

void mask_row(uint64_t key, uint32_t salt, uint64_t first, int64_t n, float p, float *out)
{
	uint32_t word[4 * LANES], threshold = mask_threshold(p);
	float scale = mask_scale(p);
	for (int64_t j = 0; j < n;) {
		uint64_t i = first + (uint64_t)j;
		philox_lanes(key, i / 4, salt, word);
		int64_t skip = (int64_t)(i % 4), have = 4 * LANES - skip;
		have = have < n - j ? have : n - j;
		select_survivors(word + skip, threshold, scale, out + j, have);
		j += have;
	}
}
