/* Narrow floating-point formats: rounding a float to the nearest code, ties to even, and back. */
#ifndef SIMT_FLOAT_H
#define SIMT_FLOAT_H

#include <cmath>
#include <cstdint>
#include "simt_device.h"

/* The code of |x|, x finite, in a format with so many bits of mantissa; it may exceed the largest finite
 * code, which the caller turns into what its format does then. A float scaled by a power of two is exact
 * in double, so there is one rounding. */
static inline unsigned simt_encode(float x, int mantissa, int bias)
{
	double magnitude = fabs((double)x);
	int exponent = 0;
	frexp(magnitude, &exponent);
	exponent--;
	if (magnitude == 0 || exponent < 1 - bias)
		exponent = 1 - bias;
	unsigned units = (unsigned)nearbyint(ldexp(magnitude, mantissa - exponent));
	return units + ((unsigned)(exponent + bias - 1) << mantissa);
}

/* The value of a finite code without its sign. */
static inline float simt_decode(unsigned code, int mantissa, int bias)
{
	unsigned field = code >> mantissa, rest = code & ((1u << mantissa) - 1);
	if (!field)
		return ldexpf((float)rest, 1 - bias - mantissa);
	return ldexpf((float)(rest | 1u << mantissa), (int)field - bias - mantissa);
}

static inline unsigned short simt_float_to_bf16(float x)
{
	uint32_t bits = __float_as_uint(x);
	if (std::isnan(x))
		return 0x7fff;
	return (unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline float simt_bf16_to_float(unsigned short code)
{
	return __uint_as_float((uint32_t)code << 16);
}

static inline unsigned short simt_float_to_half(float x)
{
	unsigned sign = __float_as_uint(x) >> 16 & 0x8000;
	if (std::isnan(x))
		return 0x7fff;
	unsigned code = std::isinf(x) ? 0x7c00 : simt_encode(x, 10, 15);
	return (unsigned short)(sign | (code < 0x7c00 ? code : 0x7c00));
}

static inline float simt_half_to_float(unsigned short code)
{
	unsigned magnitude = code & 0x7fff;
	float value = magnitude > 0x7c00    ? NAN
	              : magnitude == 0x7c00 ? INFINITY
	                                    : simt_decode(magnitude, 10, 15);
	return code & 0x8000 ? -value : value;
}

/* A 16-bit float that computes in float, as the compiler does for the types of cuda_bf16.h and
 * cuda_fp16.h: each operation rounds its result once. */
#define SIMT_FLOAT16(T, from_float, to_float)                                    \
	struct T {                                                               \
		unsigned short __x;                                              \
		T() = default;                                                   \
		T(float x) : __x(from_float(x))                                  \
		{                                                                \
		}                                                                \
		T(double x) : __x(from_float((float)x))                          \
		{                                                                \
		}                                                                \
		T(int x) : __x(from_float((float)x))                             \
		{                                                                \
		}                                                                \
		T(unsigned x) : __x(from_float((float)x))                        \
		{                                                                \
		}                                                                \
		T(T##_raw raw) : __x(raw.x)                                      \
		{                                                                \
		}                                                                \
		operator float() const                                           \
		{                                                                \
			return to_float(__x);                                    \
		}                                                                \
		operator T##_raw() const                                         \
		{                                                                \
			return {__x};                                            \
		}                                                                \
	};                                                                       \
	SIMT_OPERATOR(T, T, +, a, b, float)                                      \
	SIMT_OPERATOR(T, T, -, a, b, float)                                      \
	SIMT_OPERATOR(T, T, *, a, b, float)                                      \
	SIMT_OPERATOR(T, T, /, a, b, float)                                      \
	SIMT_OPERATOR(T, bool, <, a, b, bool)                                    \
	SIMT_OPERATOR(T, bool, >, a, b, bool)                                    \
	SIMT_OPERATOR(T, bool, <=, a, b, bool)                                   \
	SIMT_OPERATOR(T, bool, >=, a, b, bool)                                   \
	SIMT_OPERATOR(T, bool, ==, a, b, bool)                                   \
	SIMT_OPERATOR(T, bool, !=, a, b, bool)                                   \
	static inline T operator-(T a)                                           \
	{                                                                        \
		T negative;                                                      \
		negative.__x = a.__x ^ 0x8000;                                   \
		return negative;                                                 \
	}                                                                        \
	static inline T &operator+=(T &a, T b)                                   \
	{                                                                        \
		return a = a + b;                                                \
	}                                                                        \
	static inline T &operator*=(T &a, T b)                                   \
	{                                                                        \
		return a = a * b;                                                \
	}                                                                        \
	static inline T __hadd(T a, T b)                                         \
	{                                                                        \
		return a + b;                                                    \
	}                                                                        \
	static inline T __hmul(T a, T b)                                         \
	{                                                                        \
		return a * b;                                                    \
	}                                                                        \
	static inline T __hfma(T a, T b, T c)                                    \
	{                                                                        \
		return T(fmaf((float)a, (float)b, (float)c));                    \
	}                                                                        \
	static inline T __hmax(T a, T b)                                         \
	{                                                                        \
		return T(fmaxf((float)a, (float)b));                             \
	}                                                                        \
	static inline T __hmin(T a, T b)                                         \
	{                                                                        \
		return T(fminf((float)a, (float)b));                             \
	}                                                                        \
	static inline T atomicAdd(T *at, T value)                                \
	{                                                                        \
		T old = *at;                                                     \
		*at = old + value;                                               \
		return old;                                                      \
	}                                                                        \
	struct alignas(4) T##2                                                   \
	{                                                                        \
		T x, y;                                                          \
		T##2() = default;                                                \
		T##2(T low, T high) : x(low), y(high)                            \
		{                                                                \
		}                                                                \
	};                                                                       \
	static inline T##2 atomicAdd(T##2 * at, T##2 value)                      \
	{                                                                        \
		return {atomicAdd(&at->x, value.x), atomicAdd(&at->y, value.y)}; \
	}                                                                        \
	static inline T##2 __halves2##T##2(T low, T high)                        \
	{                                                                        \
		return {low, high};                                              \
	}                                                                        \
	static inline float __low2float(T##2 pair)                               \
	{                                                                        \
		return (float)pair.x;                                            \
	}                                                                        \
	static inline float __high2float(T##2 pair)                              \
	{                                                                        \
		return (float)pair.y;                                            \
	}                                                                        \
	static inline T##2 __hadd2(T##2 a, T##2 b)                               \
	{                                                                        \
		return {a.x + b.x, a.y + b.y};                                   \
	}                                                                        \
	static inline T##2 __hmul2(T##2 a, T##2 b)                               \
	{                                                                        \
		return {a.x * b.x, a.y * b.y};                                   \
	}                                                                        \
	static inline T##2 __hfma2(T##2 a, T##2 b, T##2 c)                       \
	{                                                                        \
		return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};           \
	}
#define SIMT_OPERATOR(T, result, sign, a, b, as)             \
	static inline result operator sign(T a, T b)         \
	{                                                    \
		return result((as)((float)a sign(float) b)); \
	}

#endif
