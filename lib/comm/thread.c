/* Transport `thread`: ranks are threads of one process. A message is one copy from the sender's buffer to the
 * receiver's, made by whoever comes second. Sends never buffer, so a program that would hang with large
 * messages elsewhere hangs here with small ones, which is what tests want. `self` is a world of one. */
#include "comm/link.h"
#include "base/err.h"
#include "base/mem.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

struct queue {
	struct comm_request *first, **end;
};

/* What waits for one rank: messages it has asked for, messages for it. Guarded by the world's lock. */
struct mailbox {
	struct queue recvs, sends;
	pthread_cond_t wake; /* a request of this rank has ended */
};

struct thread_world {
	pthread_mutex_t lock;
	int open; /* links that are not closed */
	struct mailbox *box;
};

struct thread_link {
	struct link base;
	struct thread_world *world;
	int lent; /* requests of this rank that another one is copying just now; guarded by the world's lock
	           */
};

static struct thread_world *world_of(struct link *l)
{
	return ((struct thread_link *)l)->world;
}

/* Unlinks the first request with the tag. */
static struct comm_request *queue_take(struct queue *q, uint64_t tag)
{
	for (struct comm_request **at = &q->first; *at; at = &(*at)->next)
		if ((*at)->tag == tag) {
			struct comm_request *r = *at;
			*at = r->next;
			if (q->end == &r->next)
				q->end = at;
			return r;
		}
	return NULL;
}

static void queue_put(struct queue *q, struct comm_request *r)
{
	r->next = NULL;
	*q->end = r;
	q->end = &r->next;
}

static int *lent_of(const struct comm_request *r)
{
	return &((struct thread_link *)r->comm->link)->lent;
}

static void copy(struct comm_request *to, struct comm_request *from)
{
	if (to->bytes == from->bytes)
		memcpy(to->data, from->data, to->bytes);
	else
		to->error = from->error = LINK_SIZE_DIFFERS;
}

/* r meets its other half in `theirs`, or waits in `ours`. */
static int meet(struct link *l, struct comm_request *r, struct queue *theirs, struct queue *ours)
{
	struct thread_world *w = world_of(l);
	pthread_mutex_lock(&w->lock);
	struct comm_request *other = queue_take(theirs, r->tag);
	if (!other) {
		queue_put(ours, r);
		pthread_mutex_unlock(&w->lock);
		return 0;
	}
	int *lent = lent_of(other), owner = other->comm->link->rank;
	++*lent;
	pthread_mutex_unlock(&w->lock);
	if (r->is_send)
		copy(other, r);
	else
		copy(r, other);
	pthread_mutex_lock(&w->lock);
	r->is_done = other->is_done = true;
	--*lent;
	pthread_cond_signal(&w->box[owner].wake);
	pthread_mutex_unlock(&w->lock);
	return 0;
}

static int thread_send(struct link *l, struct comm_request *r, int peer, struct err *e)
{
	(void)e;
	struct mailbox *box = &world_of(l)->box[peer];
	return meet(l, r, &box->recvs, &box->sends);
}

static int thread_recv(struct link *l, struct comm_request *r, int peer, struct err *e)
{
	(void)e;
	(void)peer;
	struct mailbox *box = &world_of(l)->box[l->rank];
	return meet(l, r, &box->sends, &box->recvs);
}

static bool thread_done(struct link *l, struct comm_request *r)
{
	struct thread_world *w = world_of(l);
	pthread_mutex_lock(&w->lock);
	bool done = r->is_done;
	pthread_mutex_unlock(&w->lock);
	return done;
}

static void thread_pause(struct link *l, struct comm_request *r, unsigned round)
{
	(void)round;
	struct thread_world *w = world_of(l);
	struct timespec until;
	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_nsec += 50 * 1000 * 1000;
	until.tv_sec += until.tv_nsec / 1000000000;
	until.tv_nsec %= 1000000000;
	pthread_mutex_lock(&w->lock);
	if (!r->is_done)
		pthread_cond_timedwait(&w->box[l->rank].wake, &w->lock, &until);
	pthread_mutex_unlock(&w->lock);
}

static void queue_drop(struct queue *q, const struct link *l)
{
	for (struct comm_request **at = &q->first; *at;) {
		struct comm_request *r = *at;
		if (r->comm->link == l) {
			*at = r->next;
			r->is_done = true;
		} else {
			at = &r->next;
		}
	}
	q->end = &q->first;
	while (*q->end)
		q->end = &(*q->end)->next;
}

/* A call that fails leaves messages of other batches behind: all of this rank's go, not r alone. */
static void thread_cancel(struct link *l, struct comm_request *r)
{
	(void)r;
	struct thread_world *w = world_of(l);
	pthread_mutex_lock(&w->lock);
	for (int i = 0; i < l->size; i++) {
		queue_drop(&w->box[i].recvs, l);
		queue_drop(&w->box[i].sends, l);
	}
	while (((struct thread_link *)l)->lent)
		pthread_cond_wait(&w->box[l->rank].wake, &w->lock);
	pthread_mutex_unlock(&w->lock);
}

static void thread_close(struct link *l, bool orderly)
{
	(void)orderly;
	thread_cancel(l, NULL);
	struct thread_world *w = world_of(l);
	pthread_mutex_lock(&w->lock);
	bool last = --w->open == 0;
	pthread_mutex_unlock(&w->lock);
	int size = l->size;
	link_free_common(l);
	free(l);
	if (!last)
		return;
	for (int i = 0; i < size; i++)
		pthread_cond_destroy(&w->box[i].wake);
	pthread_mutex_destroy(&w->lock);
	free(w->box);
	free(w);
}

static const struct link_ops thread_ops = {
        .name = "thread",
        .send = thread_send,
        .recv = thread_recv,
        .done = thread_done,
        .pause = thread_pause,
        .cancel = thread_cancel,
        .close = thread_close,
};

static const struct link_ops self_ops = {
        .name = "self",
        .send = thread_send,
        .recv = thread_recv,
        .done = thread_done,
        .pause = thread_pause,
        .cancel = thread_cancel,
        .close = thread_close,
};

static struct thread_world *thread_world_new(int n)
{
	struct thread_world *w = mem_array(1, sizeof *w);
	pthread_condattr_t attr;
	pthread_condattr_init(&attr);
	pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
	pthread_mutex_init(&w->lock, NULL);
	w->open = n;
	w->box = mem_array(n, sizeof *w->box);
	for (int i = 0; i < n; i++) {
		pthread_cond_init(&w->box[i].wake, &attr);
		w->box[i].recvs.end = &w->box[i].recvs.first;
		w->box[i].sends.end = &w->box[i].sends.first;
	}
	pthread_condattr_destroy(&attr);
	return w;
}

int thread_links(int n, const struct comm_options *options, struct link **out, struct err *e)
{
	if (n < 1)
		return err_set(e, EXIT_CONFIG, "a world of %d ranks; allowed: 1 or more", n);
	struct thread_world *w = thread_world_new(n);
	for (int i = 0; i < n; i++) {
		struct thread_link *l = mem_array(1, sizeof *l);
		l->base.ops = n == 1 ? &self_ops : &thread_ops;
		l->world = w;
		link_init(&l->base, i, n, options);
		out[i] = &l->base;
	}
	return 0;
}

static int self_probe(int world_size, struct err *e)
{
	return world_size == 1 ? 0
	                       : err_set(e, EXIT_UNAVAILABLE, "it is for one rank, these are %d", world_size);
}

static int self_open(struct link **out, struct boot *boot, const struct comm_options *options, struct err *e)
{
	(void)boot;
	return thread_links(1, options, out, e);
}

const struct transport transport_self = {"self", self_probe, self_open};
