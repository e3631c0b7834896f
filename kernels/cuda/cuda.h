/* What the kernels for CUDA devices share on the host's side: the stream, its memory, errors.
 *
 * Every operation has cuda_<op>, a kernel_fn that only tells the stream's `compute` what to do: it never
 * waits for the device (cuda_counts excepted), never allocates, and checks what it calls. What a call needs
 * beside its tensors comes from cuda_scratch, and scratch.def says how much. Sums are in f32 or better,
 * whatever the tensors' type. Files: *.cu are compiled by nvcc and, for tests without a device, by a C++
 * compiler against test/simt; so kernels are launched by `launch` of device.cuh alone. Floor: kernels. */
#ifndef PENTAD_KERNELS_CUDA_CUDA_H
#define PENTAD_KERNELS_CUDA_CUDA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <cuda_runtime.h>

#ifdef __cplusplus
extern "C" {
#endif

#include "backend/backend.h"
#include "base/err.h"

struct cuda_blas;      /* product.c: the library's handle, and what was chosen for each shape */
struct cuda_attention; /* attention_cudnn.c: the library's handle, and a plan for each shape */
struct cuda_counts;    /* counts.c: host copies of what dispatch_plan has given */
struct cuda_staging;   /* staging.c: pinned memory that uploads go through */
struct cuda_lanes;     /* lanes.c: streams of communication */

struct stream {
	int device;
	cudaStream_t compute;
	struct cudaDeviceProp properties;
	bool deterministic; /* the same bits from every run */
	void *scratch;
	size_t scratch_bytes, scratch_expected; /* expected: the most that any call told of asks for */
	bool is_told;                           /* of the calls that will come: backend->workspace */
	struct cuda_blas *blas;
	struct cuda_attention *attention;
	struct cuda_counts *counts;
	struct cuda_staging *staging;
	struct cuda_lanes *lanes;
	struct group *world; /* nccl.c: the first of its communicators; NULL: alone */
	struct err failed;   /* the first error of what cannot return one; code 0: none */
};

#define OP(name, n_in, n_out, flags, doc) kernel_fn cuda_##name;
#include "op/ops.def"
#undef OP

/* "cuda: <what>: <the runtime's sentence>"; returns EXIT_UNAVAILABLE where memory or devices are missing,
 * else EXIT_INTERNAL. */
int cuda_failed(struct err *e, cudaError_t rc, const char *what);
#define CUDA_TRY(e, call)                                     \
	do {                                                  \
		cudaError_t try_rc = (call);                  \
		if (try_rc != cudaSuccess)                    \
			return cuda_failed(e, try_rc, #call); \
	} while (0)
/* Where nothing can be returned: kept in s->failed. true where it went well. */
bool cuda_kept(struct stream *s, cudaError_t rc, const char *what);

/* 256-byte-aligned device memory for one call, valid until the stream is told of the next: bytes of an
 * earlier call may still be in use by earlier work, which comes first. NULL with a message in *e. */
void *cuda_scratch(struct stream *s, size_t bytes, struct err *e);

/* What one call asks cuda_scratch for; `call` has shapes alone. s->properties may be asked. */
typedef size_t cuda_space_fn(struct stream *s, const struct kernel_call *call);
#define SCRATCH(name, space) cuda_space_fn cuda_space_##space;
#include "kernels/cuda/scratch.def"
#undef SCRATCH

/* Host copy of sizes[R,E] as the work told so far leaves it; waits for it. NULL with a message in *e. */
const int32_t *cuda_counts(struct stream *s, const struct tensor *sizes, struct err *e);
/* dispatch_plan has been told to write sizes: their copy is under way from here on. */
int cuda_counts_follow(struct stream *s, const struct tensor *sizes, struct err *e);
/* Device memory [data, data + bytes) is written otherwise: what was known of it is void. */
void cuda_counts_forget(struct stream *s, const void *data, size_t bytes);
int cuda_counts_open(struct stream *s, struct err *e);
void cuda_counts_close(struct stream *s);

int cuda_blas_open(struct stream *s, struct err *e);
void cuda_blas_close(struct stream *s);
/* Version of the library, "cuBLASLt 13.1"; static storage. */
const char *cuda_blas_describe(void);

/* Attention by the library, where it knows the shapes: cuda_attention_library returns -1 where it does not
 * (the own kernel then works), else as a kernel_fn. A build without cuDNN links attention_absent.c, which
 * knows none. */
int cuda_attention_open(struct stream *s, struct err *e);
void cuda_attention_close(struct stream *s);
kernel_fn cuda_attention_library, cuda_attention_bwd_library;
/* Scratch of such a call; -1 where the library does not know the shapes. */
int64_t cuda_attention_library_bytes(struct stream *s, const struct kernel_call *call);
const char *cuda_attention_describe(void);

int cuda_staging_open(struct stream *s, struct err *e);
void cuda_staging_close(struct stream *s);
void cuda_upload(struct stream *s, void *device, const void *host, size_t bytes);

/* Ranks of one host that use one device: to NCCL they are hosts of their own, or it would refuse. Before any
 * other call of groups. */
void cuda_share_device(const struct rank_on_host *host);
extern const struct group_table cuda_groups;
extern const struct recorder cuda_recorder;
int cuda_lanes_open(struct stream *s, struct err *e);
void cuda_lanes_close(struct stream *s);
/* Waits until all that compute and lanes were told is done; 0, or why it never will be: a device's error, a
 * communicator's, or a rank that has been silent for too long. */
int cuda_settle(struct stream *s, struct err *e);

#ifdef __cplusplus
}
#endif

#endif
