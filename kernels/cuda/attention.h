/* What the two ways to compute attention share: the library's (attention_cudnn.c) and our own (attention.cu).
 * Floor: kernels. */
#ifndef PENTAD_KERNELS_CUDA_ATTENTION_H
#define PENTAD_KERNELS_CUDA_ATTENTION_H

#include "kernels/cuda/cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

ANYWHERE int32_t attention_value_dim(const union op_arg *arg)
{
	return arg->attention.value_dim ? arg->attention.value_dim : arg->attention.head_dim;
}

/* to[samples][columns][rows] <- from[samples][rows][columns], f32. */
int cuda_attention_transpose(struct stream *s, const float *from, float *to, int32_t samples, int32_t rows,
                             int32_t columns, struct err *e);

#ifdef __cplusplus
}
#endif

#endif
