#ifndef SIMT_CUDA_BF16_H
#define SIMT_CUDA_BF16_H

#include "simt_float.h"

typedef struct {
	unsigned short x;
} __nv_bfloat16_raw;

SIMT_FLOAT16(__nv_bfloat16, simt_float_to_bf16, simt_bf16_to_float)
typedef __nv_bfloat16 nv_bfloat16;
typedef __nv_bfloat162 nv_bfloat162;

static inline __nv_bfloat16 __float2bfloat16_rn(float x)
{
	return __nv_bfloat16(x);
}

static inline __nv_bfloat16 __float2bfloat16(float x)
{
	return __nv_bfloat16(x);
}

static inline float __bfloat162float(__nv_bfloat16 x)
{
	return (float)x;
}

static inline __nv_bfloat162 __float2bfloat162_rn(float x)
{
	return {__nv_bfloat16(x), __nv_bfloat16(x)};
}

static inline __nv_bfloat162 __floats2bfloat162_rn(float low, float high)
{
	return {__nv_bfloat16(low), __nv_bfloat16(high)};
}

static inline __nv_bfloat162 __float22bfloat162_rn(float2 pair)
{
	return __floats2bfloat162_rn(pair.x, pair.y);
}

static inline float2 __bfloat1622float2(__nv_bfloat162 pair)
{
	return {(float)pair.x, (float)pair.y};
}

static inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 low, __nv_bfloat16 high)
{
	return {low, high};
}

static inline __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 x)
{
	return {x, x};
}

static inline __nv_bfloat16 __low2bfloat16(__nv_bfloat162 pair)
{
	return pair.x;
}

static inline __nv_bfloat16 __high2bfloat16(__nv_bfloat162 pair)
{
	return pair.y;
}

static inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x)
{
	return x.__x;
}

static inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short code)
{
	return __nv_bfloat16_raw{code};
}

#endif
