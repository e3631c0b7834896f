/* Random masks, a row at a time. Floor: kernels. Local. */
#ifndef PENTAD_KERNELS_CPU_MASK_H
#define PENTAD_KERNELS_CPU_MASK_H

#include "kernels/mask.h"

/* out[j] = mask_scale(p) where element first + j survives, else 0; vectorised over blocks. */
void mask_row(uint64_t key, uint32_t salt, uint64_t first, int64_t n, float p, float *out);
/* out[j] = mask_jitter of element first + j. */
void mask_row_jitter(uint64_t key, uint32_t salt, uint64_t first, int64_t n, float p, float *out);

#endif
