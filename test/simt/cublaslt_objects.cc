/* cuBLASLt's objects: handles, and descriptions that are set attribute by attribute. */
#include "matmul.h"

#include <cstddef>
#include <cstring>
#include <set>

static std::set<cublasLtHandle_t> handles;

bool lives(cublasLtHandle_t handle)
{
	return handles.count(handle);
}

cublasStatus_t refuse(cublasStatus_t status, const char *why)
{
	talk("cuBLASLt: %s", why);
	return status;
}

size_t cublasLtGetVersion(void)
{
	return CUBLAS_VERSION;
}

size_t cublasLtGetCudartVersion(void)
{
	return CUDART_VERSION;
}

const char *cublasLtGetStatusName(cublasStatus_t status)
{
	switch (status) {
#define NAME(name, value, text) \
	case name:              \
		return #name;
		SIMT_CUBLAS_STATUSES(NAME)
#undef NAME
	}
	return "unknown status";
}

const char *cublasLtGetStatusString(cublasStatus_t status)
{
	switch (status) {
#define TEXT(name, value, text) \
	case name:              \
		return text;
		SIMT_CUBLAS_STATUSES(TEXT)
#undef TEXT
	}
	return "unknown status";
}

cublasStatus_t cublasLtCreate(cublasLtHandle_t *lightHandle)
{
	Lock lock = take_lock();
	*lightHandle = new cublasLtContext{current_device()};
	handles.insert(*lightHandle);
	return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtDestroy(cublasLtHandle_t lightHandle)
{
	Lock lock = take_lock();
	if (!handles.erase(lightHandle))
		return CUBLAS_STATUS_NOT_INITIALIZED;
	delete lightHandle;
	return CUBLAS_STATUS_SUCCESS;
}

/* ---- attributes ---- */

namespace
{
struct Field {
	int attribute;
	size_t offset, size;
};
} // namespace

#define FIELD(type, attribute, member)                                               \
	{                                                                            \
		attribute, offsetof(type, member), sizeof(((type *)nullptr)->member) \
	}
#define DESC(attribute, member) FIELD(simt_matmul_desc, CUBLASLT_MATMUL_DESC_##attribute, member)
static const Field desc_fields[] = {
        DESC(COMPUTE_TYPE, compute),
        DESC(SCALE_TYPE, scale),
        DESC(POINTER_MODE, pointer_mode),
        DESC(TRANSA, transa),
        DESC(TRANSB, transb),
        DESC(TRANSC, transc),
        DESC(EPILOGUE, epilogue),
        DESC(BIAS_POINTER, bias),
        DESC(BIAS_BATCH_STRIDE, bias_stride),
        DESC(EPILOGUE_AUX_POINTER, aux),
        DESC(EPILOGUE_AUX_LD, aux_ld),
        DESC(EPILOGUE_AUX_BATCH_STRIDE, aux_stride),
        DESC(SM_COUNT_TARGET, sm_count),
        DESC(A_SCALE_POINTER, a_scale),
        DESC(B_SCALE_POINTER, b_scale),
        DESC(C_SCALE_POINTER, c_scale),
        DESC(D_SCALE_POINTER, d_scale),
        DESC(AMAX_D_POINTER, amax),
        DESC(EPILOGUE_AUX_DATA_TYPE, aux_type),
        DESC(FAST_ACCUM, fast_accumulation),
        DESC(BIAS_DATA_TYPE, bias_type),
};
#define LAYOUT(attribute, member) FIELD(simt_matrix_layout, CUBLASLT_MATRIX_LAYOUT_##attribute, member)
static const Field layout_fields[] = {
        LAYOUT(TYPE, type),
        LAYOUT(ORDER, order),
        LAYOUT(ROWS, rows),
        LAYOUT(COLS, columns),
        LAYOUT(LD, ld),
        LAYOUT(BATCH_COUNT, batch),
        LAYOUT(STRIDED_BATCH_OFFSET, stride),
};
#define PREFERENCE(attribute, member) FIELD(simt_matmul_preference, CUBLASLT_MATMUL_PREF_##attribute, member)
static const Field preference_fields[] = {
        PREFERENCE(SEARCH_MODE, search_mode),          PREFERENCE(MAX_WORKSPACE_BYTES, max_workspace),
        PREFERENCE(REDUCTION_SCHEME_MASK, reductions), PREFERENCE(MIN_ALIGNMENT_A_BYTES, align_a),
        PREFERENCE(MIN_ALIGNMENT_B_BYTES, align_b),    PREFERENCE(MIN_ALIGNMENT_C_BYTES, align_c),
        PREFERENCE(MIN_ALIGNMENT_D_BYTES, align_d),
};

template <size_t count>
static const Field *find_field(const Field (&fields)[count], int attribute, size_t size)
{
	for (const Field &field : fields) {
		if (field.attribute == attribute)
			return field.size == size ? &field : nullptr;
	}
	return nullptr;
}

template <size_t count>
static cublasStatus_t set_field(const Field (&fields)[count], void *object, int attribute, const void *from,
                                size_t size)
{
	const Field *field = find_field(fields, attribute, size);
	if (!object || !from || !field)
		return INVALID("an attribute is unknown or its value has the wrong size");
	memcpy((char *)object + field->offset, from, size);
	return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *matmulDesc, cublasComputeType_t computeType,
                                        cudaDataType scaleType)
{
	simt_matmul_desc fresh = {};
	fresh.compute = computeType;
	fresh.scale = scaleType;
	fresh.epilogue = CUBLASLT_EPILOGUE_DEFAULT;
	fresh.aux_type = fresh.bias_type = -1;
	*matmulDesc = new simt_matmul_desc(fresh);
	return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t matmulDesc)
{
	delete matmulDesc;
	return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t matmulDesc,
                                              cublasLtMatmulDescAttributes_t attr, const void *buf,
                                              size_t sizeInBytes)
{
	return set_field(desc_fields, matmulDesc, attr, buf, sizeInBytes);
}

cublasStatus_t cublasLtMatmulDescGetAttribute(cublasLtMatmulDesc_t matmulDesc,
                                              cublasLtMatmulDescAttributes_t attr, void *buf,
                                              size_t sizeInBytes, size_t *sizeWritten)
{
	const Field *field = find_field(desc_fields, attr, sizeInBytes);
	if (!matmulDesc || !buf || !field)
		return INVALID("an attribute is unknown or its value has the wrong size");
	memcpy(buf, (char *)matmulDesc + field->offset, sizeInBytes);
	if (sizeWritten)
		*sizeWritten = sizeInBytes;
	return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *matLayout, cudaDataType type, uint64_t rows,
                                          uint64_t cols, int64_t ld)
{
	*matLayout = new simt_matrix_layout{(uint32_t)type, CUBLASLT_ORDER_COL, rows, cols, ld, 1, 0};
	return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t matLayout)
{
	delete matLayout;
	return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t matLayout,
                                                cublasLtMatrixLayoutAttribute_t attr, const void *buf,
                                                size_t sizeInBytes)
{
	return set_field(layout_fields, matLayout, attr, buf, sizeInBytes);
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *pref)
{
	*pref = new simt_matmul_preference{0, 0, ~0u, 256, 256, 256, 256};
	return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t pref)
{
	delete pref;
	return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t pref,
                                                    cublasLtMatmulPreferenceAttributes_t attr,
                                                    const void *buf, size_t sizeInBytes)
{
	return set_field(preference_fields, pref, attr, buf, sizeInBytes);
}
