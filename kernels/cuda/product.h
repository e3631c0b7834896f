/* Matrix products by cuBLASLt. Floor: kernels. */
#ifndef PENTAD_KERNELS_CUDA_PRODUCT_H
#define PENTAD_KERNELS_CUDA_PRODUCT_H

#include "kernels/cuda/cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The products of a layer with weights w[M,K], x[N,K] and y[N,M]: y = x w', dx = dy w, dw = dy' x. In fp8
 * (Micikevicius et al. 2022) the operands are such that cuda_product_fp8 makes. */
enum product_kind {
	PRODUCT_linear,
	PRODUCT_linear_dx,
	PRODUCT_linear_dw,
	PRODUCT_linear_fp8,
	PRODUCT_linear_dx_fp8,
	PRODUCT_linear_dw_fp8,
	PRODUCT_KINDS
};
enum product_size { SIZE_n, SIZE_m, SIZE_k, PRODUCT_SIZES };

struct product {
	enum product_kind kind;
	int64_t size[PRODUCT_SIZES];
	int64_t batch;           /* of products whose operands lie one behind the other; 1: one */
	const void *with, *rows; /* w or, for dw, x; x or dy */
	void *result;
	const void *bias; /* [M] of the result's type, linear alone; NULL: none */
	/* Of the result's shape and type, NULL: none. linear: what is left before GELU (by tanh), the result
	 * being behind it; linear_dx: what the result is multiplied by the slope at. Rows of whole 16 bytes.
	 */
	void *aux;
	enum dtype dtype, result_dtype;
	bool acc;    /* adds to the result */
	bool varies; /* N is another each time: what is chosen for a size holds for those near it */
	const float *factor[2]; /* fp8: on the device, what `with` and `rows` are multiplied by */
	size_t held_bytes;      /* of scratch that are in use from its beginning; a multiple of 256 */
};

/* Tells the stream of a product; any size may be 0. */
int cuda_product(struct stream *s, const struct product *p, struct err *e);
/* Scratch that a product takes at most, beside what is held. */
size_t cuda_product_workspace(const struct stream *s);

/* The same with operands rounded to fp8 (kernels/fp8.h): dy to E5M2, w and x to E4M3. A product of one of the
 * first three kinds, batch 1. The library multiplies in fp8 where cuda_fits_fp8, else in the operands' type,
 * which holds what is rounded without loss. */
bool cuda_fits_fp8(const struct stream *s, const struct product *p);
int cuda_product_fp8(struct stream *s, const struct product *p, struct err *e);
/* Scratch of such a call. */
size_t cuda_fp8_bytes(const struct stream *s, const struct product *p);

#ifdef __cplusplus
}
#endif

#endif
