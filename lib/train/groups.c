#include "train/groups.h"
#include "base/err.h"
#include "base/mem.h"
#include "comm/comm.h"
#include "parallel/shard.h"

#include <stdlib.h>

enum { SETS = 1 << (AXIS_COUNT + 1) }; /* sets of axes, AXES_ENDS among them */

static void mark_needed(int32_t *needed, const struct groups *g, const struct mesh *mesh,
                        const struct prog *p)
{
	for (size_t i = 0; i < p->n_node; i++) {
		const struct node *n = &p->node[i];
		if (op_rows[n->op].flags & COMM && !(op_rows[n->op].flags & ALIAS))
			needed[n->arg.comm.axes] = 1;
	}
	if (mesh->size[AXIS_pp] > 1)
		needed[AXIS_BIT(pp)] = 1;
	for (size_t i = 0; i < g->n; i++)
		needed[g->list[i].axes] = 0;
}

/* The first and the last stage of each pipeline. */
static int split_ends(struct comm *world, struct comm **out, const struct mesh *mesh, struct err *e)
{
	int coord[AXIS_COUNT];
	mesh_coords(mesh, world->rank, coord);
	bool end = coord[AXIS_pp] == 0 || coord[AXIS_pp] == mesh->size[AXIS_pp] - 1;
	int colour = end ? mesh_group_index(mesh, AXIS_BIT(pp), world->rank) : -1;
	return comm_split(world, out, colour, "ends", e);
}

int groups_open(struct groups *g, struct comm *world, const struct mesh *mesh, const struct prog *p,
                struct err *e)
{
	int32_t *needed = mem_array(SETS, sizeof *needed);
	mark_needed(needed, g, mesh, p);
	int rc = comm_all_reduce(world, needed, SETS, DT_i32, REDUCE_MAX, e);
	for (uint32_t axes = 1; axes < SETS && !rc; axes++) {
		struct comm *c = NULL;
		if (!needed[axes])
			continue;
		rc = axes & AXES_ENDS ? split_ends(world, &c, mesh, e)
		                      : comm_split_axes(world, &c, mesh, axes, e);
		ASSERT(g->n < GROUPS_MAX);
		g->list[g->n++] = (struct exec_comm){axes, c};
	}
	free(needed);
	return rc;
}

struct comm *groups_find(const struct groups *g, uint32_t axes)
{
	for (size_t i = 0; g && i < g->n; i++)
		if (g->list[i].axes == axes)
			return g->list[i].comm;
	return NULL;
}

void groups_close(struct groups *g)
{
	for (size_t i = 0; i < g->n; i++)
		comm_close(g->list[i].comm);
	*g = (struct groups){0};
}
