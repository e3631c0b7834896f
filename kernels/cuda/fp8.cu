/* Operands in fp8, or in their own type with the values that fp8 has. */
#include "kernels/cuda/product.h"
#include "kernels/cuda/rows.cuh"
#include "kernels/fp8.h"

#include <cuda_fp8.h>

/* The largest magnitude; what is no number takes no part. A maximum is the same in any order. */
template <class T>
__global__ static void __launch_bounds__(BLOCK) find_most(const T *x, int64_t n, float *most)
{
	float own = 0;
	each_pack<pack<T>::N>(n, [&](int64_t i, int64_t left) {
		float v[pack<T>::N];
		load_n(x + i, left, v);
#pragma unroll
		for (int k = 0; k < pack<T>::N; k++)
			own = fmaxf(own, fabsf(v[k]));
	});
	own = block_max(own);
	if (threadIdx.x == 0)
		atomicMax((int *)most, __float_as_int(own)); /* the order of floats that are not below 0 */
}

template <fp8_format F> __device__ __forceinline__ uint8_t encode(float x)
{
	return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, F == FP8_E4M3 ? __NV_E4M3 : __NV_E5M2);
}

/* y[n] <- x[n], n a multiple of 16; *factor <- what gives x back. */
template <class T, fp8_format F>
__global__ static void __launch_bounds__(BLOCK)
        encode_flat(const T *x, int64_t n, const float *most, uint8_t *y, float *factor)
{
	const float scale = fp8_scale(*most, F);
	if (grid_first() == 0)
		*factor = 1 / scale;
	each_pack<16>(n, [&](int64_t i, int64_t) {
		float v[16];
		elements<uint8_t, 16> out;
		load_n(x + i, v);
#pragma unroll
		for (int k = 0; k < 16; k++)
			out.x[k] = encode<F>(v[k] * scale);
		put(y + i, out);
	});
}

/* The values alone, in the type of x; the scale is a power of two. */
template <class T, fp8_format F>
__global__ static void __launch_bounds__(BLOCK) round_flat(const T *x, int64_t n, const float *most, T *y)
{
	const float scale = fp8_scale(*most, F);
	each_pack<1>(n,
	             [&](int64_t i, int64_t) { y[i] = store<T>(fp8_round(load(x[i]) * scale, F) / scale); });
}

enum { TILE = 64, TILE_PITCH = TILE + 16 };

/* y[columns, rows] <- x[rows, columns] in fp8, both multiples of 16. A block turns a tile: lanes read rows
 * below each other, so that what they write into shared memory lies side by side. */
template <class T, fp8_format F>
__global__ static void __launch_bounds__(BLOCK)
        encode_turned(const T *x, int64_t rows, int64_t columns, const float *most, uint8_t *y, float *factor)
{
	enum { N = pack<T>::N };
	__shared__ __align__(16) uint8_t tile[TILE][TILE_PITCH];
	const float scale = fp8_scale(*most, F);
	const int64_t row0 = (int64_t)blockIdx.y * TILE, column0 = (int64_t)blockIdx.x * TILE;
	const int r = threadIdx.x % TILE;
	if (threadIdx.x == 0 && !blockIdx.x && !blockIdx.y)
		*factor = 1 / scale;
	for (int c = threadIdx.x / TILE * N; c < TILE; c += BLOCK / TILE * N) {
		float v[N];
		if (row0 + r >= rows || column0 + c >= columns)
			continue;
		load_n(x + (row0 + r) * columns + column0 + c, v);
#pragma unroll
		for (int k = 0; k < N; k++)
			tile[c + k][r] = encode<F>(v[k] * scale);
	}
	__syncthreads();
	for (int i = threadIdx.x; i < TILE * TILE / 16; i += BLOCK) {
		int c = i / (TILE / 16), from = i % (TILE / 16) * 16;
		if (column0 + c < columns && row0 + from < rows)
			put(y + (column0 + c) * rows + row0 + from,
			    *(const elements<uint8_t, 16> *)&tile[c][from]);
	}
}

/* A tensor on its way: x[rows, columns], as it stands or turned. */
struct operand {
	const void *x;
	int64_t rows, columns;
	bool turned;
	float *most, *factor;
	void *y;
};

static struct shape tiles(const struct operand *o)
{
	struct shape s = {
	        dim3((unsigned)((o->columns + TILE - 1) / TILE), (unsigned)((o->rows + TILE - 1) / TILE)),
	        dim3(BLOCK), 0};
	return s;
}

template <class T> static int maximum_by(struct stream *s, const struct operand *o, struct err *e)
{
	int64_t n = o->rows * o->columns;
	return launch(s, "fp8: maximum",
	              flat(n, 4 * pack<T>::N, 8 * (int64_t)s->properties.multiProcessorCount), e,
	              find_most<T>, (const T *)o->x, n, o->most);
}

template <fp8_format F> static int encode_operand(struct stream *s, const struct operand *o, struct err *e)
{
	const bf16 *x = (const bf16 *)o->x;
	int64_t n = o->rows * o->columns;
	if (o->turned)
		return launch(s, "fp8: transposed", tiles(o), e, encode_turned<bf16, F>, x, o->rows,
		              o->columns, (const float *)o->most, (uint8_t *)o->y, o->factor);
	return launch(s, "fp8", flat(n, 16), e, encode_flat<bf16, F>, x, n, (const float *)o->most,
	              (uint8_t *)o->y, o->factor);
}

template <class T, fp8_format F>
static int round_operand(struct stream *s, const struct operand *o, struct err *e)
{
	int64_t n = o->rows * o->columns;
	return launch(s, "fp8: rounding", flat(n, 4), e, round_flat<T, F>, (const T *)o->x, n,
	              (const float *)o->most, (T *)o->y);
}

template <class T> static int round_e4m3(struct stream *s, const struct operand *o, struct err *e)
{
	return round_operand<T, FP8_E4M3>(s, o, e);
}

template <class T> static int round_e5m2(struct stream *s, const struct operand *o, struct err *e)
{
	return round_operand<T, FP8_E5M2>(s, o, e);
}

/* The first operand is `with`, the second `rows`. */
static const struct {
	enum product_kind kind;
	enum product_size dim[2][2];
	bool turned[2];
	fp8_format format[2];
} products[] = {
        {PRODUCT_linear_fp8, {{SIZE_m, SIZE_k}, {SIZE_n, SIZE_k}}, {false, false}, {FP8_E4M3, FP8_E4M3}},
        {PRODUCT_linear_dx_fp8, {{SIZE_m, SIZE_k}, {SIZE_n, SIZE_m}}, {true, false}, {FP8_E4M3, FP8_E5M2}},
        {PRODUCT_linear_dw_fp8, {{SIZE_n, SIZE_k}, {SIZE_n, SIZE_m}}, {true, true}, {FP8_E4M3, FP8_E5M2}},
};

static int convert(struct stream *s, const struct product *p, const struct operand *o, fp8_format format,
                   bool fits, struct err *e)
{
	bool e4m3 = format == FP8_E4M3;
	if (BY_TYPE(p->dtype, maximum_by)(s, o, e))
		return e->code;
	if (fits)
		return e4m3 ? encode_operand<FP8_E4M3>(s, o, e) : encode_operand<FP8_E5M2>(s, o, e);
	return e4m3 ? BY_TYPE(p->dtype, round_e4m3)(s, o, e) : BY_TYPE(p->dtype, round_e5m2)(s, o, e);
}

/* Ada and later multiply in fp8. */
bool cuda_fits_fp8(const struct stream *s, const struct product *p)
{
	bool fits = p->dtype == DT_bf16 && 10 * s->properties.major + s->properties.minor >= 89;
	for (int i = 0; i < PRODUCT_SIZES; i++)
		fits = fits && p->size[i] > 0 && p->size[i] % 16 == 0 && p->size[i] / TILE < 65535;
	return fits;
}

static int64_t operand_count(const struct product *p, int i)
{
	const enum product_size *dim = products[p->kind].dim[i];
	return p->size[dim[0]] * p->size[dim[1]];
}

static size_t operand_bytes(const struct stream *s, const struct product *p, int i)
{
	int64_t bytes = operand_count(p, i) * (cuda_fits_fp8(s, p) ? 1 : dtype_rows[p->dtype].bytes);
	return ((size_t)bytes + 255) / 256 * 256;
}

/* Maxima and factors, then the operands. */
size_t cuda_fp8_bytes(const struct stream *s, const struct product *p)
{
	return 256 + operand_bytes(s, p, 0) + operand_bytes(s, p, 1) + cuda_product_workspace(s);
}

int cuda_product_fp8(struct stream *s, const struct product *p, struct err *e)
{
	const void *x[2] = {p->with, p->rows};
	const bool fits = cuda_fits_fp8(s, p);
	struct tensor operand = {};
	operand.dtype = (uint8_t)p->dtype;
	if (type_check(OP_linear, &operand, e))
		return e->code;
	struct product q = *p;
	char *memory = (char *)cuda_scratch(s, cuda_fp8_bytes(s, p), e), *y[2];
	float *numbers = (float *)memory;
	if (!memory)
		return e->code;
	q.held_bytes = 256;
	CUDA_TRY(e, cudaMemsetAsync(numbers, 0, 2 * sizeof *numbers, s->compute));
	for (int i = 0; i < 2; i++) {
		const enum product_size *dim = products[p->kind].dim[i];
		y[i] = memory + q.held_bytes;
		struct operand o = {x[i],
		                    p->size[dim[0]],
		                    p->size[dim[1]],
		                    products[p->kind].turned[i],
		                    numbers + i,
		                    numbers + 2 + i,
		                    y[i]};
		if (convert(s, p, &o, products[p->kind].format[i], fits, e))
			return e->code;
		q.factor[i] = o.factor;
		q.held_bytes += operand_bytes(s, p, i);
	}
	q.with = y[0];
	q.rows = y[1];
	q.kind = fits ? products[p->kind].kind : p->kind;
	return cuda_product(s, &q, e);
}
