/* pentad verify: does a layout train what one rank trains? Ranks are the processes that `pentad launch` or
 * srun started, or, started alone, threads of this one. */
#include "apps/commands.h"
#include "apps/join.h"
#include "base/err.h"
#include "base/hash.h"
#include "base/log.h"
#include "comm/comm.h"
#include "data/indexed.h"
#include "train/auto.h"
#include "train/run.h"
#include "train/verify.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_THREAD_RANKS = 1024 };
static const int64_t not_said = INT64_MIN;

struct request {
	struct cli_config layers;
	int64_t ranks, steps;
	double tolerance;
	bool help;
	struct config *config, reference;
};

static int check_words(const struct request *q, struct err *e)
{
	if (q->ranks != not_said && (q->ranks < 1 || q->ranks > MAX_THREAD_RANKS))
		return err_set(e, EXIT_USAGE, "-n: %lld ranks; allowed: 1 to %d", (long long)q->ranks,
		               MAX_THREAD_RANKS);
	if (q->steps < 1)
		return err_set(e, EXIT_USAGE, "--steps: %lld; allowed: 1 or more", (long long)q->steps);
	if (!(q->tolerance > 0))
		return err_set(e, EXIT_USAGE, "--tolerance: %g; allowed: above 0", q->tolerance);
	return 0;
}

/* The same configuration once more, for one rank. */
static int read_reference(struct request *q, struct err *e)
{
	struct config_source source = cli_config_source(&q->layers);
	int rc = config_load(&q->reference, &source, e);
	return rc ? rc : run_complete_config(&q->reference, e);
}

/* world: NULL where the ranks are threads that have not begun yet. */
static int check_configs(struct request *q, struct comm *world, int ranks, struct rank_on_host host,
                         struct err *e)
{
	const char *why = NULL;
	int rc = config_check(q->config, ranks, e);
	if (!rc)
		rc = auto_choose(q->config, world, ranks, host, &why, e);
	auto_say(why);
	return rc ? rc : verify_reference_config(&q->reference, q->config, e);
}

/* Ranks as threads */

struct rank {
	pthread_t thread;
	const struct request *request;
	struct comm *world;
	int code;
	struct err e;
};

static int verify_rank(const struct request *q, struct comm *world, struct rank_on_host host, struct err *e)
{
	struct verify_options how = {
	        .steps = q->steps, .tolerance = q->tolerance, .host = host, .out = stdout};
	return verify_run(q->config, &q->reference, world, &how, e);
}

static void *run_rank(void *argument)
{
	struct rank *r = argument;
	log_set_rank(r->world->rank, r->world->size);
	r->code = verify_rank(r->request, r->world, (struct rank_on_host){r->world->rank, r->world->size},
	                      &r->e);
	comm_close(r->world);
	return NULL;
}

/* Rank 0 says what it knows, and so does the rank where it went wrong. */
static void say_errors(const struct rank *rank, int n)
{
	for (int i = 0; i < n; i++) {
		log_set_rank(i, i ? n : 1);
		if (i ? join_knows_the_cause(&rank[i].e) && strcmp(rank[i].e.text, rank[0].e.text)
		      : rank[i].code)
			log_error("%s", rank[i].e.text);
	}
	log_set_rank(0, 1);
}

static int run_threads(const struct request *q, int n)
{
	struct err e = {0};
	struct comm_options options = {.timeout_s = (double)q->config->dist.timeout_s};
	struct comm **world = mem_array((size_t)n, sizeof(struct comm *));
	struct rank *rank = mem_array((size_t)n, sizeof *rank);
	int code = comm_thread_world(n, &options, world, &e);
	for (int i = 0; i < n && !code; i++) {
		rank[i] = (struct rank){.request = q, .world = world[i]};
		/* Those that have started would wait for this one for ever. */
		ASSERT(!pthread_create(&rank[i].thread, NULL, run_rank, &rank[i]));
	}
	for (int i = 0; i < n && !code; i++)
		pthread_join(rank[i].thread, NULL);
	for (int i = 0; i < n; i++)
		code = rank[i].code > code ? rank[i].code : code;
	if (e.code)
		log_error("%s", e.text);
	say_errors(rank, n);
	free(rank);
	free(world);
	return code;
}

/* Ranks, however they come */

static int verify_alone(struct request *q, struct err *e)
{
	int64_t n = q->ranks != not_said ? q->ranks : auto_smallest_world(q->config, MAX_THREAD_RANKS);
	if (n > MAX_THREAD_RANKS)
		return err_set(e, EXIT_USAGE,
		               "verify: the layout needs %lld ranks; threads of one process can be %d",
		               (long long)n, MAX_THREAD_RANKS);
	if (n == 1)
		log_warn("one rank against one rank: give -n N to verify data parallelism too");
	int rc = config_replace(q->config, "dist.num_threads", "1", "verify: ranks are threads", e);
	if (!rc)
		rc = check_configs(q, NULL, (int)n, (struct rank_on_host){0, (int)n}, e);
	return rc ? rc : run_threads(q, (int)n);
}

static int verify_together(struct request *q, const struct joined *j, struct err *e)
{
	if (q->ranks != not_said && q->ranks != j->world->size)
		return err_set(e, EXIT_USAGE, "-n %lld: launch or srun has started %d ranks; leave -n out",
		               (long long)q->ranks, j->world->size);
	int rc = check_configs(q, j->world, j->world->size, j->host, e);
	return rc ? rc : verify_rank(q, j->world, j->host, e);
}

static int verify(struct joined *j, void *argument, struct err *e)
{
	struct request *q = argument;
	q->config = &j->config;
	int rc = read_reference(q, e);
	indexed_guard_install();
	if (!rc)
		rc = j->world->size > 1 ? verify_together(q, j, e) : verify_alone(q, e);
	config_free(&q->reference);
	return rc;
}

int verify_main(int argc, char **argv)
{
	struct request q = {.ranks = not_said, .steps = 3, .tolerance = 1};
	struct err e = {0};
	struct cli_option options[] = {
	        CLI_CONFIG(&q.layers),
	        {"n", CLI_INT, &q.ranks, "N",
	         "ranks (the fewest that the layout needs); under launch or srun, theirs"},
	        {"steps", CLI_INT, &q.steps, "K", "steps to train (3)"},
	        {"tolerance", CLI_DOUBLE, &q.tolerance, "X", "multiplies every bound (1)"},
	};
	struct cli cli = {
	        .usage = "verify -c FILE [-c FILE…] [--set a.b=c…] [-n N] [--steps K] [--tolerance X]",
	        .doc = "Trains a few steps under the file's layout and on one rank; names the first tensor, "
	               "layer\n"
	               "and rank that differ. Exit 0: the same within rounding, 80: not.",
	        .example = "verify -c configs/quickstart.yaml -n 4",
	        .options = options,
	        .n = sizeof options / sizeof *options};
	int rc = cli_read(&cli, argc, argv, &q.help, &e);
	if (!rc && !q.help)
		rc = check_words(&q, &e);
	if (q.help) {
		struct buf b = {0};
		cli_help(&cli, &b);
		fputs(b.data, stdout);
		buf_free(&b);
	} else {
		uint64_t salt = hash_bytes(&q.tolerance, sizeof q.tolerance, (uint64_t)q.steps);
		struct join how = {&q.layers, .salt = salt, .unchecked = true, .run = verify, .q = &q};
		rc = join_and_run(&how, rc, &e);
	}
	cli_free(&cli);
	return rc;
}
