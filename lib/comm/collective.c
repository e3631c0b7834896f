/* Collectives over messages. Parts go straight to the rank that owns them, and the owner adds them in rank
 * order: the sum of an element does not depend on timing, on the size of a call or on how it is cut up. */
#include "comm/link.h"
#include "base/err.h"
#include "base/mem.h"

#include <stdlib.h>
#include <string.h>

enum {
	TAG_PART = 1, /* a contribution to a reduction */
	TAG_RESULT,
	TAG_SCATTER,
	TAG_TREE,
	TAG_BARRIER,               /* + round */
	SMALL_REDUCE_BYTES = 4096, /* up to here everybody adds everything: one step instead of two */
	SMALL_BROADCAST_BYTES = 65536,
	DIRECT_BARRIER_RANKS = 32, /* up to here a hang names the culprit, not a rank that waits itself */
	SCRATCH_BYTES = 4 << 20,
	MIN_TILE_BYTES = 16 << 10,
	MAX_TILE_BYTES = 256 << 10,
};

/* Requests that are started together. */
struct batch {
	struct comm *c;
	const char *what;
	struct comm_request *r;
	size_t n;
};

/* Regions of the link's requests: four batches may be in flight, each of up to two messages a peer. */
static struct batch batch_of(struct comm *c, enum comm_kind kind, int region)
{
	return (struct batch){c, comm_kind_name[kind], c->link->request + (size_t)region * 2 * c->link->size,
	                      0};
}

static int batch_wait(struct batch *b, struct err *e)
{
	size_t n = b->n;
	b->n = 0;
	return n ? comm_wait_in(b->c, b->r, n, b->what, e) : 0;
}

/* Empty messages are not sent; both sides know. */
static int batch_send(struct batch *b, const void *data, size_t bytes, int peer, int tag, struct err *e)
{
	return bytes ? comm_post(b->c, &b->r[b->n++], true, (void *)(uintptr_t)data, bytes, peer, tag, e) : 0;
}

static int batch_recv(struct batch *b, void *data, size_t bytes, int peer, int tag, struct err *e)
{
	return bytes ? comm_post(b->c, &b->r[b->n++], false, data, bytes, peer, tag, e) : 0;
}

/* The peer that is `step` places on: everybody begins with another one, so no rank is stormed. */
static int peer_at(const struct comm *c, int step)
{
	return (c->rank + step) % c->size;
}

/* Byte offsets of parts, [size+1]; `which` is one of two tables of the link. */
static const size_t *offsets_of(struct comm *c, int which, const size_t *counts, size_t count,
                                enum dtype dtype)
{
	size_t *at = c->link->offset[which];
	at[0] = 0;
	for (int i = 0; i < c->size; i++)
		at[i + 1] = at[i] + (counts ? counts[i] : count) * dtype_rows[dtype].bytes;
	return at;
}

static size_t part_bytes(const size_t *at, int i)
{
	return at[i + 1] - at[i];
}

/* Unlike memcpy, for parts that may be their own place, or empty. */
static void copy_part(void *to, const void *from, size_t bytes)
{
	if (bytes && to != from)
		memcpy(to, from, bytes);
}

static void *scratch_of(struct link *l, size_t bytes)
{
	if (l->scratch_bytes < bytes) {
		free(l->scratch);
		l->scratch = mem_aligned(bytes);
		l->scratch_bytes = bytes;
	}
	return l->scratch;
}

/* ---- reductions ---- */

/* A reduction cut into tiles; two tiles may be in flight. */
struct reduction {
	struct comm *c;
	const struct reducer *reducer;
	enum comm_reduction op;
	size_t elem_bytes, tile_bytes, num_tiles;
	const size_t *at; /* byte offsets of parts */
	const char *send;
	char *acc, *slot[2]; /* slot: [size][tile_bytes] of contributions */
	struct batch sends[2], recvs[2];
};

/* An accumulator of one tile, and twice a tile of every rank. */
static size_t acc_bytes(size_t tile_bytes, enum dtype dtype)
{
	size_t elements = tile_bytes / dtype_rows[dtype].bytes;
	return (elements * reducers[dtype].acc_bytes + 63) / 64 * 64;
}

static size_t reduction_bytes(int size, size_t tile_bytes, enum dtype dtype)
{
	return acc_bytes(tile_bytes, dtype) + 2 * (size_t)size * tile_bytes;
}

static void reduction_begin(struct reduction *x, struct comm *c, const struct comm_call *call,
                            const size_t *at, size_t tile_bytes)
{
	*x = (struct reduction){.c = c,
	                        .reducer = &reducers[call->dtype],
	                        .op = call->op,
	                        .elem_bytes = dtype_rows[call->dtype].bytes,
	                        .tile_bytes = tile_bytes,
	                        .at = at,
	                        .send = call->send};
	size_t slots = (size_t)c->size * tile_bytes, most = 0;
	x->acc = scratch_of(c->link, reduction_bytes(c->size, tile_bytes, call->dtype));
	x->slot[0] = x->acc + acc_bytes(tile_bytes, call->dtype);
	x->slot[1] = x->slot[0] + slots;
	for (int i = 0; i < c->size; i++)
		most = part_bytes(at, i) > most ? part_bytes(at, i) : most;
	x->num_tiles = (most + tile_bytes - 1) / tile_bytes;
	for (int i = 0; i < 2; i++) {
		x->sends[i] = batch_of(c, call->kind, i);
		x->recvs[i] = x->sends[i];
		x->recvs[i].r += c->link->size;
	}
}

/* Bytes of tile t in the part of a rank, and where the tile begins in the whole. */
static size_t tile_of(const struct reduction *x, int rank, size_t t, size_t *begin)
{
	size_t part = part_bytes(x->at, rank), skip = t * x->tile_bytes;
	*begin = x->at[rank] + skip;
	return skip >= part ? 0 : part - skip < x->tile_bytes ? part - skip : x->tile_bytes;
}

static int exchange_parts(struct reduction *x, size_t t, struct err *e)
{
	struct comm *c = x->c;
	struct batch *sends = &x->sends[t & 1], *recvs = &x->recvs[t & 1];
	size_t begin, bytes = tile_of(x, c->rank, t, &begin);
	int rc = 0;
	for (int i = 0; i < c->size && !rc; i++)
		if (i != c->rank)
			rc = batch_recv(recvs, x->slot[t & 1] + i * x->tile_bytes, bytes, i, TAG_PART, e);
	for (int step = 1; step < c->size && !rc; step++) {
		int peer = peer_at(c, step);
		bytes = tile_of(x, peer, t, &begin);
		rc = batch_send(sends, x->send + begin, bytes, peer, TAG_PART, e);
	}
	return rc;
}

/* Adds the contributions in rank order, each when it has come, and writes the sum to dst. Afterwards nothing
 * of tile t is in flight, so the buffer it was sent from may change. */
static int sum_parts(struct reduction *x, size_t t, void *dst, struct err *e)
{
	struct batch *recvs = &x->recvs[t & 1];
	size_t begin, bytes = tile_of(x, x->c->rank, t, &begin), n = bytes / x->elem_bytes, next = 0;
	for (int i = 0; i < x->c->size && bytes; i++) {
		bool own = i == x->c->rank;
		int rc = own ? 0 : comm_wait_in(x->c, &recvs->r[next++], 1, recvs->what, e);
		if (rc)
			return rc;
		const void *part = own ? x->send + begin : x->slot[t & 1] + i * x->tile_bytes;
		if (i)
			x->reducer->fold[x->op](x->acc, part, n);
		else
			x->reducer->load(x->acc, part, n);
	}
	recvs->n = 0;
	int rc = batch_wait(&x->sends[t & 1], e);
	if (!rc && bytes)
		x->reducer->store(dst, x->acc, n);
	return rc;
}

static size_t tile_bytes_for(int size)
{
	size_t tile = SCRATCH_BYTES / (size_t)size;
	tile = tile < MIN_TILE_BYTES ? MIN_TILE_BYTES : tile > MAX_TILE_BYTES ? MAX_TILE_BYTES : tile;
	return tile / 64 * 64;
}

static int run_reduce_scatter(struct comm *c, const struct comm_call *call, struct err *e)
{
	struct reduction x;
	const size_t *at = offsets_of(c, 0, call->send_counts, call->count, call->dtype);
	reduction_begin(&x, c, call, at, tile_bytes_for(c->size));
	int rc = x.num_tiles ? exchange_parts(&x, 0, e) : 0;
	for (size_t t = 0; t < x.num_tiles && !rc; t++) {
		if (t + 1 < x.num_tiles)
			rc = exchange_parts(&x, t + 1, e);
		if (!rc)
			rc = sum_parts(&x, t, (char *)call->recv + t * x.tile_bytes, e);
	}
	return rc;
}

/* Tile t of every part, from its owner to all. */
static int exchange_results(struct reduction *x, struct batch *b, char *data, size_t t, struct err *e)
{
	struct comm *c = x->c;
	size_t begin, bytes;
	int rc = 0;
	for (int i = 0; i < c->size && !rc; i++) {
		bytes = tile_of(x, i, t, &begin);
		if (i != c->rank)
			rc = batch_recv(b, data + begin, bytes, i, TAG_RESULT, e);
	}
	bytes = tile_of(x, c->rank, t, &begin);
	for (int step = 1; step < c->size && !rc; step++)
		rc = batch_send(b, data + begin, bytes, peer_at(c, step), TAG_RESULT, e);
	return rc;
}

/* 0: too large for one step. */
static size_t small_tile(size_t bytes)
{
	return bytes <= SMALL_REDUCE_BYTES ? (bytes + 63) / 64 * 64 : 0;
}

size_t comm_all_reduce_bytes(int size, size_t count, enum dtype dtype)
{
	size_t tile = small_tile(count * dtype_rows[dtype].bytes);
	if (!count || size == 1)
		return 0;
	return mem_reserved(reduction_bytes(size, tile ? tile : tile_bytes_for(size), dtype));
}

size_t comm_reduce_scatter_bytes(int size, enum dtype dtype)
{
	return mem_reserved(reduction_bytes(size, tile_bytes_for(size), dtype));
}

size_t comm_scratch_bytes(const struct comm *c)
{
	return mem_reserved(c->link->scratch_bytes);
}

/* Every rank gets everything and adds it up: the order, and so the result, is that of the tiled way. */
static int reduce_small(struct comm *c, const struct comm_call *call, struct err *e)
{
	size_t bytes = call->count * dtype_rows[call->dtype].bytes;
	struct reduction x;
	size_t *at = c->link->offset[0];
	for (int i = 0; i <= c->size; i++) /* everything is rank i's part, for each i */
		at[i] = 0;
	reduction_begin(&x, c, call, at, small_tile(bytes));
	struct batch sends = x.sends[0], recvs = x.recvs[0];
	int rc = 0;
	for (int i = 0; i < c->size && !rc; i++)
		if (i != c->rank)
			rc = batch_recv(&recvs, x.slot[0] + i * x.tile_bytes, bytes, i, TAG_PART, e);
	for (int step = 1; step < c->size && !rc; step++)
		rc = batch_send(&sends, call->send, bytes, peer_at(c, step), TAG_PART, e);
	if (rc || (rc = batch_wait(&recvs, e)) || (rc = batch_wait(&sends, e)))
		return rc;
	for (int i = 0; i < c->size; i++) {
		const void *part = i == c->rank ? call->send : x.slot[0] + i * x.tile_bytes;
		if (i)
			x.reducer->fold[x.op](x.acc, part, call->count);
		else
			x.reducer->load(x.acc, part, call->count);
	}
	x.reducer->store(call->recv, x.acc, call->count);
	return 0;
}

static int run_all_reduce(struct comm *c, const struct comm_call *call, struct err *e)
{
	size_t elem_bytes = dtype_rows[call->dtype].bytes, each = call->count / c->size,
	       rest = call->count % c->size;
	if (!call->count || c->size == 1)
		return 0;
	if (small_tile(call->count * elem_bytes))
		return reduce_small(c, call, e);
	size_t *at = c->link->offset[0];
	for (int i = 0; i <= c->size; i++)
		at[i] = (each * i + ((size_t)i < rest ? (size_t)i : rest)) * elem_bytes;
	struct reduction x;
	reduction_begin(&x, c, call, at, tile_bytes_for(c->size));
	struct batch results[2] = {batch_of(c, call->kind, 2), batch_of(c, call->kind, 3)};
	char *data = call->recv;
	int rc = exchange_parts(&x, 0, e);
	for (size_t t = 0; t < x.num_tiles && !rc; t++) {
		size_t begin;
		tile_of(&x, c->rank, t, &begin);
		if (t + 1 < x.num_tiles)
			rc = exchange_parts(&x, t + 1, e);
		if (rc || (rc = sum_parts(&x, t, data + begin, e)) ||
		    (rc = exchange_results(&x, &results[t & 1], data, t, e)))
			break;
		rc = batch_wait(&results[(t + 1) & 1], e);
	}
	for (int i = 0; i < 2 && !rc; i++)
		rc = batch_wait(&results[i], e);
	return rc;
}

/* ---- copies ---- */

static int run_all_gather(struct comm *c, const struct comm_call *call, struct err *e)
{
	const size_t *at = offsets_of(c, 0, call->recv_counts, call->count, call->dtype);
	struct batch b = batch_of(c, call->kind, 0);
	char *recv = call->recv;
	int rc = 0;
	for (int i = 0; i < c->size && !rc; i++)
		if (i != c->rank)
			rc = batch_recv(&b, recv + at[i], part_bytes(at, i), i, TAG_RESULT, e);
	for (int step = 1; step < c->size && !rc; step++)
		rc = batch_send(&b, call->send, part_bytes(at, c->rank), peer_at(c, step), TAG_RESULT, e);
	copy_part(recv + at[c->rank], call->send, part_bytes(at, c->rank));
	return rc ? rc : batch_wait(&b, e);
}

static int run_all_to_all(struct comm *c, const struct comm_call *call, struct err *e)
{
	const size_t *from = offsets_of(c, 0, call->recv_counts, call->count, call->dtype);
	const size_t *to = offsets_of(c, 1, call->send_counts, call->count, call->dtype);
	struct batch b = batch_of(c, call->kind, 0);
	const char *send = call->send;
	char *recv = call->recv;
	int rc = 0;
	for (int i = 0; i < c->size && !rc; i++)
		if (i != c->rank)
			rc = batch_recv(&b, recv + from[i], part_bytes(from, i), i, TAG_RESULT, e);
	for (int step = 1; step < c->size && !rc; step++) {
		int peer = peer_at(c, step);
		rc = batch_send(&b, send + to[peer], part_bytes(to, peer), peer, TAG_RESULT, e);
	}
	if (!rc && part_bytes(from, c->rank) != part_bytes(to, c->rank))
		rc = err_set(e, EXIT_INTERNAL,
		             "all_to_all of group %s: rank %d sends itself %zu bytes and expects %zu",
		             c->name, c->link->rank, part_bytes(to, c->rank), part_bytes(from, c->rank));
	if (!rc)
		copy_part(recv + from[c->rank], send + to[c->rank], part_bytes(to, c->rank));
	return rc ? rc : batch_wait(&b, e);
}

/* Binomial tree, for few bytes: log2 n steps. */
static int broadcast_tree(struct comm *c, const struct comm_call *call, size_t bytes, struct err *e)
{
	int place = (c->rank - call->root + c->size) % c->size, bit = 1, rc = 0;
	struct batch b = batch_of(c, call->kind, 0);
	while (bit < c->size && !(place & bit))
		bit <<= 1;
	if (place) {
		rc = batch_recv(&b, call->recv, bytes, (place - bit + call->root) % c->size, TAG_TREE, e);
		rc = rc ? rc : batch_wait(&b, e);
	}
	for (bit >>= 1; bit && !rc; bit >>= 1)
		if (place + bit < c->size)
			rc = batch_send(&b, call->recv, bytes, (place + bit + call->root) % c->size, TAG_TREE,
			                e);
	return rc ? rc : batch_wait(&b, e);
}

/* Scatter, then all-gather among those who lack the rest, for many bytes: each byte leaves the root once. */
static int broadcast_scatter(struct comm *c, const struct comm_call *call, size_t bytes, struct err *e)
{
	size_t *at = c->link->offset[0];
	for (int i = 0; i <= c->size; i++)
		at[i] = bytes / c->size * i + (i == c->size ? bytes % c->size : 0);
	struct batch parts = batch_of(c, call->kind, 0), rest = batch_of(c, call->kind, 1);
	char *data = call->recv;
	bool is_root = c->rank == call->root;
	size_t mine = part_bytes(at, c->rank);
	int rc = is_root ? 0 : batch_recv(&parts, data + at[c->rank], mine, call->root, TAG_SCATTER, e);
	for (int i = 0; i < c->size && !rc && !is_root; i++)
		if (i != c->rank)
			rc = batch_recv(&rest, data + at[i], part_bytes(at, i), i, TAG_RESULT, e);
	for (int step = 1; step < c->size && !rc && is_root; step++) {
		int peer = peer_at(c, step);
		rc = batch_send(&parts, data + at[peer], part_bytes(at, peer), peer, TAG_SCATTER, e);
	}
	rc = rc ? rc : batch_wait(&parts, e);
	for (int step = 1; step < c->size && !rc; step++)
		if (peer_at(c, step) != call->root)
			rc = batch_send(&rest, data + at[c->rank], mine, peer_at(c, step), TAG_RESULT, e);
	return rc ? rc : batch_wait(&rest, e);
}

static int run_broadcast(struct comm *c, const struct comm_call *call, struct err *e)
{
	size_t bytes = call->count * dtype_rows[call->dtype].bytes;
	if (c->size == 1 || !bytes)
		return 0;
	return bytes <= SMALL_BROADCAST_BYTES || c->size == 2 ? broadcast_tree(c, call, bytes, e)
	                                                      : broadcast_scatter(c, call, bytes, e);
}

/* Dissemination: Hensgen, Finkel, Manber 1988. */
static int barrier_rounds(struct comm *c, struct err *e)
{
	char in, out = 1;
	int rc = 0;
	for (int distance = 1, round = 0; distance < c->size && !rc; distance *= 2, round++) {
		struct batch b = batch_of(c, COMM_barrier, 0);
		rc = batch_recv(&b, &in, 1, (c->rank - distance + c->size) % c->size, TAG_BARRIER + round, e);
		rc = rc ? rc : batch_send(&b, &out, 1, peer_at(c, distance), TAG_BARRIER + round, e);
		rc = rc ? rc : batch_wait(&b, e);
	}
	return rc;
}

static int run_barrier(struct comm *c, const struct comm_call *call, struct err *e)
{
	(void)call;
	int32_t here[DIRECT_BARRIER_RANKS];
	if (c->size > DIRECT_BARRIER_RANKS)
		return barrier_rounds(c, e);
	here[c->rank] = c->rank;
	const struct comm_call gather = {COMM_barrier, &here[c->rank], here, 1, .dtype = DT_i32};
	return run_all_gather(c, &gather, e);
}

const struct comm_ops comm_over_link = {
        .name = "link",
        .run =
                {
                        [COMM_all_reduce] = run_all_reduce,
                        [COMM_all_gather] = run_all_gather,
                        [COMM_reduce_scatter] = run_reduce_scatter,
                        [COMM_broadcast] = run_broadcast,
                        [COMM_all_to_all] = run_all_to_all,
                        [COMM_barrier] = run_barrier,
                },
};
