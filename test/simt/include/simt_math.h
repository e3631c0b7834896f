/* The arithmetic that CUDA adds to C. The fast forms are computed exactly here: no kernel may depend on
 * their error, and the tests that compare with another backend allow for it. */
#ifndef SIMT_MATH_H
#define SIMT_MATH_H

#include <math.h> /* the one that leaves isnan and its like outside of std, too */
#include <cmath>
#include <cstdint>
#include <cstring>

#define SIMT_MINMAX(A, B, T)                      \
	static inline constexpr T min(A a, B b)   \
	{                                         \
		return (T)a < (T)b ? (T)a : (T)b; \
	}                                         \
	static inline constexpr T max(A a, B b)   \
	{                                         \
		return (T)a < (T)b ? (T)b : (T)a; \
	}
SIMT_MINMAX(int, int, int)
SIMT_MINMAX(unsigned, unsigned, unsigned)
SIMT_MINMAX(int, unsigned, unsigned)
SIMT_MINMAX(unsigned, int, unsigned)
SIMT_MINMAX(long, long, long)
SIMT_MINMAX(unsigned long, unsigned long, unsigned long)
SIMT_MINMAX(long, unsigned long, unsigned long)
SIMT_MINMAX(unsigned long, long, unsigned long)
SIMT_MINMAX(long long, long long, long long)
SIMT_MINMAX(unsigned long long, unsigned long long, unsigned long long)
SIMT_MINMAX(long long, unsigned long long, unsigned long long)
SIMT_MINMAX(unsigned long long, long long, unsigned long long)
#undef SIMT_MINMAX

/* For floats a NaN loses, as in fminf and fmaxf. */
static inline float min(float a, float b)
{
	return fminf(a, b);
}

static inline float max(float a, float b)
{
	return fmaxf(a, b);
}

static inline double min(double a, double b)
{
	return fmin(a, b);
}

static inline double max(double a, double b)
{
	return fmax(a, b);
}

template <typename To, typename From> inline To simt_bits(From from)
{
	static_assert(sizeof(To) == sizeof(From));
	To to;
	memcpy(&to, &from, sizeof to);
	return to;
}

static inline unsigned __float_as_uint(float x)
{
	return simt_bits<unsigned>(x);
}

static inline int __float_as_int(float x)
{
	return simt_bits<int>(x);
}

static inline float __uint_as_float(unsigned x)
{
	return simt_bits<float>(x);
}

static inline float __int_as_float(int x)
{
	return simt_bits<float>(x);
}

static inline long long __double_as_longlong(double x)
{
	return simt_bits<long long>(x);
}

static inline double __longlong_as_double(long long x)
{
	return simt_bits<double>(x);
}

#define SIMT_FLOAT1(name, value)          \
	static inline float name(float x) \
	{                                 \
		return value;             \
	}
#define SIMT_FLOAT2(name, value)                   \
	static inline float name(float x, float y) \
	{                                          \
		return value;                      \
	}
SIMT_FLOAT1(simt_rsqrtf, 1.0f / sqrtf(x))
SIMT_FLOAT1(__frcp_rn, 1.0f / x)
SIMT_FLOAT1(__frsqrt_rn, 1.0f / sqrtf(x))
SIMT_FLOAT1(__fsqrt_rn, sqrtf(x))
SIMT_FLOAT1(__saturatef, x > 0 ? (x < 1 ? x : 1.0f) : 0.0f)
SIMT_FLOAT2(__fdividef, x / y)
SIMT_FLOAT2(__fdiv_rn, x / y)
SIMT_FLOAT2(__fadd_rn, x + y)
SIMT_FLOAT2(__fsub_rn, x - y)
SIMT_FLOAT2(__fmul_rn, x *y)
#undef SIMT_FLOAT1
#undef SIMT_FLOAT2

static inline double simt_rsqrt(double x)
{
	return 1.0 / sqrt(x);
}

/* The newest C libraries declare these two themselves, as functions with external linkage. */
#define rsqrtf simt_rsqrtf
#define rsqrt simt_rsqrt

static inline float __fmaf_rn(float x, float y, float z)
{
	return fmaf(x, y, z);
}

/* The C library has hidden functions of these names. */
#define __expf expf
#define __exp10f exp10f
#define __logf logf
#define __log2f log2f
#define __sinf sinf
#define __cosf cosf
#define __sincosf sincosf
#define __powf powf

/* Conversions that say how they round. */
static inline int __float2int_rn(float x)
{
	return (int)nearbyintf(x);
}

static inline int __float2int_rz(float x)
{
	return (int)x;
}

static inline int __float2int_rd(float x)
{
	return (int)floorf(x);
}

static inline unsigned __float2uint_rn(float x)
{
	return (unsigned)nearbyintf(x);
}

static inline unsigned __float2uint_rz(float x)
{
	return (unsigned)x;
}

static inline float __int2float_rn(int x)
{
	return (float)x;
}

static inline float __uint2float_rn(unsigned x)
{
	return (float)x;
}

static inline float __double2float_rn(double x)
{
	return (float)x;
}

static inline int __popc(unsigned x)
{
	return __builtin_popcount(x);
}

static inline int __popcll(unsigned long long x)
{
	return __builtin_popcountll(x);
}

static inline int __ffs(int x)
{
	return __builtin_ffs(x);
}

static inline int __ffsll(long long x)
{
	return __builtin_ffsll(x);
}

static inline int __clz(int x)
{
	return x ? __builtin_clz((unsigned)x) : 32;
}

static inline int __clzll(long long x)
{
	return x ? __builtin_clzll((unsigned long long)x) : 64;
}

static inline unsigned __brev(unsigned x)
{
	unsigned reversed = 0;
	for (int i = 0; i < 32; i++)
		reversed |= (x >> i & 1) << (31 - i);
	return reversed;
}

static inline unsigned __umulhi(unsigned x, unsigned y)
{
	return (unsigned)((unsigned long long)x * y >> 32);
}

static inline int __mulhi(int x, int y)
{
	return (int)((long long)x * y >> 32);
}

static inline unsigned long long __umul64hi(unsigned long long x, unsigned long long y)
{
	return (unsigned long long)((unsigned __int128)x * y >> 64);
}

#endif
