#include "test/ranks.h"
#include "base/err.h"
#include "base/mem.h"
#include "comm/comm.h"
#include "test/test.h"

#include <pthread.h>
#include <stdlib.h>

struct rank { /* one thread */
	pthread_t thread;
	int index;
	struct comm *world;
	rank_fn *body;
	void *shared;
};

static void *run(void *argument)
{
	struct rank *r = argument;
	r->body(r->index, r->world, r->shared);
	comm_close(r->world);
	return NULL;
}

bool ranks_run(int ranks, rank_fn *body, void *shared)
{
	struct err e = {0};
	struct comm **world = mem_array((size_t)ranks, sizeof(struct comm *));
	struct rank *rank = mem_array((size_t)ranks, sizeof *rank);
	bool good = ranks == 1 || !comm_thread_world(ranks, NULL, world, &e);
	for (int i = 0; i < ranks && good; i++) {
		rank[i] = (struct rank){.index = i, .world = world[i], .body = body, .shared = shared};
		ASSERT(!pthread_create(&rank[i].thread, NULL, run, &rank[i]));
	}
	for (int i = 0; i < ranks && good; i++)
		pthread_join(rank[i].thread, NULL);
	if (!good)
		test_failed(__FILE__, __LINE__, "%d ranks: %s", ranks, e.text);
	free(rank);
	free(world);
	return good;
}
