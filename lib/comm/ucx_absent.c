/* A build without UCX: the transport is there, and says so. */
#include "base/err.h"
#include "comm/link.h"

static int probe(int world_size, struct err *e)
{
	(void)world_size;
	return err_set(e, EXIT_UNAVAILABLE, "this build has no UCX; install libucx-dev and configure again");
}

static int absent_open(struct link **out, struct boot *boot, const struct comm_options *options,
                       struct err *e)
{
	(void)out, (void)boot, (void)options;
	return probe(0, e);
}

const struct transport transport_ucx = {"ucx", probe, absent_open};
