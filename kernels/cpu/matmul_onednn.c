/* Matrix products by oneDNN. Its plain gemm functions keep no state of ours, take any strides and may be
 * called from several threads; measured at the speed of its matmul primitives or above on the shapes of
 * training. */
#include "kernels/cpu/matmul.h"

#include <dnnl.h>
#include <omp.h>
#include <stdatomic.h>

#include "kernels/cpu/cpu.h"

/* Exported by every oneDNN so far, but not declared in its headers. */
extern dnnl_status_t dnnl_gemm_bf16bf16f32(char a_transposed, char b_transposed, dnnl_dim_t m, dnnl_dim_t n,
                                           dnnl_dim_t k, float alpha, const uint16_t *a, dnnl_dim_t a_pitch,
                                           const uint16_t *b, dnnl_dim_t b_pitch, float beta, float *c,
                                           dnnl_dim_t c_pitch) __attribute__((weak));

enum { SUMS_WORDS = 8 << 20 }; /* f32 sums of a product whose C is bf16, at a time */

/* Columns [column, column + n) of C into c. */
static void gemm(const struct matmul *g, int64_t column, int64_t n, float *c, int64_t c_pitch)
{
	char ta = g->a_transposed ? 'T' : 'N', tb = g->b_transposed ? 'T' : 'N';
	int64_t a_pitch = matmul_a_pitch(g), b_pitch = g->b_transposed ? g->k : g->n;
	int64_t b_at = g->b_transposed ? column * g->k : column;
	float beta = g->acc && g->c_dtype == DT_f32 ? 1 : 0;
	dnnl_status_t status =
	        g->dtype == DT_f32
	                ? dnnl_sgemm(ta, tb, g->m, n, g->k, 1, g->a, a_pitch, (const float *)g->b + b_at,
	                             b_pitch, beta, c, c_pitch)
	                : dnnl_gemm_bf16bf16f32(ta, tb, g->m, n, g->k, 1, g->a, a_pitch,
	                                        (const uint16_t *)g->b + b_at, b_pitch, beta, c, c_pitch);
	ASSERT(status == dnnl_success); /* what has_bf16 does not ask is a lack of memory */
}

struct finish {
	const struct matmul *g;
	int64_t column, n;
	float *sums;
	int64_t pitch;
};

static void finish_part(struct stream *s, void *job, int64_t begin, int64_t end, int part)
{
	(void)s, (void)part;
	const struct finish *f = job;
	for (int64_t i = begin; i < end; i++)
		matmul_write_row(f->g, i, f->column, f->n, f->sums + i * f->pitch);
}

/* Columns that are computed at a time. */
static int64_t strip_of(const struct matmul *g)
{
	int64_t strip =
	        g->c_dtype == DT_f32 || g->m * g->n <= SUMS_WORDS ? g->n : SUMS_WORDS / g->m / 64 * 64;
	return strip ? strip : 64;
}

static struct cpu_space onednn_space(const struct stream *s, const struct matmul *g)
{
	(void)s;
	size_t bytes = g->c_dtype == DT_f32 ? 0 : (size_t)(g->m * strip_of(g)) * sizeof(float);
	return (struct cpu_space){.shared = bytes};
}

/* Strips of fewer rows may be wider, up to SUMS_WORDS. */
static struct cpu_space onednn_most(const struct stream *s, const struct matmul *g)
{
	(void)s;
	int64_t all = g->m * g->n, narrow = 64 * g->m, words = narrow > SUMS_WORDS ? narrow : SUMS_WORDS;
	size_t bytes = (size_t)(all < words ? all : words) * sizeof(float);
	return (struct cpu_space){.shared = g->c_dtype == DT_f32 ? 0 : bytes};
}

static void multiply(struct stream *s, const struct matmul *g)
{
	bool in_place = g->c_dtype == DT_f32;
	int64_t strip = strip_of(g);
	float *sums = in_place ? NULL : cpu_scratch(s, CPU_SHARED, (size_t)(g->m * strip) * sizeof *sums);
	for (int64_t column = 0; column < g->n; column += strip) {
		int64_t n = g->n - column < strip ? g->n - column : strip;
		struct finish f = {g, column, n, in_place ? (float *)g->c + column : sums,
		                   in_place ? g->n : strip};
		gemm(g, column, n, f.sums, f.pitch);
		if (!in_place || g->bias)
			cpu_parallel(s, g->m, 64, finish_part, &f);
	}
}

/* oneDNN takes as many threads as OpenMP would give the calling thread. */
static void onednn(struct stream *s, const struct matmul *g)
{
	int before = omp_get_max_threads();
	omp_set_num_threads(s->num_threads);
	multiply(s, g);
	omp_set_num_threads(before);
}

#ifdef __x86_64__
/* Where it multiplies bf16 faster than f32: AMX, and AMD's AVX512-BF16. Elsewhere the own kernel widens. */
static bool has_fast_bf16(void)
{
	return __builtin_cpu_supports("amx-bf16") ||
	       (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_is("amd"));
}
#else
static bool has_fast_bf16(void)
{
	return false;
}
#endif

#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)
#define NAME "oneDNN " TEXT(DNNL_VERSION_MAJOR) "." TEXT(DNNL_VERSION_MINOR) "." TEXT(DNNL_VERSION_PATCH)

/* Tried once: the library's own environment may forbid it what the processor has. */
static bool has_bf16(void)
{
	static atomic_int answer; /* 0: not asked yet, 1: no, 2: yes */
	const uint16_t one = 0x3f80;
	float product = 0;
	if (!answer)
		answer = 1 + (dnnl_gemm_bf16bf16f32 && has_fast_bf16() &&
		              dnnl_gemm_bf16bf16f32('N', 'N', 1, 1, 1, 1, &one, 1, &one, 1, 0, &product, 1) ==
		                      dnnl_success);
	return answer == 2;
}

const struct matmul_impl *matmul_onednn(void)
{
	static const struct matmul_impl both = {
	        NAME, {[DT_f32] = onednn, [DT_bf16] = onednn}, onednn_space, onednn_most};
	static const struct matmul_impl f32_only = {NAME, {[DT_f32] = onednn}, onednn_space, onednn_most};
	return has_bf16() ? &both : &f32_only;
}
