#include "kernels/cuda/lanes.h"
#include "base/mem.h"

#include <stdlib.h>

enum { LANES = 8, MARKS = 256, LANE_SHIFT = 56 };
static const uint64_t RECORDED = ((uint64_t)1 << LANE_SHIFT) - 1; /* the count of a ticket in a recording */

struct mark {
	cudaEvent_t done;
	const char *what, *group, *where;
};

struct lane {
	struct stream *owner;
	cudaStream_t stream;
	struct mark mark[MARKS]; /* of tickets in turn: a ticket that is overtaken waits for a later one */
	uint64_t marked;         /* tickets given */
	uint64_t ended;          /* those known to be done */
	uint64_t joined;         /* compute comes behind these */
	cudaEvent_t ready;       /* compute has come so far */
	struct mark recorded;    /* while recording */
	bool used;               /* in this recording */
	int number;
};

struct cuda_lanes {
	struct lane *lane[LANES];
	bool recording;
};

int cuda_lanes_open(struct stream *s, struct err *e)
{
	(void)e;
	s->lanes = mem_array(1, sizeof *s->lanes);
	return 0;
}

static void lane_free(struct lane *l)
{
	if (!l)
		return;
	for (int i = 0; i < MARKS; i++)
		if (l->mark[i].done)
			cudaEventDestroy(l->mark[i].done);
	if (l->recorded.done)
		cudaEventDestroy(l->recorded.done);
	if (l->ready)
		cudaEventDestroy(l->ready);
	if (l->stream)
		cudaStreamDestroy(l->stream);
	free(l);
}

void cuda_lanes_close(struct stream *s)
{
	for (int i = 0; s->lanes && i < LANES; i++)
		lane_free(s->lanes->lane[i]);
	free(s->lanes);
	s->lanes = NULL;
}

/* Communication goes first where both could run: others wait for it. */
static int lane_open(struct lane *l, struct err *e)
{
	int least = 0, greatest = 0;
	CUDA_TRY(e, cudaDeviceGetStreamPriorityRange(&least, &greatest));
	CUDA_TRY(e, cudaStreamCreateWithPriority(&l->stream, cudaStreamNonBlocking, greatest));
	CUDA_TRY(e, cudaEventCreateWithFlags(&l->ready, cudaEventDisableTiming));
	CUDA_TRY(e, cudaEventCreateWithFlags(&l->recorded.done, cudaEventDisableTiming));
	for (int i = 0; i < MARKS; i++)
		CUDA_TRY(e, cudaEventCreateWithFlags(&l->mark[i].done, cudaEventDisableTiming));
	return 0;
}

struct lane *lane_of(struct stream *s, int n, struct err *e)
{
	struct lane **at = &s->lanes->lane[n];
	ASSERT(n >= 0 && n < LANES);
	if (*at)
		return *at;
	struct lane *l = mem_array(1, sizeof *l);
	l->owner = s;
	l->number = n;
	if (lane_open(l, e)) {
		lane_free(l);
		return NULL;
	}
	return *at = l;
}

cudaStream_t lane_stream(const struct lane *l)
{
	return l->stream;
}

int lane_follow(struct lane *l, struct err *e)
{
	CUDA_TRY(e, cudaEventRecord(l->ready, l->owner->compute));
	CUDA_TRY(e, cudaStreamWaitEvent(l->stream, l->ready, 0));
	return 0;
}

int lane_mark(struct lane *l, const char *what, const char *group, const char *where, uint64_t *ticket,
              struct err *e)
{
	bool recording = l->owner->lanes->recording;
	struct mark *m = recording ? &l->recorded : &l->mark[(l->marked + 1) % MARKS];
	m->what = what;
	m->group = group;
	m->where = where;
	CUDA_TRY(e, cudaEventRecord(m->done, l->stream));
	l->used |= recording;
	l->marked += !recording;
	*ticket = (uint64_t)l->number << LANE_SHIFT | (recording ? RECORDED : l->marked);
	return 0;
}

/* A ticket of a recording means the newest mark of it; from its end on, where all is joined, nothing. */
int lanes_join(struct stream *s, uint64_t ticket, struct err *e)
{
	uint64_t count = ticket & RECORDED;
	struct lane *l = ticket ? s->lanes->lane[ticket >> LANE_SHIFT] : NULL;
	bool recorded = count == RECORDED, recording = s->lanes->recording;
	if (!l || (recorded ? !recording || !l->used : count <= l->joined))
		return 0;
	if (recording && !recorded)
		return err_set(e, EXIT_INTERNAL, "cuda: a recording waits for %s over %s, begun before it",
		               l->mark[count % MARKS].what, l->mark[count % MARKS].group);
	CUDA_TRY(e, cudaStreamWaitEvent(s->compute, recorded ? l->recorded.done : l->mark[count % MARKS].done,
	                                0));
	l->joined = recorded ? l->joined : count;
	return 0;
}

int lanes_gather(struct stream *s, struct err *e)
{
	struct lane *l = s->lanes->lane[0];
	if (!l)
		return 0;
	if (s->lanes->recording && l->used)
		CUDA_TRY(e, cudaStreamWaitEvent(s->compute, l->recorded.done, 0));
	if (!s->lanes->recording && l->marked > l->joined) {
		CUDA_TRY(e, cudaStreamWaitEvent(s->compute, l->mark[l->marked % MARKS].done, 0));
		l->joined = l->marked;
	}
	return 0;
}

void lanes_record(struct stream *s, bool on)
{
	s->lanes->recording = on;
	for (int i = 0; i < LANES; i++)
		if (s->lanes->lane[i])
			s->lanes->lane[i]->used = false;
}

static cudaError_t lane_query(struct lane *l)
{
	cudaError_t rc = cudaSuccess;
	if (l->marked > l->ended + MARKS)
		l->ended = l->marked - MARKS;
	while (l->ended < l->marked && rc == cudaSuccess) {
		rc = cudaEventQuery(l->mark[(l->ended + 1) % MARKS].done);
		l->ended += rc == cudaSuccess;
	}
	return rc;
}

cudaError_t lanes_query(struct stream *s)
{
	cudaError_t rc = cudaSuccess;
	for (int i = 0; i < LANES; i++) {
		cudaError_t here = s->lanes->lane[i] ? lane_query(s->lanes->lane[i]) : cudaSuccess;
		rc = here != cudaSuccess && (rc == cudaSuccess || rc == cudaErrorNotReady) ? here : rc;
	}
	return rc;
}

uint64_t lanes_progress(struct stream *s)
{
	uint64_t sum = 0;
	for (int i = 0; i < LANES; i++)
		sum += s->lanes->lane[i] ? s->lanes->lane[i]->ended : 0;
	return sum;
}

void lanes_report(struct stream *s, struct err *e)
{
	for (int i = 0; i < LANES; i++) {
		struct lane *l = s->lanes->lane[i];
		if (!l || l->ended == l->marked)
			continue;
		const struct mark *m = &l->mark[(l->ended + 1) % MARKS];
		err_add(e, EXIT_INTERNAL, "it waits in %s over %s (%s), %llu calls behind it", m->what,
		        m->group, m->where, (unsigned long long)(l->marked - l->ended - 1));
	}
}
