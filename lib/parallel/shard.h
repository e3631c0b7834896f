/* Data parallelism and the optimizer: parameters, gradients and optimizer state in buckets, and who holds
 * which part of them.
 *
 * A bucket is a pack of parameters that are treated alike. stage (ZeRO, Rajbhandari et al. 2020) says what
 * ranks with the same parameters share out: 0 nothing, 1 optimizer state, 2 and gradients, 3 and parameters;
 * each holds one of equal parts of the pack. Those are the cp and dp axes for parameters of the dense grid
 * (the rp axis holds replicas of all that), edp for those of the expert grid. Local. Floor: parallel. */
#ifndef PENTAD_PARALLEL_SHARD_H
#define PENTAD_PARALLEL_SHARD_H

#include "graph/prog.h"

/* An axes bit beside the mesh's: the first and the last stage of a pipeline, which both hold a tied table. */
#define AXES_ENDS (1u << AXIS_COUNT)

struct shard_param { /* what decides the bucket of a parameter */
	int32_t value;
	int32_t chunk, layer; /* layer -1: outside the layers */
	bool decay;
	bool is_buffer;    /* no gradient, no state: it stays whole */
	bool tied, counts; /* tied: AXES_ENDS hold it; counts: this copy is the one in the norm */
	uint32_t partial; /* axes besides cp, dp, rp and edp along which its gradient comes as partial sums */
};

struct shard_options {
	int stage;
	int64_t bucket_size;   /* elements; a bucket is closed when it holds as many */
	bool reduce_in_bf16;   /* gradients travel as bf16 */
	bool reduce_early;     /* right behind the last writer of a bucket, not at the end of backward */
	bool trains;           /* false: parameters alone, for a forward program */
	enum dtype moments[2]; /* of exp_avg and exp_avg_sq: f32, or bf16, which saves memory and rounds */
};

struct shard_slice { /* value holds elements [first, first + count) of the pack */
	int32_t value;
	int64_t first, count;
};

#define SHARD_STATES(X) X(PARAM) X(GRAD) X(MASTER) X(EXP_AVG) X(EXP_AVG_SQ)
enum shard_state {
#define SHARD_STATE_ROW(name) SHARD_##name,
	SHARD_STATES(SHARD_STATE_ROW)
#undef SHARD_STATE_ROW
	        SHARD_STATE_COUNT
};

struct bucket {
	int32_t n, *member; /* indices of parameters */
	int64_t count;      /* elements of the pack */
	struct shard_param like;
	uint32_t axes; /* that share it; 0 where stage is 0 */
	int32_t ranks, rank;
	int stage;
	struct shard_slice
	        state[SHARD_STATE_COUNT]; /* value NONE: there is none (no master of f32, no training) */
};

struct sharding {
	struct bucket *bucket;
	size_t n, cap;
	int32_t *bucket_of; /* by parameter */
	int64_t *at;        /* by parameter: its first element in the pack */
	int32_t norm2; /* f64 [1] after SEG_NORM: the squared norm of the whole gradient; NONE where none */
	int32_t hyper; /* f32 [HYPER_COUNT], an input of SEG_STEP */
};

/* Sorts the parameters into buckets and appends: parameters gathered before use (stage 3), gradients reduced
 * (SEG_REDUCE; from stage 2 on right behind backward), the norm (SEG_NORM), the update (SEG_STEP). After
 * prog_backward and the passes on activations, before prog_plan. 0 or the code in p->e. */
int shard_program(struct sharding *s, struct prog *p, const struct shard_param *param, size_t n,
                  const struct shard_options *options);
void shard_free(struct sharding *s);

#endif
