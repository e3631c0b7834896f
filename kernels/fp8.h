/* Numbers of 8 bits: one scale a tensor, a power of two, so that what was rounded is exact in bf16 and every
 * device rounds alike (Micikevicius et al. 2022, "FP8 formats for deep learning"). Local. Floor: kernels. */
#ifndef PENTAD_KERNELS_FP8_H
#define PENTAD_KERNELS_FP8_H

#include <math.h>

#include "base/inline.h"

enum fp8_format { FP8_E4M3, FP8_E5M2 };

ANYWHERE float fp8_largest(enum fp8_format f)
{
	return f == FP8_E4M3 ? 448.0f : 57344.0f;
}

/* The largest power of two that keeps `amax` in range; 1 where there is nothing, or nothing finite, to scale.
 */
ANYWHERE float fp8_scale(float amax, enum fp8_format f)
{
	if (!(amax > 0) || isinf(amax))
		return 1;
	int k = ilogbf(fp8_largest(f) / amax);
	return ldexpf(1, k < -100 ? -100 : k > 100 ? 100 : k);
}

/* The nearest such number, ties to even; what is too large becomes the largest, a NaN stays one. */
ANYWHERE float fp8_round(float x, enum fp8_format f)
{
	int mantissa = f == FP8_E4M3 ? 3 : 2, least = f == FP8_E4M3 ? -6 : -14;
	float largest = fp8_largest(f);
	if (!(fabsf(x) < largest))
		return x != x ? x : copysignf(largest, x);
	int exponent = x == 0 ? least : ilogbf(x);
	float step = ldexpf(1, (exponent < least ? least : exponent) - mantissa);
	return rintf(x / step) * step;
}

#endif
