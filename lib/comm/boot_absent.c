/* A build without PMIx: the method is there, and says so where it would be needed. */
#include "base/err.h"
#include "comm/boot_method.h"

#include <stdlib.h>
#include <unistd.h>

static bool applies(void)
{
	const char *tasks = getenv("SLURM_STEP_NUM_TASKS");
	return getenv("PMIX_NAMESPACE") && (!tasks || atoi(tasks) > 1);
}

static int join(struct boot *b, struct err *e)
{
	(void)b;
	return err_set(e, EXIT_UNAVAILABLE,
	               "this build has no PMIx, so it trains on one rank alone; install libpmix-dev and "
	               "configure again");
}

static int publish(struct boot *b, const char *key, const void *data, size_t bytes, struct err *e)
{
	(void)key, (void)data, (void)bytes;
	return join(b, e);
}

static int fetch(struct boot *b, int rank, const char *key, void **data, size_t *bytes, struct err *e)
{
	(void)rank, (void)key, (void)data, (void)bytes;
	return join(b, e);
}

static void leave(struct boot *b)
{
	(void)b;
}

static void quit(struct boot *b, int code, const char *message)
{
	(void)b, (void)message;
	_exit(code);
}

const struct boot_method boot_pmix = {"pmix", applies, join, publish, join, fetch, leave, quit};
