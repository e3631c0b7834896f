/* pentad launch: ranks of a subcommand on this host, without Slurm. It serves PMIx to them, passes their
 * output on line by line, and sees to it that none outlives the others. */
#include "apps/commands.h"
#include "base/clock.h"
#include "base/err.h"
#include "base/mem.h"
#include "comm/host.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MAX_RANKS = 1024, PATIENCE_MS = 1000, GRACE_MS = 500, LINE_BYTES = 1 << 16, STREAMS = 2 };

struct stream {
	int fd; /* -1: at its end */
	struct buf line;
};

struct rank {
	pid_t pid;
	bool running, attached, stopped_by_us;
	struct stream stream[STREAMS]; /* standard output, standard error */
};

struct job {
	int n;
	bool bind;
	char **argv; /* of each rank */
	char binary[4096];
	struct rank *rank;
	struct host *host;
	int events[2], signals;
	sigset_t old_mask;
	int code, forwarded; /* a signal that was passed on */
	bool failing;
	double term_at_ms, kill_at_ms; /* 0: not yet */
};

static void say(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
static void say(const char *fmt, ...)
{
	va_list ap;
	va_start(ap, fmt);
	fputs("pentad launch: ", stderr);
	vfprintf(stderr, fmt, ap);
	fputc('\n', stderr);
	va_end(ap);
}

/* ---- command line ---- */

static void print_usage(FILE *f)
{
	fprintf(f, "usage: pentad launch -n N [--bind core|none] COMMAND …\n\n"
	           "Starts N ranks of a subcommand on this host. Each rank gets its share of the cores\n"
	           "(--bind none: all share all) and OMP_NUM_THREADS = cores / N unless that is set.\n"
	           "The exit code is the highest of the ranks'; if one fails the others are stopped.\n\n"
	           "example: pentad launch -n 4 train -c configs/tiny.yaml\n");
}

static int usage_error(const char *text, const char *word)
{
	fprintf(stderr, "pentad launch: %s%s; see `pentad launch --help`\n", text, word);
	return EXIT_USAGE;
}

static bool is_command(const char *word)
{
	static const char *const names[] = {
#define COMMAND(name, doc, example) #name,
#include "apps/commands.def"
#undef COMMAND
	};
	for (size_t i = 0; i < sizeof names / sizeof *names; i++)
		if (!strcmp(word, names[i]))
			return strcmp(word, "launch") != 0;
	return false;
}

/* Fills job->n, bind and argv. -1: go on; otherwise the exit code. */
static int parse(struct job *job, int argc, char **argv)
{
	int i = 1;
	job->bind = true;
	for (; i < argc && argv[i][0] == '-'; i++) {
		const char *value = i + 1 < argc ? argv[i + 1] : NULL;
		if (!strcmp(argv[i], "--help")) {
			print_usage(stdout);
			return EXIT_DONE;
		}
		if (strcmp(argv[i], "-n") && strcmp(argv[i], "--bind"))
			return usage_error("unknown option ", argv[i]);
		if (!value)
			return usage_error("a value is missing after ", argv[i]);
		if (!strcmp(argv[i], "--bind")) {
			if (strcmp(value, "core") && strcmp(value, "none"))
				return usage_error("--bind takes core or none, not ", value);
			job->bind = !strcmp(value, "core");
		} else {
			char *end;
			long n = strtol(value, &end, 10);
			if (*end || end == value || n < 1 || n > MAX_RANKS)
				return usage_error("-n takes a number of ranks from 1 to 1024, not ", value);
			job->n = (int)n;
		}
		i++;
	}
	if (!job->n)
		return usage_error("how many ranks? give -n N", "");
	if (i == argc)
		return usage_error("which command shall the ranks run?", "");
	if (!is_command(argv[i]))
		return usage_error("ranks cannot run the command ", argv[i]);
	job->argv = mem_array((size_t)(argc - i) + 2, sizeof *job->argv);
	job->argv[0] = "pentad";
	memcpy(job->argv + 1, argv + i, (size_t)(argc - i) * sizeof *argv);
	return -1;
}

/* ---- starting ---- */

/* The r-th of n equal runs of the cores we may use; all of them where there are fewer cores than ranks, since
 * the kernel then shares better than a fixed choice. */
static void share_of_cores(const cpu_set_t *all, int n, int r, cpu_set_t *out)
{
	int cores = CPU_COUNT(all), seen = 0;
	CPU_ZERO(out);
	for (int c = 0; c < CPU_SETSIZE; c++) {
		if (!CPU_ISSET(c, all))
			continue;
		if (cores < n || (seen >= (long)cores * r / n && seen < (long)cores * (r + 1) / n))
			CPU_SET(c, out);
		seen++;
	}
}

/* Between fork and exec, in a process with threads elsewhere: system calls only. */
static _Noreturn void become_rank(struct job *job, int r, char **env, const cpu_set_t *cores,
                                  const int out[2], pid_t launcher)
{
	setpgid(0, 0); /* a terminal's ^C comes once, through us */
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (getppid() != launcher)
		_exit(EXIT_INTERNAL);
	if (r) {
		int null = open("/dev/null", O_RDONLY);
		if (null >= 0)
			dup2(null, STDIN_FILENO);
	}
	dup2(out[0], STDOUT_FILENO);
	dup2(out[1], STDERR_FILENO);
	if (job->bind)
		sched_setaffinity(0, sizeof *cores, cores);
	sigprocmask(SIG_SETMASK, &job->old_mask, NULL);
	execve(job->binary, job->argv, env);
	_exit(EXIT_INTERNAL);
}

static int make_pipes(int out[STREAMS][2], struct err *e)
{
	for (int s = 0; s < STREAMS; s++)
		if (pipe2(out[s], O_CLOEXEC))
			return err_errno(e, EXIT_IO, "cannot make a pipe");
	return 0;
}

static int start_rank(struct job *job, int r, const cpu_set_t *all, struct err *e)
{
	int out[STREAMS][2];
	char **env;
	cpu_set_t cores;
	struct rank *k = &job->rank[r];
	pid_t launcher = getpid();
	share_of_cores(all, job->n, r, &cores);
	if (host_environment(job->host, r, &env, e) || make_pipes(out, e))
		return e->code;
	k->pid = fork();
	if (!k->pid)
		become_rank(job, r, env, &cores, (int[]){out[0][1], out[1][1]}, launcher);
	for (int s = 0; s < STREAMS; s++) {
		close(out[s][1]);
		k->stream[s].fd = out[s][0];
		fcntl(out[s][0], F_SETFL, O_NONBLOCK);
	}
	for (char **v = env; *v; v++)
		free(*v);
	free(env);
	k->running = k->pid > 0;
	return k->running ? 0 : err_errno(e, EXIT_IO, "cannot start rank %d", r);
}

/* Our own file by its name, so that ranks carry it too; a file that was replaced is still behind /proc. */
static void find_binary(struct job *job)
{
	ssize_t n = readlink("/proc/self/exe", job->binary, sizeof job->binary - 1);
	job->binary[n > 0 ? n : 0] = 0;
	if (access(job->binary, X_OK))
		snprintf(job->binary, sizeof job->binary, "/proc/self/exe");
}

/* Ranks inherit it, like the rest of the environment. */
static void share_threads(const cpu_set_t *all, int n)
{
	char text[16];
	int share = CPU_COUNT(all) / n;
	snprintf(text, sizeof text, "%d", share > 1 ? share : 1);
	setenv("OMP_NUM_THREADS", text, 0);
}

/* ---- stopping ---- */

static void signal_all(struct job *job, int number)
{
	for (int r = 0; r < job->n; r++)
		if (job->rank[r].running && kill(-job->rank[r].pid, number))
			kill(job->rank[r].pid, number);
}

/* The first failure decides the exit code. The others get `patience_ms` to end on their own, then TERM, then
 * KILL: a rank that waits for a dead one does not heed TERM. */
static void fail_job(struct job *job, int code, int patience_ms)
{
	if (job->failing)
		return;
	job->failing = true;
	job->code = code;
	job->term_at_ms = 1e3 * clock_now_s() + patience_ms;
	job->kill_at_ms = job->term_at_ms + GRACE_MS;
}

static void stop_late_ranks(struct job *job)
{
	double now = 1e3 * clock_now_s();
	if (job->term_at_ms && now >= job->term_at_ms) {
		for (int r = 0; r < job->n; r++)
			job->rank[r].stopped_by_us |= job->rank[r].running;
		job->term_at_ms = 0;
		signal_all(job, SIGTERM);
	}
	if (job->failing && now >= job->kill_at_ms)
		signal_all(job, SIGKILL);
}

/* ---- what happens ---- */

static void rank_ended(struct job *job, int r, int status)
{
	struct rank *k = &job->rank[r];
	int code = WIFEXITED(status) ? WEXITSTATUS(status) : EXIT_INTERNAL;
	k->running = false;
	if (k->stopped_by_us)
		return;
	if (WIFSIGNALED(status)) {
		int number = WTERMSIG(status);
		if (number == job->forwarded)
			code = 128 + number;
		else
			say("rank %d (process %d) was killed by signal %d (%s); the others are stopped", r,
			    (int)k->pid, number, strsignal(number));
		fail_job(job, code, 0);
	} else if (!job->failing && k->attached) {
		say("rank %d (process %d) left without shutting down, exit code %d; the others are stopped",
		    r, (int)k->pid, code);
		fail_job(job, code ? code : EXIT_INTERNAL, 0);
	} else if (code) {
		/* It never joined, or it left in order and is the one that carries the code. */
		fail_job(job, code, PATIENCE_MS);
		job->code = code > job->code ? code : job->code;
	}
}

static void take_events(struct job *job)
{
	struct host_event v;
	while (read(job->events[0], &v, sizeof v) == sizeof v) {
		if (v.rank < 0 || v.rank >= job->n)
			continue;
		if (v.kind == HOST_ABORTED)
			fail_job(job, v.code > 0 && v.code < 256 ? v.code : EXIT_INTERNAL, 0);
		else
			job->rank[v.rank].attached = v.kind == HOST_JOINED;
	}
}

static void reap(struct job *job)
{
	int status;
	for (int r = 0; r < job->n; r++)
		if (job->rank[r].running && waitpid(job->rank[r].pid, &status, WNOHANG) == job->rank[r].pid) {
			take_events(job); /* said before the process could end */
			rank_ended(job, r, status);
		}
}

static void take_signals(struct job *job)
{
	struct signalfd_siginfo info;
	while (read(job->signals, &info, sizeof info) == sizeof info)
		if (info.ssi_signo != SIGCHLD) {
			job->forwarded = (int)info.ssi_signo;
			signal_all(job, job->forwarded);
		}
}

static void put(int fd, const char *data, size_t bytes)
{
	while (bytes) {
		ssize_t n = write(fd, data, bytes);
		if (n < 0 && errno != EINTR)
			return; /* nobody reads any more; the ranks go on */
		data += n > 0 ? n : 0;
		bytes -= n > 0 ? (size_t)n : 0;
	}
}

/* Passes on whole lines; what is left waits for its end. */
static void pass_on(struct stream *s, int fd, bool at_end)
{
	size_t n = s->line.length;
	while (n && s->line.data[n - 1] != '\n')
		n--;
	if (at_end || (!n && s->line.length > LINE_BYTES))
		n = s->line.length;
	if (!n)
		return;
	put(fd, s->line.data, n);
	memmove(s->line.data, s->line.data + n, s->line.length - n);
	s->line.length -= n;
}

static void take_output(struct stream *s, int fd)
{
	char bytes[LINE_BYTES];
	ssize_t n = 0;
	while (s->fd >= 0 && (n = read(s->fd, bytes, sizeof bytes)) > 0) {
		buf_add(&s->line, bytes, (size_t)n);
		pass_on(s, fd, false);
	}
	if (s->fd >= 0 && (n == 0 || (errno != EAGAIN && errno != EINTR))) {
		pass_on(s, fd, true);
		close(s->fd);
		s->fd = -1;
	}
}

static bool any_running(const struct job *job)
{
	for (int r = 0; r < job->n; r++)
		if (job->rank[r].running)
			return true;
	return false;
}

static void watch(struct job *job)
{
	size_t n = 2 + (size_t)job->n * STREAMS;
	struct pollfd *fds = mem_array(n, sizeof *fds);
	while (any_running(job)) {
		fds[0] = (struct pollfd){.fd = job->signals, .events = POLLIN};
		fds[1] = (struct pollfd){.fd = job->events[0], .events = POLLIN};
		for (size_t i = 2; i < n; i++)
			fds[i] = (struct pollfd){.fd = job->rank[i / STREAMS - 1].stream[i % STREAMS].fd,
			                         .events = POLLIN};
		poll(fds, n, job->failing ? 50 : 1000);
		take_signals(job);
		for (size_t i = 2; i < n; i++)
			if (fds[i].revents)
				take_output(&job->rank[i / STREAMS - 1].stream[i % STREAMS],
				            STDOUT_FILENO + (int)(i % STREAMS));
		take_events(job);
		reap(job);
		stop_late_ranks(job);
	}
	free(fds);
}

static void finish_output(struct job *job)
{
	for (int r = 0; r < job->n; r++)
		for (int s = 0; s < STREAMS; s++) {
			struct stream *t = &job->rank[r].stream[s];
			take_output(t, STDOUT_FILENO + s);
			pass_on(t, STDOUT_FILENO + s, true);
			if (t->fd >= 0)
				close(t->fd);
			buf_free(&t->line);
		}
}

/* Signals come through a descriptor; blocked before any thread exists, so that none of them takes one. */
static int listen_to_signals(struct job *job, struct err *e)
{
	static const int heard[] = {SIGCHLD, SIGINT, SIGTERM, SIGUSR1, SIGUSR2};
	sigset_t mask;
	sigemptyset(&mask);
	for (size_t i = 0; i < sizeof heard / sizeof *heard; i++)
		sigaddset(&mask, heard[i]);
	sigprocmask(SIG_BLOCK, &mask, &job->old_mask);
	job->signals = signalfd(-1, &mask, SFD_NONBLOCK | SFD_CLOEXEC);
	if (job->signals < 0 || pipe2(job->events, O_CLOEXEC))
		return err_errno(e, EXIT_IO, "cannot listen to signals");
	fcntl(job->events[0], F_SETFL, O_NONBLOCK);
	return 0;
}

int launch_main(int argc, char **argv)
{
	struct job job = {0};
	struct err e = {0};
	cpu_set_t all;
	int rc = parse(&job, argc, argv);
	if (rc >= 0)
		return rc;
	job.rank = mem_array((size_t)job.n, sizeof *job.rank);
	for (int r = 0; r < job.n; r++)
		job.rank[r].stream[0].fd = job.rank[r].stream[1].fd = -1;
	sched_getaffinity(0, sizeof all, &all);
	share_threads(&all, job.n);
	find_binary(&job);
	rc = listen_to_signals(&job, &e);
	if (!rc)
		rc = host_start(&job.host, job.n, job.events[1], &e);
	for (int r = 0; r < job.n && !rc; r++)
		rc = start_rank(&job, r, &all, &e);
	if (rc) {
		say("%s", e.text);
		fail_job(&job, rc, 0);
	}
	watch(&job);
	finish_output(&job);
	host_stop(job.host);
	free(job.rank);
	free(job.argv);
	return job.code;
}
