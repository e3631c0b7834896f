/* What a rank holds of the global tensors: boxes of logical parameters, whatever buckets and parts they lie
 * in. Saving, loading, initial values and comparisons all walk this list. Floor: train. */
#ifndef PENTAD_TRAIN_PIECES_H
#define PENTAD_TRAIN_PIECES_H

#include "train/program.h"

struct piece { /* offset, extent of the global tensor part->shape, which lie at element `first` of a value */
	const struct part *part;
	int64_t offset[2], extent[2];
	int32_t value;
	int64_t first;
};

/* This rank's boxes of one state, in *out (the caller frees it); returns their number, 0 where the program
 * has no such state. A part of a bucket that begins and ends within rows gives up to three boxes a tensor.
 * Local. */
size_t pieces_list(const struct program *t, enum shard_state state, struct piece **out);
int64_t piece_count(const struct piece *q); /* elements */
/* Of the ranks that hold equal copies of a piece, one is its owner: the same for all of them, spread evenly.
 * Local. */
bool piece_is_owned(const struct program *t, const struct piece *q, enum shard_state state);
/* Initial values into the weights, and masters from the weights: after program's exec was created. Local. */
void pieces_init(const struct program *t, struct exec *x, uint64_t seed);
void pieces_refresh_masters(const struct program *t, struct exec *x);
/* Both at once and much faster, for times: the same random numbers over and over. Local. */
void pieces_fill(const struct program *t, struct exec *x, uint64_t seed);
/* One piece as f32 from the device, and to it, rounded where the value is bf16 or f16; host [piece_count].
 * Local. */
void piece_read(const struct program *t, struct exec *x, const struct piece *q, float *host);
void piece_write(const struct program *t, struct exec *x, const struct piece *q, const float *host);

#endif
