/* A training run: the loop, its folder, its checkpoints. Floor: train. */
#ifndef PENTAD_TRAIN_RUN_H
#define PENTAD_TRAIN_RUN_H

#include "backend/backend.h"
#include "train/config.h"

struct comm;

struct run_options {
	bool dry_run;             /* one step on made-up data, nothing is written */
	struct rank_on_host host; /* cores are shared out among the ranks, devices dealt out */
	const char *why;          /* the layout was chosen: lines for the log, or NULL */
};

/* Fills in what the tokenizer decides: vocab_size, eod_id where samples are cut at the ends of documents.
 * Every rank alike. Local. */
int run_complete_config(struct config *c, struct err *e);
/* The device that dist.device names, and an open stream on it with the threads of this rank. Local. */
int run_open_device(const struct config *c, struct rank_on_host host, const struct backend **backend,
                    struct stream **stream, struct err *e);
/* The flop/s of a rank's matrix products, on a stream of its own: nothing of it stays. Local. */
int run_measure_device(const struct config *c, struct rank_on_host host, double *flop_per_s, struct err *e);
/* Trains up to train.train_iters steps, resuming where the run folder has a valid checkpoint. c is checked
 * for world->size ranks. 0, EXIT_AGAIN where it stopped early with a checkpoint, or what went wrong; all
 * ranks return the same code. Collective over world. */
int run_train(const struct config *c, struct comm *world, const struct run_options *options, struct err *e);

#endif
