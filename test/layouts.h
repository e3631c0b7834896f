/* One small model trained in many layouts, ranks as threads: losses, gradient norms and weights. */
#ifndef PENTAD_TEST_LAYOUTS_H
#define PENTAD_TEST_LAYOUTS_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "train/config.h"

enum { STEPS = 5, GLOBAL_BATCH = 24, MAX_RANKS = 32, MAX_TENSORS = 400 };

struct dataset;

/* "tp 2 pp 2 mbs 3 zero 1 sp 1 …": words and numbers, see layouts.c; the rest of the ranks is data-parallel.
 */
struct layout {
	int ranks;
	const char *text;
};

struct tensor_copy { /* one logical parameter after the last step, put together from all ranks' pieces */
	char name[100];
	int64_t shape[2];
	float *data;
	uint8_t *written; /* by element: how often */
};

struct outcome { /* what rank 0 saw; all ranks saw the same */
	double loss[STEPS], norm[STEPS], validation;
	struct tensor_copy tensor[MAX_TENSORS];
	int n_tensor;
	pthread_mutex_t lock;
};

struct tolerance { /* relative differences; of weights, to the largest of the tensor */
	double loss, norm, weights;
};
extern const struct tolerance layout_fp32;

/* The small model, with the layout's keys and `extra` ones ("key=value" … NULL, or NULL). */
bool layout_config(struct config *c, const struct layout *l, const char *const *extra);
struct dataset *layout_data(bool shuffle, int64_t vocab_size, int64_t seq_length);
/* Trains in one layout, and validates. NULL, and a failed check, where it did not run. */
struct outcome *layout_run(const struct layout *l, const char *const *extra, const struct dataset *data);
void outcome_free(struct outcome *o);
void outcome_compare(const struct outcome *a, const struct outcome *b, const struct tolerance *t,
                     const char *what);
/* Every layout of the list against one rank, which runs `alone`, on samples of seq_length tokens. */
void layouts_compare(const struct layout *l, size_t n, const char *alone, int64_t seq_length,
                     const char *const *extra, bool shuffle, const struct tolerance *t);
#define COMPARE(layouts, extra, shuffle, tolerance) \
	layouts_compare(layouts, sizeof(layouts) / sizeof *(layouts), "mbs 6", 12, extra, shuffle, tolerance)

struct walk;
/* Every layout of a walk, and `more` at random, against one rank, which runs `alone`. put: the words of a
 * layout; returns its ranks. Returns how many layouts cover all pairs. */
int layouts_walk(struct walk *w, int more, int (*put)(const int *value, char *text, size_t cap),
                 const char *alone, int64_t seq_length, const char *const *extra);

#endif
