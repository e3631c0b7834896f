/* A device is a table: memory, copies, and one kernel per operation. Local. Floor: backend.
 *
 * A stream is an order of execution: what it is told is done in that order, perhaps later. Only `download`,
 * `wait`, `counts` and `status` wait until it is done. */
#ifndef PENTAD_BACKEND_BACKEND_H
#define PENTAD_BACKEND_BACKEND_H

#include "op/op.h"

#include <stdbool.h>

struct err;
struct stream;    /* the backend's own */
struct group;     /* a communicator between devices; the backend's own */
struct recording; /* what a stream was told between two calls, to be done again */

/* Reads in[0..n_in), writes out[0..n_out) (and what UPDATES allows). Tensors do not overlap, except where
 * the operation's row says IN_PLACE. Never allocates device memory. 0, or EXIT_* with a message in *e. */
typedef int kernel_fn(struct stream *s, const union op_arg *arg, const struct tensor *in,
                      const struct tensor *out, struct err *e);

struct kernel_call { /* a call by its shapes: tensors have no data, one that is absent has nd 0 */
	enum op op;
	const union op_arg *arg;
	const struct tensor *in, *out;
};

struct workspace { /* bytes of working memory of a stream's kernels, beside their tensors */
	int64_t expected, held;
};

struct rank_on_host { /* one of `ranks` ranks of this host */
	int rank, ranks;
};

struct stream_options {
	int num_threads;          /* 0 = OpenMP's default; devices with threads of their own ignore it */
	struct rank_on_host host; /* which of several devices it gets */
	bool share_device;        /* several ranks may use one */
	bool deterministic;       /* the same bits from every run, at some speed */
};
#define THREADS(n) (&(struct stream_options){.num_threads = (n), .host = {0, 1}})

/* Communication between the devices of ranks, on the devices' own memory and in the order of their streams.
 * Groups of a rank share a lane, a line of communication that runs beside its kernels; what goes through one
 * lane goes one after the other. */
#define GROUP_CALLS(X)    \
	X(all_reduce)     \
	X(all_gather)     \
	X(reduce_scatter) \
	X(all_to_all)     \
	X(shift)          \
	X(send)           \
	X(recv)
enum group_kind {
#define GROUP_ROW(name) GROUP_##name,
	GROUP_CALLS(GROUP_ROW)
#undef GROUP_ROW
	        GROUP_KIND_COUNT
};

struct group_call {
	enum group_kind kind;
	const void *send; /* device memory */
	void *recv;
	size_t count; /* elements: of the whole (all_reduce, shift, messages), or of one rank's part */
	enum dtype dtype;
	int peer; /* of a message: rank in the group; shift: to the rank so many places on */
	/* all_to_all: elements for and from each rank, packed in rank order; NULL: `count` each. Host memory,
	 * not needed after the call. */
	const size_t *send_counts, *recv_counts;
	const char *where; /* for the report of a hang; static storage */
};

struct group_table {
	const char *name; /* "nccl" */
	size_t id_bytes;  /* of what rank 0 makes and all ranks of a world are given */
	int (*make_id)(void *id, struct err *e);
	/* Opens the world; waits at most timeout_s for the others, also in later calls. Collective. */
	int (*open)(struct stream *s, struct group **world, const void *id, int rank, int size,
	            double timeout_s, struct err *e);
	/* Ranks with one colour >= 0 form a group, in their order in `from`; colour -1: *out is NULL. lane 0
	 * is that of the world; others are made as they are named. `name` is copied. Collective over `from`.
	 */
	int (*split)(struct group *from, struct group **out, int colour, int lane, const char *name,
	             struct err *e);
	/* NULL is allowed; the world last. Local after an error, collective otherwise. */
	void (*close)(struct group *g);
	/* Tells the group's lane of a call, behind everything that the stream has been told so far. *ticket
	 * is for `join`. Collective over the group. */
	int (*begin)(struct group *g, const struct group_call *call, uint64_t *ticket, struct err *e);
	/* What the stream is told from now on comes after the call is done. Ticket 0: nothing to wait for. */
	int (*join)(struct stream *s, uint64_t ticket, struct err *e);
};

/* What a stream is told once and does many times. */
struct recorder {
	int (*begin)(struct stream *s, struct err *e);
	/* Everything told since `begin`, which has not been done yet. */
	int (*end)(struct stream *s, struct recording **out, struct err *e);
	int (*replay)(struct stream *s, struct recording *r, struct err *e);
	void (*free)(struct recording *r);
};

struct backend {
	const char *name;
	/* 0 where the device can be used, else EXIT_UNAVAILABLE with the reason. */
	int (*probe)(struct err *e);
	/* What was chosen for this device, for the log: "avx512, oneDNN 2.6.3"; static storage. */
	const char *(*describe)(void);
	int (*open)(struct stream **s, const struct stream_options *options, struct err *e);
	void (*close)(struct stream *s);
	void *(*alloc)(struct stream *s, size_t bytes); /* zeroed; fatal where there is none */
	void (*free)(struct stream *s, void *p);
	/* The host's memory may be used again when it returns. */
	void (*upload)(struct stream *s, void *device, const void *host, size_t bytes);
	void (*download)(struct stream *s, void *host, const void *device, size_t bytes);
	void (*zero)(struct stream *s, void *device, size_t bytes);
	void (*wait)(struct stream *s);
	/* Tells the stream of a call that is to come (NULL: of none) and returns what its kernels will hold
	 * and what they hold now. From the first call told of they take no more than those told of need: to
	 * exceed it is our fault, and fatal. Allocates nothing itself. */
	struct workspace (*workspace)(struct stream *s, const struct kernel_call *coming);
	kernel_fn *const *kernel; /* [OP_COUNT]; COMM rows are NULL */
	/* The rest may be NULL. */
	/* Waits; 0, or what has gone wrong since the stream was opened: what was downloaded is then worth
	 * nothing. NULL: nothing can. */
	int (*status)(struct stream *s, struct err *e);
	/* A host copy of sizes[R,E] as the kernels so far have left them, valid until they change; NULL with
	 * a message in *e. NULL: the device's memory is the host's. */
	const int32_t *(*counts)(struct stream *s, const struct tensor *sizes, struct err *e);
	/* Flop/s of dense matrix products by the maker's data sheet; 0: not known. */
	double (*datasheet_peak)(struct stream *s, enum dtype dtype);
	/* Bytes of device memory that are free, and all that there are. */
	void (*memory)(struct stream *s, int64_t *free_bytes, int64_t *total_bytes);
	/* Host memory that its libraries keep resident where they are linked, used or not. */
	int64_t host_bytes;
	const struct group_table
	        *groups; /* NULL: communicators work on the device's memory, as on the host's */
	const struct recorder *recorder; /* NULL: nothing to gain */
};

#endif
