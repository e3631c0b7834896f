/* The two 8-bit formats. The types saturate on conversion, as the real ones do. */
#ifndef SIMT_CUDA_FP8_H
#define SIMT_CUDA_FP8_H

#include "cuda_bf16.h"
#include "cuda_fp16.h"

typedef unsigned char __nv_fp8_storage_t;
typedef unsigned short __nv_fp8x2_storage_t;
typedef unsigned __nv_fp8x4_storage_t;
typedef enum { __NV_NOSAT, __NV_SATFINITE } __nv_saturation_t;
typedef enum { __NV_E4M3, __NV_E5M2 } __nv_fp8_interpretation_t;

static inline __nv_fp8_storage_t __nv_cvt_float_to_fp8(float x, __nv_saturation_t saturate,
                                                       __nv_fp8_interpretation_t format)
{
	unsigned sign = __float_as_uint(x) >> 24 & 0x80;
	bool e4m3 = format == __NV_E4M3;
	unsigned largest = e4m3 ? 0x7e : 0x7b;
	if (std::isnan(x))
		return 0x7f;
	unsigned code = std::isinf(x) ? largest + 1 : simt_encode(x, e4m3 ? 3 : 2, e4m3 ? 7 : 15);
	if (code > largest)
		code = saturate == __NV_SATFINITE ? largest : largest + 1;
	return (__nv_fp8_storage_t)(sign | code);
}

static inline float simt_fp8_to_float(__nv_fp8_storage_t code, __nv_fp8_interpretation_t format)
{
	unsigned magnitude = code & 0x7f;
	float value;
	if (format == __NV_E4M3)
		value = magnitude == 0x7f ? NAN : simt_decode(magnitude, 3, 7);
	else
		value = magnitude > 0x7c ? NAN : magnitude == 0x7c ? INFINITY : simt_decode(magnitude, 2, 15);
	return code & 0x80 ? -value : value;
}

/* Every value of both formats is a value of half precision. */
static inline __half_raw __nv_cvt_fp8_to_halfraw(__nv_fp8_storage_t code, __nv_fp8_interpretation_t format)
{
	return __half(simt_fp8_to_float(code, format));
}

static inline __nv_fp8_storage_t __nv_cvt_bfloat16raw_to_fp8(__nv_bfloat16_raw x, __nv_saturation_t saturate,
                                                             __nv_fp8_interpretation_t format)
{
	return __nv_cvt_float_to_fp8(simt_bf16_to_float(x.x), saturate, format);
}

static inline __nv_fp8x2_storage_t __nv_cvt_float2_to_fp8x2(float2 pair, __nv_saturation_t saturate,
                                                            __nv_fp8_interpretation_t format)
{
	return (__nv_fp8x2_storage_t)(__nv_cvt_float_to_fp8(pair.y, saturate, format) << 8 |
	                              __nv_cvt_float_to_fp8(pair.x, saturate, format));
}

#define SIMT_FLOAT8(suffix, format)                                                                         \
	struct __nv_fp8_##suffix {                                                                          \
		__nv_fp8_storage_t __x;                                                                     \
		__nv_fp8_##suffix() = default;                                                              \
		explicit __nv_fp8_##suffix(float x) : __x(__nv_cvt_float_to_fp8(x, __NV_SATFINITE, format)) \
		{                                                                                           \
		}                                                                                           \
		explicit __nv_fp8_##suffix(double x) : __nv_fp8_##suffix((float)x)                          \
		{                                                                                           \
		}                                                                                           \
		explicit __nv_fp8_##suffix(__nv_bfloat16 x) : __nv_fp8_##suffix((float)x)                   \
		{                                                                                           \
		}                                                                                           \
		explicit __nv_fp8_##suffix(__half x) : __nv_fp8_##suffix((float)x)                          \
		{                                                                                           \
		}                                                                                           \
		explicit operator float() const                                                             \
		{                                                                                           \
			return simt_fp8_to_float(__x, format);                                              \
		}                                                                                           \
	};                                                                                                  \
	struct alignas(2) __nv_fp8x2_##suffix {                                                             \
		__nv_fp8x2_storage_t __x;                                                                   \
		__nv_fp8x2_##suffix() = default;                                                            \
		explicit __nv_fp8x2_##suffix(float2 x)                                                      \
		    : __x(__nv_cvt_float2_to_fp8x2(x, __NV_SATFINITE, format))                              \
		{                                                                                           \
		}                                                                                           \
		explicit operator float2() const                                                            \
		{                                                                                           \
			return {simt_fp8_to_float((__nv_fp8_storage_t)__x, format),                         \
			        simt_fp8_to_float((__nv_fp8_storage_t)(__x >> 8), format)};                 \
		}                                                                                           \
	};                                                                                                  \
	struct alignas(4) __nv_fp8x4_##suffix {                                                             \
		__nv_fp8x4_storage_t __x;                                                                   \
		__nv_fp8x4_##suffix() = default;                                                            \
		explicit __nv_fp8x4_##suffix(float4 x)                                                      \
		{                                                                                           \
			unsigned low = __nv_cvt_float2_to_fp8x2({x.x, x.y}, __NV_SATFINITE, format);        \
			unsigned high = __nv_cvt_float2_to_fp8x2({x.z, x.w}, __NV_SATFINITE, format);       \
			__x = high << 16 | low;                                                             \
		}                                                                                           \
		explicit operator float4() const                                                            \
		{                                                                                           \
			return {simt_fp8_to_float((__nv_fp8_storage_t)__x, format),                         \
			        simt_fp8_to_float((__nv_fp8_storage_t)(__x >> 8), format),                  \
			        simt_fp8_to_float((__nv_fp8_storage_t)(__x >> 16), format),                 \
			        simt_fp8_to_float((__nv_fp8_storage_t)(__x >> 24), format)};                \
		}                                                                                           \
	};
SIMT_FLOAT8(e4m3, __NV_E4M3)
SIMT_FLOAT8(e5m2, __NV_E5M2)
#undef SIMT_FLOAT8

#endif
