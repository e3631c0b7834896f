/* Inside the floor: what a bootstrap method implements. Floor: comm. */
#ifndef PENTAD_COMM_BOOT_METHOD_H
#define PENTAD_COMM_BOOT_METHOD_H

#include "comm/boot.h"

#include <stdbool.h>

struct boot_method {
	const char *name;
	/* Whether the environment speaks of it. */
	bool (*present)(void);
	/* Sets rank, size and, where it is known, host_name. */
	int (*join)(struct boot *b, struct err *e);
	/* Makes `data` readable for all ranks after the next fence. */
	int (*publish)(struct boot *b, const char *key, const void *data, size_t bytes, struct err *e);
	int (*fence)(struct boot *b, const char *why, struct err *e);
	/* What `rank` published, copied; the caller frees *data. */
	int (*lookup)(struct boot *b, int rank, const char *key, void **data, size_t *bytes, struct err *e);
	void (*leave)(struct boot *b);
	/* Takes all ranks down; may return. */
	void (*abort)(struct boot *b, int code, const char *message);
};
extern const struct boot_method boot_pmix; /* boot_pmix.c or boot_pmix_absent.c */

/* A deadline around a call of somebody else's that may wait for ever: past it the process says so and leaves
 * with EXIT_INTERNAL. One at a time. `what` is kept until boot_guard_end. */
void boot_guard_begin(const struct boot *b, const char *what);
void boot_guard_end(void);

#endif
