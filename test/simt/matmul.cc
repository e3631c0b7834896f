/* The arithmetic of cuBLASLt: in float, rounded once at the end to the type of D. */
#include "matmul.h"
#include "cuda_fp8.h"

#include <algorithm>
#include <cstring>

/* ---- types ---- */

#define FLOAT_TYPES(X)                   \
	X(CUDA_R_32F, float)             \
	X(CUDA_R_16F, __half)            \
	X(CUDA_R_16BF, __nv_bfloat16)    \
	X(CUDA_R_8F_E4M3, __nv_fp8_e4m3) \
	X(CUDA_R_8F_E5M2, __nv_fp8_e5m2)

size_t element_size(uint32_t type)
{
	switch (type) {
#define SIZE(name, T) \
	case name:    \
		return sizeof(T);
		FLOAT_TYPES(SIZE)
#undef SIZE
	}
	return 0;
}

template <typename T> static void widen(const void *from, size_t first, size_t count, float *to)
{
	const T *at = static_cast<const T *>(from) + first;
	for (size_t i = 0; i < count; i++)
		to[i] = (float)at[i];
}

template <typename T> static void narrow(const float *from, void *to, size_t first, size_t count)
{
	T *at = static_cast<T *>(to) + first;
	for (size_t i = 0; i < count; i++)
		at[i] = T(from[i]);
}

static void load(uint32_t type, const void *from, size_t first, size_t count, float *to)
{
	switch (type) {
#define LOAD(name, T) \
	case name:    \
		return widen<T>(from, first, count, to);
		FLOAT_TYPES(LOAD)
#undef LOAD
	}
}

static void store(uint32_t type, const float *from, void *to, size_t first, size_t count)
{
	switch (type) {
#define STORE(name, T) \
	case name:     \
		return narrow<T>(from, to, first, count);
		FLOAT_TYPES(STORE)
#undef STORE
	}
}

/* ---- matrices ---- */

/* A matrix with its columns one after the other. */
namespace
{
struct Dense {
	size_t rows, columns;
	std::vector<float> values;
	Dense(size_t r, size_t c) : rows(r), columns(c), values(r * c)
	{
	}
	float *column(size_t j)
	{
		return values.data() + j * rows;
	}
};
} // namespace

static Dense transposed(Dense &m)
{
	Dense t(m.columns, m.rows);
	for (size_t j = 0; j < m.columns; j++) {
		for (size_t i = 0; i < m.rows; i++)
			t.values[i * m.columns + j] = m.values[j * m.rows + i];
	}
	return t;
}

/* A matrix stored by rows is its transpose stored by columns. */
static Dense read(const simt_matrix_layout &l, const void *from, size_t batch, bool transpose)
{
	bool by_rows = l.order == CUBLASLT_ORDER_ROW;
	Dense m(by_rows ? l.columns : l.rows, by_rows ? l.rows : l.columns);
	size_t start = batch * (size_t)l.stride;
	for (size_t j = 0; j < m.columns; j++)
		load(l.type, from, start + j * (size_t)l.ld, m.rows, m.column(j));
	return by_rows != transpose ? transposed(m) : m;
}

static void write(const simt_matrix_layout &l, Dense &m, void *to, size_t batch)
{
	bool by_rows = l.order == CUBLASLT_ORDER_ROW;
	Dense turned = by_rows ? transposed(m) : m;
	size_t start = batch * (size_t)l.stride;
	for (size_t j = 0; j < turned.columns; j++)
		store(l.type, turned.column(j), to, start + j * (size_t)l.ld, turned.rows);
}

/* The tensor cores read ten bits of a float's mantissa. */
static void round_to_tf32(Dense &m)
{
	for (float &x : m.values) {
		unsigned bits = __float_as_uint(x);
		if (std::isfinite(x))
			x = __uint_as_float((bits + 0xfff + (bits >> 13 & 1)) & ~0x1fffu);
	}
}

/* Algorithms differ in the order of their sums, so results may only be compared within a tolerance. */
static Dense product_of(Dense &a, Dense &b, unsigned parts)
{
	Dense sum(a.rows, b.columns);
	std::vector<float> part(a.rows);
	size_t k = a.columns, step = (k + parts - 1) / parts;
	for (size_t j = 0; j < b.columns; j++) {
		float *out = sum.column(j);
		for (size_t first = 0; first < k; first += step) {
			std::fill(part.begin(), part.end(), 0.0f);
			for (size_t l = first; l < std::min(k, first + step); l++) {
				float factor = b.column(j)[l];
				const float *column = a.column(l);
				for (size_t i = 0; i < a.rows; i++)
					part[i] += column[i] * factor;
			}
			for (size_t i = 0; i < a.rows; i++)
				out[i] += part[i];
		}
	}
	return sum;
}

/* ---- epilogues ---- */

static constexpr float gelu_slope = 0.7978845608028654f, gelu_cube = 0.044715f;

static float gelu(float x)
{
	return 0.5f * x * (1 + tanhf(gelu_slope * (x + gelu_cube * x * x * x)));
}

static float gelu_derivative(float x)
{
	float t = tanhf(gelu_slope * (x + gelu_cube * x * x * x));
	return 0.5f * (1 + t) + 0.5f * x * (1 - t * t) * gelu_slope * (1 + 3 * gelu_cube * x * x);
}

static float scalar(const void *at, float otherwise)
{
	return at ? *static_cast<const float *>(at) : otherwise;
}

/* Sums over the rows of a matrix, or of its transpose, as a bias gradient. */
static void store_sums(const Product &p, const Dense &m, bool over_columns, size_t batch)
{
	std::vector<float> sums(over_columns ? m.rows : m.columns);
	for (size_t j = 0; j < m.columns; j++) {
		for (size_t i = 0; i < m.rows; i++)
			sums[over_columns ? i : j] += m.values[j * m.rows + i];
	}
	store(p.bias_type, sums.data(), p.desc.bias, batch * (size_t)p.desc.bias_stride, sums.size());
}

static void apply_epilogue(const Product &p, Dense &result, size_t batch)
{
	uint32_t e = p.desc.epilogue;
	std::vector<float> bias(p.m), aux(p.m);
	if (e & epilogue_bias)
		load(p.bias_type, p.desc.bias, batch * (size_t)p.desc.bias_stride, p.m, bias.data());
	for (size_t j = 0; j < p.n; j++) {
		float *column = result.column(j);
		size_t aux_at = batch * (size_t)p.desc.aux_stride + j * (size_t)p.desc.aux_ld;
		if (e & epilogue_dgelu)
			load(p.aux_type, p.desc.aux, aux_at, p.m, aux.data());
		for (size_t i = 0; i < p.m; i++)
			column[i] += bias[i];
		if (e & epilogue_aux && !(e & epilogue_dgelu))
			store(p.aux_type, column, p.desc.aux, aux_at, p.m);
		for (size_t i = 0; i < p.m; i++)
			column[i] = e & epilogue_gelu    ? gelu(column[i])
			            : e & epilogue_dgelu ? column[i] * gelu_derivative(aux[i])
			            : e & epilogue_relu  ? std::max(column[i], 0.0f)
			                                 : column[i];
	}
	if (e & epilogue_sums)
		store_sums(p, result, true, batch);
}

/* ---- the product ---- */

static void multiply_one(const Product &p, const Operands &o, size_t batch)
{
	float alpha = scalar(o.alpha_at, o.alpha) * scalar(p.desc.a_scale, 1) * scalar(p.desc.b_scale, 1);
	float beta = scalar(o.beta_at, o.beta) * scalar(p.desc.c_scale, 1);
	Dense a = read(p.a, o.a, batch, p.desc.transa != CUBLAS_OP_N);
	Dense b = read(p.b, o.b, batch, p.desc.transb != CUBLAS_OP_N);
	if (p.desc.epilogue == epilogue_sums_a)
		store_sums(p, a, true, batch);
	if (p.desc.epilogue == epilogue_sums_b)
		store_sums(p, b, false, batch);
	if (p.desc.compute == CUBLAS_COMPUTE_32F_FAST_TF32) {
		round_to_tf32(a);
		round_to_tf32(b);
	}
	Dense result = product_of(a, b, o.parts);
	Dense c = beta != 0 ? read(p.c, o.c, batch, false) : Dense(p.m, p.n);
	for (size_t i = 0; i < result.values.size(); i++)
		result.values[i] = alpha * result.values[i] + (beta != 0 ? beta * c.values[i] : 0);
	apply_epilogue(p, result, batch);
	if (p.desc.amax) {
		float *most = static_cast<float *>(p.desc.amax);
		*most = batch ? *most : 0;
		for (float x : result.values)
			*most = std::max(*most, fabsf(x));
	}
	if (p.desc.d_scale) {
		for (float &x : result.values)
			x *= scalar(p.desc.d_scale, 1);
	}
	write(p.d, result, o.d, batch);
}

void multiply(const Product &p, const Operands &o)
{
	if (o.workspace_bytes)
		memset(o.workspace, 0xcb, o.workspace_bytes);
	for (size_t batch = 0; batch < (size_t)p.d.batch; batch++)
		multiply_one(p, o, batch);
}
