/* Attention as graphs for cuDNN's backend interface: attention_graph.c makes a plan of a shape,
 * attention_cudnn.c keeps the plans of a stream and runs them. Floor: kernels. */
#ifndef PENTAD_KERNELS_CUDA_ATTENTION_CUDNN_H
#define PENTAD_KERNELS_CUDA_ATTENTION_CUDNN_H

#include <stdbool.h>
#include <stdint.h>

#include <cudnn.h>

struct err;

/* Causal attention on packed rows [H·D | G·D | G·V] of bf16. window 0: a query sees all keys before it.
 * Without padding: compared byte by byte. */
struct attention_shape {
	int32_t samples, length, heads, groups, size, value, window;
	int32_t backward; /* 1: the gradients */
};

/* What a plan reads and writes; numbers in the library are these. Those of one value lie in the host's
 * memory, all others in the device's. sum[B,H,T] and dq_sum[B,H,T,D], both f32, are working space. */
#define ATTENTION_TENSORS(X)                       \
	X(q)                                       \
	X(k)                                       \
	X(v)                                       \
	X(o)                                       \
	X(stats) /* f32 [B,H,T]: log of the sum */ \
	X(scale)                                   \
	X(minus_infinity)                          \
	X(window)                                  \
	X(dout)                                    \
	X(dq)                                      \
	X(dk)                                      \
	X(dv)                                      \
	X(one)                                     \
	X(sum)                                     \
	X(dq_sum)
enum attention_tensor {
	TENSOR_none,
#define ATTENTION_TENSOR(name) TENSOR_##name,
	ATTENTION_TENSORS(ATTENTION_TENSOR)
#undef ATTENTION_TENSOR
	        TENSOR_COUNT
};

enum { ATTENTION_MAX_KEPT = 256 };
struct attention_plan {
	struct attention_shape shape;
	cudnnBackendDescriptor_t plan; /* NULL: the library has none */
	int64_t workspace;
	int offered; /* engine configurations by the library's heuristics */
	cudnnBackendDescriptor_t kept[ATTENTION_MAX_KEPT]; /* all that the plan is made of */
	int n_kept;
};

/* The first plan that the library offers for p->shape and can build. For the device of the handle, or, where
 * that is NULL, for one that a device-property descriptor describes. EXIT_UNAVAILABLE with the reason in *e
 * where there is none; the plan is to be freed in any case. */
int attention_plan_make(struct attention_plan *p, cudnnHandle_t handle, cudnnBackendDescriptor_t device,
                        struct err *e);
void attention_plan_free(struct attention_plan *p);
/* "cuda: cuDNN: <what>: <status>: <the library's sentence>"; returns `code`. */
int attention_failed(struct err *e, int code, cudnnStatus_t rc, const char *what);

#endif
