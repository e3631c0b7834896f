/* The devices that this build knows. Floor: kernels (they stand on backend). */
#ifndef PENTAD_KERNELS_KERNELS_H
#define PENTAD_KERNELS_KERNELS_H

#include "backend/backend.h"

extern const struct backend cpu_backend;           /* fast kernels, chosen at run time */
extern const struct backend cpu_reference_backend; /* plain C in double precision: what tests compare with */
extern const struct backend cuda_backend;          /* in a build without CUDA its probe says so */

#endif
