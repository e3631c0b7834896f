/* Ranks as processes: every collective over the transport that comm_start chooses, and what mixed, silent and
 * dead ranks lead to. Run alone it starts worlds of several sizes itself, through the server half of PMIx;
 * run as a rank (`srun --mpi=pmix -n8 test_comm_ranks`) it takes its place. */
#include "base/err.h"
#include "base/log.h"
#include "base/mem.h"
#include "comm/boot.h"
#include "comm/comm.h"
#include "comm/host.h"
#include "test/comm_suite.h"
#include "test/test.h"

#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { MAX_RANKS = 16, SKIPPED = 77, PATIENCE_S = 60 };

static struct comm *world;

TEST(every_collective_equals_the_serial_loop)
{
	comm_suite(world);
}

/* ---- a rank ---- */

static int run_suite(struct boot *boot)
{
	struct err e = {0};
	char *names[] = {"test_comm_ranks", NULL};
	int code = test_main(1, names) ? EXIT_SELF_CHECK : 0;
	code = comm_any(world, code, &e);
	comm_close(world);
	return boot_finish(boot, code);
}

/* Rank 1 never comes; the others say so and take it down. */
static int run_hang(struct boot *boot)
{
	struct err e = {0};
	if (world->rank == 1)
		nanosleep(&(struct timespec){.tv_sec = PATIENCE_S}, NULL);
	int rc = comm_barrier(world, &e);
	boot_abort(boot, rc, e.text);
}

static int run_code(struct boot *boot)
{
	int code = world->rank == 1 ? EXIT_AGAIN : 0;
	comm_close(world);
	return boot_finish(boot, code);
}

static const struct mode {
	const char *name;
	int (*run)(struct boot *boot);
} modes[] = {{"suite", run_suite},
             {"hang", run_hang},

             {"code", run_code},
             {"mixed", run_suite}};

static int be_rank(const char *name)
{
	struct boot *boot;
	struct err e = {0};
	struct boot_card card = {.version = "test", .config_hash = 7, .timeout_s = PATIENCE_S};
	struct comm_options options = {.timeout_s = strcmp(name, "hang") ? PATIENCE_S : 1};
	const char *rank = getenv("PMIX_RANK");
	if (!strcmp(name, "mixed") && rank && atoi(rank) == 1)
		card.config_hash = 8;
	if (comm_start(&world, &boot, &card, &options, &e))
		return boot_failed(NULL, &e);
	log_set_rank(world->rank, world->size);
	if (!world->rank)
		printf("%d ranks over %s\n", world->size, comm_transport(world));
	for (size_t i = 0; i < sizeof modes / sizeof *modes; i++)
		if (!strcmp(modes[i].name, name))
			return modes[i].run(boot);
	return EXIT_USAGE;
}

/* ---- a world of them ---- */

struct worlds {
	pid_t pid[MAX_RANKS];
	int n, status[MAX_RANKS];
	char output[1 << 16]; /* of all ranks */
};

static pid_t start_rank(struct host *h, int rank, const char *mode, int out)
{
	char **env = NULL;
	struct err e = {0};
	if (host_environment(h, rank, &env, &e)) {
		test_failed(__FILE__, __LINE__, "%s", e.text);
		return -1;
	}
	char *argv[] = {"test_comm_ranks", (char *)(uintptr_t)mode, NULL};
	pid_t pid = fork();
	if (!pid) {
		dup2(out, STDOUT_FILENO);
		dup2(out, STDERR_FILENO);
		execve("/proc/self/exe", argv, env);
		_exit(EXIT_INTERNAL);
	}
	for (char **v = env; *v; v++)
		free(*v);
	free(env);
	return pid;
}

static bool has_aborted(int events)
{
	struct host_event v;
	while (read(events, &v, sizeof v) == sizeof v)
		if (v.kind == HOST_ABORTED)
			return true;
	return false;
}

/* All of them, for as long as the test has patience; an abort, or the end of patience, ends who is left. */
static void wait_for_ranks(struct worlds *w, int events)
{
	int alive = w->n, status;
	for (int ticks = 0; alive && ticks < PATIENCE_S * 100 && !has_aborted(events); ticks++) {
		for (int r = 0; r < w->n; r++)
			if (w->pid[r] > 0 && waitpid(w->pid[r], &status, WNOHANG) == w->pid[r]) {
				w->pid[r] = 0;
				w->status[r] = status;
				alive--;
			}
		nanosleep(&(struct timespec){.tv_nsec = 10000000}, NULL);
	}
	for (int r = 0; r < w->n; r++)
		if (w->pid[r] > 0) {
			nanosleep(&(struct timespec){.tv_nsec = 200000000},
			          NULL); /* it may be leaving just now */
			kill(w->pid[r], SIGKILL);
			waitpid(w->pid[r], &w->status[r], 0);
		}
}

/* Fills *w; false where this build cannot host ranks. */
static bool run_world(struct worlds *w, int n, const char *mode)
{
	struct host *h = NULL;
	struct err e = {0};
	int events[2];
	char path[4096];
	memset(w, 0, sizeof *w);
	w->n = n;
	snprintf(path, sizeof path, "%s/output", test_dir());
	int out = open(path, O_RDWR | O_CREAT | O_TRUNC | O_APPEND, 0600);
	if (out < 0 || pipe2(events, O_CLOEXEC | O_NONBLOCK))
		return CHECK(!"a file and a pipe");
	int rc = host_start(&h, n, events[1], &e);
	for (int r = 0; r < n && !rc; r++)
		w->pid[r] = start_rank(h, r, mode, out);
	if (!rc)
		wait_for_ranks(w, events[0]);
	host_stop(h);
	ssize_t got = pread(out, w->output, sizeof w->output - 1, 0);
	w->output[got > 0 ? got : 0] = 0;
	close(out);
	close(events[0]);
	close(events[1]);
	return !rc;
}

static int code_of(const struct worlds *w, int rank)
{
	return WIFEXITED(w->status[rank]) ? WEXITSTATUS(w->status[rank]) : -1;
}

static int count(const char *text, const char *part)
{
	int n = 0;
	for (const char *at = text; (at = strstr(at, part)); at += strlen(part))
		n++;
	return n;
}

static bool all_leave_with(const struct worlds *w, int first, int others)
{
	for (int r = 0; r < w->n; r++)
		if (code_of(w, r) != (r ? others : first))
			return false;
	return true;
}

static bool all_well(const struct worlds *w)
{
	return all_leave_with(w, 0, 0);
}

static bool first_has_code(const struct worlds *w)
{
	return all_leave_with(w, EXIT_AGAIN, 0);
}

static bool refused_once(const struct worlds *w)
{
	return all_leave_with(w, EXIT_CONFIG, 0) && count(w->output, "rank 1 (") == 1;
}

static bool names_the_silent(const struct worlds *w)
{
	return code_of(w, 0) == EXIT_INTERNAL && count(w->output, "nothing from rank 1");
}

static const struct world_case {
	int n;
	const char *mode, *what;
	bool (*good)(const struct worlds *w);
} cases[] = {
        {2, "suite", "every collective equals the serial loop", all_well},
        {3, "suite", "every collective equals the serial loop", all_well},
        {4, "suite", "every collective equals the serial loop", all_well},
        {8, "suite", "every collective equals the serial loop", all_well},
        {3, "code", "rank 0 leaves with the highest code", first_has_code},
        {4, "mixed", "a mixed job says so once and leaves with 78", refused_once},
        {3, "hang", "who waits for whom is said before the job goes down", names_the_silent},
};

static int run_case(const struct world_case *k)
{
	struct worlds *w = mem_array(1, sizeof *w);
	if (!run_world(w, k->n, k->mode)) {
		puts("this build cannot host ranks: no PMIx");
		return SKIPPED;
	}
	bool good = k->good(w);
	printf("%s %d ranks: %s\n", good ? "ok  " : "FAIL", w->n, k->what);
	for (int r = 0; r < w->n && !good; r++)
		printf("     rank %d: exit code %d\n", r, code_of(w, r));
	if (!good)
		fputs(w->output, stdout);
	free(w);
	return !good;
}

/* A process for each case: libpmix's server starts once in a process. */
static int run_cases(const char *filter)
{
	int worst = 0, status;
	for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
		if (filter && strcmp(filter, cases[i].mode))
			continue;
		fflush(stdout);
		pid_t pid = fork();
		if (!pid)
			exit(run_case(&cases[i]));
		if (pid < 0 || waitpid(pid, &status, 0) != pid || !WIFEXITED(status))
			return 1;
		if (WEXITSTATUS(status) == SKIPPED)
			return SKIPPED;
		worst |= WEXITSTATUS(status);
	}
	return worst;
}

int main(int argc, char **argv)
{
	setvbuf(stdout, NULL, _IOLBF, 0);
	if (getenv("PMIX_NAMESPACE"))
		return be_rank(argc > 1 ? argv[1] : "suite");
	return run_cases(argc > 1 ? argv[1] : NULL);
}
