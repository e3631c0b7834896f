/* How fast this rank's device multiplies matrices: the honest divisor of MFU. Local. Floor: train. */
#ifndef PENTAD_TRAIN_PROBE_H
#define PENTAD_TRAIN_PROBE_H

#include "backend/backend.h"

/* The best of a few products [1024,768]·[768,768] of f32, bf16 or f16, in flop/s; takes some 150 ms. */
double probe_matmul_peak(const struct backend *backend, struct stream *stream, enum dtype dtype);

#endif
