/* Rotary positions of one head, and what their tables must have. Local. Floor: kernels. */
#ifndef PENTAD_KERNELS_CPU_ROPE_H
#define PENTAD_KERNELS_CPU_ROPE_H

#include "kernels/cpu/cpu.h"

/* Rotates 2·half elements in place by the angles whose cosines and then sines are in table[2·half]: pairs
 * (i, i + half), or neighbours. */
void cpu_rotate(float *x, const float *table, bool inverse, bool interleaved, int64_t half);
/* The same in double precision, from elements of x at `from` on to elements of y at `to` on; these may be the
 * same. Row `position` of the table [P, 2·half]. */
void cpu_ref_rotate(const struct tensor *x, int64_t from, const struct tensor *y, int64_t to,
                    const struct tensor *table, int64_t position, bool inverse, bool interleaved);
/* Fails where a position has no row in the table. */
int cpu_rope_check(enum op op, const struct tensor *table, const struct tensor *position, struct err *e);

#endif
