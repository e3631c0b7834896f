/* Products by the library. What it offers for a shape is asked for once; where the stream was told of what is
 * to come, so that more calls of the shape will follow, the first call also tries what is offered and keeps
 * the fastest (dist.deterministic: never). Offers round differently, and another run or rank may find another
 * one fastest: runs are then not the same bit for bit, nor is what several ranks each compute for themselves.
 * Products in f32 are never tried: they are few, and routers choose by them. */
#include "kernels/cuda/product.h"
#include "base/mem.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cublasLt.h>

enum {
	OFFERS = 8,     /* that are asked for */
	TRIES = 3,      /* of each */
	ALIGN_MOST = 64 /* tensors are aligned so */
};
static const float worth = 0.97f; /* the share of the first offer's time that another may take */

enum operand { OPERAND_a, OPERAND_b, OPERAND_d, OPERANDS };

/* The library's matrices stand by columns: what is x[N,K] here is K by N there. Hopper multiplies in fp8 only
 * what stands by the depth on both sides, so dx is given w', and dw dy' and x'. */
static const struct {
	const char *name;
	cublasOperation_t transposed[2];
	enum product_size dim[OPERANDS][2]; /* rows and columns; the leading dimension is that of the rows */
	enum product_size depth;
	bool slope;     /* an activation is that of the backward pass */
	bool fp8, fast; /* fast: sums of fp8 go to f32 only at the end */
	cudaDataType type[2];
} kinds[PRODUCT_KINDS] = {
        [PRODUCT_linear] = {.name = "linear",
                            .transposed = {CUBLAS_OP_T, CUBLAS_OP_N},
                            .dim = {{SIZE_k, SIZE_m}, {SIZE_k, SIZE_n}, {SIZE_m, SIZE_n}},
                            .depth = SIZE_k},
        [PRODUCT_linear_dx] = {.name = "linear_dx",
                               .transposed = {CUBLAS_OP_N, CUBLAS_OP_N},
                               .dim = {{SIZE_k, SIZE_m}, {SIZE_m, SIZE_n}, {SIZE_k, SIZE_n}},
                               .depth = SIZE_m,
                               .slope = true},
        [PRODUCT_linear_dw] = {.name = "linear_dw",
                               .transposed = {CUBLAS_OP_N, CUBLAS_OP_T},
                               .dim = {{SIZE_k, SIZE_n}, {SIZE_m, SIZE_n}, {SIZE_k, SIZE_m}},
                               .depth = SIZE_n},
        [PRODUCT_linear_fp8] = {.name = "linear in fp8",
                                .transposed = {CUBLAS_OP_T, CUBLAS_OP_N},
                                .dim = {{SIZE_k, SIZE_m}, {SIZE_k, SIZE_n}, {SIZE_m, SIZE_n}},
                                .depth = SIZE_k,
                                .fp8 = true,
                                .fast = true,
                                .type = {CUDA_R_8F_E4M3, CUDA_R_8F_E4M3}},
        [PRODUCT_linear_dx_fp8] = {.name = "linear_dx in fp8",
                                   .transposed = {CUBLAS_OP_T, CUBLAS_OP_N},
                                   .dim = {{SIZE_m, SIZE_k}, {SIZE_m, SIZE_n}, {SIZE_k, SIZE_n}},
                                   .depth = SIZE_m,
                                   .slope = true,
                                   .fp8 = true,
                                   .type = {CUDA_R_8F_E4M3, CUDA_R_8F_E5M2}},
        [PRODUCT_linear_dw_fp8] = {.name = "linear_dw in fp8",
                                   .transposed = {CUBLAS_OP_T, CUBLAS_OP_N},
                                   .dim = {{SIZE_n, SIZE_k}, {SIZE_n, SIZE_m}, {SIZE_k, SIZE_m}},
                                   .depth = SIZE_n,
                                   .fp8 = true,
                                   .type = {CUDA_R_8F_E4M3, CUDA_R_8F_E5M2}},
};

static const struct {
	bool known;
	cudaDataType type;
} types[DT_COUNT] = {
        [DT_f32] = {true, CUDA_R_32F}, [DT_bf16] = {true, CUDA_R_16BF}, [DT_f16] = {true, CUDA_R_16F}};

/* What a choice depends on; compared as bytes. */
struct key {
	int64_t size[PRODUCT_SIZES], batch;
	uint8_t kind, dtype, result_dtype, bias, aux, align, unused[2];
};

struct choice {
	struct key key;
	bool used;  /* a place of the table */
	bool apart; /* no offer takes the bias or the activation along */
	cublasLtMatmulDesc_t how;
	cublasLtMatrixLayout_t layout[OPERANDS];
	cublasLtMatmulAlgo_t algo;
	size_t workspace_bytes;
	int64_t rows; /* N that the layouts say now */
};

struct cuda_blas {
	cublasLtHandle_t library;
	cublasLtMatmulPreference_t preference;
	cudaEvent_t begun, ended;
	bool tunes;
	struct choice *choice; /* open addressing, at most half full */
	size_t n, places;      /* places: a power of two */
};

static int blas_failed(struct err *e, cublasStatus_t rc, const char *what)
{
	return err_set(e, rc == CUBLAS_STATUS_ALLOC_FAILED ? EXIT_UNAVAILABLE : EXIT_INTERNAL,
	               "cuda: %s: %s (%s)", what, cublasLtGetStatusString(rc), cublasLtGetStatusName(rc));
}
#define BLAS_TRY(e, call)                                     \
	do {                                                  \
		cublasStatus_t try_rc = (call);               \
		if (try_rc != CUBLAS_STATUS_SUCCESS)          \
			return blas_failed(e, try_rc, #call); \
	} while (0)

const char *cuda_blas_describe(void)
{
	static _Thread_local char text[40];
	size_t version = cublasLtGetVersion();
	snprintf(text, sizeof text, "cuBLASLt %zu.%zu", version / 10000, version / 100 % 100);
	return text;
}

/* Hopper's products want more. */
size_t cuda_product_workspace(const struct stream *s)
{
	return (size_t)(s->properties.major >= 9 ? 32 : 8) << 20;
}

size_t cuda_space_product(struct stream *s, const struct kernel_call *call)
{
	(void)call;
	return cuda_product_workspace(s);
}

/* Sums that are cut into parts meet in f32. */
static int prefer(struct cuda_blas *b, uint64_t workspace, struct err *e)
{
	uint32_t reductions = CUBLASLT_REDUCTION_SCHEME_NONE | CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
	BLAS_TRY(e, cublasLtMatmulPreferenceCreate(&b->preference));
	BLAS_TRY(e,
	         cublasLtMatmulPreferenceSetAttribute(b->preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
	                                              &workspace, sizeof workspace));
	BLAS_TRY(e, cublasLtMatmulPreferenceSetAttribute(b->preference,
	                                                 CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
	                                                 &reductions, sizeof reductions));
	return 0;
}

int cuda_blas_open(struct stream *s, struct err *e)
{
	struct cuda_blas *b = s->blas = mem_array(1, sizeof *b);
	b->tunes = !s->deterministic;
	b->places = 64;
	b->choice = mem_array(b->places, sizeof *b->choice);
	BLAS_TRY(e, cublasLtCreate(&b->library));
	CUDA_TRY(e, cudaEventCreate(&b->begun));
	CUDA_TRY(e, cudaEventCreate(&b->ended));
	return prefer(b, cuda_product_workspace(s), e);
}

static void choice_close(struct choice *c)
{
	for (int i = 0; i < OPERANDS; i++)
		if (c->layout[i])
			cublasLtMatrixLayoutDestroy(c->layout[i]);
	if (c->how)
		cublasLtMatmulDescDestroy(c->how);
}

void cuda_blas_close(struct stream *s)
{
	struct cuda_blas *b = s->blas;
	if (!b)
		return;
	for (size_t i = 0; i < b->places; i++)
		choice_close(&b->choice[i]);
	free(b->choice);
	if (b->preference)
		cublasLtMatmulPreferenceDestroy(b->preference);
	if (b->begun)
		cudaEventDestroy(b->begun);
	if (b->ended)
		cudaEventDestroy(b->ended);
	if (b->library)
		cublasLtDestroy(b->library);
	free(b);
	s->blas = NULL;
}

/* The choices */

/* Four sizes in each power of two; every 16th of the small ones. */
static int64_t near(int64_t rows)
{
	int64_t step = 16;
	while (step * 8 < rows)
		step *= 2;
	return (rows + step - 1) / step * step;
}

/* Of every operand of every product of a batch. */
static uint8_t alignment(const struct product *p)
{
	uintptr_t all = (uintptr_t)p->rows | (uintptr_t)p->with | (uintptr_t)p->result | (uintptr_t)p->bias |
	                (uintptr_t)p->aux | ALIGN_MOST;
	for (int i = 0; i < OPERANDS && p->batch > 1; i++) {
		const enum product_size *dim = kinds[p->kind].dim[i];
		enum dtype dtype = i == OPERAND_d ? p->result_dtype : p->dtype;
		all |= (uintptr_t)(p->size[dim[0]] * p->size[dim[1]] * dtype_rows[dtype].bytes);
	}
	return (uint8_t)(all & -all);
}

static struct key key_of(const struct product *p)
{
	struct key key = {.batch = p->batch,
	                  .kind = (uint8_t)p->kind,
	                  .dtype = (uint8_t)p->dtype,
	                  .result_dtype = (uint8_t)p->result_dtype,
	                  .bias = p->bias != NULL,
	                  .aux = p->aux != NULL,
	                  .align = alignment(p)};
	memcpy(key.size, p->size, sizeof key.size);
	if (p->varies)
		key.size[SIZE_n] = near(p->size[SIZE_n]);
	return key;
}

/* Fowler-Noll-Vo. */
static uint64_t hash(const struct key *key)
{
	const unsigned char *byte = (const unsigned char *)key;
	uint64_t h = 0xcbf29ce484222325;
	for (size_t i = 0; i < sizeof *key; i++)
		h = (h ^ byte[i]) * 0x100000001b3;
	return h ^ h >> 32;
}

/* The key's place, or the free one where it belongs. */
static struct choice *place_of(const struct cuda_blas *b, const struct key *key)
{
	size_t i = hash(key) & (b->places - 1);
	while (b->choice[i].used && memcmp(&b->choice[i].key, key, sizeof *key) != 0)
		i = (i + 1) & (b->places - 1);
	return &b->choice[i];
}

static void grow(struct cuda_blas *b)
{
	struct choice *old = b->choice;
	size_t places = b->places;
	b->places *= 2;
	b->choice = mem_array(b->places, sizeof *b->choice);
	for (size_t i = 0; i < places; i++)
		if (old[i].used)
			*place_of(b, &old[i].key) = old[i];
	free(old);
}

#define SET_HOW(c, attribute, value)                                                                     \
	BLAS_TRY(e, cublasLtMatmulDescSetAttribute((c)->how, CUBLASLT_MATMUL_DESC_##attribute, &(value), \
	                                           sizeof(value)))

/* Where a call's bias, what goes with its activation, and factors are; offers are for their alignment. */
static int set_pointers(const struct choice *c, const struct product *p, struct err *e)
{
	if (p->bias && !c->apart)
		SET_HOW(c, BIAS_POINTER, p->bias);
	if (p->aux && !c->apart)
		SET_HOW(c, EPILOGUE_AUX_POINTER, p->aux);
	if (!kinds[p->kind].fp8)
		return 0;
	SET_HOW(c, A_SCALE_POINTER, p->factor[OPERAND_a]);
	SET_HOW(c, B_SCALE_POINTER, p->factor[OPERAND_b]);
	return 0;
}

static cublasLtEpilogue_t epilogue_of(const struct product *p)
{
	if (p->aux && kinds[p->kind].slope)
		return CUBLASLT_EPILOGUE_DGELU;
	if (p->aux)
		return p->bias ? CUBLASLT_EPILOGUE_GELU_AUX_BIAS : CUBLASLT_EPILOGUE_GELU_AUX;
	return p->bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT;
}

static int set_how(const struct choice *c, const struct product *p, struct err *e)
{
	const cublasOperation_t *op = kinds[p->kind].transposed;
	const cublasLtEpilogue_t epilogue = c->apart ? CUBLASLT_EPILOGUE_DEFAULT : epilogue_of(p);
	const int64_t aux_pitch = p->size[kinds[p->kind].dim[OPERAND_d][0]];
	const int8_t fast = kinds[p->kind].fast;
	SET_HOW(c, TRANSA, op[0]);
	SET_HOW(c, TRANSB, op[1]);
	SET_HOW(c, EPILOGUE, epilogue);
	if (p->aux && !c->apart)
		SET_HOW(c, EPILOGUE_AUX_LD, aux_pitch);
	if (fast)
		SET_HOW(c, FAST_ACCUM, fast);
	return set_pointers(c, p, e);
}

/* Products of a batch lie one behind the other. */
static int set_batch(cublasLtMatrixLayout_t layout, int32_t batch, int64_t each, struct err *e)
{
	BLAS_TRY(e, cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &batch,
	                                             sizeof batch));
	BLAS_TRY(e, cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
	                                             &each, sizeof each));
	return 0;
}

static cudaDataType type_of(const struct product *p, int operand)
{
	if (operand != OPERAND_d && kinds[p->kind].fp8)
		return kinds[p->kind].type[operand];
	return types[operand == OPERAND_d ? p->result_dtype : p->dtype].type;
}

static int describe(struct choice *c, const struct product *p, struct err *e)
{
	BLAS_TRY(e, cublasLtMatmulDescCreate(&c->how, CUBLAS_COMPUTE_32F, CUDA_R_32F));
	for (int i = 0; i < OPERANDS; i++) {
		int64_t rows = c->key.size[kinds[p->kind].dim[i][0]],
		        columns = c->key.size[kinds[p->kind].dim[i][1]];
		BLAS_TRY(e, cublasLtMatrixLayoutCreate(&c->layout[i], type_of(p, i), (uint64_t)rows,
		                                       (uint64_t)columns, rows));
		if (p->batch > 1 && set_batch(c->layout[i], (int32_t)p->batch, rows * columns, e))
			return e->code;
	}
	c->rows = c->key.size[SIZE_n];
	return set_how(c, p, e);
}

static int set_alignment(const struct cuda_blas *b, uint32_t align, struct err *e)
{
	static const cublasLtMatmulPreferenceAttributes_t of[] = {
	        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
	        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES};
	for (size_t i = 0; i < sizeof of / sizeof *of; i++)
		BLAS_TRY(e, cublasLtMatmulPreferenceSetAttribute(b->preference, of[i], &align, sizeof align));
	return 0;
}

static bool is_refusal(cublasStatus_t rc)
{
	return rc == CUBLAS_STATUS_NOT_SUPPORTED || rc == CUBLAS_STATUS_INVALID_VALUE ||
	       rc == CUBLAS_STATUS_ARCH_MISMATCH;
}

/* The best first; where there are none for the layouts and the epilogue, *n is 0. */
static int ask(const struct cuda_blas *b, const struct choice *c, cublasLtMatmulHeuristicResult_t *offer,
               int *n, struct err *e)
{
	int found = 0;
	*n = 0;
	if (set_alignment(b, c->key.align, e))
		return e->code;
	cublasStatus_t rc = cublasLtMatmulAlgoGetHeuristic(
	        b->library, c->how, c->layout[OPERAND_a], c->layout[OPERAND_b], c->layout[OPERAND_d],
	        c->layout[OPERAND_d], b->preference, OFFERS, offer, &found);
	if (rc != CUBLAS_STATUS_SUCCESS && !is_refusal(rc))
		return blas_failed(e, rc, "cublasLtMatmulAlgoGetHeuristic");
	for (int i = 0; i < found; i++)
		if (offer[i].state == CUBLAS_STATUS_SUCCESS)
			offer[(*n)++] = offer[i];
	return 0;
}

static int refused(const struct product *p, const struct key *key, struct err *e)
{
	return err_set(
	        e, EXIT_INTERNAL,
	        "cuda: %s offers nothing for %s of N %lld, M %lld, K %lld, %s to %s, aligned to %d bytes",
	        cuda_blas_describe(), kinds[p->kind].name, (long long)key->size[SIZE_n],
	        (long long)key->size[SIZE_m], (long long)key->size[SIZE_k], dtype_rows[p->dtype].name,
	        dtype_rows[p->result_dtype].name, key->align);
}

/* The product */

/* `out` is where the result goes: it may be another place while offers are tried. */
static cublasStatus_t multiply(struct stream *s, const struct choice *c, const struct product *p,
                               const cublasLtMatmulAlgo_t *algo, void *workspace, size_t bytes, void *out,
                               bool acc)
{
	const float one = 1, zero = 0;
	return cublasLtMatmul(s->blas->library, c->how, &one, p->with, c->layout[OPERAND_a], p->rows,
	                      c->layout[OPERAND_b], acc ? &one : &zero, out, c->layout[OPERAND_d], out,
	                      c->layout[OPERAND_d], algo, bytes ? workspace : NULL, bytes, s->compute);
}

/* Milliseconds of TRIES runs, the first one, which may have to load code, left out; below 0: it cannot run.
 */
static float time_of(struct stream *s, const struct choice *c, const struct product *p,
                     const cublasLtMatmulHeuristicResult_t *offer, void *workspace, void *out)
{
	struct cuda_blas *b = s->blas;
	float ms = -1;
	bool runs = true;
	for (int i = 0; i <= TRIES && runs; i++) {
		if (i == 1)
			runs = cudaEventRecord(b->begun, s->compute) == cudaSuccess;
		runs = runs && multiply(s, c, p, &offer->algo, workspace, offer->workspaceSize, out, false) ==
		                       CUBLAS_STATUS_SUCCESS;
	}
	runs = runs && cudaEventRecord(b->ended, s->compute) == cudaSuccess &&
	       cudaEventSynchronize(b->ended) == cudaSuccess &&
	       cudaEventElapsedTime(&ms, b->begun, b->ended) == cudaSuccess;
	return runs ? ms : -1;
}

static int64_t result_bytes(const struct product *p)
{
	const enum product_size *dim = kinds[p->kind].dim[OPERAND_d];
	return p->size[dim[0]] * p->size[dim[1]] * p->batch * dtype_rows[p->result_dtype].bytes;
}

/* Where results may go that are tried out: what is added to must not be lost. */
static void *place_to_try(struct stream *s, const struct product *p, char *workspace)
{
	size_t held = p->held_bytes + cuda_product_workspace(s);
	if (!p->acc)
		return p->result;
	return held + (size_t)result_bytes(p) <= s->scratch_bytes ? workspace + cuda_product_workspace(s)
	                                                          : NULL;
}

/* NULL with a message in *e. */
static char *workspace_of(struct stream *s, const struct product *p, size_t bytes, struct err *e)
{
	char *scratch = cuda_scratch(s, p->held_bytes + bytes, e);
	return scratch ? scratch + p->held_bytes : NULL;
}

static bool may_try(struct stream *s, const struct product *p)
{
	enum cudaStreamCaptureStatus status;
	return s->blas->tunes && s->is_told && !p->varies && p->dtype != DT_f32 &&
	       cudaStreamIsCapturing(s->compute, &status) == cudaSuccess &&
	       status == cudaStreamCaptureStatusNone;
}

/* Which of n offers; the first where another is not clearly faster. */
static int fastest(struct stream *s, const struct choice *c, const struct product *p,
                   const cublasLtMatmulHeuristicResult_t *offer, int n, struct err *e)
{
	int best = 0;
	if (n < 2 || !may_try(s, p))
		return 0;
	char *workspace = workspace_of(s, p, cuda_product_workspace(s), e);
	void *out = workspace ? place_to_try(s, p, workspace) : NULL;
	if (!out)
		return 0;
	float least = time_of(s, c, p, &offer[0], workspace, out);
	least = least < 0 ? INFINITY : least * worth;
	for (int i = 1; i < n; i++) {
		float ms = time_of(s, c, p, &offer[i], workspace, out);
		if (ms < 0 || ms >= least)
			continue;
		best = i;
		least = ms;
	}
	return best;
}

static int choose(struct stream *s, struct choice *c, const struct product *p, struct err *e)
{
	cublasLtMatmulHeuristicResult_t offer[OFFERS];
	int n;
	if (describe(c, p, e) || ask(s->blas, c, offer, &n, e))
		return e->code;
	if (!n && (p->bias || p->aux)) {
		c->apart = true;
		if (set_how(c, p, e) || ask(s->blas, c, offer, &n, e))
			return e->code;
	}
	if (!n)
		return refused(p, &c->key, e);
	int best = fastest(s, c, p, offer, n, e);
	c->algo = offer[best].algo;
	c->workspace_bytes = offer[best].workspaceSize;
	return 0;
}

/* NULL with a message in *e. Valid until the next shape is new. */
static struct choice *choice_for(struct stream *s, const struct product *p, struct err *e)
{
	struct cuda_blas *b = s->blas;
	struct key key = key_of(p);
	struct choice *c = place_of(b, &key), new = {.key = key, .used = true};
	if (c->used)
		return c;
	if (choose(s, &new, p, e)) {
		choice_close(&new);
		return NULL;
	}
	if (2 * ++b->n > b->places)
		grow(b);
	c = place_of(b, &key);
	*c = new;
	return c;
}

/* The layouts say N as it is. */
static int set_rows(struct choice *c, const struct product *p, struct err *e)
{
	uint64_t rows = (uint64_t)p->size[SIZE_n];
	if (c->rows == p->size[SIZE_n])
		return 0;
	for (int i = 0; i < OPERANDS; i++)
		if (kinds[p->kind].dim[i][1] == SIZE_n) /* a kind that stands by N is never one that varies */
			BLAS_TRY(e, cublasLtMatrixLayoutSetAttribute(
			                    c->layout[i], CUBLASLT_MATRIX_LAYOUT_COLS, &rows, sizeof rows));
	c->rows = p->size[SIZE_n];
	return 0;
}

static int run(struct stream *s, const struct choice *c, const struct product *p,
               const cublasLtMatmulAlgo_t *algo, size_t bytes, cublasStatus_t *rc, struct err *e)
{
	char *workspace = bytes ? workspace_of(s, p, bytes, e) : NULL;
	if (bytes && !workspace)
		return e->code;
	*rc = multiply(s, c, p, algo, workspace, bytes, p->result, p->acc);
	return 0;
}

/* What was chosen for a size near this one may refuse this one, and now and then the library refuses what it
 * has offered: all offers in turn. */
static int run_anew(struct stream *s, struct choice *c, const struct product *p, cublasStatus_t *rc,
                    struct err *e)
{
	cublasLtMatmulHeuristicResult_t offer[OFFERS];
	int n;
	if (ask(s->blas, c, offer, &n, e))
		return e->code;
	for (int i = 0; i < n && is_refusal(*rc); i++) {
		if (run(s, c, p, &offer[i].algo, offer[i].workspaceSize, rc, e))
			return e->code;
		if (*rc == CUBLAS_STATUS_SUCCESS && !p->varies) {
			c->algo = offer[i].algo;
			c->workspace_bytes = offer[i].workspaceSize;
		}
	}
	return 0;
}

static struct tensor matrix(const void *data, const struct product *p, int64_t columns)
{
	return (struct tensor){.data = (void *)data,
	                       .dim = {(int32_t)p->size[SIZE_n], (int32_t)columns, 1, 1},
	                       .nd = 2,
	                       .dtype = (uint8_t)p->result_dtype};
}

static int add_bias(struct stream *s, const struct product *p, const void *to, struct err *e)
{
	struct tensor y = matrix(to, p, p->size[SIZE_m]), in[] = {y, matrix(p->bias, p, 1)};
	const union op_arg none = {0};
	in[1].dim[0] = (int32_t)p->size[SIZE_m];
	in[1].nd = 1;
	return cuda_bias_add(s, &none, in, &y, e);
}

/* By kernels of our own, where no offer does it: the bias, then the activation, or its slope. */
static int finish(struct stream *s, const struct product *p, struct err *e)
{
	const union op_arg gelu = {.activation = {ACT_gelu}};
	int64_t columns = p->size[kinds[p->kind].dim[OPERAND_d][0]];
	struct tensor y = matrix(p->result, p, columns), h = matrix(p->aux, p, columns);
	if (p->bias && add_bias(s, p, p->aux ? p->aux : p->result, e))
		return e->code;
	if (!p->aux)
		return 0;
	if (kinds[p->kind].slope)
		return cuda_activation_bwd(s, &gelu, (struct tensor[]){y, h}, &y, e);
	return cuda_activation(s, &gelu, &h, &y, e);
}

/* What is activated afterwards stays where it is read from. */
static struct product apart_from(const struct product *p)
{
	struct product q = *p;
	if (p->aux && !kinds[p->kind].slope)
		q.result = p->aux;
	return q;
}

/* Sums of nothing. */
static int no_depth(struct stream *s, const struct product *p, struct err *e)
{
	struct product q = apart_from(p);
	if (!p->acc)
		CUDA_TRY(e, cudaMemsetAsync(q.result, 0, (size_t)result_bytes(p), s->compute));
	return finish(s, p, e);
}

/* One try; what refuses with all that goes along may do without. */
static int run_chosen(struct stream *s, struct choice *c, const struct product *p, struct err *e)
{
	cublasStatus_t rc = CUBLAS_STATUS_SUCCESS;
	struct product q = c->apart ? apart_from(p) : *p;
	if (set_rows(c, p, e) || set_pointers(c, p, e) || run(s, c, &q, &c->algo, c->workspace_bytes, &rc, e))
		return e->code;
	if (is_refusal(rc) && run_anew(s, c, &q, &rc, e))
		return e->code;
	if (is_refusal(rc) && (p->bias || p->aux) && !c->apart) {
		c->apart = true;
		return set_how(c, p, e) ? e->code : run_chosen(s, c, p, e);
	}
	if (rc != CUBLAS_STATUS_SUCCESS)
		return blas_failed(e, rc, kinds[p->kind].name);
	return c->apart ? finish(s, p, e) : 0;
}

int cuda_product(struct stream *s, const struct product *p, struct err *e)
{
	if (!types[p->dtype].known || !types[p->result_dtype].known)
		return err_set(e, EXIT_INTERNAL, "cuda: %s from %s to %s; allowed: f32, bf16, f16",
		               kinds[p->kind].name, dtype_rows[p->dtype].name,
		               dtype_rows[p->result_dtype].name);
	if (!result_bytes(p))
		return 0;
	if (!p->size[kinds[p->kind].depth])
		return no_depth(s, p, e);
	struct choice *c = choice_for(s, p, e);
	return c ? run_chosen(s, c, p, e) : e->code;
}
