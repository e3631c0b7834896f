/* The watchdog of the bootstrap: PMIx calls have no limit of their own that holds across nodes. */
#include "comm/boot_method.h"
#include "base/err.h"
#include "base/log.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

static struct {
	pthread_mutex_t lock;
	pthread_cond_t changed;
	bool running, armed;
	unsigned generation;
	const struct boot *boot;
	const char *what;
} guard = {.lock = PTHREAD_MUTEX_INITIALIZER};

static void guard_expired(void)
{
	log_error("waited %g s in %s for the other ranks; one of them is late, stopped or gone",
	          guard.boot->timeout_s, guard.what);
	fflush(NULL);
	_exit(EXIT_INTERNAL);
}

/* Waits for a change; returns the seconds that this used up. In steps of a second, so that a process that was
 * stopped does not find its time over. */
static double wait_step(double left)
{
	struct timespec until;
	double step = left < 1 ? left : 1;
	clock_gettime(CLOCK_MONOTONIC, &until);
	long nanos = until.tv_nsec + (long)(step * 1e9);
	until.tv_sec += nanos / 1000000000;
	until.tv_nsec = nanos % 1000000000;
	return pthread_cond_timedwait(&guard.changed, &guard.lock, &until) == ETIMEDOUT ? step : 0;
}

static void *guard_main(void *unused)
{
	(void)unused;
	pthread_mutex_lock(&guard.lock);
	for (;;) {
		while (!guard.armed)
			pthread_cond_wait(&guard.changed, &guard.lock);
		unsigned generation = guard.generation;
		double left = guard.boot->timeout_s;
		while (guard.armed && guard.generation == generation && left > 0)
			left -= wait_step(left);
		if (guard.armed && guard.generation == generation) {
			log_set_rank(guard.boot->rank, guard.boot->size);
			guard_expired();
		}
	}
	return NULL;
}

/* Signals are for the main thread. */
static bool thread_start(void)
{
	pthread_condattr_t attr;
	pthread_t thread;
	sigset_t all, before;
	pthread_condattr_init(&attr);
	pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
	pthread_cond_init(&guard.changed, &attr);
	pthread_condattr_destroy(&attr);
	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, &all, &before);
	bool started = !pthread_create(&thread, NULL, guard_main, NULL);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (started)
		pthread_detach(thread);
	return started;
}

void boot_guard_begin(const struct boot *b, const char *what)
{
	pthread_mutex_lock(&guard.lock);
	guard.running = guard.running || thread_start();
	guard.armed = true;
	guard.generation++;
	guard.boot = b;
	guard.what = what;
	pthread_cond_signal(&guard.changed);
	pthread_mutex_unlock(&guard.lock);
}

void boot_guard_end(void)
{
	pthread_mutex_lock(&guard.lock);
	guard.armed = false;
	pthread_cond_signal(&guard.changed);
	pthread_mutex_unlock(&guard.lock);
}
