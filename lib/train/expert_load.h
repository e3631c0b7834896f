/* How evenly the experts of a model are used. Floor: train. */
#ifndef PENTAD_TRAIN_EXPERT_LOAD_H
#define PENTAD_TRAIN_EXPERT_LOAD_H

#include "train/step.h"

struct buf;

/* The fullest expert's choices over the average, as mean over the layers; 1 is even. Local. */
double expert_load_imbalance(const struct step_experts *x);
/* [[…],…] as JSON: choices by layer and expert. Local. */
void expert_load_put_json(const struct step_experts *x, struct buf *b);
/* A table for people, a line a layer: every expert's choices in percent of the average, or where there are
 * many how they are spread. Local. */
void expert_load_put_table(const struct step_experts *x, struct buf *b);

#endif
