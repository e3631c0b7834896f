/* Which layers each virtual stage of a pipeline holds. Pure arithmetic. Local. Floor: parallel.
 *
 * Virtual stage v of pipeline · chunks is chunk v / pipeline on pipeline rank v % pipeline, and layers go to
 * virtual stages in ascending order: the interleaving of Narayanan et al., "Efficient large-scale language
 * model training on GPU clusters using Megatron-LM", SC 2021, section 2.2. */
#ifndef PENTAD_PARALLEL_STAGES_H
#define PENTAD_PARALLEL_STAGES_H

#include <stdbool.h>
#include <stdint.h>

#include "base/err.h"

enum { STAGES_MAX = 1 << 20, STAGES_MAX_LAYERS = 1 << 20, STAGES_MAX_LAYOUT_BYTES = 4096 };

struct stage {
	int32_t first_layer, n_layers; /* layers first_layer … first_layer + n_layers - 1, counted from 0 */
	bool has_embedding, has_loss;  /* has_loss: final norm, output layer, loss */
};

/* Megatron-LM's keys. Without any of the last five each virtual stage has num_layers / (pipeline · chunks).
 */
struct stages_spec {
	int64_t num_layers;
	int pipeline, chunks; /* pipeline ranks; virtual stages of each */
	/* Each counts as one more layer in the even split, of the first and the last virtual stage. */
	bool account_for_embedding, account_for_loss;
	/* Layers of the first and the last pipeline rank, over all its chunks; 0: not said. The other ranks
	 * share the rest evenly. */
	int64_t first_stage_layers, last_stage_layers;
	/* NULL, or what stands where in the order of virtual stages: E embedding, t a transformer layer, L
	 * loss, | begins the next virtual stage, x*N and (…)*N repeat a letter, a bar, a group (groups may
	 * nest, N is 1 or more); commas mean nothing. "Et*3|(tt|)*29,t|L" */
	const char *layout;
};

/* Fills stage[pipeline · chunks], the caller's. A virtual stage holds at least one of embedding, layer, loss.
 * EXIT_CONFIG with the equation filled in and the nearest legal values, or with the byte of the layout
 * (counted from 0) and what is allowed there; stage[] is then undefined. A product above STAGES_MAX is
 * refused before stage is touched: bound the allocation by it. Local. */
int stages_split(const struct stages_spec *spec, struct stage *stage, struct err *e);

#endif
