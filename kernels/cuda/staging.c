/* Uploads go through pinned memory, a few pieces in turn: the host goes on while they are on their way. */
#include "kernels/cuda/cuda.h"
#include "base/mem.h"

#include <stdlib.h>
#include <string.h>

enum { PIECES = 16 };
static const size_t piece_bytes = (size_t)2 << 20;

struct cuda_staging {
	char *memory; /* pinned, [PIECES][piece_bytes] */
	cudaEvent_t sent[PIECES];
	size_t next; /* piece */
};

int cuda_staging_open(struct stream *s, struct err *e)
{
	struct cuda_staging *g = s->staging = mem_array(1, sizeof *g);
	CUDA_TRY(e, cudaMallocHost((void **)&g->memory, PIECES * piece_bytes));
	for (int i = 0; i < PIECES; i++)
		CUDA_TRY(e, cudaEventCreateWithFlags(&g->sent[i], cudaEventDisableTiming));
	return 0;
}

void cuda_staging_close(struct stream *s)
{
	struct cuda_staging *g = s->staging;
	if (!g)
		return;
	for (int i = 0; i < PIECES; i++)
		if (g->sent[i])
			cudaEventDestroy(g->sent[i]);
	cudaFreeHost(g->memory);
	free(g);
	s->staging = NULL;
}

/* An event that was never recorded counts as done. */
static bool send_piece(struct stream *s, char *device, const char *host, size_t bytes)
{
	struct cuda_staging *g = s->staging;
	size_t i = g->next++ % PIECES;
	char *pinned = g->memory + i * piece_bytes;
	if (!cuda_kept(s, cudaEventSynchronize(g->sent[i]), "an upload"))
		return false;
	memcpy(pinned, host, bytes);
	return cuda_kept(s, cudaMemcpyAsync(device, pinned, bytes, cudaMemcpyHostToDevice, s->compute),
	                 "an upload") &&
	       cuda_kept(s, cudaEventRecord(g->sent[i], s->compute), "an upload");
}

void cuda_upload(struct stream *s, void *device, const void *host, size_t bytes)
{
	cuda_counts_forget(s, device, bytes);
	for (size_t at = 0; at < bytes && !s->failed.code; at += piece_bytes) {
		size_t n = bytes - at < piece_bytes ? bytes - at : piece_bytes;
		if (!send_piece(s, (char *)device + at, (const char *)host + at, n))
			return;
	}
}
