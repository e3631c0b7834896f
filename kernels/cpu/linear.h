/* Operands of linear layers as a product takes them. Local. Floor: kernels. */
#ifndef PENTAD_KERNELS_CPU_LINEAR_H
#define PENTAD_KERNELS_CPU_LINEAR_H

#include <stdbool.h>

#include "kernels/fp8.h"
#include "op/op.h"

struct stream;

/* use[0..2) <- in[0..2), where arg.linear.fp8 says so rounded into `memory` of linear_rounded_bytes;
 * backward: in[0] is a gradient. */
int64_t linear_rounded_bytes(const union op_arg *arg, const struct tensor *in);
void linear_operands(struct stream *s, const union op_arg *arg, bool backward, const struct tensor *in,
                     struct tensor *use, void *memory);

#endif
