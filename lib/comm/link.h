/* Inside the floor: what a transport implements (messages), and what collectives are made of.
 *
 * A link is one rank's end of a transport. Collectives are written once, over messages (collective.c); a
 * transport that has its own fills another comm_ops table. Floor: comm. */
#ifndef PENTAD_COMM_LINK_H
#define PENTAD_COMM_LINK_H

#include "comm/comm.h"

/* name, what is counted */
#define COMM_KINDS(X)     \
	X(all_reduce)     \
	X(all_gather)     \
	X(reduce_scatter) \
	X(broadcast)      \
	X(all_to_all)     \
	X(barrier)
enum comm_kind {
#define COMM_KIND_ROW(name) COMM_##name,
	COMM_KINDS(COMM_KIND_ROW)
#undef COMM_KIND_ROW
	        COMM_KIND_COUNT
};
extern const char *const comm_kind_name[COMM_KIND_COUNT];

/* One collective as data. Where counts are NULL every part has `count` elements. */
struct comm_call {
	enum comm_kind kind;
	const void *send;
	void *recv;
	size_t count;
	const size_t *send_counts, *recv_counts; /* [size] */
	enum dtype dtype;
	enum comm_reduction op;
	int root;
};

typedef int comm_run_fn(struct comm *c, const struct comm_call *call, struct err *e);
struct comm_ops {
	const char *name;
	comm_run_fn *run[COMM_KIND_COUNT];
};
extern const struct comm_ops comm_over_link; /* collective.c */
extern const struct comm_ops comm_checked;   /* check.c: compares, then calls inner_ops */

/* Messages. The peer is a rank of the world; r->tag already tells group, sender and call apart. */
struct link_ops {
	const char *name;
	/* Start r; it is done when done() says so. */
	int (*send)(struct link *l, struct comm_request *r, int peer, struct err *e);
	int (*recv)(struct link *l, struct comm_request *r, int peer, struct err *e);
	/* true where r has ended; r->error is then 0, or a LINK_ value. */
	bool (*done)(struct link *l, struct comm_request *r);
	/* Makes progress, and gives the core away; returns within 100 ms. `round` counts calls without
	 * success. */
	void (*pause)(struct link *l, struct comm_request *r, unsigned round);
	/* Progress of whatever is under way, without waiting; false where there was none. NULL where messages
	 * need none. */
	bool (*progress)(struct link *l);
	/* After it the transport does not touch r or its buffer any more. */
	void (*cancel)(struct link *l, struct comm_request *r);
	/* Given the peers' cards. NULL where there is nothing to do. */
	int (*connect)(struct link *l, const struct boot *boot, struct err *e);
	/* Everything sent has left; nothing is received any more. `orderly` = all ranks close. */
	void (*close)(struct link *l, bool orderly);
};
enum { LINK_OK, LINK_SIZE_DIFFERS, LINK_LOST };

enum { LINK_TAG_BITS = 24, LINK_RANK_BITS = 24, LINK_MAX_CONTEXT = 0x7fff };

struct link {
	const struct link_ops *ops;
	int rank, size;    /* of the world */
	struct boot *boot; /* NULL where ranks are threads */
	double timeout_s;
	bool check, broken;
	uint32_t next_context;
	const void *address; /* for the card; NULL where there is none */
	size_t address_bytes;
	struct comm_request *request; /* [8·size] for collectives */
	size_t *offset[2];            /* [size+1] each: parts of a call */
	void *scratch;                /* for reductions; grows to what the largest call needs */
	size_t scratch_bytes;
};

/* One row a transport, in order of preference. */
struct transport {
	const char *name;
	/* 0, or EXIT_UNAVAILABLE with the reason; the same answer on every rank. Local. */
	int (*probe)(int world_size, struct err *e);
	/* boot has joined; peers are not known yet. Local. */
	int (*open)(struct link **out, struct boot *boot, const struct comm_options *options, struct err *e);
};
extern const struct transport transport_self, transport_ucx;

/* Fields that all transports share; the rest of *l is zero. */
void link_init(struct link *l, int rank, int size, const struct comm_options *o);
void link_free_common(struct link *l);
/* The comm of a new group; members (world ranks, ascending) are copied. */
struct comm *comm_new(struct link *l, const int *members, int size, uint32_t context, const char *name);

/* Messages of collectives: `tag` is below 256. r is the caller's. */
int comm_post(struct comm *c, struct comm_request *r, bool is_send, void *data, size_t bytes, int peer,
              int tag, struct err *e);
int comm_wait_in(struct comm *c, struct comm_request *r, size_t n, const char *what, struct err *e);

/* Reductions: an accumulator type for each element type. */
struct reducer {
	size_t acc_bytes; /* 0: the type cannot be reduced */
	void (*load)(void *acc, const void *x, size_t n);
	void (*fold[REDUCE_COUNT])(void *acc, const void *x, size_t n);
	void (*store)(void *x, const void *acc, size_t n);
};
extern const struct reducer reducers[DT_COUNT]; /* reduce.c */
extern const char *const reduction_name[REDUCE_COUNT];

/* thread.c */
int thread_links(int n, const struct comm_options *options, struct link **out, struct err *e);

#endif
