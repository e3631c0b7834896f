/* Checks of collectives that every rank of a world runs together, whatever the transport. */
#ifndef PENTAD_TEST_COMM_CHECKS_H
#define PENTAD_TEST_COMM_CHECKS_H

#include "comm/comm.h"

struct comm_check {
	const char *name;
	/* 0, or 1 with the reason. Collective over world. */
	int (*run)(struct comm *world, char *why, size_t cap);
};
extern const struct comm_check comm_checks[];
extern const size_t comm_num_checks;

#endif
