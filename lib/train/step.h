/* One optimizer step on one rank: micro-batches through the pipeline's schedule, reduction, update. Floor:
 * train.
 */
#ifndef PENTAD_TRAIN_STEP_H
#define PENTAD_TRAIN_STEP_H

#include "train/batch.h"
#include "train/groups.h"
#include "train/pieces.h"
#include "train/program.h"
#include "train/scaler.h"

struct comm;
struct comm_queue;
struct transfers;

/* A device, and this rank among the others; not owned. */
struct place_of_rank {
	const struct backend *backend;
	struct stream *stream;
	struct comm *world;    /* NULL: one rank */
	struct groups *groups; /* opened as programs need them; NULL where world is */
};

struct step {
	const struct config *config;
	struct place_of_rank at;
	struct program program;
	struct exec *exec;
	struct comm_queue *queue;    /* communication beside computation; NULL: none asked for */
	struct transfers *transfers; /* between pipeline stages; NULL where there is one */
	struct batch batch;
	double loss_scale; /* of the next step: scaler_moderate, until the caller knows better */
	int32_t *load;     /* [layers,experts]: how many choices each expert got in the last step */
	/* Of the last pass through the schedule: seconds from its first slot to its last, and those of every
	 * slot [schedule.n] that were work, not waiting for another stage. */
	double pass_s, *slot_s;
};

struct step_experts { /* all 0 where there are none */
	int layers, experts;
	const int32_t *layer;  /* [layers]: their numbers in the model; the program's */
	const int32_t *load;   /* [layers,experts]; the step's, until the next one */
	double balancing_loss; /* mean over tokens, of all layers, coefficients applied: part of what is
	                          minimized */
	double z, entropy;     /* means over tokens and layers; entropy of the router's scores, in nats */
	int64_t dropped,
	        overflow; /* choices of this step that no expert took, since it was full, or its rank */
};

struct step_result {
	double lm_loss;   /* mean over the targets of the global batch */
	double grad_norm; /* before clipping, without the loss's scale; 0 for evaluation */
	bool skipped;     /* not finite: weights were left alone */
	struct step_experts experts;
};

/* Builds this rank's program for MODEL_TRAIN or MODEL_EVALUATE, opens the groups it communicates over and
 * allocates its memory. An evaluation uses the weights of `weights_of` (its training step). Weights are zero
 * until pieces_init or state_load; after pieces_init call pieces_refresh_masters. *s must not be moved.
 * Collective over at->world: all ranks return the same code. */
int step_create(struct step *s, const struct config *c, enum model_use use, const struct place_of_rank *at,
                const struct step *weights_of, struct err *e);
void step_free(struct step *s);
/* Samples [first_sample, first_sample + global batch) of the dataset, this rank's share of them (d NULL:
 * made-up tokens): forward, backward, reduction; weights do not change yet. Collective over the world. */
int step_gradients(struct step *s, const struct dataset *d, uint64_t first_sample, struct step_result *r,
                   struct err *e);
/* Clips and updates; `step` counts from 1. Not for a skipped result. Collective over the world. */
int step_update(struct step *s, int64_t step, double lr, struct err *e);
/* piece_read, gradients without the loss's scale. Local. */
void step_read_piece(const struct step *s, const struct piece *q, enum shard_state state, float *host);
/* Forward alone: the mean loss of global batches [0, n) from first_sample on. Collective over the world. */
int step_evaluate(struct step *s, const struct dataset *d, uint64_t first_sample, int64_t n, double *lm_loss,
                  struct err *e);

#endif
