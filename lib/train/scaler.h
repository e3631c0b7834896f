/* What the loss is multiplied by, so that gradients in half precision neither vanish nor overflow:
 * Micikevicius et al. 2018. The optimizer divides by it again. Other precisions have 1. Local. Floor: train.
 */
#ifndef PENTAD_TRAIN_SCALER_H
#define PENTAD_TRAIN_SCALER_H

#include "train/config.h"

struct scaler {
	double scale;
	int64_t clean; /* steps without overflow since the scale last grew or one was skipped */
	int64_t left;  /* steps with overflow until they make it smaller; filled up where it grows alone */
};

/* Whether the configuration leaves the scale to be found. */
bool scaler_searches(const struct config *c);
struct scaler scaler_start(const struct config *c);
/* Behind a step, which was skipped or not: what the next one takes. Nothing where it does not search. */
void scaler_update(struct scaler *s, const struct config *c, bool skipped);
/* Whether skipped steps make it no smaller any more. */
bool scaler_is_lowest(const struct scaler *s, const struct config *c);
/* A scale that needs no search, for a few steps: the one that is given, or else a power of two with which the
 * gradient of a target's logits is about 1. */
double scaler_moderate(const struct config *c);

#endif
