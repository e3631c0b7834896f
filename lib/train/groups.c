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

/* The first and the last stage of each pipeline have a colour of their own; the others none. */
static int ends_colour(const struct mesh *mesh, int rank)
{
	int coord[AXIS_COUNT];
	mesh_coords(mesh, rank, coord);
	bool end = coord[AXIS_pp] == 0 || coord[AXIS_pp] == mesh->size[AXIS_pp] - 1;
	return end ? mesh_group_index(mesh, AXIS_BIT(pp), rank) : -1;
}

static int colour_of(const struct mesh *mesh, uint32_t axes, int rank)
{
	return axes & AXES_ENDS ? ends_colour(mesh, rank) : mesh_group_index(mesh, axes, rank);
}

static const char *name_of(uint32_t axes, char *name, size_t size)
{
	return axes & AXES_ENDS ? "ends" : mesh_axes_name(axes, name, size);
}

/* Rank 0 makes the id of the devices' world; the ranks' own communicator carries it. */
static int open_devices(struct groups *g, struct comm *world, const struct groups_device *d, struct err *e)
{
	const struct group_table *table = d->backend->groups;
	size_t words = (table->id_bytes + 3) / 4;
	int32_t *id = mem_array(words, sizeof *id);
	int rc = comm_any(world, world->rank ? 0 : table->make_id(id, e), e);
	if (!rc)
		rc = comm_broadcast(world, id, words, DT_i32, 0, e);
	if (!rc)
		rc = table->open(d->stream, &g->devices, id, world->rank, world->size, d->timeout_s, e);
	free(id);
	return rc;
}

static int open_group(struct groups *g, struct comm *world, const struct mesh *mesh, uint32_t axes,
                      struct err *e)
{
	char text[48];
	const char *name = name_of(axes, text, sizeof text);
	struct exec_comm *at = &g->list[g->n];
	int colour = colour_of(mesh, axes, world->rank);
	ASSERT(g->n < GROUPS_MAX);
	*at = (struct exec_comm){.axes = axes};
	int rc = comm_split(world, &at->comm, colour, name, e);
	if (!rc && g->devices)
		rc = g->backend->groups->split(g->devices, &at->group, colour, 0, name, e);
	g->n += !rc;
	return rc;
}

/* Edges of a pipeline that have no stage in common are opened together: those with even numbers, with odd
 * numbers, and the one from the last stage back to the first. Edge i leads from stage i to the next. */
enum { EDGE_CLASSES = 3 };

static int class_of(int edge, int stages)
{
	return edge == stages - 1 ? 2 : edge % 2;
}

static int open_edges(struct groups *g, const struct mesh *mesh, int rank, int d, int class, struct err *e)
{
	static const char *const names[DIRECTIONS] = {"pp forward", "pp backward"};
	int coord[AXIS_COUNT], stages = mesh->size[AXIS_pp], edge = -1;
	mesh_coords(mesh, rank, coord);
	int next = coord[AXIS_pp],
	    last = (next + stages - 1) % stages; /* edges to the next stage, from the last */
	if (class_of(next, stages) == class)
		edge = next;
	if (class_of(last, stages) == class)
		edge = last;
	int colour = edge < 0 ? -1 : mesh_group_index(mesh, AXIS_BIT(pp), rank) * stages + edge;
	struct edge_group made = {0};
	int rc = g->backend->groups->split(g->devices, &made.group, colour, 1 + d * EDGE_CLASSES + class,
	                                   names[d], e);
	int other = edge == next ? (next + 1) % stages : last;
	made.peer = other > coord[AXIS_pp]; /* ranks of a group are in the order of stages */
	if (!rc && edge >= 0)
		*((edge == next) == (d == FORWARD_EDGE) ? &g->to[d] : &g->from[d]) = made;
	return rc;
}

static int open_pipeline(struct groups *g, const struct mesh *mesh, int rank, struct err *e)
{
	int rc = 0;
	for (int d = 0; d < DIRECTIONS && !rc; d++)
		for (int class = 0; class < EDGE_CLASSES && !rc; class ++)
			rc = open_edges(g, mesh, rank, d, class, e);
	return rc;
}

int groups_open(struct groups *g, struct comm *world, const struct groups_device *device,
                const struct mesh *mesh, const struct prog *p, struct err *e)
{
	int32_t *needed = mem_array(SETS, sizeof *needed);
	bool first = !g->backend;
	mark_needed(needed, g, mesh, p);
	g->backend = device->backend;
	int rc = comm_all_reduce(world, needed, SETS, DT_i32, REDUCE_MAX, e);
	if (!rc && first && world->size > 1 && device->backend->groups)
		rc = open_devices(g, world, device, e);
	for (uint32_t axes = 1; axes < SETS && !rc; axes++)
		if (needed[axes])
			rc = open_group(g, world, mesh, axes, e);
	if (!rc && first && g->devices && mesh->size[AXIS_pp] > 1)
		rc = open_pipeline(g, mesh, world->rank, e);
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
	const struct group_table *table = g->devices ? g->backend->groups : NULL;
	for (int d = 0; table && d < DIRECTIONS; d++) {
		table->close(g->from[d].group);
		table->close(g->to[d].group);
	}
	for (size_t i = 0; i < g->n; i++) {
		if (table)
			table->close(g->list[i].group);
		comm_close(g->list[i].comm);
	}
	if (table)
		table->close(g->devices);
	*g = (struct groups){0};
}
