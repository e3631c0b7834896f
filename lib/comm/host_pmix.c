/* The server half of libpmix. Upcalls run on its own thread: they answer at once and leave an event behind.
 */
#include "comm/host.h"
#include "base/err.h"
#include "base/mem.h"
#include "base/sys.h"

#include <pmix.h>
#include <pmix_server.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

extern char **environ;

struct host {
	int num_ranks;
	char folder[256];
	char name_space[PMIX_MAX_NSLEN + 1];
};

static int events_to;

static void tell(int kind, const pmix_proc_t *who, int code)
{
	struct host_event v = {kind, (int)who->rank, code};
	/* Smaller than PIPE_BUF: whole or not at all. The reader is gone only when all is over. */
	ssize_t n = write(events_to, &v, sizeof v);
	(void)n;
}

static pmix_status_t on_connected(const pmix_proc_t *who, void *object, pmix_op_cbfunc_t done, void *user)
{
	(void)object, (void)done, (void)user;
	tell(HOST_JOINED, who, 0);
	return PMIX_OPERATION_SUCCEEDED;
}

static pmix_status_t on_finalized(const pmix_proc_t *who, void *object, pmix_op_cbfunc_t done, void *user)
{
	(void)object, (void)done, (void)user;
	tell(HOST_LEFT, who, 0);
	return PMIX_OPERATION_SUCCEEDED;
}

static pmix_status_t on_abort(const pmix_proc_t *who, void *object, int code, const char message[],
                              pmix_proc_t procs[], size_t num_procs, pmix_op_cbfunc_t done, void *user)
{
	(void)object, (void)message, (void)procs, (void)num_procs, (void)done, (void)user;
	tell(HOST_ABORTED, who, code);
	return PMIX_OPERATION_SUCCEEDED;
}

/* libpmix has gathered what all local ranks gave; with one host that is everything. */
static pmix_status_t on_fence(const pmix_proc_t procs[], size_t num_procs, const pmix_info_t info[],
                              size_t num_info, char *data, size_t bytes, pmix_modex_cbfunc_t done, void *user)
{
	(void)procs, (void)num_procs, (void)info, (void)num_info;
	if (done)
		done(PMIX_SUCCESS, data, bytes, user, NULL, NULL);
	return PMIX_SUCCESS;
}

static pmix_status_t on_direct_modex(const pmix_proc_t *who, const pmix_info_t info[], size_t num_info,
                                     pmix_modex_cbfunc_t done, void *user)
{
	(void)who, (void)info, (void)num_info, (void)done, (void)user;
	return PMIX_ERR_NOT_FOUND;
}

static pmix_server_module_t module = {.client_connected = on_connected,
                                      .client_finalized = on_finalized,
                                      .abort = on_abort,
                                      .fence_nb = on_fence,
                                      .direct_modex = on_direct_modex};

/* Waits for the callback of a call that ends later. */
struct wait {
	pthread_mutex_t lock;
	pthread_cond_t ended;
	bool is_done;
	pmix_status_t status;
};

static void on_ended(pmix_status_t status, void *user)
{
	struct wait *w = user;
	pthread_mutex_lock(&w->lock);
	w->is_done = true;
	w->status = status;
	pthread_cond_signal(&w->ended);
	pthread_mutex_unlock(&w->lock);
}

static pmix_status_t wait_for(struct wait *w, pmix_status_t started)
{
	if (started != PMIX_SUCCESS)
		return started == PMIX_OPERATION_SUCCEEDED ? PMIX_SUCCESS : started;
	pthread_mutex_lock(&w->lock);
	while (!w->is_done)
		pthread_cond_wait(&w->ended, &w->lock);
	pthread_mutex_unlock(&w->lock);
	return w->status;
}

#define WAIT_INIT                                                             \
	{                                                                     \
		PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, false, 0 \
	}

static int failed(struct err *e, const char *what, pmix_status_t status)
{
	return err_set(e, EXIT_UNAVAILABLE, "PMIx server: %s: %s", what, PMIx_Error_string(status));
}

static char *list_of_ranks(int n)
{
	struct buf b = {0};
	for (int i = 0; i < n; i++)
		buf_printf(&b, i ? ",%d" : "%d", i);
	return b.data;
}

static pmix_status_t register_job(struct host *h)
{
	struct wait w = WAIT_INIT;
	uint32_t n = (uint32_t)h->num_ranks;
	char name[256] = "localhost", *nodes = NULL, *places = NULL, *ranks = list_of_ranks(h->num_ranks);
	gethostname(name, sizeof name - 1);
	pmix_status_t rc = PMIx_generate_regex(name, &nodes);
	if (rc == PMIX_SUCCESS)
		rc = PMIx_generate_ppn(ranks, &places);
	if (rc == PMIX_SUCCESS) {
		pmix_info_t info[6];
		PMIX_INFO_LOAD(&info[0], PMIX_JOB_SIZE, &n, PMIX_UINT32);
		PMIX_INFO_LOAD(&info[1], PMIX_UNIV_SIZE, &n, PMIX_UINT32);
		PMIX_INFO_LOAD(&info[2], PMIX_LOCAL_SIZE, &n, PMIX_UINT32);
		PMIX_INFO_LOAD(&info[3], PMIX_NODE_MAP, nodes, PMIX_REGEX);
		PMIX_INFO_LOAD(&info[4], PMIX_PROC_MAP, places, PMIX_REGEX);
		PMIX_INFO_LOAD(&info[5], PMIX_LOCAL_PEERS, ranks, PMIX_STRING);
		rc = wait_for(
		        &w, PMIx_server_register_nspace(h->name_space, h->num_ranks, info, 6, on_ended, &w));
		for (int i = 0; i < 6; i++)
			PMIX_INFO_DESTRUCT(&info[i]);
	}
	free(nodes);
	free(places);
	free(ranks);
	return rc;
}

static pmix_status_t register_ranks(struct host *h)
{
	pmix_status_t rc = PMIX_SUCCESS;
	for (int i = 0; i < h->num_ranks && rc == PMIX_SUCCESS; i++) {
		struct wait w = WAIT_INIT;
		pmix_proc_t p;
		PMIX_LOAD_PROCID(&p, h->name_space, i);
		rc = wait_for(&w, PMIx_server_register_client(&p, getuid(), getgid(), NULL, on_ended, &w));
	}
	return rc;
}

/* We may be a rank of somebody else ourselves (srun --pty bash): our ranks are ours. */
static void forget_outer_server(void)
{
	struct buf name = {0};
	for (char **at = environ; *at;) {
		size_t n = strcspn(*at, "=");
		if (strncmp(*at, "PMIX_", 5) || !strncmp(*at, "PMIX_MCA_", 9)) {
			at++;
			continue;
		}
		name.length = 0;
		buf_add(&name, *at, n);
		unsetenv(name.data);
		at = environ;
	}
	buf_free(&name);
}

static int folder_make(struct host *h, struct err *e)
{
	const char *parent = getenv("TMPDIR");
	snprintf(h->folder, sizeof h->folder, "%s/pentad-launch-XXXXXX", parent && *parent ? parent : "/tmp");
	if (!mkdtemp(h->folder))
		return err_errno(e, EXIT_IO, "%s: cannot make a folder for the PMIx server", h->folder);
	return 0;
}

int host_start(struct host **out, int num_ranks, int event_fd, struct err *e)
{
	struct host *h = mem_array(1, sizeof *h);
	struct err ignored;
	h->num_ranks = num_ranks;
	events_to = event_fd;
	snprintf(h->name_space, sizeof h->name_space, "pentad-launch-%ld", (long)getpid());
	forget_outer_server();
	if (folder_make(h, e)) {
		free(h);
		return e->code;
	}
	pmix_info_t info[2];
	PMIX_INFO_LOAD(&info[0], PMIX_SERVER_TMPDIR, h->folder, PMIX_STRING);
	PMIX_INFO_LOAD(&info[1], PMIX_SYSTEM_TMPDIR, h->folder, PMIX_STRING);
	pmix_status_t rc = PMIx_server_init(&module, info, 2);
	for (int i = 0; i < 2; i++)
		PMIX_INFO_DESTRUCT(&info[i]);
	if (rc != PMIX_SUCCESS) {
		sys_remove_tree(h->folder, &ignored);
		free(h);
		return failed(e, "cannot start", rc);
	}
	rc = register_job(h);
	rc = rc == PMIX_SUCCESS ? register_ranks(h) : rc;
	if (rc != PMIX_SUCCESS) {
		host_stop(h);
		return failed(e, "cannot register the ranks", rc);
	}
	*out = h;
	return 0;
}

int host_environment(struct host *h, int rank, char ***out, struct err *e)
{
	size_t n = 0;
	while (environ[n])
		n++;
	char **env = mem_array(n + 1, sizeof *env);
	for (size_t i = 0; i < n; i++)
		env[i] = mem_strdup(environ[i]);
	pmix_proc_t p;
	PMIX_LOAD_PROCID(&p, h->name_space, rank);
	pmix_status_t rc = PMIx_server_setup_fork(&p, &env);
	if (rc != PMIX_SUCCESS)
		return failed(e, "cannot make a rank's environment", rc);
	*out = env;
	return 0;
}

void host_stop(struct host *h)
{
	struct err ignored;
	if (!h)
		return;
	PMIx_server_finalize();
	sys_remove_tree(h->folder, &ignored);
	free(h);
}
