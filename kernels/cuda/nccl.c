/* Groups of devices over NCCL.
 *
 * Communicators are opened without blocking, so that a rank that never comes is noticed by our own clock
 * (NCCL has none), and closed by ncclCommAbort after a fault: ncclCommDestroy could wait for ever. */
#include "kernels/cuda/lanes.h"
#include "base/clock.h"
#include "base/mem.h"

#include <nccl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#if NCCL_VERSION_CODE < NCCL_VERSION(2, 18, 0)
#error "NCCL 2.18 or newer is needed: ncclCommSplit"
#endif

struct group {
	struct stream *owner;
	struct lane *lane;
	ncclComm_t comm;
	struct group *next; /* of the stream's list, the world first */
	int rank, size;
	double timeout_s; /* the world's */
	char name[48];
};

static const struct {
	ncclDataType_t type;
	bool known;
} types[DT_COUNT] = {
        [DT_f32] = {ncclFloat32, true}, [DT_bf16] = {ncclBfloat16, true}, [DT_f16] = {ncclFloat16, true},
        [DT_f64] = {ncclFloat64, true}, [DT_i32] = {ncclInt32, true},     [DT_i64] = {ncclInt64, true}};

static int failed(const struct group *g, ncclResult_t rc, const char *what, struct err *e)
{
	return err_set(e, EXIT_INTERNAL, "nccl: %s over %s (%d ranks): %s; %s", what, g->name, g->size,
	               ncclGetErrorString(rc), ncclGetLastError(NULL));
}

static void nap(void)
{
	nanosleep(&(struct timespec){.tv_nsec = 200000}, NULL);
}

/* Until a call that was begun is through the host's part, or the others have been waited for too long. */
static int finish(const struct group *g, ncclResult_t rc, const char *what, struct err *e)
{
	double begin = clock_now_s();
	while (rc == ncclInProgress && g->comm) {
		ncclResult_t asked = ncclCommGetAsyncError(g->comm, &rc);
		if (asked != ncclSuccess)
			rc = asked;
		if (rc != ncclInProgress)
			break;
		if (clock_now_s() - begin > g->timeout_s)
			return err_set(e, EXIT_INTERNAL,
			               "nccl: %s over %s: the other ranks have not come for %.0f s", what,
			               g->name, g->timeout_s);
		nap();
	}
	return rc == ncclSuccess ? 0 : failed(g, rc, what, e);
}

/* Between such ranks only sockets work, and few blocks of each rank fit beside the others'. */
void cuda_share_device(const struct rank_on_host *host)
{
	char id[64];
	snprintf(id, sizeof id, "rank-%d-of-%d", host->rank, host->ranks);
	setenv("NCCL_HOSTID", id, 0);
	setenv("NCCL_NET", "Socket", 0);
	setenv("NCCL_MNNVL_ENABLE", "0", 0);
	setenv("NCCL_NVLS_ENABLE", "0", 0);
	setenv("NCCL_MAX_CTAS", "2", 0);
}

static int make_id(void *id, struct err *e)
{
	/* NCCL would open a port that other users of the host can reach; who wants it says so. */
	setenv("NCCL_RAS_ENABLE", "0", 0);
	ncclResult_t rc = ncclGetUniqueId(id);
	return rc == ncclSuccess ? 0
	                         : err_set(e, EXIT_UNAVAILABLE, "nccl: no id for the ranks: %s",
	                                   ncclGetErrorString(rc));
}

static ncclConfig_t config(void)
{
	ncclConfig_t c = NCCL_CONFIG_INITIALIZER;
	c.blocking = 0;
	c.splitShare = 1;
	return c;
}

static struct group *group_new(struct stream *s, const char *name, int rank, int size, double timeout_s)
{
	struct group *g = mem_array(1, sizeof *g);
	g->owner = s;
	g->rank = rank;
	g->size = size;
	g->timeout_s = timeout_s;
	snprintf(g->name, sizeof g->name, "%s", name);
	return g;
}

static void unlist(struct group *g)
{
	for (struct group **at = &g->owner->world; *at; at = &(*at)->next)
		if (*at == g) {
			*at = g->next;
			return;
		}
}

static bool ends_well(const struct group *g)
{
	struct err ignored;
	return !g->owner->failed.code && !finish(g, ncclCommFinalize(g->comm), "closing", &ignored) &&
	       ncclCommDestroy(g->comm) == ncclSuccess;
}

static void close_group(struct group *g)
{
	if (!g)
		return;
	if (g->comm && !ends_well(g))
		ncclCommAbort(g->comm);
	unlist(g);
	free(g);
}

static int open_world(struct stream *s, struct group **world, const void *id, int rank, int size,
                      double timeout_s, struct err *e)
{
	setenv("NCCL_RAS_ENABLE", "0", 0);
	struct group *g = group_new(s, "world", rank, size, timeout_s);
	ncclConfig_t how = config();
	ncclUniqueId unique;
	memcpy(&unique, id, sizeof unique);
	int rc = (g->lane = lane_of(s, 0, e)) ? 0 : e->code;
	if (!rc)
		rc = finish(g, ncclCommInitRankConfig(&g->comm, size, unique, rank, &how), "the start", e);
	if (rc) {
		if (g->comm)
			ncclCommAbort(g->comm);
		free(g);
		return rc;
	}
	s->world = *world = g;
	return 0;
}

static int split(struct group *from, struct group **out, int colour, int lane, const char *name,
                 struct err *e)
{
	struct group *g = group_new(from->owner, name, 0, 0, from->timeout_s);
	ncclConfig_t how = config();
	ncclResult_t began = ncclCommSplit(from->comm, colour < 0 ? NCCL_SPLIT_NOCOLOR : colour, from->rank,
	                                   &g->comm, &how);
	int rc = finish(from, began, "a split", e);
	*out = NULL;
	if (!rc && colour >= 0) {
		rc = finish(g, ncclInProgress, "a split", e);
		if (!rc && (ncclCommUserRank(g->comm, &g->rank) != ncclSuccess ||
		            ncclCommCount(g->comm, &g->size) != ncclSuccess))
			rc = err_set(e, EXIT_INTERNAL, "nccl: the group %s does not know its ranks", name);
		if (!rc)
			rc = (g->lane = lane_of(g->owner, lane, e)) ? 0 : e->code;
	}
	if (rc || colour < 0) {
		if (g->comm)
			ncclCommAbort(g->comm);
		free(g);
		return rc;
	}
	g->next = g->owner->world->next;
	g->owner->world->next = g;
	*out = g;
	return 0;
}

/* The calls */

static ncclResult_t call_all_reduce(struct group *g, const struct group_call *c, ncclDataType_t t)
{
	return ncclAllReduce(c->send, c->recv, c->count, t, ncclSum, g->comm, lane_stream(g->lane));
}

static ncclResult_t call_all_gather(struct group *g, const struct group_call *c, ncclDataType_t t)
{
	return ncclAllGather(c->send, c->recv, c->count, t, g->comm, lane_stream(g->lane));
}

static ncclResult_t call_reduce_scatter(struct group *g, const struct group_call *c, ncclDataType_t t)
{
	return ncclReduceScatter(c->send, c->recv, c->count, t, ncclSum, g->comm, lane_stream(g->lane));
}

static ncclResult_t call_send(struct group *g, const struct group_call *c, ncclDataType_t t)
{
	return ncclSend(c->send, c->count, t, c->peer, g->comm, lane_stream(g->lane));
}

static ncclResult_t call_recv(struct group *g, const struct group_call *c, ncclDataType_t t)
{
	return ncclRecv(c->recv, c->count, t, c->peer, g->comm, lane_stream(g->lane));
}

/* The first refusal, or what the end of the group says. */
static ncclResult_t end_group(ncclResult_t rc)
{
	ncclResult_t ended = ncclGroupEnd();
	return rc == ncclSuccess || rc == ncclInProgress ? ended : rc;
}

static ncclResult_t worse(ncclResult_t a, ncclResult_t b)
{
	return a == ncclSuccess || a == ncclInProgress ? b : a;
}

static ncclResult_t call_shift(struct group *g, const struct group_call *c, ncclDataType_t t)
{
	int step = (c->peer % g->size + g->size) % g->size;
	int to = (g->rank + step) % g->size, from = (g->rank - step + g->size) % g->size;
	ncclResult_t rc = ncclGroupStart();
	rc = worse(rc, ncclSend(c->send, c->count, t, to, g->comm, lane_stream(g->lane)));
	rc = worse(rc, ncclRecv(c->recv, c->count, t, from, g->comm, lane_stream(g->lane)));
	return end_group(rc);
}

/* Empty parts are left out on both sides: the counts agree. */
static ncclResult_t call_all_to_all(struct group *g, const struct group_call *c, ncclDataType_t t)
{
	size_t each = dtype_rows[c->dtype].bytes, sent = 0, received = 0;
	ncclResult_t rc = ncclGroupStart();
	for (int r = 0; r < g->size; r++) {
		size_t out = c->send_counts ? c->send_counts[r] : c->count;
		size_t in = c->recv_counts ? c->recv_counts[r] : c->count;
		if (out)
			rc = worse(rc, ncclSend((const char *)c->send + sent * each, out, t, r, g->comm,
			                        lane_stream(g->lane)));
		if (in)
			rc = worse(rc, ncclRecv((char *)c->recv + received * each, in, t, r, g->comm,
			                        lane_stream(g->lane)));
		sent += out;
		received += in;
	}
	return end_group(rc);
}

static const struct {
	const char *name;
	ncclResult_t (*run)(struct group *g, const struct group_call *c, ncclDataType_t t);
} calls[GROUP_KIND_COUNT] = {
#define GROUP_ROW(name) {#name, call_##name},
        GROUP_CALLS(GROUP_ROW)
#undef GROUP_ROW
};

static int begin(struct group *g, const struct group_call *c, uint64_t *ticket, struct err *e)
{
	if (!types[c->dtype].known)
		return err_set(e, EXIT_INTERNAL,
		               "nccl: %s of %s over %s; allowed: f32, bf16, f16, f64, i32, i64",
		               calls[c->kind].name, dtype_rows[c->dtype].name, g->name);
	int rc = lane_follow(g->lane, e);
	if (!rc)
		rc = finish(g, calls[c->kind].run(g, c, types[c->dtype].type), calls[c->kind].name, e);
	return rc ? rc : lane_mark(g->lane, calls[c->kind].name, g->name, c->where, ticket, e);
}

const struct group_table cuda_groups = {.name = "nccl",
                                        .id_bytes = sizeof(ncclUniqueId),
                                        .make_id = make_id,
                                        .open = open_world,
                                        .split = split,
                                        .close = close_group,
                                        .begin = begin,
                                        .join = lanes_join};

/* Waiting */

static int communicators_are_well(struct stream *s, struct err *e)
{
	for (struct group *g = s->world; g; g = g->next) {
		ncclResult_t state = ncclSuccess, rc = ncclCommGetAsyncError(g->comm, &state);
		rc = rc == ncclSuccess ? state : rc;
		if (rc != ncclSuccess && rc != ncclInProgress)
			return failed(g, rc, "communication", e);
	}
	return 0;
}

static int hung(struct stream *s, double silent_s, struct err *e)
{
	err_set(e, EXIT_INTERNAL, "cuda: nothing has moved on rank %d's device for %.0f s", s->world->rank,
	        silent_s);
	lanes_report(s, e);
	return e->code;
}

/* With ranks beside this one a wait may never end: the clock is ours. */
static int settle_watched(struct stream *s, struct err *e)
{
	double moved_at = clock_now_s();
	uint64_t seen = lanes_progress(s);
	for (unsigned round = 0;; round++) {
		cudaError_t lanes = lanes_query(s), compute = cudaStreamQuery(s->compute);
		if (lanes != cudaSuccess && lanes != cudaErrorNotReady)
			return cuda_failed(e, lanes, "communication");
		if (compute != cudaSuccess && compute != cudaErrorNotReady)
			return cuda_failed(e, compute, "kernels");
		if (lanes == cudaSuccess && compute == cudaSuccess)
			return 0;
		if (lanes_progress(s) != seen) {
			seen = lanes_progress(s);
			moved_at = clock_now_s();
		}
		if (round % 64 == 63) {
			double silent = clock_now_s() - moved_at;
			if (communicators_are_well(s, e))
				return e->code;
			if (silent > s->world->timeout_s)
				return hung(s, silent, e);
			nap();
		}
	}
}

int cuda_settle(struct stream *s, struct err *e)
{
	struct err here;
	if (!s->failed.code && !s->world)
		cuda_kept(s, cudaStreamSynchronize(s->compute), "kernels");
	if (!s->failed.code && s->world && settle_watched(s, &here)) {
		s->failed = here;
		/* Peers that wait in these communicators learn of it by their own clocks; kernels that spin
		 * here must end, or nothing on this device ever does. */
		for (struct group *g = s->world; g; g = g->next) {
			ncclCommAbort(g->comm);
			g->comm = NULL;
		}
	}
	if (s->failed.code)
		*e = s->failed;
	return s->failed.code;
}
