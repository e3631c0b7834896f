/* The simulated cuBLASLt against plain loops, and what it refuses. */
#include "test/test_simt.h"
#include "cublasLt.h"
#include "cuda_bf16.h"
#include "cuda_fp8.h"

namespace
{
struct Matrix {
	cublasLtMatrixLayout_t layout;
	std::vector<float> values;
	void *at;
	cudaDataType type;
};
} // namespace

static void *upload_as(cudaDataType type, const std::vector<float> &values)
{
	if (type == CUDA_R_32F)
		return upload(values);
	if (type == CUDA_R_16BF)
		return upload(std::vector<__nv_bfloat16>(values.begin(), values.end()));
	std::vector<__nv_fp8_e4m3> narrow;
	for (float x : values)
		narrow.push_back(__nv_fp8_e4m3(x));
	return upload(narrow);
}

/* Small integers divided by 8, exact in every type. */
static Matrix new_matrix(cudaDataType type, size_t rows, size_t columns, unsigned salt)
{
	Matrix m = {nullptr, std::vector<float>(rows * columns), nullptr, type};
	for (size_t i = 0; i < m.values.size(); i++)
		m.values[i] = (float)((int)((i * 7 + salt * 3 + i / 5) % 17) - 8) / 8;
	m.at = upload_as(type, m.values);
	OK(cublasLtMatrixLayoutCreate(&m.layout, type, rows, columns, (int64_t)rows));
	return m;
}

static void end_matrix(Matrix &m)
{
	OK(cublasLtMatrixLayoutDestroy(m.layout));
	OK(cudaFree(m.at));
}

static float download_one(const void *at, size_t i, cudaDataType type)
{
	if (type == CUDA_R_32F)
		return download((const float *)at + i, 1)[0];
	if (type == CUDA_R_16BF)
		return (float)download((const __nv_bfloat16 *)at + i, 1)[0];
	return (float)download((const __nv_fp8_e4m3 *)at + i, 1)[0];
}

template <typename T>
static void set(cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t attribute, T value)
{
	OK(cublasLtMatmulDescSetAttribute(desc, attribute, &value, sizeof value));
}

/* The algorithms for a product with so much workspace. */
static std::vector<cublasLtMatmulHeuristicResult_t> algorithms(cublasLtHandle_t handle,
                                                               cublasLtMatmulDesc_t desc, const Matrix &a,
                                                               const Matrix &b, const Matrix &d,
                                                               uint64_t workspace)
{
	std::vector<cublasLtMatmulHeuristicResult_t> results(8);
	cublasLtMatmulPreference_t preference;
	int count = 0;
	OK(cublasLtMatmulPreferenceCreate(&preference));
	OK(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
	                                        &workspace, sizeof workspace));
	cublasLtMatmulAlgoGetHeuristic(handle, desc, a.layout, b.layout, d.layout, d.layout, preference, 8,
	                               results.data(), &count);
	OK(cublasLtMatmulPreferenceDestroy(preference));
	results.resize((size_t)count);
	return results;
}

static float gelu(float x)
{
	return 0.5f * x * (1 + tanhf(sqrtf(2 / (float)M_PI) * (x + 0.044715f * x * x * x)));
}

static float slope_of_gelu(float x)
{
	return (gelu(x + 1e-3f) - gelu(x - 1e-3f)) / 2e-3f;
}

static const size_t M = 12, N = 7, K = 9;

/* alpha op(A) op(B) + beta C before the epilogue. */
static float plain(const Matrix &a, const Matrix &b, const Matrix &c, bool ta, bool tb, size_t i, size_t j)
{
	float sum = 0;
	for (size_t k = 0; k < K; k++)
		sum += a.values[ta ? i * K + k : k * M + i] * b.values[tb ? k * N + j : j * K + k];
	return 0.5f * sum + 2 * c.values[j * M + i];
}

namespace
{
struct Reference {
	std::vector<float> d, aux, bias;
};
} // namespace

static Reference loops(const Matrix &a, const Matrix &b, const Matrix &c, bool ta, bool tb, uint32_t epilogue,
                       const std::vector<float> &bias, const std::vector<float> &aux)
{
	Reference r = {std::vector<float>(M * N), aux, bias};
	if (epilogue & 16 || epilogue >= 256)
		r.bias.assign(std::max(M, N), 0);
	for (size_t j = 0; j < N; j++) {
		for (size_t i = 0; i < M; i++) {
			float x = plain(a, b, c, ta, tb, i, j) + (epilogue & 4 ? bias[i] : 0);
			if (epilogue & 128 && epilogue & 32)
				r.aux[j * 16 + i] = x;
			r.d[j * M + i] = epilogue & 32   ? gelu(x)
			                 : epilogue & 64 ? x * slope_of_gelu(aux[j * 16 + i])
			                                 : x;
			if (epilogue & 16)
				r.bias[i] += r.d[j * M + i];
		}
	}
	for (size_t k = 0; k < K; k++) {
		for (size_t i = 0; i < M && epilogue == CUBLASLT_EPILOGUE_BGRADA; i++)
			r.bias[i] += a.values[ta ? i * K + k : k * M + i];
		for (size_t j = 0; j < N && epilogue == CUBLASLT_EPILOGUE_BGRADB; j++)
			r.bias[j] += b.values[tb ? k * N + j : j * K + k];
	}
	return r;
}

static void check_product(cublasLtHandle_t handle, uint32_t epilogue, cudaDataType type, bool ta, bool tb)
{
	Matrix a = new_matrix(type, ta ? K : M, ta ? M : K, 1),
	       b = new_matrix(type, tb ? N : K, tb ? K : N, 2);
	Matrix c = new_matrix(type, M, N, 3), bias = new_matrix(type, std::max(M, N), 1, 4),
	       aux = new_matrix(type, 16, N, 5);
	Reference want = loops(a, b, c, ta, tb, epilogue, bias.values, aux.values);
	cublasLtMatmulDesc_t desc;
	OK(cublasLtMatmulDescCreate(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F));
	set(desc, CUBLASLT_MATMUL_DESC_TRANSA, (int32_t)(ta ? CUBLAS_OP_T : CUBLAS_OP_N));
	set(desc, CUBLASLT_MATMUL_DESC_TRANSB, (int32_t)(tb ? CUBLAS_OP_T : CUBLAS_OP_N));
	set(desc, CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue);
	set(desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias.at);
	set(desc, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, aux.at);
	set(desc, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, (int64_t)16);
	auto results = algorithms(handle, desc, a, b, c, 32 << 10);
	CHECK_INT(results.size(), 2);
	void *workspace = upload(std::vector<char>(32 << 10));
	float alpha = 0.5f, beta = 2;
	OK(cublasLtMatmul(handle, desc, &alpha, a.at, a.layout, b.at, b.layout, &beta, c.at, c.layout, c.at,
	                  c.layout, results.empty() ? nullptr : &results[0].algo, workspace, 32 << 10,
	                  nullptr));
	alpha = beta = 0;
	double tolerance = type == CUDA_R_32F ? 2e-4 : 0.04;
	for (size_t i = 0; i < M * N; i++)
		CHECK_NEAR(download_one(c.at, i, type), want.d[i], tolerance * (1 + fabsf(want.d[i])));
	for (size_t i = 0; i < 16 * N; i++)
		CHECK_NEAR(download_one(aux.at, i, type), want.aux[i], tolerance * (1 + fabsf(want.aux[i])));
	for (size_t i = 0; i < (epilogue == CUBLASLT_EPILOGUE_BGRADB ? N : M); i++)
		CHECK_NEAR(download_one(bias.at, i, type), want.bias[i],
		           tolerance * (1 + fabsf(want.bias[i])));
	for (Matrix *m : {&a, &b, &c, &bias, &aux})
		end_matrix(*m);
	OK(cudaFree(workspace));
	OK(cublasLtMatmulDescDestroy(desc));
}

TEST(products_with_every_epilogue)
{
	cublasLtHandle_t handle;
	OK(cublasLtCreate(&handle));
	int turn = 0;
	for (uint32_t epilogue :
	     {CUBLASLT_EPILOGUE_DEFAULT, CUBLASLT_EPILOGUE_BIAS, CUBLASLT_EPILOGUE_GELU,
	      CUBLASLT_EPILOGUE_GELU_AUX, CUBLASLT_EPILOGUE_GELU_BIAS, CUBLASLT_EPILOGUE_GELU_AUX_BIAS,
	      CUBLASLT_EPILOGUE_DGELU, CUBLASLT_EPILOGUE_DGELU_BGRAD, CUBLASLT_EPILOGUE_BGRADA,
	      CUBLASLT_EPILOGUE_BGRADB}) {
		for (cudaDataType type : {CUDA_R_32F, CUDA_R_16BF}) {
			check_product(handle, epilogue, type, turn & 1, turn & 2);
			turn++;
		}
		turn += turn % 4 == 0;
	}
	OK(cublasLtDestroy(handle));
}

TEST(products_of_batches_and_rows)
{
	cublasLtHandle_t handle;
	cublasLtMatmulDesc_t desc;
	cublasLtMatrixLayout_t layout[3];
	OK(cublasLtCreate(&handle));
	OK(cublasLtMatmulDescCreate(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F));
	const uint64_t rows[3] = {2, 3, 2}, columns[3] = {3, 4, 4};
	float *at[3];
	for (int i = 0; i < 3; i++) {
		int32_t batch = 5, order = CUBLASLT_ORDER_ROW;
		int64_t stride = (int64_t)(rows[i] * columns[i]);
		std::vector<float> values((size_t)stride * 5);
		for (size_t v = 0; v < values.size(); v++)
			values[v] = (float)(v % 11);
		at[i] = upload(values);
		OK(cublasLtMatrixLayoutCreate(&layout[i], CUDA_R_32F, rows[i], columns[i],
		                              (int64_t)columns[i]));
		OK(cublasLtMatrixLayoutSetAttribute(layout[i], CUBLASLT_MATRIX_LAYOUT_ORDER, &order, 4));
		OK(cublasLtMatrixLayoutSetAttribute(layout[i], CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &batch,
		                                    4));
		OK(cublasLtMatrixLayoutSetAttribute(layout[i], CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
		                                    &stride, 8));
	}
	float *factors = upload(std::vector<float>{3, 0});
	set(desc, CUBLASLT_MATMUL_DESC_POINTER_MODE, (int32_t)CUBLASLT_POINTER_MODE_DEVICE);
	OK(cublasLtMatmul(handle, desc, factors, at[0], layout[0], at[1], layout[1], factors + 1, at[2],
	                  layout[2], at[2], layout[2], nullptr, nullptr, 0, nullptr));
	std::vector<float> got = download(at[2], 40);
	for (size_t e = 0; e < 40; e++) {
		size_t batch = e / 8, i = e / 4 % 2, j = e % 4;
		float sum = 0;
		for (size_t k = 0; k < 3; k++)
			sum += (float)((batch * 6 + i * 3 + k) % 11) * (float)((batch * 12 + k * 4 + j) % 11);
		CHECK_NEAR(got[e], 3 * sum, 0);
	}
	for (int i = 0; i < 3; i++) {
		OK(cudaFree(at[i]));
		OK(cublasLtMatrixLayoutDestroy(layout[i]));
	}
	OK(cudaFree(factors));
	OK(cublasLtMatmulDescDestroy(desc));
	OK(cublasLtDestroy(handle));
}

TEST(fp8_products_scale_and_find_maxima)
{
	cublasLtHandle_t handle;
	cublasLtMatmulDesc_t desc;
	OK(cublasLtCreate(&handle));
	OK(cublasLtMatmulDescCreate(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F));
	Matrix a = new_matrix(CUDA_R_8F_E4M3, 32, 16, 1), b = new_matrix(CUDA_R_8F_E4M3, 32, 48, 2);
	Matrix c = new_matrix(CUDA_R_16BF, 16, 48, 3), d = new_matrix(CUDA_R_8F_E4M3, 16, 48, 4);
	float *scales = upload(std::vector<float>{2, 3, 0.25f, 0});
	CHECK_INT(algorithms(handle, desc, a, b, c, 0).size(), 0); /* A is not transposed */
	set(desc, CUBLASLT_MATMUL_DESC_TRANSA, (int32_t)CUBLAS_OP_T);
	CHECK_INT(algorithms(handle, desc, a, b, c, 0).size(), 1);
	set(desc, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, (void *)scales);
	set(desc, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, (void *)(scales + 1));
	set(desc, CUBLASLT_MATMUL_DESC_D_SCALE_POINTER, (void *)(scales + 2));
	set(desc, CUBLASLT_MATMUL_DESC_AMAX_D_POINTER, (void *)(scales + 3));
	set(desc, CUBLASLT_MATMUL_DESC_FAST_ACCUM, (int8_t)1);
	float alpha = 1, beta = 0, most = 0;
	OK(cublasLtMatmul(handle, desc, &alpha, a.at, a.layout, b.at, b.layout, &beta, c.at, c.layout, d.at,
	                  d.layout, nullptr, nullptr, 0, nullptr));
	for (size_t e = 0; e < 16 * 48; e++) {
		float sum = 0;
		for (size_t k = 0; k < 32; k++)
			sum += a.values[e % 16 * 32 + k] * b.values[e / 16 * 32 + k];
		most = fmaxf(most, fabsf(6 * sum));
		CHECK_NEAR(download_one(d.at, e, d.type), (float)__nv_fp8_e4m3(1.5f * sum), 0);
	}
	CHECK_NEAR(download(scales + 3, 1)[0], most, 0);
	for (Matrix *m : {&a, &b, &c, &d})
		end_matrix(*m);
	OK(cudaFree(scales));
	OK(cublasLtMatmulDescDestroy(desc));
	OK(cublasLtDestroy(handle));
}

TEST(products_that_do_not_fit_are_refused)
{
	cublasLtHandle_t handle;
	cublasLtMatmulDesc_t desc;
	OK(cublasLtCreate(&handle));
	OK(cublasLtMatmulDescCreate(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F));
	Matrix a = new_matrix(CUDA_R_32F, M, K, 1), b = new_matrix(CUDA_R_32F, K, N, 2),
	       c = new_matrix(CUDA_R_32F, M, N, 3), bf16 = new_matrix(CUDA_R_16BF, K, N, 3);
	float one = 1, zero = 0;
	char *workspace = upload(std::vector<char>(1 << 20));
	auto multiply = [&](const Matrix &x, const Matrix &y, const cublasLtMatmulAlgo_t *algo, void *room,
	                    size_t size) {
		return cublasLtMatmul(handle, desc, &one, x.at, x.layout, y.at, y.layout, &zero, c.at,
		                      c.layout, c.at, c.layout, algo, room, size, nullptr);
	};
	OK(multiply(a, b, nullptr, nullptr, 0));
	CHECK_INT(multiply(b, a, nullptr, nullptr, 0), CUBLAS_STATUS_INVALID_VALUE);
	CHECK_INT(multiply(a, bf16, nullptr, nullptr, 0), CUBLAS_STATUS_NOT_SUPPORTED);
	CHECK_INT(multiply(a, b, nullptr, nullptr, 16), CUBLAS_STATUS_INVALID_VALUE);
	CHECK_INT(multiply(a, b, nullptr, workspace + 16, 1024), CUBLAS_STATUS_INVALID_VALUE);
	auto results = algorithms(handle, desc, a, b, c, 1 << 20);
	CHECK_INT(results.size(), 3);
	MUST(results.size() == 3);
	CHECK_INT(results[0].workspaceSize, 1 << 20);
	CHECK_INT(multiply(a, b, &results[0].algo, workspace, 1 << 19), CUBLAS_STATUS_INVALID_VALUE);
	OK(multiply(a, b, &results[0].algo, workspace, 1 << 20));
	Matrix shifted = a;
	shifted.at = (char *)b.at + 4; /* less aligned than the preference assumed */
	CHECK_INT(multiply(shifted, b, &results[2].algo, nullptr, 0), CUBLAS_STATUS_INVALID_VALUE);
	int64_t ld = (int64_t)M - 1;
	CHECK_INT(cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_TRANSA, &ld, 8),
	          CUBLAS_STATUS_INVALID_VALUE);
	set(desc, CUBLASLT_MATMUL_DESC_EPILOGUE, (uint32_t)CUBLASLT_EPILOGUE_BIAS);
	CHECK_INT(multiply(a, b, nullptr, nullptr, 0), CUBLAS_STATUS_INVALID_VALUE); /* no bias */
	CHECK_INT(multiply(a, b, &results[2].algo, nullptr, 0), CUBLAS_STATUS_INVALID_VALUE);
	set(desc, CUBLASLT_MATMUL_DESC_EPILOGUE, (uint32_t)CUBLASLT_EPILOGUE_GELU_AUX);
	set(desc, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, (void *)workspace);
	set(desc, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, (int64_t)M);
	CHECK_INT(multiply(a, b, nullptr, nullptr, 0),
	          CUBLAS_STATUS_INVALID_VALUE); /* 12 is no multiple of 8 */
	set(desc, CUBLASLT_MATMUL_DESC_EPILOGUE, (uint32_t)CUBLASLT_EPILOGUE_DEFAULT);
	set(desc, CUBLASLT_MATMUL_DESC_AMAX_D_POINTER, (void *)workspace);
	CHECK_INT(multiply(a, b, nullptr, nullptr, 0), CUBLAS_STATUS_INVALID_VALUE); /* only fp8 has one */
	set(desc, CUBLASLT_MATMUL_DESC_AMAX_D_POINTER, (void *)nullptr);
	OK(cublasLtMatrixLayoutSetAttribute(a.layout, CUBLASLT_MATRIX_LAYOUT_LD, &ld, sizeof ld));
	CHECK_INT(multiply(a, b, nullptr, nullptr, 0), CUBLAS_STATUS_INVALID_VALUE);
	ld = 64;
	OK(cublasLtMatrixLayoutSetAttribute(a.layout, CUBLASLT_MATRIX_LAYOUT_LD, &ld, sizeof ld));
	CHECK_HAS(last_words([&] { multiply(a, b, nullptr, nullptr, 0); }), "cublasLtMatmul: A needs");
	for (Matrix *m : {&a, &b, &c, &bf16})
		end_matrix(*m);
	OK(cudaFree(workspace));
	OK(cublasLtMatmulDescDestroy(desc));
	OK(cublasLtDestroy(handle));
}
