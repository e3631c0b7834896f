/* What a training run keeps in a checkpoint, and how it gets back: weights, master weights, moments, and the
 * position in the data. Floor: train. */
#ifndef PENTAD_TRAIN_STATE_H
#define PENTAD_TRAIN_STATE_H

#include "train/step.h"

struct ckpt;
struct hf;

/* Where weights come from: a checkpoint of ours or a Hugging Face folder; the other is NULL. */
struct weights {
	struct ckpt *ckpt;
	struct hf *hf;
};
/* EXIT_NO_INPUT, EXIT_BAD_DATA. Local. */
int weights_open(const char *path, struct weights *out, struct err *e);
void weights_close(struct weights *w);

/* Everything about a run besides tensors. */
struct position {
	int64_t step;    /* finished steps */
	int64_t updates; /* of them, those that were not skipped */
	uint64_t consumed_samples;
	uint64_t dataset_fingerprint;
	struct scaler scaler; /* scale 0: nobody knows, begin anew */
};

/* Saves below `dir` ("RUN/checkpoints") and prunes. Every piece is written by one of the ranks that hold it;
 * all return the same code. Collective over `world`. */
int state_save(const struct step *s, const struct position *at, struct comm *world, const char *dir,
               struct err *e);
/* Fills weights, and with `optimizer` also moments, from weights of any layout and precision.
 * Without optimizer, moments are zero and masters equal the weights. EXIT_BAD_DATA names the tensor. Local.
 */
int state_load(struct step *s, const struct weights *w, bool optimizer, struct err *e);
/* The weights of a model alone, for generation and conversion. Local. */
int state_load_weights(const struct program *t, struct exec *x, const struct weights *w, struct err *e);
/* Reads the position that state_save wrote. EXIT_BAD_DATA where the checkpoint holds weights alone. Local. */
int position_read(const struct ckpt *c, struct position *out, struct err *e);

#endif
