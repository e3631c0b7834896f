#include "comm/mesh.h"
#include "base/err.h"

#include <stdio.h>
#include <string.h>

enum { MAX_AXIS = 1 << 20 }; /* the product of three fits in int64 */

static const struct {
	const char *name;
	unsigned grids;
} axes_table[AXIS_COUNT] = {
#define MESH_AXIS_ROW(name, grids, doc) {#name, grids},
        MESH_AXES(MESH_AXIS_ROW)
#undef MESH_AXIS_ROW
};

const char *mesh_axis_name(enum mesh_axis axis)
{
	return axes_table[axis].name;
}

const char *mesh_axes_name(unsigned axes, char *out, int cap)
{
	if (!axes || axes == AXES_DENSE || axes == AXES_EXPERT) {
		snprintf(out, cap, "%s", axes ? "world" : "self");
		return out;
	}
	int length = 0;
	for (int a = 0; a < AXIS_COUNT; a++)
		if (axes >> a & 1 && length < cap)
			length += snprintf(out + length, cap - length, "%s%s", length ? "-" : "",
			                   axes_table[a].name);
	return out;
}

/* world / (a·b·pp), or 0 where that is no whole number. */
static int quotient(int world, int a, int b, int pp)
{
	long long product = (long long)a * b * pp;
	return world % product ? 0 : (int)(world / product);
}

int mesh_init(struct mesh *m, int world, const struct mesh_sizes *sizes, struct err *e)
{
	const struct {
		const char *key;
		int size;
	} given[] = {
	        {"tensor_model_parallel_size", sizes->tp},
	        {"context_parallel_size", sizes->cp},
	        {"pipeline_model_parallel_size", sizes->pp},
	        {"expert_model_parallel_size", sizes->ep},
	        {"expert_tensor_parallel_size", sizes->etp},
	        {"num_distributed_optimizer_instances", sizes->rp},
	};
	for (size_t i = 0; i < sizeof given / sizeof *given; i++)
		if (given[i].size < 0 || given[i].size > MAX_AXIS)
			return err_set(e, EXIT_CONFIG, "parallel.%s is %d; allowed: 1 to %d", given[i].key,
			               given[i].size, MAX_AXIS);
	int tp = sizes->tp ? sizes->tp : 1, cp = sizes->cp ? sizes->cp : 1, pp = sizes->pp ? sizes->pp : 1;
	int ep = sizes->ep ? sizes->ep : 1, etp = sizes->etp ? sizes->etp : tp;
	int dp = quotient(world, tp, cp, pp), edp = quotient(world, etp, ep, pp);
	if (!dp)
		return err_set(e, EXIT_CONFIG,
		               "%d ranks cannot be divided into tp %d · cp %d · pp %d = %lld: the number of "
		               "ranks must be a multiple of it (data_parallel = ranks / (tp · cp · pp))",
		               world, tp, cp, pp, (long long)tp * cp * pp);
	if (!edp)
		return err_set(
		        e, EXIT_CONFIG,
		        "%d ranks cannot be divided into etp %d · ep %d · pp %d = %lld: the number of "
		        "ranks must be a multiple of it (expert data parallel = ranks / (etp · ep · pp))",
		        world, etp, ep, pp, (long long)etp * ep * pp);
	int rp = sizes->rp ? sizes->rp : 1;
	if (dp % rp)
		return err_set(e, EXIT_CONFIG,
		               "data_parallel %d is not a multiple of num_distributed_optimizer_instances %d",
		               dp, rp);
	*m = (struct mesh){world,
	                   {[AXIS_tp] = tp,
	                    [AXIS_cp] = cp,
	                    [AXIS_dp] = dp / rp,
	                    [AXIS_rp] = rp,
	                    [AXIS_etp] = etp,
	                    [AXIS_ep] = ep,
	                    [AXIS_edp] = edp,
	                    [AXIS_pp] = pp}};
	return 0;
}

/* One grid's share of mesh_coords. */
static void grid_coords(const struct mesh *m, unsigned grid, int rank, int *coord)
{
	for (int a = 0; a < AXIS_COUNT; a++)
		if (axes_table[a].grids & grid) {
			coord[a] = rank % m->size[a];
			rank /= m->size[a];
		}
}

void mesh_coords(const struct mesh *m, int rank, int coord[AXIS_COUNT])
{
	grid_coords(m, GRID_DENSE, rank, coord);
	grid_coords(m, GRID_EXPERT, rank, coord);
}

int mesh_rank(const struct mesh *m, enum mesh_grid grid, const int coord[AXIS_COUNT])
{
	int rank = 0, stride = 1;
	for (int a = 0; a < AXIS_COUNT; a++)
		if (axes_table[a].grids & grid) {
			rank += coord[a] * stride;
			stride *= m->size[a];
		}
	return rank;
}

static enum mesh_grid grid_of(unsigned axes)
{
	ASSERT(!(axes & ~AXES_DENSE) || !(axes & ~AXES_EXPERT));
	return axes & ~AXES_DENSE ? GRID_EXPERT : GRID_DENSE;
}

int mesh_group_size(const struct mesh *m, unsigned axes)
{
	(void)grid_of(axes);
	int n = 1;
	for (int a = 0; a < AXIS_COUNT; a++)
		n *= axes >> a & 1 ? m->size[a] : 1;
	return n;
}

int mesh_group(const struct mesh *m, unsigned axes, int rank, int *members)
{
	enum mesh_grid grid = grid_of(axes);
	int coord[AXIS_COUNT], place = 0, n = mesh_group_size(m, axes);
	mesh_coords(m, rank, coord);
	for (int i = 0; i < n; i++) {
		int rest = i;
		for (int a = 0; a < AXIS_COUNT; a++)
			if (axes >> a & 1) {
				coord[a] = rest % m->size[a];
				rest /= m->size[a];
			}
		int member = mesh_rank(m, grid, coord);
		if (members)
			members[i] = member;
		if (member == rank)
			place = i;
	}
	return place;
}

int mesh_group_index(const struct mesh *m, unsigned axes, int rank)
{
	enum mesh_grid grid = grid_of(axes);
	int coord[AXIS_COUNT], index = 0, stride = 1;
	mesh_coords(m, rank, coord);
	for (int a = 0; a < AXIS_COUNT; a++)
		if (axes_table[a].grids & grid && !(axes >> a & 1)) {
			index += coord[a] * stride;
			stride *= m->size[a];
		}
	return index;
}

int mesh_neighbour(const struct mesh *m, enum mesh_axis axis, int rank, int step)
{
	enum mesh_grid grid = grid_of(1u << axis);
	int coord[AXIS_COUNT], n = m->size[axis];
	mesh_coords(m, rank, coord);
	coord[axis] = ((coord[axis] + step) % n + n) % n;
	return mesh_rank(m, grid, coord);
}
