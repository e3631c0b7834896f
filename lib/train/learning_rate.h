/* The learning rate over time: Megatron-LM's OptimizerParamScheduler, in steps. Local. Floor: train. */
#ifndef PENTAD_TRAIN_LEARNING_RATE_H
#define PENTAD_TRAIN_LEARNING_RATE_H

#include "train/config.h"

/* The rate of step `step` (the first is 1): linear from lr_warmup_init to lr over the warm-up, then from lr
 * to min_lr by the style; min_lr behind lr_decay_iters. c is checked. */
double learning_rate(const struct config *c, int64_t step);

#endif
