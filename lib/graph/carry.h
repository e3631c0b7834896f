/* How a collective of a program is carried out: by communicators on host memory, by groups on device memory.
 * Floor: graph. */
#ifndef PENTAD_GRAPH_CARRY_H
#define PENTAD_GRAPH_CARRY_H

#include "backend/backend.h"
#include "comm/queue.h"
#include "op/op.h"

struct carried { /* a job's `more`: the node's argument and tensors */
	const union op_arg *arg;
	struct tensor in, sizes, out; /* sizes: absent but for all_to_all */
};

typedef int carry_fn(const struct comm_job *job, struct err *e);
/* Of a COMM operation that is no ALIAS; job->count elements of job->out are to be filled, job->peer is
 * arg.comm.step. Collective over job->comm. */
carry_fn *carry_of(enum op op);

/* The same on the device: tells the group's lane of it. `comm` is the same group's on the host; `where` is
 * static. Collective over it. */
int carry_on_device(const struct backend *backend, struct stream *stream, const struct comm *comm,
                    struct group *group, enum op op, const struct carried *c, const char *where,
                    uint64_t *ticket, struct err *e);

/* Elements that go to each rank and come from each, [size]. `sizes` of c is host memory. EXIT_INTERNAL where
 * they do not fit into its tensors. Local. */
int carry_count_rows(const struct carried *c, const struct comm *comm, size_t *out, size_t *in,
                     struct err *e);

/* Ranks that may share experts: their parts are counted on the stack. */
enum { CARRY_MAX_RANKS = 4096 };

#endif
