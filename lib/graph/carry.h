/* How a collective of a program is carried out on host memory. Floor: graph. */
#ifndef PENTAD_GRAPH_CARRY_H
#define PENTAD_GRAPH_CARRY_H

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

/* Ranks that may share experts: their parts are counted on the stack. */
enum { CARRY_MAX_RANKS = 4096 };

#endif
