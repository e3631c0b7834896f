/* Which device a rank computes on, and with how many threads. */
#include "base/err.h"
#include "kernels/kernels.h"
#include "train/probe.h"
#include "train/program.h"
#include "train/run.h"

#include <sched.h>
#include <stdlib.h>

/* In order of preference for `auto`. */
static const struct {
	const struct backend *backend;
	enum device_choice name;
} devices[] = {{&cuda_backend, DEVICE_CUDA}, {&cpu_backend, DEVICE_CPU}};

static int threads_of_rank(const struct config *c, int ranks)
{
	cpu_set_t set;
	if (c->dist.num_threads > 0)
		return (int)c->dist.num_threads;
	if (getenv("OMP_NUM_THREADS"))
		return 0; /* OpenMP has read it */
	int cores = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
	return cores > ranks ? cores / ranks : 1;
}

int run_open_device(const struct config *c, struct rank_on_host host, const struct backend **backend,
                    struct stream **stream, struct err *e)
{
	struct stream_options options = {.num_threads = threads_of_rank(c, host.ranks),
	                                 .host = host,
	                                 .share_device = c->dist.share_device,
	                                 .deterministic = c->dist.deterministic};
	for (size_t i = 0; i < sizeof devices / sizeof *devices; i++) {
		bool named = c->dist.device == devices[i].name;
		if (!named && c->dist.device != DEVICE_AUTO)
			continue;
		struct err why = {0};
		if (!devices[i].backend->probe(&why)) {
			*backend = devices[i].backend;
			return devices[i].backend->open(stream, &options, e);
		}
		if (named)
			return err_set(e, why.code, "dist.device: %s; allowed here: auto, cpu", why.text);
	}
	return err_set(e, EXIT_UNAVAILABLE, "dist.device: no device can be used");
}

int run_measure_device(const struct config *c, struct rank_on_host host, double *flop_per_s, struct err *e)
{
	const struct backend *backend;
	struct stream *stream;
	int rc = run_open_device(c, host, &backend, &stream, e);
	if (rc)
		return rc;
	*flop_per_s = probe_matmul_peak(backend, stream, program_dtype(c));
	backend->close(stream);
	return 0;
}
