/* The groups of ranks that a program's collectives name, as communicators. Floor: train. */
#ifndef PENTAD_TRAIN_GROUPS_H
#define PENTAD_TRAIN_GROUPS_H

#include "comm/mesh.h"
#include "graph/exec.h"

struct comm;

enum { GROUPS_MAX = 64 };

struct groups {
	struct exec_comm
	        list[GROUPS_MAX]; /* stays where it is; comm is NULL where this rank is in no such group */
	size_t n;
};

/* Opens what any rank's program needs and is not open yet (p: this rank's), and the pipeline's. Collective
 * over world. */
int groups_open(struct groups *g, struct comm *world, const struct mesh *mesh, const struct prog *p,
                struct err *e);
/* The group over these axes (mesh bits, AXES_ENDS); NULL where there is none. */
struct comm *groups_find(const struct groups *g, uint32_t axes);
void groups_close(struct groups *g);

#endif
