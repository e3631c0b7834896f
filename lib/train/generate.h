/* Text from a trained model: a prefill program and a one-token program over the same weights and key-value
 * caches. Floor: train. */
#ifndef PENTAD_TRAIN_GENERATE_H
#define PENTAD_TRAIN_GENERATE_H

#include "train/program.h"

struct weights;
struct generator;

/* What to draw from: the softmax of logits / temperature, cut to the top_k most likely tokens and to the
 * fewest whose sum reaches top_p (Holtzman et al. 2020). */
struct sampling {
	double temperature; /* 0: always the most likely token */
	int64_t top_k;      /* 0: all */
	double top_p;       /* 1: all */
	uint64_t seed;
};

/* The configuration of a model, from what its checkpoint or folder says of itself. *c is due
 * to config_free whatever it returns. Local. */
int generate_read_config(const struct weights *w, struct config *c, struct err *e);
/* Loads the weights onto a device. c outlives the generator; backend and stream are not owned. Local. */
int generator_new(const struct config *c, const struct weights *w, const struct backend *backend,
                  struct stream *stream, struct generator **out, struct err *e);
void generator_free(struct generator *g);
/* Forgets the sequence. */
void generator_reset(struct generator *g);
/* Tokens that still fit behind the sequence so far. */
int64_t generator_room(const struct generator *g);
/* Appends n >= 1 tokens; *logits [vocab_size] of the last one belong to the generator, until the next call.
 * EXIT_USAGE where they do not fit. Local. */
int generator_feed(struct generator *g, const int32_t *ids, size_t n, const float **logits, struct err *e);
/* Draws a token; `index` numbers the draws under one seed. Local. */
int32_t sample_token(const struct sampling *s, const float *logits, int32_t vocab_size, uint64_t index);

#endif
