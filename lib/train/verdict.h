/* Are a layout's numbers and tensors those of one rank? The judge on rank 0: bounds, what was compared, the
 * first difference. Tensors come in boxes under their logical names, from each rank all that it holds; those
 * of one rank are read box by box, so beside its program this takes no more than two tensors at a time.
 *
 * Layouts add in different orders, so honest ones differ by rounding; a bound lies above that and far below a
 * mistake. Weights before the first step are equal: nothing has been added yet. A gradient may differ by a
 * small part of its tensor's largest, and by a far smaller one of the model's largest, since a gradient that
 * is zero in truth (key biases, which softmax does not see) is rounding alone. Adam (Kingma & Ba 2015)
 * divides a gradient by its own size plus eps, so with a tiny eps such an element would go up in one layout
 * and down in the other; both sides therefore train with an eps that is large beside rounding
 * (verdict_adam_eps), and a weight may differ by n · rate · (bound of its gradient) / eps after n steps, and
 * by rounding of its own. Ranks that hold the same box hold the same bits. Local. Floor: train. */
#ifndef PENTAD_TRAIN_VERDICT_H
#define PENTAD_TRAIN_VERDICT_H

#include "train/pieces.h"
#include "train/step.h"

struct verdict;

/* In the order of a run: state, when, in which step (0: the last), what one and what all of them are called.
 */
#define VERDICT_STAGES(X)                                                  \
	X(START, SHARD_PARAM, "before step", 1, "weight", "weights")       \
	X(GRADIENTS, SHARD_GRAD, "in step", 1, "gradient of", "gradients") \
	X(WEIGHTS, SHARD_PARAM, "after step", 0, "weight", "weights")      \
	X(MASTERS, SHARD_MASTER, "after step", 0, "master weight of", "master weights")
enum verdict_stage {
#define VERDICT_STAGE_ROW(name, state, when, step, one, all) VERDICT_##name,
	VERDICT_STAGES(VERDICT_STAGE_ROW)
#undef VERDICT_STAGE_ROW
};
enum shard_state verdict_state(enum verdict_stage stage);

enum { BOX_NAME_BYTES = 128 };

struct verdict_box { /* a piece on its way to rank 0; its elements follow as f32 */
	int64_t offset[2], extent[2];
	int64_t owned; /* piece_is_owned, on the rank that sends it */
	char name[BOX_NAME_BYTES];
};

/* `reference`: one rank's training step, `layout`: this rank's in the layout; both outlive the verdict. Every
 * bound is multiplied by `tolerance`. The caller frees it. */
struct verdict *verdict_new(const struct step *reference, const struct step *layout, double tolerance);
void verdict_free(struct verdict *d);
/* Appends the bounds, in words. */
void verdict_put_bounds(const struct verdict *d, struct buf *b);

/* What step `step` (from 1 on) gave on a rank of the layout (rank 0 first), and on one rank. */
void verdict_numbers(struct verdict *d, int64_t step, int rank, const struct step_result *have,
                     const struct step_result *want);
/* Around the boxes of a stage; GRADIENTS before the first update. end appends a line to b. */
void verdict_begin(struct verdict *d, enum verdict_stage stage);
void verdict_end(struct verdict *d, struct buf *b);
/* After GRADIENTS of a step with this gradient norm: adam_eps, raised so that rounding stays rounding. */
double verdict_adam_eps(const struct verdict *d, double grad_norm);
/* data: [extent[0], extent[1]]. */
void verdict_take(struct verdict *d, int rank, const struct verdict_box *box, const float *data);
/* Appends the first difference: a sentence, naming a tensor where any differs. false: there is none. */
bool verdict_put_first(const struct verdict *d, struct buf *b);

#endif
