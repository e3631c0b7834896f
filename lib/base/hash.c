#include "base/hash.h"

#include <pthread.h>
#include <string.h>

static uint32_t table[256];

static void fill_table(void)
{
	for (uint32_t i = 0; i < 256; i++) {
		uint32_t c = i;
		for (int k = 0; k < 8; k++)
			c = c >> 1 ^ (c & 1 ? 0x82F63B78u : 0);
		table[i] = c;
	}
}

static uint32_t crc_plain(uint32_t c, const unsigned char *p, size_t n)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;
	pthread_once(&once, fill_table);
	while (n--)
		c = c >> 8 ^ table[(c ^ *p++) & 255];
	return c;
}

#ifdef __x86_64__
__attribute__((target("sse4.2"))) static uint32_t crc_sse(uint32_t crc, const unsigned char *p, size_t n)
{
	uint64_t c = crc, word;
	for (; n >= 8; n -= 8, p += 8) {
		memcpy(&word, p, 8);
		c = __builtin_ia32_crc32di(c, word);
	}
	while (n--)
		c = __builtin_ia32_crc32qi((uint32_t)c, *p++);
	return (uint32_t)c;
}
static int has_sse(void)
{
	return __builtin_cpu_supports("sse4.2");
}
#else
static uint32_t crc_sse(uint32_t crc, const unsigned char *p, size_t n)
{
	return crc_plain(crc, p, n);
}
static int has_sse(void)
{
	return 0;
}
#endif

uint32_t hash_crc32c(uint32_t crc, const void *data, size_t bytes)
{
	return ~(has_sse() ? crc_sse(~crc, data, bytes) : crc_plain(~crc, data, bytes));
}

static uint64_t mix(uint64_t x)
{
	x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u; /* splitmix64's finaliser */
	x = (x ^ x >> 27) * 0x94d049bb133111ebu;
	return x ^ x >> 31;
}

uint64_t hash_bytes(const void *data, size_t bytes, uint64_t seed)
{
	const unsigned char *p = data;
	uint64_t h = mix(seed + 0x9e3779b97f4a7c15u + bytes);
	for (; bytes >= 8; bytes -= 8, p += 8) {
		uint64_t w = 0;
		for (int i = 0; i < 8; i++)
			w |= (uint64_t)p[i] << 8 * i;
		h = mix(h ^ w) + 0x9e3779b97f4a7c15u;
	}
	uint64_t w = 0;
	for (size_t i = 0; i < bytes; i++)
		w |= (uint64_t)p[i] << 8 * i;
	return mix(h ^ w);
}
