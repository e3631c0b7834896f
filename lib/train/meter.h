/* What a run tells while it goes: metrics.jsonl for programs, a line for people. Floor: train. */
#ifndef PENTAD_TRAIN_METER_H
#define PENTAD_TRAIN_METER_H

#include "train/step.h"

#include <stdio.h>

struct meter {
	const struct config *config;
	FILE *file;                 /* metrics.jsonl, NULL where nothing is written */
	double flops_per_step;      /* of the model */
	double matmul_peak;         /* flop/s measured on one rank, 0 = not measured */
	double datasheet_peak;      /* of one rank's device, 0 = none is known */
	int64_t memory_limit_bytes; /* of that device, 0 = the host's */
	int world_size;
	int64_t mem_bytes; /* of one rank's plan */
	int64_t skipped;
	/* Since the last line. */
	double seconds, loss_sum;
	int64_t steps, dropped, overflow;
	int64_t overflow_sum; /* of the run */
	/* The newest validation, for the line. */
	double val_loss;
	int64_t val_step;
	double smooth_step_s; /* of all steps, for the time that is left */
};

struct step_report {
	int64_t step;
	double lm_loss, grad_norm, lr, loss_scale, seconds;
	bool skipped;
	struct step_experts experts; /* all 0 where the model has none */
};

/* Opens RUN/metrics.jsonl and drops what it says of steps after `step` (a run that was killed behind its
 * checkpoint repeats them). run_dir NULL: no file. Rank 0. */
int meter_open(struct meter *m, const struct config *c, const char *run_dir, int64_t step, struct err *e);
void meter_close(struct meter *m);
/* Counts a step; every log_interval steps, and for the last one, writes the metrics and the line. */
void meter_step(struct meter *m, const struct step_report *r);
void meter_validation(struct meter *m, int64_t step, double lm_loss);

#endif
