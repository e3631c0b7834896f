#include "comm/queue.h"
#include "base/err.h"
#include "base/mem.h"

#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { PLACES = 256 }; /* jobs posted and not done; a poster waits for a place */
enum { TEND_LEAST_NS = 20000, TEND_MOST_NS = 640000 }; /* between looks at what is under way */

struct comm_queue {
	pthread_t thread;
	pthread_mutex_t lock;
	pthread_cond_t changed;
	struct comm_job job[PLACES];
	uint64_t posted, done; /* counts; the ticket of a job is its number from 1 on */
	bool ends;
	struct comm *tended; /* whose messages go on while the queue is empty, until this request is done */
	struct comm_request *request;
	long pause_ns;
	bool tending; /* the thread is at it, without the lock */
	int code;
	struct err error;
};

static void run_next(struct comm_queue *q)
{
	struct comm_job job = q->job[q->done % PLACES];
	bool broken = q->code != 0;
	struct err e = {0};
	pthread_mutex_unlock(&q->lock);
	int rc = broken ? 0 : job.run(&job, &e);
	pthread_mutex_lock(&q->lock);
	if (rc) {
		q->code = rc;
		q->error = e;
	}
	q->done++;
	pthread_cond_broadcast(&q->changed);
}

static void sleep_until(struct comm_queue *q, long after_ns)
{
	struct timespec until;
	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_nsec += after_ns;
	if (until.tv_nsec >= 1000000000) {
		until.tv_nsec -= 1000000000;
		until.tv_sec++;
	}
	pthread_cond_timedwait(&q->changed, &q->lock, &until);
}

/* One look at what is under way, and a pause that is the longer the less happens. */
static void tend(struct comm_queue *q)
{
	struct comm *c = q->tended;
	struct comm_request *request = q->request;
	q->tending = true;
	pthread_mutex_unlock(&q->lock);
	bool moved = comm_progress(c), done = comm_test(request);
	pthread_mutex_lock(&q->lock);
	q->tending = false;
	q->pause_ns = moved ? TEND_LEAST_NS : q->pause_ns < TEND_MOST_NS ? 2 * q->pause_ns : TEND_MOST_NS;
	if (done && q->request == request)
		q->tended = NULL;
	pthread_cond_broadcast(&q->changed);
	if (q->done == q->posted && q->tended)
		sleep_until(q, q->pause_ns);
}

static void *queue_main(void *argument)
{
	struct comm_queue *q = argument;
	pthread_mutex_lock(&q->lock);
	while (!q->ends || q->done < q->posted) {
		if (q->done < q->posted)
			run_next(q);
		else if (q->tended)
			tend(q);
		else
			pthread_cond_wait(&q->changed, &q->lock);
	}
	pthread_mutex_unlock(&q->lock);
	return NULL;
}

int comm_queue_open(struct comm_queue **out, struct err *e)
{
	struct comm_queue *q = mem_array(1, sizeof *q);
	sigset_t all, before;
	pthread_mutex_init(&q->lock, NULL);
	pthread_condattr_t steady; /* somebody may set the time of day back */
	pthread_condattr_init(&steady);
	pthread_condattr_setclock(&steady, CLOCK_MONOTONIC);
	pthread_cond_init(&q->changed, &steady);
	pthread_condattr_destroy(&steady);
	sigfillset(&all); /* signals are the main thread's */
	pthread_sigmask(SIG_BLOCK, &all, &before);
	int failed = pthread_create(&q->thread, NULL, queue_main, q);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (failed) {
		free(q);
		return err_set(e, EXIT_UNAVAILABLE, "no thread for communication: %s", strerror(failed));
	}
	*out = q;
	return 0;
}

void comm_queue_close(struct comm_queue *q)
{
	if (!q)
		return;
	pthread_mutex_lock(&q->lock);
	q->ends = true;
	pthread_cond_broadcast(&q->changed);
	pthread_mutex_unlock(&q->lock);
	pthread_join(q->thread, NULL);
	pthread_cond_destroy(&q->changed);
	pthread_mutex_destroy(&q->lock);
	free(q);
}

void comm_queue_tend(struct comm_queue *q, struct comm *c, struct comm_request *request)
{
	if (!q)
		return;
	pthread_mutex_lock(&q->lock);
	q->tended = c;
	q->request = request;
	q->pause_ns = TEND_LEAST_NS;
	pthread_cond_broadcast(&q->changed);
	while (!c && q->tending)
		pthread_cond_wait(&q->changed, &q->lock);
	pthread_mutex_unlock(&q->lock);
}

uint64_t comm_queue_post(struct comm_queue *q, const struct comm_job *job, int *rc, struct err *e)
{
	*rc = 0;
	if (!q) {
		*rc = job->run(job, e);
		return 0;
	}
	pthread_mutex_lock(&q->lock);
	while (q->posted - q->done == PLACES)
		pthread_cond_wait(&q->changed, &q->lock);
	q->job[q->posted++ % PLACES] = *job;
	uint64_t ticket = q->posted;
	pthread_cond_broadcast(&q->changed);
	pthread_mutex_unlock(&q->lock);
	return ticket;
}

int comm_queue_wait(struct comm_queue *q, uint64_t ticket, struct err *e)
{
	if (!q)
		return 0;
	pthread_mutex_lock(&q->lock);
	uint64_t until = ticket < q->posted ? ticket : q->posted;
	while (q->done < until)
		pthread_cond_wait(&q->changed, &q->lock);
	int rc = q->code;
	if (rc)
		*e = q->error;
	pthread_mutex_unlock(&q->lock);
	return rc;
}
