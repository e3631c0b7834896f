/* What the processor's kernels share: the stream, threads, scratch, and rows in f32, bf16 or f16.
 *
 * Every operation has cpu_ref_<op>: plain loops in double precision on one thread, the truth for tests; it
 * takes f64 tensors wherever f32, bf16 and f16 may stand, so that gradients can be checked by differences.
 * cpu_fast_<op>, listed in fast.def, replaces it in cpu_backend. A fast kernel cuts rows into parts by
 * cpu_parallel and hands each to leaf functions on f32 arrays marked CPU_CLONES, compiled for several
 * instruction sets and chosen when the program is loaded. Sums over rows go through blocks whose size depends
 * on the shape alone, so results do not depend on the number of threads. Floor: kernels. */
#ifndef PENTAD_KERNELS_CPU_CPU_H
#define PENTAD_KERNELS_CPU_CPU_H

#include <stdbool.h>
#include <stdint.h>

#include "backend/backend.h"
#include "base/err.h"

/* On a leaf function without OpenMP regions. Helpers it uses must be CPU_INLINE to be compiled with it. The
 * thread sanitizer is not up yet when the loader asks which clone to take. */
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
        !defined(__SANITIZE_THREAD__)
#define CPU_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CPU_CLONES
#endif
#define CPU_INLINE static inline __attribute__((always_inline))

enum { CPU_BLOCK = 1024 }; /* elements that a kernel holds in f32 at a time: 4 KiB each */

struct cpu_scratch {
	void *data;
	size_t bytes, expected; /* expected: the most that any call told of asks for */
};

struct stream {
	int num_threads;
	struct cpu_scratch *scratch; /* [num_threads + 2]: one per part of cpu_parallel, then those for all */
	bool is_told;                /* of the calls that will come: backend->workspace */
};

#define OP(name, n_in, n_out, flags, doc) kernel_fn cpu_ref_##name;
#include "op/ops.def"
#undef OP

/* What one call asks cpu_scratch for at most: bytes of the whole call, and of each part below `parts`. */
struct cpu_space {
	size_t shared, part;
	int parts;
	size_t rounded; /* CPU_ROUNDED */
};
typedef struct cpu_space cpu_space_fn(const struct stream *s, const union op_arg *arg,
                                      const struct tensor *in, const struct tensor *out);

#define FAST(name, space)          \
	kernel_fn cpu_fast_##name; \
	cpu_space_fn cpu_space_##space;
#include "kernels/cpu/fast.def"
#undef FAST

/* One part of the work: items [begin, end), run as part number `part` in [0, num_threads). */
typedef void cpu_part_fn(struct stream *s, void *job, int64_t begin, int64_t end, int part);

/* Cuts [0, n) into at most num_threads contiguous parts of at least `grain` items and runs them at once.
 * One part runs in the caller without a team. */
void cpu_parallel(struct stream *s, int64_t n, int64_t grain, cpu_part_fn *fn, void *job);
/* How many parts that are, 1 or more. */
int cpu_parts(const struct stream *s, int64_t n, int64_t grain);

/* 64-byte-aligned memory of a part (CPU_SHARED: of the whole call), valid until the same is asked again;
 * contents are left over. It is allocated once, with what the calls told of need, or grows the first times
 * where the stream was told of none: the steady state allocates nothing. What a kernel asks for is what its
 * cpu_space function says. */
enum { CPU_SHARED = -1, CPU_ROUNDED = -2 }; /* CPU_ROUNDED: shared too, for what another call works on */
void *cpu_scratch(struct stream *s, int part, size_t bytes);

/* Conversion of n elements from and to bf16 or f16; in != out. */
void cpu_f32_from_half(enum dtype dtype, const uint16_t *in, float *out, int64_t n);
void cpu_half_from_f32(enum dtype dtype, const float *in, uint16_t *out, int64_t n);

/* Elements [at, at + n) as f32: in the tensor itself where it is f32, else converted into buffer[n]. */
CPU_INLINE const float *cpu_read(const struct tensor *t, int64_t at, int64_t n, float *buffer)
{
	if (t->dtype == DT_f32)
		return (const float *)t->data + at;
	cpu_f32_from_half((enum dtype)t->dtype, (const uint16_t *)t->data + at, buffer, n);
	return buffer;
}

/* Where to compute elements from `at` on: the tensor itself or the buffer; cpu_write then rounds. */
CPU_INLINE float *cpu_place(const struct tensor *t, int64_t at, float *buffer)
{
	return t->dtype == DT_f32 ? (float *)t->data + at : buffer;
}

CPU_INLINE void cpu_write(const struct tensor *t, int64_t at, int64_t n, const float *placed)
{
	if (t->dtype != DT_f32)
		cpu_half_from_f32((enum dtype)t->dtype, placed, (uint16_t *)t->data + at, n);
}

/* One element of an f32, bf16, f16 or f64 tensor. */
static inline double cpu_get(const struct tensor *t, int64_t i)
{
	return t->dtype == DT_f32   ? ((const float *)t->data)[i]
	       : t->dtype == DT_f64 ? ((const double *)t->data)[i]
	                            : half_to_f32(t->dtype, ((const uint16_t *)t->data)[i]);
}

static inline void cpu_set(const struct tensor *t, int64_t i, double x)
{
	if (t->dtype == DT_f32)
		((float *)t->data)[i] = (float)x;
	else if (t->dtype == DT_f64)
		((double *)t->data)[i] = x;
	else
		((uint16_t *)t->data)[i] = half_from_f32(t->dtype, (float)x);
}

/* Adds where the tensor says so, else overwrites. */
static inline void cpu_accumulate(const struct tensor *t, int64_t i, double x)
{
	cpu_set(t, i, t->acc ? cpu_get(t, i) + x : x);
}

/* What the matrix kernels stand on, for the log: "oneDNN 2.6.3", "own kernels"; static storage. */
const char *cpu_matmul_describe(void);

#endif
