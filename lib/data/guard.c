#include "data/guard.h"
#include "base/err.h"
#include "base/mem.h"
#include "data/indexed.h"

#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* Slots are reused and never freed, so that the handler may walk the list at any moment. */
struct slot {
	_Atomic uintptr_t begin; /* 0: free */
	_Atomic size_t bytes;
	char path[PATH_MAX];
	struct slot *next;
};

static struct slot *_Atomic slots;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct sigaction before;

static struct slot *find_slot(uintptr_t begin)
{
	struct slot *s = atomic_load(&slots);
	while (s && atomic_load(&s->begin) != begin)
		s = s->next;
	return s;
}

void guard_add(const char *path, const void *data, size_t bytes)
{
	if (!data)
		return;
	pthread_mutex_lock(&lock);
	struct slot *s = find_slot(0);
	if (!s) {
		s = mem_array(1, sizeof *s);
		s->next = atomic_load(&slots);
		atomic_store(&slots, s);
	}
	snprintf(s->path, sizeof s->path, "%s", path);
	atomic_store(&s->bytes, bytes);
	atomic_store(&s->begin, (uintptr_t)data);
	pthread_mutex_unlock(&lock);
}

void guard_remove(const void *data)
{
	if (!data)
		return;
	pthread_mutex_lock(&lock);
	struct slot *s = find_slot((uintptr_t)data);
	if (s)
		atomic_store(&s->begin, 0);
	pthread_mutex_unlock(&lock);
}

/* What follows runs in a signal handler: write() and _exit(), no stdio, no allocation. */

static size_t put_text(char *out, size_t n, size_t cap, const char *s)
{
	while (*s && n < cap)
		out[n++] = *s++;
	return n;
}

static size_t put_number(char *out, size_t n, size_t cap, size_t x)
{
	char digits[24], *p = digits + sizeof digits - 1;
	*p = 0;
	do
		*--p = (char)('0' + x % 10);
	while (x /= 10);
	return put_text(out, n, cap, p);
}

static _Noreturn void leave(const struct slot *s, size_t offset)
{
	char text[PATH_MAX + 200];
	size_t n = put_text(text, 0, sizeof text, "error: ");
	n = put_text(text, n, sizeof text, s->path);
	n = put_text(text, n, sizeof text, ": byte offset ");
	n = put_number(text, n, sizeof text, offset);
	n = put_text(text, n, sizeof text,
	             " can no longer be read: the file was cut short while in use, or its disk failed\n");
	for (size_t at = 0; at < n;) {
		ssize_t done = write(STDERR_FILENO, text + at, n - at);
		if (done <= 0)
			break;
		at += (size_t)done;
	}
	_exit(EXIT_BAD_DATA);
}

static void on_bus_error(int number, siginfo_t *info, void *context)
{
	(void)context;
	uintptr_t at = (uintptr_t)info->si_addr;
	for (const struct slot *s = info->si_code > 0 ? atomic_load(&slots) : NULL; s; s = s->next) {
		uintptr_t begin = atomic_load(&s->begin);
		if (begin && at - begin < atomic_load(&s->bytes))
			leave(s, at - begin);
	}
	/* Not ours: a fault comes again when we return, a signal that was sent does not. */
	sigaction(SIGBUS, &before, NULL);
	if (info->si_code <= 0)
		raise(number);
}

void indexed_guard_install(void)
{
	struct sigaction sa = {.sa_sigaction = on_bus_error, .sa_flags = SA_SIGINFO | SA_ONSTACK}, old;
	sigemptyset(&sa.sa_mask);
	sigaction(SIGBUS, &sa, &old);
	if (!(old.sa_flags & SA_SIGINFO) || old.sa_sigaction != on_bus_error)
		before = old;
}
