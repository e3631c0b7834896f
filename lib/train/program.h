/* The whole training step of one rank as one program: forward and backward of its pipeline chunks, reduction
 * over ranks, optimizer; and the order in which micro-batches go through. Floor: train. */
#ifndef PENTAD_TRAIN_PROGRAM_H
#define PENTAD_TRAIN_PROGRAM_H

#include "model/model.h"
#include "parallel/schedule.h"
#include "parallel/shard.h"
#include "train/config.h"

struct program {
	struct prog prog;
	struct mesh mesh;
	int rank, coord[AXIS_COUNT]; /* in the mesh */
	struct model_chunk chunk[PROG_MAX_CHUNKS];
	struct model model;
	struct schedule schedule; /* of this rank; MODEL_GENERATE has none */
	struct sharding sharding;
	int32_t loss; /* f64 [1]: the sum over all targets of all ranks, after SEG_NORM */
	/* The model's sums of mixture-of-experts layers over all ranks, after SEG_NORM; NONE where it has
	 * none. */
	int32_t expert_sums, expert_load;
};

/* Of weights and activations. */
enum dtype program_dtype(const struct config *c);
/* The mesh that a checked configuration asks for; of one rank for MODEL_GENERATE. */
int program_mesh(const struct config *c, enum model_use use, struct mesh *mesh, struct err *e);
/* What rank `rank` of the configuration's world runs: builds, differentiates, fuses, recomputes, shards,
 * plans and checks. Needs no other rank and no device. For MODEL_GENERATE `rows` is the number of tokens a
 * call, otherwise it is ignored. *t must not be moved afterwards. Local. */
int program_build(struct program *t, const struct config *c, enum model_use use, int32_t rows, int rank,
                  struct err *e);
void program_free(struct program *t);
/* Bytes of all regions. */
int64_t program_bytes(const struct program *t);
/* Samples of the global batch are dealt to dp · rp ranks: this rank's turn, and their number. */
int program_data_rank(const struct program *t);
int program_data_ranks(const struct program *t);

#endif
