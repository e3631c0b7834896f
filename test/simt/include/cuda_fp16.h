#ifndef SIMT_CUDA_FP16_H
#define SIMT_CUDA_FP16_H

#include "simt_float.h"

typedef struct {
	unsigned short x;
} __half_raw;

SIMT_FLOAT16(__half, simt_float_to_half, simt_half_to_float)
typedef __half half;
typedef __half2 half2;

static inline __half __float2half_rn(float x)
{
	return __half(x);
}

static inline __half __float2half(float x)
{
	return __half(x);
}

static inline float __half2float(__half x)
{
	return (float)x;
}

static inline __half2 __float2half2_rn(float x)
{
	return {__half(x), __half(x)};
}

static inline __half2 __floats2half2_rn(float low, float high)
{
	return {__half(low), __half(high)};
}

static inline __half2 __float22half2_rn(float2 pair)
{
	return __floats2half2_rn(pair.x, pair.y);
}

static inline float2 __half22float2(__half2 pair)
{
	return {(float)pair.x, (float)pair.y};
}

static inline __half2 __halves2half2(__half low, __half high)
{
	return {low, high};
}

static inline __half __low2half(__half2 pair)
{
	return pair.x;
}

static inline __half __high2half(__half2 pair)
{
	return pair.y;
}

static inline unsigned short __half_as_ushort(__half x)
{
	return x.__x;
}

static inline __half __ushort_as_half(unsigned short code)
{
	return __half_raw{code};
}

#endif
