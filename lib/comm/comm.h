/* Collectives and messages between the ranks of a group, over one of several transports.
 *
 * A `struct comm` is one rank's end of one group. Transports (a table, tried in order): `self` (one rank),
 * `thread` (ranks are threads of one process: tests), `ucx` (processes: shared memory on a node, InfiniBand
 * or TCP between nodes).
 *
 * Exactness: every reduction adds contributions in rank order 0, 1, …, n-1, element by element, whatever the
 * timing, the size or the transport, so it equals the serial loop bit for bit, on every rank, and all_reduce
 * equals reduce_scatter followed by all_gather. bf16 and f16 are accumulated in f32 and rounded once.
 *
 * Hangs: a wait that lasts longer than timeout_s ends with EXIT_INTERNAL and a sentence that says who waits
 * for whom, where, in which call. Where ranks are processes the job is then taken down (boot_abort), since
 * buffers may still be in flight. Time in which the process was stopped does not count.
 *
 * A rank calls from one thread at a time. Every rank of the group makes the same calls in the same order.
 * Counts are elements. Buffers are the caller's; send and receive buffers do not overlap unless said.
 * Floor: comm. */
#ifndef PENTAD_COMM_COMM_H
#define PENTAD_COMM_COMM_H

#include "comm/mesh.h"
#include "op/op.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct err;
struct boot;
struct boot_card;
struct link;
struct comm_ops;

enum comm_reduction { REDUCE_SUM, REDUCE_MAX, REDUCE_MIN, REDUCE_COUNT };

struct comm_options {
	const char *transport; /* a name, or NULL = the first that works */
	double timeout_s;      /* of one wait; 0 = 600 */
	bool check;            /* before each call, compare what all ranks of the group are about to call */
};

struct comm {
	int rank, size;    /* in this group */
	const char *name;  /* of the group, for messages */
	int *world_rank;   /* [size] rank in the world of each member, ascending */
	uint64_t sequence; /* collectives begun */
	/* The rest is the module's own. */
	const struct comm_ops *ops;
	const struct comm_ops *inner_ops; /* below a wrapper */
	struct link *link;                /* this rank's end of the transport, shared by all its groups */
	uint32_t context;                 /* tells messages of groups apart */
	bool is_world;
	char name_text[48];
};

/* Joins, opens the transport, exchanges cards, connects: *boot and *world are set on success. On failure
 * every rank has left already: `return boot_failed(NULL, &e)`. card->address is ignored. Collective over all.
 */
int comm_start(struct comm **world, struct boot **boot, const struct boot_card *card,
               const struct comm_options *options, struct err *e);
/* n ranks as threads of this process: fills world[n], one for each thread; each closes its own. Local. */
int comm_thread_world(int n, const struct comm_options *options, struct comm **world, struct err *e);
/* A world of one. Local. */
int comm_self(struct comm **world, struct err *e);
/* Closing the world waits for its members; close sub-groups before. NULL is allowed. Collective for the
 * world, local for sub-groups and after an error. */
void comm_close(struct comm *c);

/* Working memory of reductions: each needs some, the largest decides, and all groups of a rank share it. What
 * one over `size` ranks needs (count: elements of the whole), and what this rank holds now; what a transport
 * keeps inside is not counted. Local. */
size_t comm_all_reduce_bytes(int size, size_t count, enum dtype dtype);
size_t comm_reduce_scatter_bytes(int size, enum dtype dtype);
size_t comm_scratch_bytes(const struct comm *c);
/* Name of the transport, "ucx". */
const char *comm_transport(const struct comm *c);

/* Ranks of the same colour >= 0 form a group, ordered as in the parent; colour -1 gets *out = NULL. `name` is
 * copied. The caller closes *out. Collective over `parent`. */
int comm_split(struct comm *parent, struct comm **out, int colour, const char *name, struct err *e);
/* The group of this rank over mesh axes; `world` has mesh->world ranks. Collective over `world`. */
int comm_split_axes(struct comm *world, struct comm **out, const struct mesh *mesh, unsigned axes,
                    struct err *e);

/* data[i] becomes the reduction of all ranks' data[i]. Collective over c. */
int comm_all_reduce(struct comm *c, void *data, size_t count, enum dtype dtype, enum comm_reduction op,
                    struct err *e);
/* recv[size·count] = every rank's send[count], in rank order; send may be recv + rank·count. Collective over
 * c. */
int comm_all_gather(struct comm *c, const void *send, void *recv, size_t count, enum dtype dtype,
                    struct err *e);
/* recv[count] = the reduction of send[size·count]'s part `rank`; recv may be that part. Collective over c. */
int comm_reduce_scatter(struct comm *c, const void *send, void *recv, size_t count, enum dtype dtype,
                        enum comm_reduction op, struct err *e);
/* The same with counts[size] elements of each rank, packed in rank order; all ranks pass equal counts.
 * The part of a rank may be 0. Collective over c. */
int comm_all_gather_v(struct comm *c, const void *send, void *recv, const size_t *counts, enum dtype dtype,
                      struct err *e);
int comm_reduce_scatter_v(struct comm *c, const void *send, void *recv, const size_t *counts,
                          enum dtype dtype, enum comm_reduction op, struct err *e);
/* data of `root` to all. Collective over c. */
int comm_broadcast(struct comm *c, void *data, size_t count, enum dtype dtype, int root, struct err *e);
/* Part j of send[size·count] goes to rank j, part i of recv comes from rank i. Collective over c. */
int comm_all_to_all(struct comm *c, const void *send, void *recv, size_t count, enum dtype dtype,
                    struct err *e);
/* The same with send_counts[size] and recv_counts[size], packed in rank order; send_counts[j] here equals
 * recv_counts[here] on rank j. Collective over c. */
int comm_all_to_all_v(struct comm *c, const void *send, const size_t *send_counts, void *recv,
                      const size_t *recv_counts, enum dtype dtype, struct err *e);
/* Nobody leaves before the last one has come. Collective over c. */
int comm_barrier(struct comm *c, struct err *e);

/* The highest `code` of all ranks, so that one rank's failure becomes everybody's at the next point where
 * they meet. A rank whose own code was 0 gets a sentence naming the first rank with the highest code in *e;
 * a rank that failed keeps its own *e. Collective over c. */
int comm_any(struct comm *c, int code, struct err *e);

/* Messages. They match by (sender, tag), in order; sizes must agree (EXIT_INTERNAL). A send may wait until
 * the receiver asks for it: where two ranks send to each other, start both, then wait. Tags 0 … 2^24-1. */
struct comm_request {
	struct comm *comm;
	int peer; /* in comm */
	bool is_send, is_done;
	size_t bytes;
	void *data;
	uint64_t tag;
	/* The transport's own. */
	void *handle;
	struct comm_request *next;
	int error;
};
/* Start; *r must stay where it is, and the buffer untouched, until comm_wait. Local. */
int comm_isend(struct comm *c, const void *data, size_t count, enum dtype dtype, int peer, int tag,
               struct comm_request *r, struct err *e);
int comm_irecv(struct comm *c, void *data, size_t count, enum dtype dtype, int peer, int tag,
               struct comm_request *r, struct err *e);
/* Until all n requests of one comm are done. On error none is in flight any more, or the job is gone. Local.
 */
int comm_wait(struct comm_request *r, size_t n, struct err *e);
/* Lets messages that were begun go on: a large one over a network needs its sender's hand while it passes.
 * false where nothing moved. Local. */
bool comm_progress(struct comm *c);
/* true where a message has ended; comm_wait is due all the same. Local. */
bool comm_test(struct comm_request *r);
/* Start and wait. */
int comm_send(struct comm *c, const void *data, size_t count, enum dtype dtype, int peer, int tag,
              struct err *e);
int comm_recv(struct comm *c, void *data, size_t count, enum dtype dtype, int peer, int tag, struct err *e);

#endif
