/* The dataset of a training run: one or more indexed datasets blended, in batches.
 *
 * Sample i of the whole is a pure function of (files, weights, split, seq_length, seed, i): the state of
 * the data is the number of samples consumed. Every rank opens the dataset and reads the samples that are
 * its own. Read-only after dataset_open and may be shared by threads. Local. Floor: data. */
#ifndef PENTAD_DATA_DATASET_H
#define PENTAD_DATA_DATASET_H

#include <stdbool.h>
#include <stdint.h>

#include "data/samples.h"

struct err;
struct dataset;

struct dataset_spec {
	const char *const *paths; /* [n] prefixes: PATH.bin, PATH.idx */
	const double *weights;    /* [n], > 0; NULL: in proportion to the samples of each */
	int n;
	double split[SPLIT_COUNT]; /* samples_parse_split */
	enum samples_split which;
	int seq_length;
	uint64_t seed;
	bool shuffle;
	int64_t vocab_size; /* ids must be below; 0: not checked */
};

/* Megatron's data_path: "path", ["p1", "p2"], or ["w1", "p1", "w2", "p2"] to (weight, path) pairs. A list is
 * weighted where its length is even and each word in an even place is a number. weights[words] and
 * paths[words] are filled, *n is the number of datasets; *weighted says whether weights were given.
 * EXIT_CONFIG where a weight is not a positive finite number. */
int dataset_parse_paths(const char *const *words, int n_words, const char **paths, double *weights, int *n,
                        bool *weighted, struct err *e);

/* *out is the caller's, set only on success; *spec is copied. EXIT_NO_INPUT, EXIT_BAD_DATA as indexed_open
 * and samples_init; EXIT_CONFIG where weights are not positive. */
int dataset_open(const struct dataset_spec *spec, struct dataset **out, struct err *e);
void dataset_close(struct dataset *d); /* NULL is fine */

/* Samples of one epoch, and tokens of the split, over all datasets. */
uint64_t dataset_count_samples(const struct dataset *d);
uint64_t dataset_count_tokens(const struct dataset *d);
/* One line for people: "2 datasets, 1.2M documents, 3.4G tokens, …" is left to the caller; these are the
 * numbers of dataset k in [0, spec.n). */
struct dataset_part {
	const char *path;
	uint64_t documents, tokens, samples; /* of the split; samples of one epoch */
	double weight;                       /* share of the blend, sums to 1 */
};
struct dataset_part dataset_part(const struct dataset *d, int k);

/* Samples [first, first + n) as inputs tokens[n][seq_length] and targets[n][seq_length], the same window one
 * token later. EXIT_BAD_DATA as indexed_read. */
int dataset_batch(const struct dataset *d, uint64_t first_sample, int n, int32_t *tokens, int32_t *targets,
                  struct err *e);

/* What decides the order: indexed_fingerprint of each dataset, its tokens of the split, its share,
 * seq_length, seed, shuffle. Kept in a checkpoint's data state; paths are not in it, so data may move. */
uint64_t dataset_fingerprint(const struct dataset *d);

#endif
