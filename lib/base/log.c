#include "base/log.h"
#include "base/err.h"

#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static _Thread_local int my_rank, world = 1;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static FILE *file;
static int progress_shown;

void log_set_rank(int rank, int world_size)
{
	my_rank = rank;
	world = world_size;
}

int log_open(const char *path, struct err *e)
{
	FILE *f = fopen(path, "ae");
	if (!f)
		return err_errno(e, EXIT_IO, "%s: cannot open the log", path);
	setvbuf(f, NULL, _IOLBF, 0);
	pthread_mutex_lock(&lock);
	file = f;
	pthread_mutex_unlock(&lock);
	return 0;
}

void log_close(void)
{
	pthread_mutex_lock(&lock);
	if (file)
		fclose(file);
	file = NULL;
	pthread_mutex_unlock(&lock);
}

static void clear_progress(void)
{
	if (progress_shown)
		fputs("\r\033[K", stderr);
	progress_shown = 0;
}

static void say(const char *prefix, const char *fmt, va_list ap)
{
	char text[4096], stamp[32];
	vsnprintf(text, sizeof text, fmt, ap);
	time_t now = time(NULL);
	struct tm tm;
	strftime(stamp, sizeof stamp, "%Y-%m-%d %H:%M:%S", localtime_r(&now, &tm));
	pthread_mutex_lock(&lock);
	clear_progress();
	fprintf(stderr, "%s%s\n", prefix, text);
	if (file)
		fprintf(file, "%s %s%s\n", stamp, prefix, text);
	pthread_mutex_unlock(&lock);
}

void log_info(const char *fmt, ...)
{
	if (my_rank)
		return;
	va_list ap;
	va_start(ap, fmt);
	say("", fmt, ap);
	va_end(ap);
}

void log_warn(const char *fmt, ...)
{
	if (my_rank)
		return;
	va_list ap;
	va_start(ap, fmt);
	say("warning: ", fmt, ap);
	va_end(ap);
}

void log_error(const char *fmt, ...)
{
	char prefix[320] = "error: ", host[256] = "?";
	if (world > 1) {
		gethostname(host, sizeof host - 1);
		snprintf(prefix, sizeof prefix, "error: rank %d on %.200s: ", my_rank, host);
	}
	va_list ap;
	va_start(ap, fmt);
	say(prefix, fmt, ap);
	va_end(ap);
}

void log_progress(const char *fmt, ...)
{
	if (my_rank || !isatty(STDERR_FILENO))
		return;
	va_list ap;
	va_start(ap, fmt);
	pthread_mutex_lock(&lock);
	clear_progress();
	if (*fmt) {
		vfprintf(stderr, fmt, ap);
		fflush(stderr);
		progress_shown = 1;
	}
	pthread_mutex_unlock(&lock);
	va_end(ap);
}
