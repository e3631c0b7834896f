/* pentad doctor: what this machine offers a run, what is wrong, and what to do about it. One function a
 * field; each adds rows. Under several ranks (srun --mpi=pmix, pentad launch) they meet, and rank 0 reports.
 */
#include "apps/commands.h"
#include "apps/options.h"
#include "base/clock.h"
#include "base/err.h"
#include "base/json.h"
#include "base/mem.h"
#include "base/sys.h"
#include "base/text.h"
#include "comm/boot.h"
#include "comm/comm.h"
#include "kernels/kernels.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <hdf5.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/statvfs.h>
#include <sys/vfs.h>
#include <unistd.h>

enum verdict { OK, WARN, FAIL };
static const char *const verdict_name[] = {"ok", "warn", "fail"};

struct finding {
	enum verdict verdict;
	char *what;
	const char *remedy; /* static storage; NULL where nothing is to be done */
};

struct findings {
	struct finding *at;
	size_t n, cap;
};

static void add(struct findings *f, enum verdict verdict, const char *remedy, const char *fmt, ...)
        __attribute__((format(printf, 4, 5)));
static void add(struct findings *f, enum verdict verdict, const char *remedy, const char *fmt, ...)
{
	char text[1024];
	va_list ap;
	va_start(ap, fmt);
	vsnprintf(text, sizeof text, fmt, ap);
	va_end(ap);
	f->at = mem_grow(f->at, f->n, &f->cap, sizeof *f->at);
	f->at[f->n++] = (struct finding){verdict, mem_strdup(text), verdict == OK ? NULL : remedy};
}

/* ---- libraries ---- */

/* The versions that run, not those we were compiled with: name, function that tells it, what is lost without.
 * They are looked up by name because any of them may be absent from a build. */
#define LIBRARIES(X)                                                                                    \
	X("libyaml", yaml_get_version_string, FAIL, "configuration files cannot be read")               \
	X("PMIx", PMIx_Get_version, WARN, "one rank only: install libpmix-dev and configure again")     \
	X("UCX", ucp_get_version_string, WARN, "one rank only: install libucx-dev and configure again") \
	X("zlib", zlibVersion, WARN, "no .gz input: install zlib1g-dev and configure again")            \
	X("utf8proc", utf8proc_version, WARN,                                                           \
	  "a smaller Unicode table: install libutf8proc-dev and configure again")

static const struct library {
	const char *name, *symbol;
	enum verdict without;
	const char *remedy;
} libraries[] = {
#define LIBRARY_ROW(name, symbol, without, remedy) {name, #symbol, without, remedy},
        LIBRARIES(LIBRARY_ROW)
#undef LIBRARY_ROW
};

static void check_libraries(struct findings *f)
{
	for (size_t i = 0; i < sizeof libraries / sizeof *libraries; i++) {
		const struct library *l = &libraries[i];
		const char *(*version)(void);
		void *symbol = dlsym(RTLD_DEFAULT, l->symbol);
		memcpy(&version, &symbol, sizeof version);
		if (symbol) {
			const char *text = version();
			int n = (int)strcspn(text, "(");
			add(f, OK, NULL, "%s: %.*s", l->name, n && text[n - 1] == ' ' ? n - 1 : n, text);
			continue;
		}
		add(f, l->without, l->remedy, "%s is not part of this build", l->name);
	}
	unsigned major, minor, release;
	H5get_libversion(&major, &minor, &release);
	bool same = major == H5_VERS_MAJOR && minor == H5_VERS_MINOR;
	add(f, same ? OK : WARN, "build against the HDF5 that runs, or mend LD_LIBRARY_PATH",
	    "HDF5: %u.%u.%u%s", major, minor, release,
	    same ? "" : ", while this build was made with another");
}

/* ---- processor ---- */

/* The value of "name : value" in a file of such lines, cut at `cap`; false where there is none. */
static bool read_field(const char *path, const char *name, char *out, size_t cap)
{
	char line[8192];
	bool found = false;
	FILE *file = fopen(path, "r");
	while (file && !found && fgets(line, sizeof line, file)) {
		char *colon = strchr(line, ':');
		if (strncmp(line, name, strlen(name)) || !colon)
			continue;
		colon += 1 + strspn(colon + 1, " \t");
		colon[strcspn(colon, "\n")] = 0;
		snprintf(out, cap, "%s", colon);
		found = true;
	}
	if (file)
		fclose(file);
	return found;
}

static bool has_word(const char *text, const char *word)
{
	size_t n = strlen(word);
	for (const char *at = text; (at = strstr(at, word)); at += n)
		if ((at == text || at[-1] == ' ') && (!at[n] || at[n] == ' '))
			return true;
	return false;
}

static void check_processor(struct findings *f)
{
	static const char *const useful[] = {"avx2", "avx512f", "avx512_bf16", "amx_bf16"};
	char name[256] = "unknown", flags[8192] = "";
	struct err e = {0};
	struct buf has = {0};
	buf_puts(&has, "");
	read_field("/proc/cpuinfo", "model name", name, sizeof name);
	read_field("/proc/cpuinfo", "flags", flags, sizeof flags);
	for (size_t i = 0; i < sizeof useful / sizeof *useful; i++)
		if (has_word(flags, useful[i]))
			buf_printf(&has, " %s", useful[i]);
	add(f, OK, NULL, "processor: %s;%s", name,
	    has.length ? has.data : " none of avx2, avx512f, avx512_bf16, amx_bf16");
	buf_free(&has);
	if (cpu_backend.probe(&e))
		add(f, FAIL, "use a build for this processor", "kernels: %s", e.text);
	else
		add(f, OK, NULL, "kernels: %s", cpu_backend.describe());
}

/* A host without one is as good as any. */
static void check_devices(struct findings *f)
{
	struct err e = {0};
	if (cuda_backend.probe(&e))
		add(f, OK, NULL, "CUDA: %s", e.text);
	else
		add(f, OK, NULL, "CUDA: %s", cuda_backend.describe());
}

static void check_cores(struct findings *f)
{
	cpu_set_t set;
	long online = sysconf(_SC_NPROCESSORS_ONLN);
	int usable = sched_getaffinity(0, sizeof set, &set) ? (int)online : CPU_COUNT(&set);
	const char *text = getenv("OMP_NUM_THREADS");
	add(f, OK, NULL, "processors: this process may use %d of %ld", usable, online);
	if (text && atoi(text) > usable)
		add(f, WARN, "set OMP_NUM_THREADS to processors / ranks of a node, or leave it unset",
		    "OMP_NUM_THREADS=%s, more threads than processors", text);
	else
		add(f, OK, NULL, "OMP_NUM_THREADS: %s",
		    text ? text : "unset, so processors / ranks of this host");
}

/* ---- memory ---- */

static double read_number(const char *path, double otherwise)
{
	double x = otherwise;
	FILE *file = fopen(path, "r");
	if (file && fscanf(file, "%lf", &x) != 1)
		x = otherwise;
	if (file)
		fclose(file);
	return x;
}

static void check_memory(struct findings *f)
{
	char text[64] = "0", size[32], limit_size[32];
	read_field("/proc/meminfo", "MemAvailable", text, sizeof text);
	double available = strtod(text, NULL) * 1024, limit = read_number("/sys/fs/cgroup/memory.max", 0);
	text_bytes(size, sizeof size, available);
	if (limit)
		add(f, limit < 1e9 ? WARN : OK, "ask for more memory (sbatch --mem)",
		    "memory: %s available, the job's limit is %s", size,
		    text_bytes(limit_size, sizeof limit_size, limit));
	else
		add(f, available < 1e9 ? WARN : OK, "end other programs, or train a smaller model",
		    "memory: %s available", size);
}

static void check_shared_memory(struct findings *f)
{
	struct statvfs s;
	char size[32];
	if (statvfs("/dev/shm", &s)) {
		add(f, WARN, "mount a tmpfs there; ranks of one node talk through it", "/dev/shm is missing");
		return;
	}
	double free_bytes = (double)s.f_bavail * (double)s.f_frsize;
	add(f, free_bytes < 64e6 ? WARN : OK,
	    "enlarge it (docker run --shm-size); ranks of one node talk through it", "/dev/shm: %s free",
	    text_bytes(size, sizeof size, free_bytes));
}

/* ---- Slurm, ranks ---- */

static void check_slurm(struct findings *f)
{
	char line[256], first[256] = "";
	bool pmix = false;
	const char *job = getenv("SLURM_JOB_ID"), *tasks = getenv("SLURM_STEP_NUM_TASKS");
	FILE *p = popen("command -v srun >/dev/null && timeout 5 srun --mpi=list 2>&1", "r");
	while (p && fgets(line, sizeof line, p)) {
		line[strcspn(line, "\n")] = 0;
		pmix |= strstr(line, "pmix") != NULL;
		if (!*first)
			memcpy(first, line, sizeof first);
	}
	if (p)
		pclose(p);
	if (!*first)
		add(f, OK, NULL, "Slurm: no srun here; `pentad launch` starts ranks on this host");
	else if (pmix)
		add(f, OK, NULL, "Slurm: `srun --mpi=list` names pmix");
	else if (strstr(first, "error") || strstr(first, "fatal"))
		add(f, WARN, "only of interest on a cluster: mend SLURM_CONF or /etc/slurm", "Slurm: %s",
		    first);
	else
		add(f, WARN, "ask the site for Slurm's PMIx plugin; without it a job is one rank",
		    "Slurm: `srun --mpi=list` does not name pmix");
	if (job)
		add(f, OK, NULL, "Slurm: job %s, %s tasks in this step", job, tasks ? tasks : "no");
}

/* Joins the others where there are others; *world and *boot are for leave(). */
static void check_ranks(struct findings *f, struct comm **world, struct boot **boot)
{
	struct err e = {0};
	struct boot_card card = {.version = PENTAD_VERSION, .timeout_s = 30};
	struct comm_options options = {.timeout_s = 30};
	double begin = clock_now_s();
	int rc = comm_start(world, boot, &card, &options, &e);
	if (!rc)
		rc = comm_barrier(*world, &e);
	if (rc)
		add(f, FAIL,
		    "see the message; `srun --mpi=pmix` or `pentad launch -n N` start ranks that meet",
		    "ranks: %s", e.text);
	else
		add(f, OK, NULL, "ranks: %d on %d node%s met over '%s' in %.0f ms", (*world)->size,
		    (*boot)->num_nodes, (*boot)->num_nodes > 1 ? "s" : "", comm_transport(*world),
		    1e3 * (clock_now_s() - begin));
}

/* ---- the current folder ---- */

/* statfs(2), linux/magic.h and the file systems' own headers. */
#define FILE_SYSTEMS(X)          \
	X(0xEF53, "ext4")        \
	X(0x58465342, "xfs")     \
	X(0x9123683E, "btrfs")   \
	X(0x01021994, "tmpfs")   \
	X(0x794c7630, "overlay") \
	X(0x6969, "nfs")         \
	X(0x0BD00BD3, "lustre")  \
	X(0x47504653, "gpfs")    \
	X(0x19830326, "beegfs")  \
	X(0x00C36400, "ceph")

static const char *file_system_name(unsigned long magic)
{
#define FILE_SYSTEM_ROW(number, name) {number, name},
	static const struct {
		unsigned long number;
		const char *name;
	} rows[] = {FILE_SYSTEMS(FILE_SYSTEM_ROW)};
#undef FILE_SYSTEM_ROW
	for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
		if (rows[i].number == magic)
			return rows[i].name;
	return "another file system";
}

/* MB/s of writing and flushing 8 MB, 0 with the reason in *e. */
static double measure_write(struct err *e)
{
	enum { BYTES = 8 << 20 };
	char path[] = "./pentad-doctor-XXXXXX";
	char *data = mem_aligned(BYTES);
	double rate = 0, begin = clock_now_s();
	int fd = mkstemp(path);
	memset(data, 0x5a, BYTES);
	if (fd < 0)
		err_errno(e, EXIT_IO, "no file can be made here");
	else if (sys_write_all(fd, data, BYTES) || sys.fsync(fd))
		err_errno(e, EXIT_IO, "8 MB cannot be written here");
	else
		rate = BYTES / 1e6 / (clock_now_s() - begin);
	if (fd >= 0) {
		close(fd);
		unlink(path);
	}
	free(data);
	return rate;
}

static void check_folder(struct findings *f)
{
	struct statfs s;
	struct err e = {0};
	char size[32];
	if (!statfs(".", &s)) {
		double free_bytes = (double)s.f_bavail * (double)s.f_bsize;
		const char *name = file_system_name((unsigned long)s.f_type & 0xffffffffu);
		bool is_memory = !strcmp(name, "tmpfs");
		add(f, free_bytes < 10e9 || is_memory ? WARN : OK,
		    is_memory ? "keep runs on a disk: this is memory"
		              : "free some; a checkpoint holds 12-16 bytes a parameter",
		    "this folder: %s, %s free", name, text_bytes(size, sizeof size, free_bytes));
	}
	double rate = measure_write(&e);
	if (!rate)
		add(f, FAIL, "go where you may write, or set run.dir to such a folder", "this folder: %s",
		    e.text);
	else
		add(f, rate < 50 ? WARN : OK,
		    "keep run.dir on a faster file system; each checkpoint waits for it",
		    "this folder: %.0f MB/s written and flushed", rate);
}

/* ---- report ---- */

static void print_text(const struct findings *f)
{
	for (size_t i = 0; i < f->n; i++) {
		const struct finding *x = &f->at[i];
		printf("%-4s %s%s%s\n", verdict_name[x->verdict], x->what, x->remedy ? " → " : "",
		       x->remedy ? x->remedy : "");
	}
}

static void print_json(const struct findings *f, enum verdict worst)
{
	struct buf b = {0};
	buf_printf(&b, "{\"status\": \"%s\", \"checks\": [", verdict_name[worst]);
	for (size_t i = 0; i < f->n; i++) {
		const struct finding *x = &f->at[i];
		buf_printf(&b, "%s\n  {\"status\": \"%s\", \"what\": ", i ? "," : "",
		           verdict_name[x->verdict]);
		json_put_string(&b, x->what, strlen(x->what));
		buf_puts(&b, ", \"remedy\": ");
		if (x->remedy)
			json_put_string(&b, x->remedy, strlen(x->remedy));
		else
			buf_puts(&b, "null");
		buf_puts(&b, "}");
	}
	buf_puts(&b, "\n]}\n");
	fputs(b.data, stdout);
	buf_free(&b);
}

static int report(struct findings *f, bool json, bool speaks)
{
	enum verdict worst = OK;
	for (size_t i = 0; i < f->n; i++)
		worst = f->at[i].verdict > worst ? f->at[i].verdict : worst;
	if (speaks && json)
		print_json(f, worst);
	else if (speaks)
		print_text(f);
	for (size_t i = 0; i < f->n; i++)
		free(f->at[i].what);
	free(f->at);
	return worst == FAIL ? EXIT_UNAVAILABLE : EXIT_DONE;
}

int doctor_main(int argc, char **argv)
{
	bool json = false;
	struct cli_option options[] = {{"json", CLI_FLAG, &json, NULL, "one object instead of lines"}};
	struct cli cli = {
	        .usage = "doctor [--json]",
	        .doc = "Says what this machine offers a run, what is wrong, and what to do. Exit code 69 "
	               "where something\nessential fails. Under `srun --mpi=pmix` the ranks meet.",
	        .example = "doctor",
	        .options = options,
	        .n = sizeof options / sizeof *options};
	struct findings f = {0};
	struct comm *world = NULL;
	struct boot *boot = NULL;
	int code;
	if (!cli_parse(&cli, argc, argv, &code))
		return code;
	cli_free(&cli);
	check_ranks(&f, &world, &boot);
	bool speaks = !world || world->rank == 0;
	add(&f, OK, NULL, "pentad %s", PENTAD_VERSION);
	if (speaks) {
		check_libraries(&f);
		check_processor(&f);
		check_devices(&f);
		check_cores(&f);
		check_memory(&f);
		check_shared_memory(&f);
		check_slurm(&f);
		check_folder(&f);
	}
	code = report(&f, json, speaks);
	comm_close(world);
	return boot ? boot_finish(boot, code) : code;
}
