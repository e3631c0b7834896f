/* The watchdog of the bootstrap: PMIx calls have no useful limit of their own across nodes. */
#include "base/err.h"
#include "base/log.h"
#include "comm/boot_method.h"

#include <pthread.h>
#include <time.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static const char *watched; /* NULL: nothing */
static struct timespec deadline;
static double allowed_s;

static void *watch(void *unused)
{
	(void)unused;
	pthread_mutex_lock(&lock);
	for (;;) {
		if (!watched) {
			pthread_cond_wait(&changed, &lock);
			continue;
		}
		struct timespec now;
		pthread_cond_timedwait(&changed, &lock, &deadline);
		clock_gettime(CLOCK_REALTIME, &now);
		if (!watched || now.tv_sec < deadline.tv_sec)
			continue;
		log_error("%s has taken more than %g s: another rank did not come", watched, allowed_s);
		_exit(EXIT_INTERNAL);
	}
	return NULL;
}

void boot_watch(const char *what, double timeout_s)
{
	static bool running;
	pthread_t thread;
	pthread_mutex_lock(&lock);
	clock_gettime(CLOCK_REALTIME, &deadline);
	deadline.tv_sec += (time_t)timeout_s + 1;
	allowed_s = timeout_s;
	watched = what;
	if (!running && pthread_create(&thread, NULL, watch, NULL) == 0) {
		pthread_detach(thread);
		running = true;
	}
	pthread_cond_signal(&changed);
	pthread_mutex_unlock(&lock);
}

void boot_unwatch(void)
{
	pthread_mutex_lock(&lock);
	watched = NULL;
	pthread_cond_signal(&changed);
	pthread_mutex_unlock(&lock);
}
