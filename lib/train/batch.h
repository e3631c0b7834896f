/* The inputs of one micro-batch: samples read, and this rank's rows of them sent to the device. Floor: train.
 */
#ifndef PENTAD_TRAIN_BATCH_H
#define PENTAD_TRAIN_BATCH_H

#include "data/dataset.h"
#include "graph/exec.h"
#include "train/program.h"

struct batch {
	const struct program *program; /* not owned */
	struct exec *exec;             /* not owned */
	int32_t *tokens, *targets;     /* [B·T]: whole samples */
	int32_t *begins, *positions;   /* [B·T]: of each token's document, in the sample; in its document or,
	                                  where   positions do not begin anew, in the sample */
	int32_t *rows;                 /* [B·T]: those that one input wants */
	int64_t *keys;                 /* [B] */
	int32_t eod;                   /* ends a document; negative: nothing does */
	int64_t vocab_size;
	uint64_t dropout_key;
};

/* Uploads what is the same for all micro-batches. Local. */
void batch_open(struct batch *b, const struct program *program, struct exec *exec, const struct config *c);
void batch_close(struct batch *b);
/* Micro-batch m of a global batch whose first sample is `first_sample`; d NULL: tokens that are made up, the
 * same for the same sample. Local. */
int batch_load(struct batch *b, const struct dataset *d, uint64_t first_sample, int64_t m, struct err *e);

#endif
