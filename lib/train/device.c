/* Which device a rank computes on, and with how many threads. */
#include "base/err.h"
#include "kernels/kernels.h"
#include "train/probe.h"
#include "train/run.h"

#include <sched.h>
#include <stdlib.h>

/* In order of preference for `auto`. */
static const struct backend *const devices[] = {&cpu_backend};

static int threads_of_rank(const struct config *c, int local_ranks)
{
	cpu_set_t set;
	if (c->dist.num_threads > 0)
		return (int)c->dist.num_threads;
	if (getenv("OMP_NUM_THREADS"))
		return 0; /* OpenMP has read it */
	int cores = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
	return cores > local_ranks ? cores / local_ranks : 1;
}

int run_open_device(const struct config *c, int local_ranks, const struct backend **backend,
                    struct stream **stream, struct err *e)
{
	if (c->dist.device == DEVICE_CUDA)
		return err_set(e, EXIT_UNAVAILABLE,
		               "dist.device: this build has no CUDA backend; allowed: auto, cpu");
	for (size_t i = 0; i < sizeof devices / sizeof *devices; i++) {
		if (devices[i]->probe(e))
			continue;
		*backend = devices[i];
		return devices[i]->open(stream, threads_of_rank(c, local_ranks), e);
	}
	return e->code;
}

int run_measure_device(const struct config *c, int local_ranks, double *flop_per_s, struct err *e)
{
	const struct backend *backend;
	struct stream *stream;
	int rc = run_open_device(c, local_ranks, &backend, &stream, e);
	if (rc)
		return rc;
	*flop_per_s = probe_matmul_peak(backend, stream, c->mixed_precision.precision == PRECISION_BF16);
	backend->close(stream);
	return 0;
}
