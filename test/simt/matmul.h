/* A matrix product as cuBLASLt describes it. */
#ifndef SIMT_MATMUL_H
#define SIMT_MATMUL_H

#include "streams.h"
#include "cublasLt.h"

struct simt_matmul_desc {
	int32_t compute, scale, pointer_mode, transa, transb, transc;
	uint32_t epilogue;
	void *bias;
	int64_t bias_stride;
	void *aux;
	int64_t aux_ld, aux_stride;
	int32_t sm_count;
	void *a_scale, *b_scale, *c_scale, *d_scale, *amax;
	int32_t aux_type, bias_type;
	int8_t fast_accumulation;
};
struct simt_matrix_layout {
	uint32_t type;
	int32_t order;
	uint64_t rows, columns;
	int64_t ld;
	int32_t batch;
	int64_t stride;
};

struct cublasLtContext {
	int device;
};
struct simt_matmul_preference {
	uint32_t search_mode;
	uint64_t max_workspace;
	uint32_t reductions, align_a, align_b, align_c, align_d;
};

namespace simt
{
/* The product D = epilogue(alpha op(A) op(B) + beta C), op(A) being m by k and op(B) k by n. */
struct Product {
	simt_matmul_desc desc;
	simt_matrix_layout a, b, c, d;
	size_t m, n, k;
	cudaDataType aux_type, bias_type; /* those that hold if the descriptor says nothing */
};
struct Operands {
	const void *alpha_at, *beta_at; /* on the device, or null: then the values are here */
	float alpha, beta;
	const void *a, *b, *c;
	void *d, *workspace;
	size_t workspace_bytes; /* what the algorithm scribbles over */
	unsigned parts;         /* into which the sum over k is cut */
};
} // namespace simt

/* ---- cublaslt_objects.cc ---- */

bool lives(cublasLtHandle_t handle);
/* Says why, to who wants to know, and returns the status. */
cublasStatus_t refuse(cublasStatus_t status, const char *why);
#define INVALID(why) refuse(CUBLAS_STATUS_INVALID_VALUE, why)
#define UNSUPPORTED(why) refuse(CUBLAS_STATUS_NOT_SUPPORTED, why)

/* ---- matmul.cc ---- */

size_t element_size(uint32_t type); /* 0: no such type */
void multiply(const Product &product, const Operands &operands);

/* What an epilogue does, as bits that the names in cublasLt.h are made of. */
constexpr uint32_t epilogue_relu = 2, epilogue_bias = 4, epilogue_sums = 16, epilogue_gelu = 32,
                   epilogue_dgelu = 64, epilogue_aux = 128, epilogue_sums_a = 256, epilogue_sums_b = 512;

#endif
