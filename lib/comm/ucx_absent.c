/* Transport `ucx` in a build without OpenUCX: it says so. */
#include "comm/link.h"
#include "base/err.h"

static int ucx_probe(int world_size, struct err *e)
{
	(void)world_size;
	return err_set(e, EXIT_UNAVAILABLE, "this pentad was built without UCX (configure --with-ucx)");
}

static int ucx_open(struct link **out, struct boot *boot, const struct comm_options *options, struct err *e)
{
	(void)out;
	(void)boot;
	(void)options;
	return ucx_probe(0, e);
}

const struct transport transport_ucx = {"ucx", ucx_probe, ucx_open};
