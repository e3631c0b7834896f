/* In which order a pipeline rank works: its slots, each the work of one chunk on one micro-batch. Pure
 * arithmetic, no model, no communication. Local. Floor: parallel.
 *
 * 1f1b: Narayanan et al., "Memory-efficient pipeline-parallel DNN training", ICML 2021 (PipeDream-Flush).
 * interleaved: Narayanan et al., "Efficient large-scale language model training on GPU clusters using
 *   Megatron-LM", SC 2021, section 2.2.2.
 * zero_bubble: ZB-H1 of Qi et al., "Zero bubble pipeline parallelism", ICLR 2024, section 2.2.
 *
 * Time lost with the same f, b, w on every virtual stage (b without w), m micro-batches, p stages: 1f1b
 * (p-1)(f+b+w), interleaved the same of a chunk's shorter f, b, w; zero_bubble (p-1)(f+b-w) where m >= p,
 * w <= f and w <= b, and never more than 1f1b. */
#ifndef PENTAD_PARALLEL_SCHEDULE_H
#define PENTAD_PARALLEL_SCHEDULE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "parallel/config.h"

/* Under zero_bubble a backward slot gives the gradients of its inputs, and a later weight slot those of its
 * weights; else a backward slot gives both. */
#define SLOT_KINDS(X)                \
	X(SLOT_FORWARD, "forward")   \
	X(SLOT_BACKWARD, "backward") \
	X(SLOT_WEIGHT, "weight")
enum slot_kind {
#define SLOT_KIND_VALUE(value, name) value,
	SLOT_KINDS(SLOT_KIND_VALUE)
#undef SLOT_KIND_VALUE
	        N_SLOT_KINDS
};

/* What a slot waits for: forward: the forward of the virtual stage before; backward: its own forward and the
 * backward of the virtual stage behind; weight: its own backward. Nothing else: a chunk's micro-batches go
 * through each kind in ascending order. */
struct slot {
	uint8_t kind, chunk;
	int32_t micro_batch;
};

enum {
	SCHEDULE_MAX_STAGES = 65536,
	SCHEDULE_MAX_CHUNKS = 256,
	SCHEDULE_MAX_WORK = 1 << 24
}; /* work: micro-batches · chunks */

struct schedule_spec {
	enum parallel_schedule kind;
	int stages, chunks;    /* pipeline ranks; virtual stages of each */
	int64_t micro_batches; /* of one step and one pipeline */
	bool forward_only;     /* evaluation: the same order without backward and weight slots */
};

struct schedule {
	struct schedule_spec spec;
	int stage;
	struct slot *slot;
	size_t n;
	int32_t *in_flight; /* [chunks] most micro-batches between begin of forward and end of last slot */
	int32_t window;     /* most micro-batches from the oldest unfinished one to the newest begun, both
	                     * counted, over all chunks: as many input buffers are enough */
};

/* The slots of pipeline rank `stage`, 0 <= stage < spec->stages; schedule_free() frees them. EXIT_CONFIG
 * where the sizes do not fit the kind, with the nearest legal ones; *s is then empty. Local. */
int schedule_build(struct schedule *s, const struct schedule_spec *spec, int stage, struct err *e);
/* All zero is an empty schedule. */
void schedule_free(struct schedule *s);

/* The pipeline rank a slot's input comes from and its result goes to; -1 where there is none: the ends of the
 * pipeline, weight slots. The rank itself where there is one stage and several chunks. Local. */
int schedule_source(const struct schedule *s, const struct slot *slot);
int schedule_target(const struct schedule *s, const struct slot *slot);

/* Seconds of one slot of one chunk. Without zero_bubble a backward slot takes backward + weight. */
struct schedule_times {
	double forward, backward, weight;
	double transfer; /* of a result to the next rank, beside the rank's work */
};

struct schedule_result {
	double makespan; /* seconds from the first slot of all ranks to the end of the last */
	double bubble; /* idle part of it, averaged over ranks: 1 - busy / makespan; 0 where makespan is 0 */
};

/* Plays the lists of all ranks against each other; time[chunk · stages + stage], of each virtual stage.
 *
 * A slot begins when its rank is free and its input has arrived, transfer seconds after the end of the slot
 * that made it. Nobody waits for a send, but a result is written into one of `buffers` (>= 1) places of its
 * chunk and direction, by turns, and a slot does not begin before the receiver has begun to receive what
 * stands in its place (rendezvous). A rank begins to receive the input of a slot when it is done with the
 * slot before, whatever else it waits for then.
 *
 * EXIT_CONFIG as schedule_build. EXIT_INTERNAL where no rank can go on, a line for each rank that waits
 * (eight at most): "stage s waits at slot i (forward, chunk c, micro-batch m) for …". Local. */
int schedule_play(const struct schedule_spec *spec, const struct schedule_times *time, int buffers,
                  struct schedule_result *out, struct err *e);
/* The same with lists made already: all[stages], all of one spec. EXIT_INTERNAL also for a slot out of its
 * chunk's order. */
int schedule_play_lists(const struct schedule *all, const struct schedule_times *time, int buffers,
                        struct schedule_result *out, struct err *e);

#endif
