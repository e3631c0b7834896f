/* A build without PMIx: nobody to serve ranks. */
#include "comm/host.h"
#include "base/err.h"

int host_start(struct host **out, int num_ranks, int event_fd, struct err *e)
{
	(void)out, (void)num_ranks, (void)event_fd;
	return err_set(e, EXIT_UNAVAILABLE,
	               "this pentad was built without PMIx, so it cannot start several ranks (configure "
	               "--with-pmix)");
}

int host_environment(struct host *h, int rank, char ***out, struct err *e)
{
	(void)h, (void)rank, (void)out;
	return err_set(e, EXIT_UNAVAILABLE, "built without PMIx");
}

void host_stop(struct host *h)
{
	(void)h;
}
