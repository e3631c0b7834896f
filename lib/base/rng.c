#include "base/rng.h"
#include "base/hash.h"

#include <math.h>
#include <string.h>

uint64_t rng_key(uint64_t seed, const char *name)
{
	return rng_subkey(hash_bytes(name, strlen(name), 0), seed);
}

uint64_t rng_subkey(uint64_t key, uint64_t index)
{
	uint32_t r[4];
	rng_philox(key, index, 0x6b6579, r);
	return (uint64_t)r[1] << 32 | r[0];
}

uint64_t rng_bits(uint64_t key, uint64_t index)
{
	uint32_t r[4];
	rng_philox(key, index, 0, r);
	return (uint64_t)r[1] << 32 | r[0];
}

double rng_uniform(uint64_t key, uint64_t index)
{
	return (double)(rng_bits(key, index) >> 11) * 0x1p-53;
}

/* Elements 2k and 2k+1 come from block k: two uniforms, (0,1] for the logarithm. */
static void normal_pair(uint64_t key, uint64_t k, double z[2])
{
	uint32_t r[4];
	rng_philox(key, k, 1, r);
	double u = ((double)r[0] * 0x1p32 + r[1] + 1) * 0x1p-64;
	double v = ((double)r[2] * 0x1p32 + r[3]) * 0x1p-64;
	double radius = sqrt(-2 * log(u)), angle = 2 * 3.14159265358979323846 * v;
	z[0] = radius * cos(angle);
	z[1] = radius * sin(angle);
}

void rng_normal(uint64_t key, uint64_t first, size_t n, float mean, float std, float *out)
{
	double z[2];
	for (size_t i = 0; i < n; i++) {
		uint64_t at = first + i;
		if (i == 0 || !(at & 1))
			normal_pair(key, at / 2, z);
		out[i] = (float)(mean + std * z[at & 1]);
	}
}
