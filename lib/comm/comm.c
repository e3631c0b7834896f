#include "comm/comm.h"
#include "comm/boot.h"
#include "comm/link.h"
#include "base/clock.h"
#include "base/err.h"
#include "base/mem.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *const comm_kind_name[COMM_KIND_COUNT] = {
#define COMM_KIND_ROW(name) #name,
        COMM_KINDS(COMM_KIND_ROW)
#undef COMM_KIND_ROW
};

/* ---- links and groups ---- */

void link_init(struct link *l, int rank, int size, const struct comm_options *o)
{
	l->rank = rank;
	l->size = size;
	l->timeout_s = o && o->timeout_s > 0 ? o->timeout_s : 600;
	l->check = o && o->check;
	l->request = mem_array(8 * (size_t)size, sizeof *l->request);
	for (int i = 0; i < 2; i++)
		l->offset[i] = mem_array((size_t)size + 1, sizeof *l->offset[i]);
}

void link_free_common(struct link *l)
{
	free(l->request);
	free(l->offset[0]);
	free(l->offset[1]);
	free(l->scratch);
}

struct comm *comm_new(struct link *l, const int *members, int size, uint32_t context, const char *name)
{
	struct comm *c = mem_array(1, sizeof *c);
	c->size = size;
	c->world_rank = mem_array(size, sizeof *c->world_rank);
	memcpy(c->world_rank, members, size * sizeof *members);
	for (int i = 0; i < size; i++)
		if (members[i] == l->rank)
			c->rank = i;
	c->ops = l->check ? &comm_checked : &comm_over_link;
	c->inner_ops = &comm_over_link;
	c->link = l;
	c->context = context;
	snprintf(c->name_text, sizeof c->name_text, "%s", name);
	c->name = c->name_text;
	return c;
}

/* The group of all; link fields that depend on it. */
static struct comm *world_new(struct link *l)
{
	int *members = mem_array(l->size, sizeof *members);
	for (int i = 0; i < l->size; i++)
		members[i] = i;
	struct comm *c = comm_new(l, members, l->size, 0, "world");
	c->is_world = true;
	l->next_context = 1;
	free(members);
	return c;
}

void comm_close(struct comm *c)
{
	if (!c)
		return;
	if (c->is_world) {
		struct err e;
		bool orderly = !c->link->broken && !comm_barrier(c, &e);
		c->link->ops->close(c->link, orderly);
	}
	free(c->world_rank);
	free(c);
}

const char *comm_transport(const struct comm *c)
{
	return c->link->ops->name;
}

int comm_thread_world(int n, const struct comm_options *options, struct comm **world, struct err *e)
{
	struct link **links = mem_array(n, sizeof *links);
	int rc = thread_links(n, options, links, e);
	for (int i = 0; !rc && i < n; i++)
		world[i] = world_new(links[i]);
	free(links);
	return rc;
}

int comm_self(struct comm **world, struct err *e)
{
	return comm_thread_world(1, NULL, world, e);
}

static const struct transport *const transports[] = {&transport_self, &transport_ucx};
enum { N_TRANSPORTS = sizeof transports / sizeof *transports };

/* The first row that works, or the one that was asked for. The reasons of all that do not are in *e. */
static int transport_choose(const struct transport **out, const char *wanted, int size, struct err *e)
{
	struct err reasons = {0};
	bool known = !wanted;
	for (size_t i = 0; i < N_TRANSPORTS; i++) {
		if (wanted && strcmp(wanted, transports[i]->name))
			continue;
		known = true;
		struct err why = {0};
		if (!transports[i]->probe(size, &why)) {
			*out = transports[i];
			return 0;
		}
		err_add(&reasons, EXIT_UNAVAILABLE, "no transport '%s': %s", transports[i]->name, why.text);
	}
	if (!known)
		return err_set(e, EXIT_CONFIG, "dist.transport: '%s' is unknown; allowed: self, ucx", wanted);
	*e = reasons;
	return e->code;
}

int comm_start(struct comm **world, struct boot **boot, const struct boot_card *card,
               const struct comm_options *options, struct err *e)
{
	struct boot *b = NULL;
	const struct transport *t;
	struct link *l;
	if (boot_join(&b, card->timeout_s, e))
		return e->code;
	/* Every rank judges alike, so all leave here together. */
	if (transport_choose(&t, options ? options->transport : NULL, b->size, e))
		goto all_fail;
	if (t->open(&l, b, options, e))
		boot_abort(b, e->code, e->text);
	struct boot_card mine = *card;
	mine.address = l->address;
	mine.address_bytes = l->address_bytes;
	if (boot_exchange(b, &mine, e)) {
		l->ops->close(l, false);
		goto all_fail;
	}
	l->boot = b->size > 1 ? b : NULL;
	if (l->ops->connect && l->ops->connect(l, b, e))
		boot_abort(b, e->code, e->text);
	*world = world_new(l);
	*boot = b;
	return 0;
all_fail:
	boot_finish(b, e->code);
	return e->code;
}

int comm_split(struct comm *parent, struct comm **out, int colour, const char *name, struct err *e)
{
	int64_t mine[2] = {colour, parent->link->next_context};
	int64_t(*all)[2] = mem_array(parent->size, sizeof *all);
	int *members = mem_array(parent->size, sizeof *members), n = 0, rc;
	uint32_t context = 0;
	if ((rc = comm_all_gather(parent, mine, all, 2, DT_i64, e)))
		goto done;
	for (int i = 0; i < parent->size; i++) {
		context = all[i][1] > context ? (uint32_t)all[i][1] : context;
		if (all[i][0] == colour)
			members[n++] = parent->world_rank[i];
	}
	if (context > LINK_MAX_CONTEXT) {
		rc = err_set(e, EXIT_INTERNAL, "group %s: more than %d groups were made in this run", name,
		             LINK_MAX_CONTEXT);
		goto done;
	}
	parent->link->next_context = context + 1;
	*out = colour < 0 ? NULL : comm_new(parent->link, members, n, context, name);
done:
	free(all);
	free(members);
	return rc;
}

int comm_split_axes(struct comm *world, struct comm **out, const struct mesh *mesh, unsigned axes,
                    struct err *e)
{
	char name[48];
	ASSERT(mesh->world == world->size);
	return comm_split(world, out, mesh_group_index(mesh, axes, world->rank),
	                  mesh_axes_name(axes, name, sizeof name), e);
}

/* ---- messages ---- */

static uint64_t tag_of(uint32_t context, bool collective, int sender, uint32_t tag)
{
	uint64_t group = (uint64_t)context << 1 | collective;
	return group << (LINK_RANK_BITS + LINK_TAG_BITS) | (uint64_t)sender << LINK_TAG_BITS | tag;
}

static int post(struct comm *c, struct comm_request *r, uint32_t tag, bool collective, struct err *e)
{
	struct link *l = c->link;
	int peer = c->world_rank[r->peer];
	r->comm = c;
	r->tag = tag_of(c->context, collective, r->is_send ? l->rank : peer, tag);
	return r->is_send ? l->ops->send(l, r, peer, e) : l->ops->recv(l, r, peer, e);
}

int comm_post(struct comm *c, struct comm_request *r, bool is_send, void *data, size_t bytes, int peer,
              int tag, struct err *e)
{
	*r = (struct comm_request){.peer = peer, .is_send = is_send, .data = data, .bytes = bytes};
	return post(c, r, (uint32_t)(c->sequence & 0xffff) << 8 | (uint32_t)tag, true, e);
}

static const char *host_of(const struct link *l, int world_rank)
{
	return l->boot && l->boot->peer ? l->boot->peer[world_rank].host : "this process";
}

/* "rank 1 (node3), rank 5 (node4)": those of whom a request still waits. */
static void put_silent(struct buf *b, struct comm *c, struct comm_request *r, size_t n)
{
	int listed = 0, last = -1;
	for (size_t i = 0; i < n; i++) {
		int peer = c->world_rank[r[i].peer];
		if (c->link->ops->done(c->link, &r[i]) || peer == last)
			continue;
		last = peer;
		if (listed++ < 8)
			buf_printf(b, "%s%s rank %d (%s)", listed > 1 ? ", " : "",
			           r[i].is_send ? "not taken by" : "nothing from", peer,
			           host_of(c->link, peer));
	}
	if (listed > 8)
		buf_printf(b, " and %d more", listed - 8);
}

static int hang(struct comm *c, struct comm_request *r, size_t n, const char *what, struct err *e)
{
	struct link *l = c->link;
	struct buf b = {0};
	buf_printf(&b, "rank %d (%s) has waited %g s in %s #%llu of group %s (ranks", l->rank,
	           host_of(l, l->rank), l->timeout_s, what, (unsigned long long)c->sequence, c->name);
	for (int i = 0; i < c->size && i < 16; i++)
		buf_printf(&b, " %d", c->world_rank[i]);
	buf_puts(&b, c->size > 16 ? " …): " : "): ");
	put_silent(&b, c, r, n);
	err_set(e, EXIT_INTERNAL, "%s", b.data);
	buf_free(&b);
	if (l->boot)
		boot_abort(l->boot, e->code, e->text);
	return e->code;
}

/* Waits for one; EXIT_INTERNAL without a message where it took too long. */
static int wait_one(struct link *l, struct comm_request *r)
{
	double waited = 0, last = 0;
	for (unsigned round = 0; !l->ops->done(l, r); round++) {
		l->ops->pause(l, r, round);
		double now = clock_now_s();
		/* A stopped process (SIGSTOP, scontrol suspend) sees one long step: it counts as a short one.
		 */
		waited += round ? fmin(now - last, 1) : 0;
		last = now;
		if (waited > l->timeout_s)
			return EXIT_INTERNAL;
	}
	return 0;
}

int comm_wait_in(struct comm *c, struct comm_request *r, size_t n, const char *what, struct err *e)
{
	struct link *l = c->link;
	int rc = 0;
	for (size_t i = 0; i < n && !rc; i++) {
		if (wait_one(l, &r[i]))
			rc = hang(c, r, n, what, e);
		else if (r[i].error == LINK_SIZE_DIFFERS)
			rc = err_set(e, EXIT_INTERNAL,
			             "%s of group %s: rank %d expects %zu bytes to pass between it and rank "
			             "%d, the other "
			             "side expects another size",
			             what, c->name, l->rank, r[i].bytes, c->world_rank[r[i].peer]);
		else if (r[i].error)
			rc = err_set(e, EXIT_INTERNAL,
			             "%s of group %s: the connection to rank %d (%s) is lost", what, c->name,
			             c->world_rank[r[i].peer], host_of(l, c->world_rank[r[i].peer]));
	}
	if (!rc)
		return 0;
	l->broken = true;
	if (l->boot)
		boot_abort(l->boot, rc, e->text);
	for (size_t i = 0; i < n; i++)
		l->ops->cancel(l, &r[i]);
	return rc;
}

int comm_wait(struct comm_request *r, size_t n, struct err *e)
{
	return n ? comm_wait_in(r->comm, r, n, r->is_send ? "send" : "recv", e) : 0;
}

static int message(struct comm *c, bool is_send, void *data, size_t count, enum dtype dtype, int peer,
                   int tag, struct comm_request *r, struct err *e)
{
	ASSERT(peer >= 0 && peer < c->size && tag >= 0 && tag < 1 << LINK_TAG_BITS);
	*r = (struct comm_request){
	        .peer = peer, .is_send = is_send, .data = data, .bytes = count * dtype_rows[dtype].bytes};
	return post(c, r, (uint32_t)tag, false, e);
}

int comm_isend(struct comm *c, const void *data, size_t count, enum dtype dtype, int peer, int tag,
               struct comm_request *r, struct err *e)
{
	return message(c, true, (void *)(uintptr_t)data, count, dtype, peer, tag, r, e);
}

int comm_irecv(struct comm *c, void *data, size_t count, enum dtype dtype, int peer, int tag,
               struct comm_request *r, struct err *e)
{
	return message(c, false, data, count, dtype, peer, tag, r, e);
}

bool comm_test(struct comm_request *r)
{
	return !r->comm || r->comm->link->ops->done(r->comm->link, r);
}

bool comm_progress(struct comm *c)
{
	return c->link->ops->progress && c->link->ops->progress(c->link);
}

int comm_send(struct comm *c, const void *data, size_t count, enum dtype dtype, int peer, int tag,
              struct err *e)
{
	struct comm_request r;
	int rc = comm_isend(c, data, count, dtype, peer, tag, &r, e);
	return rc ? rc : comm_wait(&r, 1, e);
}

int comm_recv(struct comm *c, void *data, size_t count, enum dtype dtype, int peer, int tag, struct err *e)
{
	struct comm_request r;
	int rc = comm_irecv(c, data, count, dtype, peer, tag, &r, e);
	return rc ? rc : comm_wait(&r, 1, e);
}

/* ---- collectives ---- */

static int run(struct comm *c, const struct comm_call *call, struct err *e)
{
	if ((call->kind == COMM_all_reduce || call->kind == COMM_reduce_scatter) &&
	    !reducers[call->dtype].acc_bytes)
		return err_set(e, EXIT_INTERNAL, "%s: %s cannot be reduced", comm_kind_name[call->kind],
		               dtype_rows[call->dtype].name);
	c->sequence++;
	int rc = c->ops->run[call->kind](c, call, e);
	c->link->broken |= rc != 0;
	return rc;
}

int comm_all_reduce(struct comm *c, void *data, size_t count, enum dtype dtype, enum comm_reduction op,
                    struct err *e)
{
	return run(c, &(struct comm_call){COMM_all_reduce, data, data, count, .dtype = dtype, .op = op}, e);
}

int comm_all_gather(struct comm *c, const void *send, void *recv, size_t count, enum dtype dtype,
                    struct err *e)
{
	return run(c, &(struct comm_call){COMM_all_gather, send, recv, count, .dtype = dtype}, e);
}

int comm_all_gather_v(struct comm *c, const void *send, void *recv, const size_t *counts, enum dtype dtype,
                      struct err *e)
{
	return run(c, &(struct comm_call){COMM_all_gather, send, recv, .recv_counts = counts, .dtype = dtype},
	           e);
}

int comm_reduce_scatter(struct comm *c, const void *send, void *recv, size_t count, enum dtype dtype,
                        enum comm_reduction op, struct err *e)
{
	return run(c, &(struct comm_call){COMM_reduce_scatter, send, recv, count, .dtype = dtype, .op = op},
	           e);
}

int comm_reduce_scatter_v(struct comm *c, const void *send, void *recv, const size_t *counts,
                          enum dtype dtype, enum comm_reduction op, struct err *e)
{
	return run(c,
	           &(struct comm_call){COMM_reduce_scatter, send, recv, .send_counts = counts, .dtype = dtype,
	                               .op = op},
	           e);
}

int comm_broadcast(struct comm *c, void *data, size_t count, enum dtype dtype, int root, struct err *e)
{
	ASSERT(root >= 0 && root < c->size);
	return run(c, &(struct comm_call){COMM_broadcast, data, data, count, .dtype = dtype, .root = root},
	           e);
}

int comm_all_to_all(struct comm *c, const void *send, void *recv, size_t count, enum dtype dtype,
                    struct err *e)
{
	return run(c, &(struct comm_call){COMM_all_to_all, send, recv, count, .dtype = dtype}, e);
}

int comm_all_to_all_v(struct comm *c, const void *send, const size_t *send_counts, void *recv,
                      const size_t *recv_counts, enum dtype dtype, struct err *e)
{
	return run(c,
	           &(struct comm_call){COMM_all_to_all, send, recv, .send_counts = send_counts,
	                               .recv_counts = recv_counts, .dtype = dtype},
	           e);
}

int comm_barrier(struct comm *c, struct err *e)
{
	return run(c, &(struct comm_call){COMM_barrier, .dtype = DT_i32}, e);
}

int comm_any(struct comm *c, int code, struct err *e)
{
	/* The code in the upper half, the lowest rank wins in the lower. */
	int64_t worst = (int64_t)code << 32 | (INT32_MAX - c->rank);
	struct err why;
	int rc = comm_all_reduce(c, &worst, 1, DT_i64, REDUCE_MAX, &why);
	if (rc) {
		if (!code)
			*e = why;
		return code > rc ? code : rc;
	}
	int highest = (int)(worst >> 32), first = INT32_MAX - (int)(worst & 0xffffffff);
	if (highest && !code)
		err_set(e, highest, "rank %d failed: %s (exit code %d)", c->world_rank[first],
		        err_code_doc(highest), highest);
	return highest;
}
