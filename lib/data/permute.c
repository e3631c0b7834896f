#include "data/permute.h"
#include "base/err.h"
#include "base/rng.h"

#include <math.h>

/* Small domains need more rounds than large ones: 8 leave a measurable bias at n = 5. */
enum { ROUNDS = 12 };

/* The domain a·b: the smallest a with a² >= n, then the smallest b with a·b >= n. */
struct domain {
	uint64_t key, a, b;
};

static struct domain domain_of(uint64_t key, uint64_t n)
{
	uint64_t a = (uint64_t)sqrt((double)n);
	while (a * a < n)
		a++;
	while (a > 1 && (a - 1) * (a - 1) >= n)
		a--;
	return (struct domain){key, a, (n + a - 1) / a};
}

/* What a round adds: uniform in [0, modulus) up to modulus / 2^64, by the high half of a product. */
static uint64_t round_value(const struct domain *d, int round, uint64_t half, uint64_t modulus)
{
	uint32_t r[4];
	rng_philox(d->key, half, (uint64_t)round, r);
	uint64_t bits = (uint64_t)r[1] << 32 | r[0];
	return (uint64_t)((unsigned __int128)bits * modulus >> 64);
}

/* Even rounds change l by r, odd ones r by l. */
static uint64_t forward(const struct domain *d, uint64_t x)
{
	uint64_t l = x % d->a, r = x / d->a;
	for (int k = 0; k < ROUNDS; k += 2) {
		l = (l + round_value(d, k, r, d->a)) % d->a;
		r = (r + round_value(d, k + 1, l, d->b)) % d->b;
	}
	return r * d->a + l;
}

static uint64_t backward(const struct domain *d, uint64_t x)
{
	uint64_t l = x % d->a, r = x / d->a;
	for (int k = ROUNDS - 2; k >= 0; k -= 2) {
		r = (r + d->b - round_value(d, k + 1, l, d->b)) % d->b;
		l = (l + d->a - round_value(d, k, r, d->a)) % d->a;
	}
	return r * d->a + l;
}

uint64_t permute_index(uint64_t key, uint64_t n, uint64_t i)
{
	ASSERT(i < n && n <= PERMUTE_MAX);
	struct domain d = domain_of(key, n);
	do
		i = forward(&d, i);
	while (i >= n);
	return i;
}

uint64_t permute_inverse(uint64_t key, uint64_t n, uint64_t i)
{
	ASSERT(i < n && n <= PERMUTE_MAX);
	struct domain d = domain_of(key, n);
	do
		i = backward(&d, i);
	while (i >= n);
	return i;
}
