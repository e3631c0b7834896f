/* Which rows go to which expert and where: what both kernels of capacity and dispatch_plan stand on.
 * Floor: kernels. */
#ifndef PENTAD_KERNELS_CPU_DISPATCH_H
#define PENTAD_KERNELS_CPU_DISPATCH_H

#include "kernels/cpu/cpu.h"

/* Number of row `row` of the inputs of capacity in the order of samples and positions. */
int64_t capacity_order(const union op_arg *arg, int64_t rows, int64_t row);
/* EXIT_INTERNAL where the rows are not as arg.capacity says. */
int capacity_check(const union op_arg *arg, const struct tensor *in, const struct tensor *out, struct err *e);

/* All of dispatch_plan; room for two numbers of each expert. */
int dispatch_plan(const union op_arg *arg, const struct tensor *in, const struct tensor *out, int64_t *room,
                  struct err *e);

#endif
