/* cuBLASLt's calls: what is refused, and the product as an operation of a stream. */
#include "matmul.h"

#include <cstring>

/* ---- what fits together ---- */

static bool is_fp8(uint32_t type)
{
	return type == CUDA_R_8F_E4M3 || type == CUDA_R_8F_E5M2;
}

static cublasStatus_t check_layout(const simt_matrix_layout &l)
{
	if (!l.rows || !l.columns || l.batch < 1)
		return INVALID("a matrix or a batch is empty");
	if (l.order != CUBLASLT_ORDER_COL && l.order != CUBLASLT_ORDER_ROW)
		return UNSUPPORTED("an order other than by columns or by rows");
	if (l.ld < (int64_t)(l.order == CUBLASLT_ORDER_COL ? l.rows : l.columns))
		return INVALID("a leading dimension is smaller than what it leads over");
	return element_size(l.type) ? CUBLAS_STATUS_SUCCESS : UNSUPPORTED("a type of a matrix");
}

static cublasStatus_t check_shapes(const Product &p)
{
	bool ta = p.desc.transa != CUBLAS_OP_N, tb = p.desc.transb != CUBLAS_OP_N;
	for (const simt_matrix_layout *l : {&p.a, &p.b, &p.c, &p.d}) {
		cublasStatus_t status = check_layout(*l);
		if (status)
			return status;
	}
	if ((ta ? p.a.columns : p.a.rows) != p.m || (tb ? p.b.columns : p.b.rows) != p.k ||
	    (tb ? p.b.rows : p.b.columns) != p.n || p.c.rows != p.m || p.c.columns != p.n)
		return INVALID("the dimensions of the matrices do not agree");
	if (p.a.batch != p.d.batch || p.b.batch != p.d.batch || p.c.batch != p.d.batch)
		return INVALID("the batches are of different sizes");
	if (p.d.batch > 1 && !p.d.stride)
		return INVALID("the results of a batch all lie in one place");
	return CUBLAS_STATUS_SUCCESS;
}

/* The rules of fp8 on Hopper. */
static cublasStatus_t check_fp8(const Product &p)
{
	bool e5m2_twice = p.a.type == CUDA_R_8F_E5M2 && p.b.type == CUDA_R_8F_E5M2;
	if (!is_fp8(p.a.type) || !is_fp8(p.b.type) || e5m2_twice)
		return UNSUPPORTED("fp8 is multiplied with fp8, and one of the two is e4m3");
	if (p.desc.transa == CUBLAS_OP_N || p.desc.transb != CUBLAS_OP_N)
		return UNSUPPORTED("fp8 needs A transposed and B not");
	if (p.m % 16 || p.n % 16 || p.k % 16 || p.a.ld % 16 || p.b.ld % 16)
		return UNSUPPORTED("fp8 needs dimensions that are multiples of 16");
	if (p.d.ld * (int64_t)element_size(p.d.type) % 16 || p.c.ld * (int64_t)element_size(p.c.type) % 16)
		return UNSUPPORTED("fp8 needs columns of D that are multiples of 16 bytes apart");
	if (is_fp8(p.c.type))
		return UNSUPPORTED("C of type fp8");
	if (is_fp8(p.d.type) ? p.c.type == CUDA_R_32F : p.c.type != p.d.type)
		return UNSUPPORTED("C and D of these types");
	if (p.desc.epilogue & (epilogue_sums | epilogue_sums_a | epilogue_sums_b | epilogue_dgelu))
		return UNSUPPORTED("gradients in the epilogue of fp8");
	return CUBLAS_STATUS_SUCCESS;
}

static cublasStatus_t check_types(const Product &p)
{
	const simt_matmul_desc &d = p.desc;
	if (d.scale != CUDA_R_32F ||
	    (d.compute != CUBLAS_COMPUTE_32F && d.compute != CUBLAS_COMPUTE_32F_FAST_TF32))
		return UNSUPPORTED("a compute or scale type other than 32F");
	if (d.transa > CUBLAS_OP_C || d.transb > CUBLAS_OP_C || d.transc != CUBLAS_OP_N)
		return UNSUPPORTED("such a transposition");
	if (is_fp8(p.a.type) || is_fp8(p.b.type))
		return check_fp8(p);
	if (d.a_scale || d.b_scale || d.c_scale || d.d_scale || d.amax)
		return INVALID("scales and maxima belong to fp8");
	if (p.a.type != p.b.type || p.c.type != p.d.type || (p.d.type != p.a.type && p.d.type != CUDA_R_32F))
		return UNSUPPORTED("such a combination of types");
	if (d.compute == CUBLAS_COMPUTE_32F_FAST_TF32 && p.a.type != CUDA_R_32F)
		return UNSUPPORTED("TF32 for inputs other than 32F");
	return CUBLAS_STATUS_SUCCESS;
}

static cublasStatus_t check_epilogue(const Product &p)
{
	switch (p.desc.epilogue) {
	case CUBLASLT_EPILOGUE_DEFAULT:
		return CUBLAS_STATUS_SUCCESS;
	case CUBLASLT_EPILOGUE_BGRADA:
	case CUBLASLT_EPILOGUE_BGRADB:
		if (p.d.batch > 1)
			return UNSUPPORTED("BGRADA and BGRADB of a batch");
		break;
	case CUBLASLT_EPILOGUE_RELU:
	case CUBLASLT_EPILOGUE_BIAS:
	case CUBLASLT_EPILOGUE_RELU_BIAS:
	case CUBLASLT_EPILOGUE_GELU:
	case CUBLASLT_EPILOGUE_GELU_AUX:
	case CUBLASLT_EPILOGUE_GELU_BIAS:
	case CUBLASLT_EPILOGUE_GELU_AUX_BIAS:
	case CUBLASLT_EPILOGUE_DGELU:
	case CUBLASLT_EPILOGUE_DGELU_BGRAD:
		break;
	default:
		return UNSUPPORTED("this epilogue");
	}
	for (const simt_matrix_layout *l : {&p.a, &p.b, &p.c, &p.d}) {
		if (l->order != CUBLASLT_ORDER_COL)
			return UNSUPPORTED("an epilogue for matrices stored by rows");
	}
	if (p.desc.epilogue & epilogue_aux &&
	    (p.desc.aux_ld % 8 || p.desc.aux_ld < (int64_t)p.m || p.desc.aux_stride % 8))
		return INVALID("EPILOGUE_AUX_LD is no multiple of 8 or smaller than the rows of D");
	cudaDataType bias = is_fp8(p.a.type) && p.d.type != CUDA_R_16F ? CUDA_R_16BF : (cudaDataType)p.d.type;
	if (p.bias_type != bias || p.aux_type != (cudaDataType)p.d.type)
		return UNSUPPORTED("a bias or auxiliary matrix of this type");
	return CUBLAS_STATUS_SUCCESS;
}

static cublasStatus_t make_product(cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t a,
                                   cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c,
                                   cublasLtMatrixLayout_t d, Product *p)
{
	if (!desc || !a || !b || !c || !d)
		return INVALID("a descriptor is missing");
	*p = {*desc, *a, *b, *c, *d, d->rows, d->columns, 0, (cudaDataType)d->type, (cudaDataType)d->type};
	p->k = desc->transa != CUBLAS_OP_N ? a->rows : a->columns;
	if (is_fp8(a->type) && d->type != CUDA_R_16F)
		p->bias_type = CUDA_R_16BF;
	if (desc->bias_type >= 0)
		p->bias_type = (cudaDataType)desc->bias_type;
	if (desc->aux_type >= 0)
		p->aux_type = (cudaDataType)desc->aux_type;
	cublasStatus_t status = check_shapes(*p);
	if (!status)
		status = check_types(*p);
	return status ? status : check_epilogue(*p);
}

/* ---- algorithms ---- */

static constexpr uint64_t algo_magic = 0x73696d74616c676f;
static const size_t algo_workspaces[] = {1 << 20, 32 << 10, 0};

namespace
{
struct Algo {
	uint64_t magic, parts, workspace, fingerprint;
	uint32_t align[4]; /* of A, B, C and D */
	uint64_t unused[2];
};
} // namespace
static_assert(sizeof(Algo) == sizeof(cublasLtMatmulAlgo_t));

/* An algorithm is for these types, transpositions and epilogue, whatever the sizes. */
static uint64_t fingerprint(const Product &p)
{
	uint64_t print = 0;
	for (uint64_t part :
	     {(uint64_t)p.a.type, (uint64_t)p.b.type, (uint64_t)p.d.type, (uint64_t)p.desc.transa,
	      (uint64_t)p.desc.transb, (uint64_t)p.desc.epilogue, (uint64_t)p.desc.compute})
		print = print * 1099511628211u + part;
	return print;
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t lightHandle,
                                              cublasLtMatmulDesc_t operationDesc,
                                              cublasLtMatrixLayout_t Adesc, cublasLtMatrixLayout_t Bdesc,
                                              cublasLtMatrixLayout_t Cdesc, cublasLtMatrixLayout_t Ddesc,
                                              cublasLtMatmulPreference_t preference, int requestedAlgoCount,
                                              cublasLtMatmulHeuristicResult_t heuristicResultsArray[],
                                              int *returnAlgoCount)
{
	Lock lock = take_lock();
	Product p;
	if (!lives(lightHandle))
		return CUBLAS_STATUS_NOT_INITIALIZED;
	if (requestedAlgoCount < 1 || !preference || !heuristicResultsArray || !returnAlgoCount)
		return INVALID("a heuristic needs a preference and room for results");
	*returnAlgoCount = 0;
	cublasStatus_t status = make_product(operationDesc, Adesc, Bdesc, Cdesc, Ddesc, &p);
	if (status)
		return status;
	for (size_t i = 0; i < 3 && *returnAlgoCount < requestedAlgoCount; i++) {
		if (algo_workspaces[i] > preference->max_workspace)
			continue;
		const simt_matmul_preference &f = *preference;
		Algo algo = {algo_magic,
		             3 - i,
		             algo_workspaces[i],
		             fingerprint(p),
		             {f.align_a, f.align_b, f.align_c, f.align_d},
		             {}};
		cublasLtMatmulHeuristicResult_t result = {};
		memcpy(&result.algo, &algo, sizeof algo);
		result.workspaceSize = algo_workspaces[i];
		result.state = CUBLAS_STATUS_SUCCESS;
		result.wavesCount = 1;
		heuristicResultsArray[(*returnAlgoCount)++] = result;
	}
	return CUBLAS_STATUS_SUCCESS;
}

/* ---- the product ---- */

static size_t extent(const simt_matrix_layout &l)
{
	bool by_rows = l.order == CUBLASLT_ORDER_ROW;
	size_t lines = by_rows ? l.rows : l.columns, length = by_rows ? l.columns : l.rows;
	size_t one = (lines - 1) * (size_t)l.ld + length;
	return ((size_t)(l.batch - 1) * (size_t)l.stride + one) * element_size(l.type);
}

/* Where the chip would read or write what is not there, there is nothing to return. */
static void must_reach(const char *what, const void *at, size_t bytes, int device)
{
	if (!on_device(at, bytes, device))
		die("cublasLtMatmul: %s needs %zu bytes at %p, which are not all memory of device %d", what,
		    bytes, at, device);
}

static void check_reach(const Product &p, const Operands &o, int device)
{
	const simt_matmul_desc &d = p.desc;
	must_reach("A", o.a, extent(p.a), device);
	must_reach("B", o.b, extent(p.b), device);
	must_reach("C", o.c, extent(p.c), device);
	must_reach("D", o.d, extent(p.d), device);
	size_t batches = (size_t)p.d.batch - 1;
	size_t bias = d.epilogue == epilogue_sums_b ? p.n : p.m;
	if (d.epilogue & (epilogue_bias | epilogue_sums | epilogue_sums_a | epilogue_sums_b))
		must_reach("the bias", d.bias,
		           (batches * (size_t)d.bias_stride + bias) * element_size(p.bias_type), device);
	size_t aux = batches * (size_t)d.aux_stride + (p.n - 1) * (size_t)d.aux_ld + p.m;
	if (d.epilogue & epilogue_aux)
		must_reach("the auxiliary matrix", d.aux, aux * element_size(p.aux_type), device);
	for (const void *scalar : {d.a_scale, d.b_scale, d.c_scale, d.d_scale, d.amax}) {
		if (scalar)
			must_reach("a scale", scalar, sizeof(float), device);
	}
	if (o.d == o.a || o.d == o.b)
		die("cublasLtMatmul: D is written over %s", o.d == o.a ? "A" : "B");
}

static cublasStatus_t check_operands(const Product &p, const Operands &o)
{
	const simt_matmul_desc &d = p.desc;
	if (!o.a || !o.b || !o.c || !o.d)
		return INVALID("a matrix is missing");
	if (o.c == o.d && (p.c.ld != p.d.ld || p.c.order != p.d.order || p.c.type != p.d.type))
		return INVALID("C and D are one, but laid out differently");
	if (d.epilogue & (epilogue_bias | epilogue_sums | epilogue_sums_a | epilogue_sums_b) && !d.bias)
		return INVALID("the epilogue needs BIAS_POINTER");
	if (d.epilogue & epilogue_aux && (!d.aux || (uintptr_t)d.aux % 16))
		return INVALID("the epilogue needs EPILOGUE_AUX_POINTER, aligned to 16 bytes");
	if (is_fp8(p.a.type) && ((uintptr_t)o.a % 16 || (uintptr_t)o.b % 16 || (uintptr_t)o.d % 16))
		return UNSUPPORTED("fp8 needs matrices aligned to 16 bytes");
	if ((d.d_scale || d.amax) && !is_fp8(p.d.type))
		return INVALID("D's scale and maximum belong to results in fp8");
	return CUBLAS_STATUS_SUCCESS;
}

static cublasStatus_t read_algo(const Product &p, const cublasLtMatmulAlgo_t *given, size_t workspace_bytes,
                                Operands *o)
{
	Algo algo;
	o->parts = 1;
	o->workspace_bytes = 0;
	if (!given)
		return CUBLAS_STATUS_SUCCESS;
	memcpy(&algo, given, sizeof algo);
	if (algo.magic != algo_magic)
		return INVALID("the algorithm did not come from the heuristic");
	if (algo.fingerprint != fingerprint(p))
		return UNSUPPORTED("the algorithm is for other types, transpositions or another epilogue");
	if (algo.workspace > workspace_bytes)
		return INVALID("the workspace is smaller than the algorithm needs");
	const void *pointers[] = {o->a, o->b, o->c, o->d};
	for (int i = 0; i < 4; i++) {
		if (algo.align[i] && (uintptr_t)pointers[i] % algo.align[i])
			return INVALID("a matrix is less aligned than the preference of the algorithm said");
	}
	o->parts = (unsigned)algo.parts;
	o->workspace_bytes = algo.workspace;
	return CUBLAS_STATUS_SUCCESS;
}

static cublasStatus_t read_factors(const Product &p, const void *alpha, const void *beta, Operands *o)
{
	if (!alpha || !beta)
		return INVALID("alpha or beta is missing");
	if (p.desc.pointer_mode == CUBLASLT_POINTER_MODE_DEVICE) {
		o->alpha_at = alpha;
		o->beta_at = beta;
		return CUBLAS_STATUS_SUCCESS;
	}
	if (p.desc.pointer_mode != CUBLASLT_POINTER_MODE_HOST)
		return UNSUPPORTED("this pointer mode");
	o->alpha = *(const float *)alpha;
	o->beta = *(const float *)beta;
	return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t lightHandle, cublasLtMatmulDesc_t computeDesc,
                              const void *alpha, const void *A, cublasLtMatrixLayout_t Adesc, const void *B,
                              cublasLtMatrixLayout_t Bdesc, const void *beta, const void *C,
                              cublasLtMatrixLayout_t Cdesc, void *D, cublasLtMatrixLayout_t Ddesc,
                              const cublasLtMatmulAlgo_t *algo, void *workspace, size_t workspaceSizeInBytes,
                              cudaStream_t stream)
{
	Lock lock = take_lock();
	CUstream_st *s = find_stream(stream);
	Product p;
	Operands o = {nullptr, nullptr, 0, 0, A, B, C, D, workspace, 0, 1};
	if (!lives(lightHandle))
		return CUBLAS_STATUS_NOT_INITIALIZED;
	cublasStatus_t status = make_product(computeDesc, Adesc, Bdesc, Cdesc, Ddesc, &p);
	if (!status)
		status = check_operands(p, o);
	if (!status && (!s || s->device != lightHandle->device))
		status = INVALID("the stream is not of the device for which the handle was made");
	if (!status && (!workspace != !workspaceSizeInBytes || (uintptr_t)workspace % 256))
		status = INVALID(
		        "the workspace has a size without a place, or the reverse, or is not aligned to 256");
	if (!status)
		status = read_algo(p, algo, workspaceSizeInBytes, &o);
	if (!status)
		status = read_factors(p, alpha, beta, &o);
	if (status)
		return status;
	check_reach(p, o, s->device);
	if (workspace)
		must_reach("the workspace", workspace, workspaceSizeInBytes, s->device);
	bool failed = enqueue_simple(lock, s, "cublasLtMatmul", [p, o] { multiply(p, o); });
	return failed ? CUBLAS_STATUS_EXECUTION_FAILED : CUBLAS_STATUS_SUCCESS;
}
