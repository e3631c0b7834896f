/* A device is a table: memory, copies, and one kernel per operation. Local. Floor: backend. */
#ifndef PENTAD_BACKEND_BACKEND_H
#define PENTAD_BACKEND_BACKEND_H

#include "op/op.h"

struct err;
struct stream; /* an order of execution on one device; the backend's own */

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

struct backend {
	const char *name;
	/* 0 where the device can be used, else EXIT_UNAVAILABLE with the reason. */
	int (*probe)(struct err *e);
	/* What was chosen for this device, for the log: "avx512, oneDNN 2.6.3"; static storage. */
	const char *(*describe)(void);
	int (*open)(struct stream **s, int num_threads, struct err *e); /* num_threads 0 = OpenMP's default */
	void (*close)(struct stream *s);
	void *(*alloc)(struct stream *s, size_t bytes); /* zeroed; fatal where there is none */
	void (*free)(struct stream *s, void *p);
	void (*upload)(struct stream *s, void *device, const void *host, size_t bytes);
	void (*download)(struct stream *s, void *host, const void *device, size_t bytes);
	void (*zero)(struct stream *s, void *device, size_t bytes);
	void (*wait)(struct stream *s);
	/* Tells the stream of a call that is to come (NULL: of none) and returns what its kernels will hold
	 * and what they hold now. From the first call told of they take no more than those told of need: to
	 * exceed it is our fault, and fatal. Allocates nothing itself. */
	struct workspace (*workspace)(struct stream *s, const struct kernel_call *coming);
	kernel_fn *const *kernel; /* [OP_COUNT]; COMM rows are NULL */
};

#endif
