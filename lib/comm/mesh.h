/* The mesh: which rank stands where on the axes of parallelism, and who shares a group with whom.
 *
 * Two grids fold over the same ranks, so that dense layers and experts choose their layouts apart:
 *	dense   rank = tp_r + tp·(cp_r + cp·(dp_r + dp·(rp_r + rp·pp_r)))
 *	expert  rank = etp_r + etp·(ep_r + ep·(edp_r + edp·pp_r))
 * Data-parallel ranks are dp · rp: rp replicas of dp ranks that share the optimizer's state (rp is 1 unless
 *asked for), so the data-parallel group of Megatron-LM is dp-rp here, and edp covers both. A group is "these
 *axes free, the rest fixed"; its members are listed in ascending rank, which is the order with the first axis
 *fastest. The order of Megatron-LM (core/parallel_state.py, "tp-cp-ep-dp-pp"). Pure arithmetic: nothing here
 *communicates. Local. Floor: comm. */
#ifndef PENTAD_COMM_MESH_H
#define PENTAD_COMM_MESH_H

struct err;

enum mesh_grid { GRID_DENSE = 1, GRID_EXPERT = 2 };

/* name, grids it belongs to, what it divides; the fastest axis of each grid first. */
#define MESH_AXES(X)                                                   \
	X(tp, GRID_DENSE, "tensor: heads, hidden columns, vocabulary") \
	X(cp, GRID_DENSE, "context: the sequence")                     \
	X(dp, GRID_DENSE, "data: samples of the global batch")         \
	X(rp, GRID_DENSE, "data: replicas of what dp shares out")      \
	X(etp, GRID_EXPERT, "expert tensor: columns of each expert")   \
	X(ep, GRID_EXPERT, "expert: whole experts")                    \
	X(edp, GRID_EXPERT, "expert data: replicas of each expert")    \
	X(pp, GRID_DENSE | GRID_EXPERT, "pipeline: layers, the same in both grids")

enum mesh_axis {
#define MESH_AXIS_ROW(name, grids, doc) AXIS_##name,
	MESH_AXES(MESH_AXIS_ROW)
#undef MESH_AXIS_ROW
	        AXIS_COUNT
};
#define AXIS_BIT(name) (1u << AXIS_##name)
#define AXES_DENSE (AXIS_BIT(tp) | AXIS_BIT(cp) | AXIS_BIT(dp) | AXIS_BIT(rp) | AXIS_BIT(pp))
#define AXES_DATA (AXIS_BIT(dp) | AXIS_BIT(rp))
#define AXES_EXPERT (AXIS_BIT(etp) | AXIS_BIT(ep) | AXIS_BIT(edp) | AXIS_BIT(pp))

struct mesh {
	int world;            /* ranks */
	int size[AXIS_COUNT]; /* dp and edp are derived */
};

/* What the configuration says; 0 = not said: 1, and for etp the value of tp. */
struct mesh_sizes {
	int tp, cp, pp, ep, etp, rp;
};

/* Fills *m for `world` ranks. EXIT_CONFIG with the equation where the sizes do not divide the world. */
int mesh_init(struct mesh *m, int world, const struct mesh_sizes *sizes, struct err *e);

/* "tp", "cp", …; static storage. */
const char *mesh_axis_name(enum mesh_axis axis);
/* Name of a set of axes, "dp-cp" written "cp-dp" (axis order); "world" for a whole grid, "self" for none. */
const char *mesh_axes_name(unsigned axes, char *out, int cap);

/* Coordinate of a rank on every axis of both grids. 0 <= rank < world. */
void mesh_coords(const struct mesh *m, int rank, int coord[AXIS_COUNT]);
/* The rank at coordinates of one grid (the other grid's entries are not read). */
int mesh_rank(const struct mesh *m, enum mesh_grid grid, const int coord[AXIS_COUNT]);

/* Groups: `axes` is a set of AXIS_BITs that lie in one grid (pp lies in both). */
int mesh_group_size(const struct mesh *m, unsigned axes);
/* The ranks that share all other coordinates with `rank`, ascending, into members[mesh_group_size()];
 * members may be NULL. Returns the place of `rank` in the list. */
int mesh_group(const struct mesh *m, unsigned axes, int rank, int *members);
/* A number below world / group size, the same for all members and for nobody else. */
int mesh_group_index(const struct mesh *m, unsigned axes, int rank);
/* The rank `step` places on along one axis, around the end. */
int mesh_neighbour(const struct mesh *m, enum mesh_axis axis, int rank, int step);

#endif
