/* Which rows go to which expert and where. Floor: kernels. */
#ifndef PENTAD_KERNELS_CPU_DISPATCH_H
#define PENTAD_KERNELS_CPU_DISPATCH_H

#include "kernels/cpu/cpu.h"
#include "op/experts.h"

/* All of dispatch_plan; room for two numbers of each expert. */
int dispatch_plan(const union op_arg *arg, const struct tensor *in, const struct tensor *out, int64_t *room,
                  struct err *e);

#endif
