/* A part of a step, recorded once as a CUDA graph and launched as one. */
#include "kernels/cuda/lanes.h"
#include "base/mem.h"

#include <stdlib.h>

struct recording {
	cudaGraphExec_t graph;
};

/* What lane 0 is at must come before the recording: from within nothing outside can be waited for. */
static int begin(struct stream *s, struct err *e)
{
	int rc = lanes_gather(s, e);
	if (rc)
		return rc;
	CUDA_TRY(e, cudaStreamBeginCapture(s->compute, cudaStreamCaptureModeThreadLocal));
	lanes_record(s, true);
	return 0;
}

static void free_recording(struct recording *r)
{
	if (!r)
		return;
	cudaGraphExecDestroy(r->graph);
	free(r);
}

static int end(struct stream *s, struct recording **out, struct err *e)
{
	cudaGraph_t graph = NULL;
	cudaGraphExec_t ready = NULL;
	int gathered = lanes_gather(s, e);
	lanes_record(s, false);
	cudaError_t rc = cudaStreamEndCapture(s->compute, &graph);
	if (rc == cudaSuccess && !gathered)
		rc = cudaGraphInstantiate(&ready, graph, 0);
	if (graph)
		cudaGraphDestroy(graph);
	if (gathered)
		return gathered;
	CUDA_TRY(e, rc);
	*out = mem_array(1, sizeof **out);
	(*out)->graph = ready;
	return 0;
}

static int replay(struct stream *s, struct recording *r, struct err *e)
{
	int rc = lanes_gather(s, e);
	if (rc)
		return rc;
	CUDA_TRY(e, cudaGraphLaunch(r->graph, s->compute));
	return 0;
}

const struct recorder cuda_recorder = {begin, end, replay, free_recording};
