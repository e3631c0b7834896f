/* Inside the floor: what a way of meeting offers. One row a method, tried in order. Floor: comm. */
#ifndef PENTAD_COMM_BOOT_METHOD_H
#define PENTAD_COMM_BOOT_METHOD_H

#include "comm/boot.h"

#include <stdbool.h>

struct boot_method {
	const char *name;
	bool (*applies)(void); /* whether the environment says so */
	/* Fills rank, size, local_rank, local_size, node, num_nodes, host_name. EXIT_UNAVAILABLE. */
	int (*join)(struct boot *b, struct err *e);
	/* Tells all ranks `bytes` of data under a key; they can be had after the next fence. */
	int (*publish)(struct boot *b, const char *key, const void *data, size_t bytes, struct err *e);
	int (*fence)(struct boot *b, struct err *e);
	/* What `rank` published, as a copy for free(). */
	int (*fetch)(struct boot *b, int rank, const char *key, void **data, size_t *bytes, struct err *e);
	void (*leave)(struct boot *b);
	void (*abort)(struct boot *b, int code, const char *message); /* does not return */
};
extern const struct boot_method boot_pmix, boot_lone;

/* Bounds what runs between the two calls: after timeout_s the process says what it waited for and leaves with
 * EXIT_INTERNAL. */
void boot_watch(const char *what, double timeout_s);
void boot_unwatch(void);

#endif
