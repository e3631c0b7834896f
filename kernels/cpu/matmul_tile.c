#include "kernels/cpu/matmul_tile.h"

#include <stddef.h>
#include <string.h>

typedef uint32_t word8 __attribute__((vector_size(32)));
typedef uint16_t half8 __attribute__((vector_size(16)));
typedef int32_t int8 __attribute__((vector_size(32)));
typedef float float8 __attribute__((vector_size(32)));

#define TILE(tile_name, pair)                                                                      \
	{                                                                                          \
		.name = tile_name, .columns = 2 * ISA_LANES,                                       \
		.pack = {ISA(pack_f32), ISA(pack_wide), ISA(pack_f16), ISA(pack_pair)},            \
		.product = ISA(product), .product_pair = pair, .multiply = ISA(multiply),          \
		.softmax = ISA(softmax), .exponent = ISA(exponent), .score_grad = ISA(score_grad), \
		.dot = ISA(dot), .add_scaled = ISA(add_scaled)                                     \
	}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>

#define ISA(name) avx512_##name
#define ISA_TARGET __attribute__((target("arch=x86-64-v4")))
#define ISA_LANES 16
#define ISA_ROWS 12
#include "kernels/cpu/matmul_isa.h"
#include "kernels/cpu/attention_isa.h"

#define PRODUCT(name) avx512_bf16_##name
#define TARGET __attribute__((target("arch=x86-64-v4,avx512bf16")))
#define WORD uint32_t
#define MULTIPLY_ADD(sum, word, from)                                                                   \
	((sum) = (ISA(vector))_mm512_dpbf16_ps((__m512)(sum), (__m512bh)_mm512_set1_epi32((int)(word)), \
	                                       (__m512bh)_mm512_loadu_si512(from)))
#include "kernels/cpu/matmul_product.h"
#undef MULTIPLY_ADD
#undef WORD
#undef TARGET
#undef PRODUCT
static const struct tile avx512_bf16 = TILE("avx512_bf16", avx512_bf16_product);
static const struct tile avx512 = TILE("avx512", NULL);
#undef ISA
#undef ISA_TARGET
#undef ISA_LANES
#undef ISA_ROWS
#undef ISA_INLINE

#define ISA(name) avx2_##name
#define ISA_TARGET __attribute__((target("arch=x86-64-v3")))
#define ISA_LANES 8
#define ISA_ROWS 6
#include "kernels/cpu/matmul_isa.h"
#include "kernels/cpu/attention_isa.h"
static const struct tile avx2 = TILE("avx2", NULL);
#undef ISA
#undef ISA_TARGET
#undef ISA_LANES
#undef ISA_ROWS
#undef ISA_INLINE

static bool avx512_runs(void)
{
	return __builtin_cpu_supports("x86-64-v4");
}

/* Intel's processors have the instruction too, but at half the speed of f32 multiplication. */
static bool avx512_bf16_runs(void)
{
	return avx512_runs() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_is("amd");
}

static bool avx2_runs(void)
{
	return __builtin_cpu_supports("x86-64-v3");
}

#define X86_ROWS {&avx512_bf16, avx512_bf16_runs}, {&avx512, avx512_runs}, {&avx2, avx2_runs},
#else
#define X86_ROWS
#endif

#define ISA(name) plain_##name
#define ISA_TARGET
#define ISA_LANES 4
#define ISA_ROWS 6
#include "kernels/cpu/matmul_isa.h"
#include "kernels/cpu/attention_isa.h"
static const struct tile plain = TILE("plain", NULL);

static bool plain_runs(void)
{
	return true;
}

static const struct {
	const struct tile *tile;
	bool (*runs)(void);
} tiles[] = {X86_ROWS{&plain, plain_runs}};

const struct tile *tile_at(int i, bool *runs)
{
	if (i < 0 || (size_t)i >= sizeof tiles / sizeof *tiles)
		return NULL;
	*runs = tiles[i].runs();
	return tiles[i].tile;
}

const struct tile *tile_best(void)
{
	int i = 0;
	while (!tiles[i].runs())
		i++;
	return tiles[i].tile;
}
