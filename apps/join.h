/* The ranks of one command: they meet before any of them judges the configuration, so that a mistake is one
 * sentence and one exit code on all of them. */
#ifndef PENTAD_APPS_JOIN_H
#define PENTAD_APPS_JOIN_H

#include "apps/options.h"
#include "backend/backend.h"
#include "train/config.h"

struct comm;

struct joined {
	struct config config;
	struct comm *world;
	struct rank_on_host host;
	const char *why; /* the layout was chosen: lines for people (auto.h), or NULL */
};

struct join {
	const struct cli_config *layers;
	uint64_t salt;  /* of what else ranks have to agree on */
	bool unchecked; /* run calls config_check and auto_choose itself */
	int (*run)(struct joined *j, void *q, struct err *e);
	void *q;
};

/* Reads the files and sets, joins the world, checks the configuration for world->size ranks, chooses the
 * layout where it is open, runs, and leaves: the exit code of this process. request_code, *e: what is wrong
 * with the command line already, told once all have met. Collective over all ranks of the command. */
int join_and_run(const struct join *how, int request_code, struct err *e);
/* A sentence of this rank's own, not comm_any's "rank 3 failed: …". */
bool join_knows_the_cause(const struct err *e);

#endif
