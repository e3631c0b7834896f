/* Elementary functions that the compiler vectorises inside a CPU_CLONES function: no calls, no tables, no
 * branches. Errors are checked by test_ops. A NaN stays one. Floor: kernels. */
#ifndef PENTAD_KERNELS_CPU_VMATH_H
#define PENTAD_KERNELS_CPU_VMATH_H

#include <stdint.h>

#include "kernels/cpu/cpu.h"

/* e^x, relative error below 3e-7; 0 below -87.7, infinity above 88.4. Cody & Waite reduction to
 * |r| <= ln 2 / 2, then the minimax polynomial of Moshier 1989 (Cephes, expf). */
CPU_INLINE float vexp(float x)
{
	union {
		float f;
		uint32_t u;
	} power;
	x = x < -88 ? -88 : x;
	x = x > 89 ? 89 : x;
	power.f = x * 1.44269504f + 12582912.0f; /* 1.5 · 2^23: the low bits now hold the rounded integer */
	float n = power.f - 12582912.0f;
	float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
	float p = 1.9875691500e-4f;
	p = p * r + 1.3981999507e-3f;
	p = p * r + 8.3334519073e-3f;
	p = p * r + 4.1665795894e-2f;
	p = p * r + 1.6666665459e-1f;
	p = p * r + 5.0000001201e-1f;
	p = p * r * r + r + 1;
	power.u = (power.u << 23) + (127u << 23);
	return p * power.f;
}

CPU_INLINE float vsigmoid(float x)
{
	return 1 / (1 + vexp(-x));
}

/* Φ(x), the normal distribution; absolute error 1e-7: Abramowitz & Stegun 7.1.26 on |x| / sqrt 2. */
CPU_INLINE float vnormal(float x)
{
	float z = (x < 0 ? -x : x) * 0.707106781f;
	float t = 1 / (1 + 0.3275911f * z);
	float p = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t +
	           0.254829592f) *
	          t;
	float tail = 0.5f * p * vexp(-z * z);
	return x < 0 ? tail : 1 - tail;
}

/* Value and slope of each row of ACTIVATIONS. With σ the logistic function, gelu(x) is x σ(2u), where
 * u = sqrt(2/π) (x + 0.044715 x³): nothing cancels for negative x. */
CPU_INLINE float vgelu_sigmoid(float x)
{
	return vsigmoid(x * (1.59576912f + 0.0713548163f * x * x));
}

CPU_INLINE float vgelu_value(float x)
{
	return x * vgelu_sigmoid(x);
}

CPU_INLINE float vgelu_slope(float x)
{
	float c = x < -30 ? -30 : x; /* beyond, the slope is 0 or 1; x³ must not meet infinity */
	c = c > 30 ? 30 : c;
	float s = vgelu_sigmoid(c);
	return s + c * s * (1 - s) * (1.59576912f + 0.214064449f * c * c);
}

CPU_INLINE float vgelu_exact_value(float x)
{
	return x * vnormal(x);
}

CPU_INLINE float vgelu_exact_slope(float x)
{
	return vnormal(x) + x * 0.398942280f * vexp(-0.5f * x * x);
}

CPU_INLINE float vrelu_value(float x)
{
	return x < 0 ? 0 : x;
}

CPU_INLINE float vrelu_slope(float x)
{
	return x > 0 ? 1 : 0;
}

CPU_INLINE float vsquared_relu_value(float x)
{
	return x < 0 ? 0 : x * x;
}

CPU_INLINE float vsquared_relu_slope(float x)
{
	return x < 0 ? 0 : 2 * x;
}

CPU_INLINE float vsilu_value(float x)
{
	return x * vsigmoid(x);
}

CPU_INLINE float vsilu_slope(float x)
{
	float s = vsigmoid(x);
	return s * (1 + x * (1 - s));
}

#endif
