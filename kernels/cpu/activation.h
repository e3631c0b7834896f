/* The activations of ACTIVATIONS: leaf functions on rows, and value and slope in double precision.
 * Floor: kernels. */
#ifndef PENTAD_KERNELS_CPU_ACTIVATION_H
#define PENTAD_KERNELS_CPU_ACTIVATION_H

#include <stdint.h>

#include "op/op.h"

/* y may be x, dx may be dy or x, and a row of glu's dx its row of x. */
struct activation_rows {
	void (*value)(const float *x, float *y, int64_t n);
	void (*value_bwd)(const float *dy, const float *x, float *dx, int64_t n);
	void (*glu)(const float *gate, const float *up, float *y, int64_t n);
	void (*glu_bwd)(const float *dy, const float *gate, const float *up, float *dgate, float *dup,
	                int64_t n);
};
extern const struct activation_rows cpu_activation_rows[ACT_COUNT];

struct activation_math {
	double (*value)(double), (*slope)(double);
};
extern const struct activation_math cpu_activation_math[ACT_COUNT];

#endif
