/* `pentad verify`: the same training under the configuration's layout and on one rank, compared step by step
 * and tensor by tensor (verdict.h).
 *
 * Rank 0 computes the one rank's training as well, so the whole model has to fit it; meanwhile it tells the
 * others every fraction of a second that it lives. Samples are those of the training, or made up where there
 * is no dataset.data_path. Weights are initial values, or those of checkpoint.pretrained_checkpoint or
 * checkpoint.load, without optimizer state. The learning rate is optimizer.lr from the first step on: in a
 * warm-up there would be little to see. Nothing is written. Floor: train.
 *
 * verify_run is: open; compare START; steps of gradients and update, with compare GRADIENTS in the first;
 * compare WEIGHTS and MASTERS; conclude; close. Tests take it apart, to make mistakes between. */
#ifndef PENTAD_TRAIN_VERIFY_H
#define PENTAD_TRAIN_VERIFY_H

#include "train/step.h"
#include "train/verdict.h"

#include <stdio.h>

struct verify_options {
	int64_t steps;            /* 1 or more */
	double tolerance;         /* multiplies every bound */
	struct rank_on_host host; /* of this host: cores are shared out among them */
	FILE *out;                /* where rank 0 reports */
};

struct verify {
	const struct config *config, *reference_config;
	struct verify_options options;
	struct comm *world;
	struct groups groups;
	struct place_of_rank at, alone;
	struct dataset *data; /* NULL: made-up tokens */
	struct step step;     /* of this rank in the layout */
	struct step_result result;
	struct config tuned; /* a copy to read, from the first update on: tune */
	int64_t done;        /* steps begun */
	bool lost;           /* the last one is not finite, on one side: there is no update */
	/* On rank 0: */
	struct step reference;
	struct step_result wanted;
	struct verdict *verdict;
};

/* Makes *reference, loaded from the same sources as c and not checked yet, the same training on one rank: all
 * keys of the groups parallel, ddp, recompute and comm_overlap back to their defaults. c is checked. Local.
 */
int verify_reference_config(struct config *reference, const struct config *c, struct err *e);

/* All: collective over world; all ranks return the same code. */

/* EXIT_SELF_CHECK with the first difference in *e on rank 0; EXIT_DIVERGED where loss or gradient is not
 * finite, on one rank neither; or what went wrong. c is checked for world->size ranks, both configurations
 * outlive the call. */
int verify_run(const struct config *c, const struct config *reference, struct comm *world,
               const struct verify_options *options, struct err *e);
/* verify_close is due whatever open returns; *v must not be moved. */
int verify_open(struct verify *v, const struct config *c, const struct config *reference, struct comm *world,
                const struct verify_options *options, struct err *e);
void verify_close(struct verify *v);
/* Loss and gradients of the next step, on both sides; then the update. */
int verify_gradients(struct verify *v, struct err *e);
int verify_update(struct verify *v, struct err *e);
/* Every box of every rank, one rank after the other. */
int verify_compare(struct verify *v, enum verdict_stage stage, struct err *e);
/* The last line of the report, and EXIT_SELF_CHECK. */
int verify_conclude(struct verify *v, struct err *e);

#endif
