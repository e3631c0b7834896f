/* Running a planned program on a device: nothing is allocated after exec_create.
 *
 * The three debugging tools that need values live here: a trace of every node, a hunt for the first
 * non-finite value, and the reference kernel run beside the fast one, stopping at the first disagreement.
 * Floor: graph. */
#ifndef PENTAD_GRAPH_EXEC_H
#define PENTAD_GRAPH_EXEC_H

#include "backend/backend.h"
#include "graph/prog.h"

struct comm;
struct comm_queue;
struct exec;

struct exec_comm {     /* which group carries a collective over these axes */
	uint32_t axes; /* bit set of enum mesh_axis */
	struct comm *comm;
	struct group *group; /* the devices' own, where the backend has groups */
};

struct exec_options {
	const struct exec_comm *comm; /* not owned; must outlive the exec */
	size_t n_comm;
	struct comm_queue *queue;        /* not owned: carries out all collectives; NULL: at once */
	bool record;                     /* replay a part that was run before, where the device can */
	bool times;                      /* wait for each node and count its time: exec_take_times */
	bool trace;                      /* a line a node on standard error: time, size, root mean square */
	bool nan_hunt;                   /* after each node, refuse non-finite outputs: EXIT_DIVERGED */
	const struct backend *reference; /* compare with this device's kernels: EXIT_SELF_CHECK; or NULL */
	const struct exec *share;        /* whose memory to use for share_regions; must outlive the exec */
	uint32_t share_regions;          /* bit set of enum region */
};

/* Tells the stream of every kernel that the program calls, and returns the working memory that its kernels
 * will hold for all programs told of so far. Allocates nothing. Local. */
struct workspace exec_workspace(const struct prog *program, const struct backend *backend,
                                struct stream *stream);
/* Allocates every region of the plan, and tells the stream of the program. program, backend and stream are
 * not owned. Local. */
int exec_create(struct exec **out, const struct prog *program, const struct backend *backend,
                struct stream *stream, const struct exec_options *options, struct err *e);
void exec_free(struct exec *x);
/* Where a value lies on the device, for a micro-batch (counted from 0 in the step; only regions with slots
 * depend on it); owned by the exec. */
void *exec_data(const struct exec *x, int32_t value);
void *exec_data_of(const struct exec *x, int32_t value, int64_t micro_batch);
/* Host to device and back, a whole value. */
void exec_upload(struct exec *x, int32_t value, const void *host);
void exec_upload_of(struct exec *x, int32_t value, int64_t micro_batch, const void *host);
void exec_download(struct exec *x, int32_t value, void *host);
/* Elements [first, first + count) of a value. */
void exec_upload_part(struct exec *x, int32_t value, int64_t first, int64_t count, const void *host);
void exec_download_part(struct exec *x, int32_t value, int64_t first, int64_t count, void *host);

struct exec_part {         /* what to run */
	uint32_t segments; /* bit set of enum segment */
	int32_t chunk;     /* its nodes alone; NORM and STEP nodes belong to chunk 0 */
	int64_t micro_batch;
	bool first; /* accumulators (GRAD, STAT) are overwritten by their first writer instead of added to */
};
/* Runs the nodes of a part, in order. Where a kernel fails the rest still runs, since other ranks count on
 * this one's collectives, and the first error is returned; a failed collective ends it at once. Collective
 * over the groups of the part's collectives. */
int exec_run(struct exec *x, const struct exec_part *part, struct err *e);
/* 0, or what has gone wrong on the device: what was downloaded before is then worth nothing. Local. */
int exec_status(struct exec *x, struct err *e);
/* A collective has failed: the other ranks cannot be reached any more. */
bool exec_is_lost(const struct exec *x);
/* Bytes of the regions that this exec owns, for the comparison with the plan. */
int64_t exec_bytes(const struct exec *x);
/* Bytes of the one piece of memory that exec_create asks its device for, where regions of the set are
 * another's: a little more, since regions begin at pages. Local. */
int64_t exec_allocation(const struct prog *program, uint32_t shared_regions);
/* Seconds and nodes per operation since the last call, [OP_COUNT] each; counted only under `times` and
 * `trace` (which leaves communication out). */
void exec_take_times(struct exec *x, double *seconds, int64_t *nodes);

#endif
