/* The groups of ranks that a program's collectives and transfers name: communicators on the host, and groups
 * of devices where these have their own. Floor: train. */
#ifndef PENTAD_TRAIN_GROUPS_H
#define PENTAD_TRAIN_GROUPS_H

#include "comm/mesh.h"
#include "graph/exec.h"

struct comm;

enum { GROUPS_MAX = 64 };

/* Activations go to the next stage, gradients to the one before. */
enum direction { FORWARD_EDGE, BACKWARD_EDGE, DIRECTIONS };

/* Two stages, one sends, the other receives; alone on its lane, so that no message waits for another's. */
struct edge_group {
	struct group *group; /* NULL where there is none */
	int peer;            /* the other's rank in it */
};

struct groups {
	struct exec_comm
	        list[GROUPS_MAX]; /* stays where it is; comm is NULL where this rank is in no such group */
	size_t n;
	const struct backend *backend;
	struct group *devices; /* the world of devices; NULL where communicators carry everything */
	struct edge_group from[DIRECTIONS], to[DIRECTIONS];
};

/* A device whose groups are wanted. */
struct groups_device {
	const struct backend *backend;
	struct stream *stream;
	double timeout_s;
};

/* Opens what any rank's program needs and is not open yet (p: this rank's), and the pipeline's. Collective
 * over world. */
int groups_open(struct groups *g, struct comm *world, const struct groups_device *device,
                const struct mesh *mesh, const struct prog *p, struct err *e);
/* The group over these axes (mesh bits, AXES_ENDS); NULL where there is none. */
struct comm *groups_find(const struct groups *g, uint32_t axes);
/* Before the stream is closed. */
void groups_close(struct groups *g);

#endif
