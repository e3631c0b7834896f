/* Communication beside computation: a thread that carries out calls on communicators in the order they were
 * posted, as a communication stream of a device does.
 *
 * Where a rank has a queue, all its communication goes through it, or happens while it is empty
 * (comm_queue_wait): a rank still calls from one thread at a time, and every rank of a group still makes the
 * same calls in the same order. Without a queue (NULL) a posted call is carried out at once. Local. Floor:
 * comm. */
#ifndef PENTAD_COMM_QUEUE_H
#define PENTAD_COMM_QUEUE_H

#include "comm/comm.h"

struct comm_queue;

struct comm_job { /* run(job) is called by the queue's thread; the buffers stay untouched until it is done */
	int (*run)(const struct comm_job *job, struct err *e);
	struct comm *comm;
	const void *in;
	void *out;
	size_t count; /* elements of out, or as run says */
	enum dtype dtype;
	int peer, tag;
	struct comm_request *request;
	const void *more; /* whatever else run wants; it outlives the job */
};

int comm_queue_open(struct comm_queue **q, struct err *e);
void comm_queue_close(struct comm_queue *q); /* NULL is allowed; waits for what was posted */
/* While there is nothing else to do, the thread lets the messages of c that were begun go on, until
 * `request`, which a posted job begins, is done; NULL: no longer, and when it returns the thread calls
 * nothing. */
void comm_queue_tend(struct comm_queue *q, struct comm *c, struct comm_request *request);
/* Returns the ticket of the job, or 0 where q is NULL: then it has run, with *rc and *e. */
uint64_t comm_queue_post(struct comm_queue *q, const struct comm_job *job, int *rc, struct err *e);
/* Until the job and all before it are done; the first error of any of them, again on every later call:
 * nothing is carried out behind an error. UINT64_MAX waits for all. */
int comm_queue_wait(struct comm_queue *q, uint64_t ticket, struct err *e);

#endif
