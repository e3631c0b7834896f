#include "train/stop.h"
#include "base/mem.h"
#include "base/sys.h"

#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/auxv.h>
#include <time.h>

#define STOP_WORD(name, doc) doc,
const char *const stop_words[STOP_COUNT] = {STOP_REASONS(STOP_WORD)};

static volatile sig_atomic_t caught;

static void on_signal(int number)
{
	if (caught && (number == SIGTERM || number == SIGINT))
		signal(number, SIG_DFL);
	caught = 1;
}

/* Handlers need a stack of their own: oneDNN's sgemm points the stack pointer into a heap buffer while it
 * runs, so a frame on "the stack" would be written over whatever lies before that buffer (seen with 2.6.3).
 * For the main thread, which the kernel prefers for signals to the process. Frames with AVX-512 or AMX state
 * are larger than SIGSTKSZ. */
static void own_stack(void)
{
	size_t bytes = getauxval(AT_MINSIGSTKSZ) + 64 * 1024;
	stack_t stack = {.ss_sp = mem_aligned(bytes), .ss_size = bytes};
	sigaltstack(&stack, NULL);
}

void stop_install_signals(void)
{
	static const int numbers[] = {SIGTERM, SIGINT, SIGUSR1, SIGUSR2};
	struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART | SA_ONSTACK};
	own_stack();
	for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
		sigaction(numbers[i], &action, NULL);
}

double stop_seconds_left(void)
{
	const char *end = getenv("SLURM_JOB_END_TIME"); /* Slurm 23.02 and later */
	long long at = end ? atoll(end) : 0;
	return at > 0 ? (double)(at - (long long)time(NULL)) : -1;
}

static int take_file(const char *dir, const char *name)
{
	char path[PATH_MAX];
	struct stat st;
	return snprintf(path, sizeof path, "%s/%s", dir, name) < (int)sizeof path &&
	       sys.stat(path, &st) == 0 && sys.unlink(path) == 0;
}

enum stop_reason stop_look(const char *run_dir, double needed_s)
{
	double left = stop_seconds_left();
	if (caught)
		return STOP_SIGNAL;
	if (run_dir && take_file(run_dir, "stop"))
		return STOP_FILE;
	if (left >= 0 && left < needed_s)
		return STOP_TIME_LIMIT;
	return run_dir && take_file(run_dir, "save") ? STOP_SAVE : STOP_NOTHING;
}
