/* The whole training step as one program: forward, backward, reduction over ranks, optimizer. Floor: train.
 */
#ifndef PENTAD_TRAIN_PROGRAM_H
#define PENTAD_TRAIN_PROGRAM_H

#include "model/model.h"
#include "train/config.h"

/* What belongs to a parameter besides its weights, as value ids; master is NONE for f32 parameters. */
struct param_state {
	int32_t grad, master, exp_avg, exp_avg_sq;
};

struct program {
	struct prog prog;
	struct model model;
	struct param_state *state; /* [model.n_param], MODEL_TRAIN only */
	int32_t loss;              /* f64 [1]: model.loss, summed over ranks once SEG_REDUCE ran */
	int32_t norm2;             /* f64 [1]: squared norm of the whole gradient, after SEG_REDUCE */
	int32_t hyper;             /* f32 [HYPER_COUNT] input of SEG_STEP */
};

/* Builds, differentiates, fuses, recomputes, plans and checks. For MODEL_GENERATE `rows` is the number of
 * tokens a call, otherwise it is ignored. *t must not be moved afterwards. Local. */
int program_build(struct program *t, const struct config *c, enum model_use use, int32_t rows, struct err *e);
void program_free(struct program *t);

#endif
