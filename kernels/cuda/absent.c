/* The CUDA device in a build without it: the same table, which says so. */
#include "base/err.h"
#include "kernels/kernels.h"

static int probe(struct err *e)
{
	return err_set(e, EXIT_UNAVAILABLE, "this program was built without CUDA");
}

static const char *describe(void)
{
	return "built without CUDA";
}

static int open_nothing(struct stream **s, const struct stream_options *options, struct err *e)
{
	(void)s, (void)options;
	return probe(e);
}

const struct backend cuda_backend = {
        .name = "cuda", .probe = probe, .describe = describe, .open = open_nothing};
