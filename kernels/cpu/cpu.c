#include "kernels/cpu/cpu.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#define DEFAULT_THREADS omp_get_max_threads()
#else
#define DEFAULT_THREADS 1
#endif

#include "base/mem.h"
#include "kernels/kernels.h"

int cpu_parts(const struct stream *s, int64_t n, int64_t grain)
{
	int64_t most = n / (grain > 1 ? grain : 1);
	int parts = most < s->num_threads ? (int)most : s->num_threads;
	return parts > 1 ? parts : 1;
}

void cpu_parallel(struct stream *s, int64_t n, int64_t grain, cpu_part_fn *fn, void *job)
{
	int parts = cpu_parts(s, n, grain);
	if (parts == 1) {
		fn(s, job, 0, n, 0);
		return;
	}
#pragma omp parallel for num_threads(parts) schedule(static, 1)
	for (int part = 0; part < parts; part++)
		fn(s, job, n * part / parts, n * (part + 1) / parts, part);
}

void *cpu_scratch(struct stream *s, int part, size_t bytes)
{
	struct cpu_scratch *c = &s->scratch[part < 0 ? s->num_threads - 1 - part : part];
	if (bytes > c->bytes) {
		ASSERT(!s->is_told || bytes <= c->expected);
		free(c->data);
		c->bytes = bytes > c->expected ? bytes : c->expected;
		c->data = mem_aligned(c->bytes);
	}
	return c->data;
}

CPU_CLONES static void read_bf16(const uint16_t *in, float *out, int64_t n)
{
#pragma omp simd
	for (int64_t i = 0; i < n; i++)
		out[i] = bf16_to_f32(in[i]);
}

CPU_CLONES static void write_bf16(const float *in, uint16_t *out, int64_t n)
{
#pragma omp simd
	for (int64_t i = 0; i < n; i++)
		out[i] = bf16_from_f32(in[i]);
}

CPU_CLONES static void read_f16(const uint16_t *in, float *out, int64_t n)
{
#pragma omp simd
	for (int64_t i = 0; i < n; i++)
		out[i] = f16_to_f32(in[i]);
}

CPU_CLONES static void write_f16(const float *in, uint16_t *out, int64_t n)
{
#pragma omp simd
	for (int64_t i = 0; i < n; i++)
		out[i] = f16_from_f32(in[i]);
}

void cpu_f32_from_half(enum dtype dtype, const uint16_t *in, float *out, int64_t n)
{
	(dtype == DT_bf16 ? read_bf16 : read_f16)(in, out, n);
}

void cpu_half_from_f32(enum dtype dtype, const float *in, uint16_t *out, int64_t n)
{
	(dtype == DT_bf16 ? write_bf16 : write_f16)(in, out, n);
}

static int stream_open(struct stream **s, const struct stream_options *options, struct err *e)
{
	int num_threads = options->num_threads;
	if (num_threads < 0)
		return err_set(e, EXIT_CONFIG,
		               "cpu: %d threads asked for; 0 (OpenMP's default) or more are allowed",
		               num_threads);
	struct stream *opened = mem_array(1, sizeof *opened);
	opened->num_threads = num_threads ? num_threads : DEFAULT_THREADS;
	opened->scratch = mem_array((size_t)opened->num_threads + 2, sizeof *opened->scratch);
	*s = opened;
	return 0;
}

static void stream_close(struct stream *s)
{
	for (int i = 0; s && i < s->num_threads + 2; i++)
		free(s->scratch[i].data);
	if (s)
		free(s->scratch);
	free(s);
}

static void *memory_alloc(struct stream *s, size_t bytes)
{
	(void)s;
	return mem_aligned(bytes);
}

static void memory_free(struct stream *s, void *p)
{
	(void)s;
	free(p);
}

static void memory_upload(struct stream *s, void *device, const void *host, size_t bytes)
{
	(void)s;
	memcpy(device, host, bytes);
}

static void memory_download(struct stream *s, void *host, const void *device, size_t bytes)
{
	(void)s;
	memcpy(host, device, bytes);
}

static void zero_part(struct stream *s, void *job, int64_t begin, int64_t end, int part)
{
	(void)s, (void)part;
	memset((char *)job + begin, 0, (size_t)(end - begin));
}

static void memory_zero(struct stream *s, void *device, size_t bytes)
{
	cpu_parallel(s, (int64_t)bytes, 1 << 18, zero_part, device);
}

static void stream_wait(struct stream *s)
{
	(void)s;
}

struct cpu_space cpu_space_none(const struct stream *s, const union op_arg *arg, const struct tensor *in,
                                const struct tensor *out)
{
	(void)s, (void)arg, (void)in, (void)out;
	return (struct cpu_space){0};
}

static cpu_space_fn *const spaces[OP_COUNT] = {
#define FAST(name, space) [OP_##name] = cpu_space_##space,
#include "kernels/cpu/fast.def"
#undef FAST
};

static void expect(struct cpu_scratch *c, size_t bytes)
{
	c->expected = bytes > c->expected ? bytes : c->expected;
}

static struct workspace stream_workspace(struct stream *s, const struct kernel_call *coming)
{
	struct workspace w = {0};
	s->is_told |= coming != NULL;
	if (coming && spaces[coming->op]) {
		struct cpu_space need = spaces[coming->op](s, coming->arg, coming->in, coming->out);
		expect(&s->scratch[s->num_threads], need.shared);
		expect(&s->scratch[s->num_threads + 1], need.rounded);
		for (int i = 0; i < need.parts; i++)
			expect(&s->scratch[i], need.part);
	}
	for (int i = 0; i < s->num_threads + 2; i++) {
		w.expected += (int64_t)mem_reserved(s->scratch[i].expected);
		w.held += (int64_t)mem_reserved(s->scratch[i].bytes);
	}
	return w;
}

/* The reference kernels take their few rows from the heap and give them back. */
static struct workspace no_workspace(struct stream *s, const struct kernel_call *coming)
{
	(void)s, (void)coming;
	return (struct workspace){0};
}

static int probe(struct err *e)
{
	(void)e;
	return 0;
}

#ifdef __x86_64__
static const char *instruction_set(void)
{
	return __builtin_cpu_supports("x86-64-v4")   ? "x86-64-v4 (AVX-512)"
	       : __builtin_cpu_supports("x86-64-v3") ? "x86-64-v3 (AVX2, FMA)"
	                                             : "x86-64 (SSE2)";
}
#else
static const char *instruction_set(void)
{
	return "the compiler's default instruction set";
}
#endif

/* Where no matrix kernels are linked; they bring their own. */
__attribute__((weak)) const char *cpu_matmul_describe(void)
{
	return "reference matrix products";
}

static const char *describe_fast(void)
{
	static _Thread_local char text[200];
	snprintf(text, sizeof text, "%s, %s", instruction_set(), cpu_matmul_describe());
	return text;
}

static const char *describe_reference(void)
{
	return "plain C in double precision, one thread";
}

/* The condition is constant, so a COMM row asks for no symbol and any other row's kernel must link. */
#define REFERENCE_ROW(name, flags) [OP_##name] = (flags)&COMM ? NULL : cpu_ref_##name

static kernel_fn *const reference_kernels[OP_COUNT] = {
#define OP(name, n_in, n_out, flags, doc) REFERENCE_ROW(name, flags),
#include "op/ops.def"
#undef OP
};

/* Later rows of an initialiser replace earlier ones: the fast kernel where there is one. */
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Woverride-init"
static kernel_fn *const fast_kernels[OP_COUNT] = {
#define OP(name, n_in, n_out, flags, doc) REFERENCE_ROW(name, flags),
#include "op/ops.def"
#undef OP
#define FAST(name, space) [OP_##name] = cpu_fast_##name,
#include "kernels/cpu/fast.def"
#undef FAST
};
#pragma GCC diagnostic pop

#define CPU_BACKEND(called, describes, space, table)                                                        \
	{                                                                                                   \
		.name = called, .probe = probe, .describe = describes, .open = stream_open,                 \
		.close = stream_close, .alloc = memory_alloc, .free = memory_free, .upload = memory_upload, \
		.download = memory_download, .zero = memory_zero, .wait = stream_wait, .workspace = space,  \
		.kernel = table                                                                             \
	}

const struct backend cpu_reference_backend =
        CPU_BACKEND("cpu_reference", describe_reference, no_workspace, reference_kernels);
const struct backend cpu_backend = CPU_BACKEND("cpu", describe_fast, stream_workspace, fast_kernels);
