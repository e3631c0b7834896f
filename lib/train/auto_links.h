/* Groups of ranks and the links between them; lib/train/auto_*.c alone include it. Local. Floor: train. */
#ifndef PENTAD_TRAIN_AUTO_LINKS_H
#define PENTAD_TRAIN_AUTO_LINKS_H

#include "train/auto.h"

struct group {
	int64_t ranks, on_node; /* on_node: of them, on the node where they are fewest */
};

/* So many ranks, each `stride` from the next. */
struct group group_apart(const struct auto_machine *m, int64_t stride, int64_t ranks);
/* What each rank of the group needs to send its bytes. A ring leaves and enters a node once, so its ranks
 * there share their ways out; pairwise, what goes to another node leaves from the rank where it is. */
double group_seconds(const struct auto_machine *m, struct group g, bool pairwise, double bytes, double calls);

#endif
