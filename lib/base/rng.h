/* Counter-based random numbers: the value is a pure function of (key, index), so initial weights,
 * dropout masks and data order are the same under every layout and after every resume.
 * Philox4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Local. Floor: base.
 */
#ifndef PENTAD_BASE_RNG_H
#define PENTAD_BASE_RNG_H

#include "base/inline.h"

#include <stddef.h>
#include <stdint.h>

/* Ten rounds of Philox4x32; inline so that kernels vectorise it. */
ANYWHERE void rng_philox(uint64_t key, uint64_t counter_lo, uint64_t counter_hi, uint32_t out[4])
{
	uint32_t c0 = (uint32_t)counter_lo, c1 = (uint32_t)(counter_lo >> 32);
	uint32_t c2 = (uint32_t)counter_hi, c3 = (uint32_t)(counter_hi >> 32);
	uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
	for (int i = 0; i < 10; i++) {
		uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
		uint32_t n0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0, n2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
		c1 = (uint32_t)p1;
		c3 = (uint32_t)p0;
		c0 = n0;
		c2 = n2;
		k0 += 0x9E3779B9u;
		k1 += 0xBB67AE85u;
	}
	out[0] = c0;
	out[1] = c1;
	out[2] = c2;
	out[3] = c3;
}

/* A key for everything drawn under one seed and one name ("decoder.layers.3.mlp.fc1.weight"). */
uint64_t rng_key(uint64_t seed, const char *name);
/* A further key below `key`: step, sample, micro-batch … */
uint64_t rng_subkey(uint64_t key, uint64_t index);
/* 64 random bits; uniform in [0, 1) with 53 bits. */
uint64_t rng_bits(uint64_t key, uint64_t index);
double rng_uniform(uint64_t key, uint64_t index);
/* out[i] = mean + std · z(first + i), z standard normal by Box–Muller; any slice of the same sequence
 * gives the same values. */
void rng_normal(uint64_t key, uint64_t first, size_t n, float mean, float std, float *out);

#endif
