/* Transport `ucx`: ranks are processes; OpenUCX picks shared memory, InfiniBand or TCP. UCX_TLS and its
 * other variables stay the user's. Waiting gives the core away: a few rounds of progress, then sched_yield,
 * then sleep on the worker's descriptor, so more ranks than cores still make progress. */
#include "comm/link.h"
#include "comm/boot.h"
#include "base/err.h"
#include "base/mem.h"

#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <ucp/api/ucp.h>
#include <ucs/debug/debug.h>

enum { SPIN_ROUNDS = 64, YIELD_ROUNDS = 256, SLEEP_MS = 20, CLOSE_SECONDS = 5 };

struct ucx_link {
	struct link base;
	ucp_context_h context;
	ucp_worker_h worker;
	ucp_address_t *address;
	int event_fd;
	const struct boot_peer *peer;
	ucp_ep_h *ep; /* [size], made when first needed */
};

static struct ucx_link *ucx_of(struct link *l)
{
	return (struct ucx_link *)l;
}

static void on_sent(void *request, ucs_status_t status, void *user)
{
	(void)request;
	struct comm_request *r = user;
	r->error = status == UCS_OK ? LINK_OK : LINK_LOST;
	r->is_done = true;
}

static int error_of_recv(const struct comm_request *r, ucs_status_t status, size_t length_bytes)
{
	if (status == UCS_ERR_MESSAGE_TRUNCATED)
		return LINK_SIZE_DIFFERS;
	if (status != UCS_OK)
		return LINK_LOST;
	return length_bytes == r->bytes ? LINK_OK : LINK_SIZE_DIFFERS;
}

static void on_received(void *request, ucs_status_t status, const ucp_tag_recv_info_t *info, void *user)
{
	(void)request;
	struct comm_request *r = user;
	r->error = error_of_recv(r, status, status == UCS_OK ? info->length : 0);
	r->is_done = true;
}

static int endpoint_of(struct ucx_link *l, int peer, ucp_ep_h *out, struct err *e)
{
	if (!l->ep[peer]) {
		const ucp_ep_params_t p = {.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS,
		                           .address = l->peer[peer].address};
		ucs_status_t status = ucp_ep_create(l->worker, &p, &l->ep[peer]);
		if (status != UCS_OK) {
			l->ep[peer] = NULL;
			return err_set(e, EXIT_UNAVAILABLE,
			               "rank %d (%s) cannot reach rank %d (%s) over UCX: %s; see UCX_TLS and "
			               "UCX_NET_DEVICES",
			               l->base.rank, l->peer[l->base.rank].host, peer, l->peer[peer].host,
			               ucs_status_string(status));
		}
	}
	*out = l->ep[peer];
	return 0;
}

static int ucx_send(struct link *base, struct comm_request *r, int peer, struct err *e)
{
	struct ucx_link *l = ucx_of(base);
	ucp_ep_h ep = NULL;
	const ucp_request_param_t p = {.op_attr_mask =
	                                       UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA,
	                               .cb.send = on_sent,
	                               .user_data = r};
	int rc = endpoint_of(l, peer, &ep, e);
	if (rc)
		return rc;
	ucs_status_ptr_t request = ucp_tag_send_nbx(ep, r->data, r->bytes, r->tag, &p);
	if (UCS_PTR_IS_PTR(request))
		r->handle = request;
	else
		on_sent(NULL, UCS_PTR_STATUS(request), r);
	return 0;
}

static int ucx_recv(struct link *base, struct comm_request *r, int peer, struct err *e)
{
	(void)peer, (void)e;
	/* Never completed on the spot: only the callback is told the length (UCX 1.13). */
	const ucp_request_param_t p = {.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK |
	                                               UCP_OP_ATTR_FIELD_USER_DATA |
	                                               UCP_OP_ATTR_FLAG_NO_IMM_CMPL,
	                               .cb.recv = on_received,
	                               .user_data = r};
	ucs_status_ptr_t request =
	        ucp_tag_recv_nbx(ucx_of(base)->worker, r->data, r->bytes, r->tag, ~0ull, &p);
	if (UCS_PTR_IS_PTR(request))
		r->handle = request;
	else
		on_received(NULL, UCS_PTR_STATUS(request), &(ucp_tag_recv_info_t){.length = r->bytes}, r);
	return 0;
}

static bool ucx_done(struct link *base, struct comm_request *r)
{
	(void)base;
	if (r->is_done && r->handle) {
		ucp_request_free(r->handle);
		r->handle = NULL;
	}
	return r->is_done;
}

static void ucx_pause(struct link *base, struct comm_request *r, unsigned round)
{
	(void)r;
	struct ucx_link *l = ucx_of(base);
	if (ucp_worker_progress(l->worker) || round < SPIN_ROUNDS)
		return;
	if (round < YIELD_ROUNDS) {
		sched_yield();
		return;
	}
	/* An armed worker's descriptor becomes readable when something comes; not armed = it has already
	 * come. */
	if (ucp_worker_arm(l->worker) == UCS_OK) {
		struct pollfd fd = {.fd = l->event_fd, .events = POLLIN};
		poll(&fd, 1, SLEEP_MS);
	}
}

static bool ucx_progress(struct link *base)
{
	bool any = false;
	while (ucp_worker_progress(ucx_of(base)->worker))
		any = true;
	return any;
}

static void ucx_cancel(struct link *base, struct comm_request *r)
{
	struct ucx_link *l = ucx_of(base);
	if (!ucx_done(base, r) && r->handle)
		ucp_request_cancel(l->worker, r->handle);
	for (int i = 0; i < 1000 && !ucx_done(base, r); i++)
		ucp_worker_progress(l->worker);
}

static int ucx_connect(struct link *base, const struct boot *boot, struct err *e)
{
	struct ucx_link *l = ucx_of(base);
	l->peer = boot->peer;
	for (int i = 0; i < boot->size; i++)
		if (!boot->peer[i].address_bytes)
			return err_set(e, EXIT_UNAVAILABLE, "rank %d (%s) has told no UCX address", i,
			               boot->peer[i].host);
	return 0;
}

/* Progress until the request has ended, for at most CLOSE_SECONDS. */
static void drain(struct ucx_link *l, ucs_status_ptr_t request)
{
	time_t until = time(NULL) + CLOSE_SECONDS;
	if (!UCS_PTR_IS_PTR(request))
		return;
	while (ucp_request_check_status(request) == UCS_INPROGRESS && time(NULL) < until)
		if (!ucp_worker_progress(l->worker))
			sched_yield();
	ucp_request_free(request);
}

/* All have said all (the caller's barrier); what is on its way leaves; then, by another road, all have done
 * so. Only now may a worker vanish: closing endpoints one by one would talk to peers that are gone. */
static void ucx_close(struct link *base, bool orderly)
{
	struct ucx_link *l = ucx_of(base);
	struct err ignored;
	const ucp_request_param_t p = {0};
	if (orderly) {
		drain(l, ucp_worker_flush_nbx(l->worker, &p));
		boot_fence(base->boot, &ignored);
	}
	ucp_worker_release_address(l->worker, l->address);
	/* After an error a worker with live requests is left to the end of the process. */
	if (orderly || !l->peer) {
		ucp_worker_destroy(l->worker);
		ucp_cleanup(l->context);
	}
	free(l->ep);
	link_free_common(base);
	free(l);
}

static const struct link_ops ucx_ops = {
        .name = "ucx",
        .send = ucx_send,
        .recv = ucx_recv,
        .done = ucx_done,
        .pause = ucx_pause,
        .progress = ucx_progress,
        .cancel = ucx_cancel,
        .connect = ucx_connect,
        .close = ucx_close,
};

/* The library takes over fatal signals when it is loaded, before main could say otherwise in the environment.
 * They are given back, so that a fault ends the process as its own code wants, unless the user chose. */
static void signals_give_back(void)
{
	static const int taken[] = {SIGILL, SIGSEGV, SIGBUS, SIGFPE};
	if (getenv("UCX_ERROR_SIGNALS") || getenv("UCX_HANDLE_ERRORS"))
		return;
	for (size_t i = 0; i < sizeof taken / sizeof *taken; i++)
		ucs_debug_disable_signal(taken[i]);
}

static int worker_open(struct ucx_link *l, struct err *e)
{
	const ucp_params_t params = {.field_mask = UCP_PARAM_FIELD_FEATURES | UCP_PARAM_FIELD_NAME,
	                             .features = UCP_FEATURE_TAG | UCP_FEATURE_WAKEUP,
	                             .name = "pentad"};
	const ucp_worker_params_t worker = {.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE,
	                                    .thread_mode = UCS_THREAD_MODE_SERIALIZED};
	ucp_config_t *config;
	ucs_status_t status = ucp_config_read(NULL, NULL, &config);
	if (status != UCS_OK)
		return err_set(e, EXIT_UNAVAILABLE, "UCX: cannot read its configuration: %s",
		               ucs_status_string(status));
	status = ucp_init(&params, config, &l->context);
	ucp_config_release(config);
	if (status != UCS_OK)
		return err_set(e, EXIT_UNAVAILABLE, "UCX: cannot start: %s; see UCX_TLS",
		               ucs_status_string(status));
	status = ucp_worker_create(l->context, &worker, &l->worker);
	if (status != UCS_OK) {
		ucp_cleanup(l->context);
		return err_set(e, EXIT_UNAVAILABLE,
		               "UCX: cannot make a worker: %s; see UCX_TLS and UCX_NET_DEVICES",
		               ucs_status_string(status));
	}
	status = ucp_worker_get_efd(l->worker, &l->event_fd);
	if (status == UCS_OK)
		status = ucp_worker_get_address(l->worker, &l->address, &l->base.address_bytes);
	if (status != UCS_OK) {
		ucp_worker_destroy(l->worker);
		ucp_cleanup(l->context);
		return err_set(e, EXIT_UNAVAILABLE, "UCX: no address or event descriptor: %s; see UCX_TLS",
		               ucs_status_string(status));
	}
	l->base.address = l->address;
	return 0;
}

static int ucx_open(struct link **out, struct boot *boot, const struct comm_options *options, struct err *e)
{
	struct ucx_link *l = mem_array(1, sizeof *l);
	signals_give_back();
	int rc = worker_open(l, e);
	if (rc) {
		free(l);
		return rc;
	}
	l->base.ops = &ucx_ops;
	l->ep = mem_array(boot->size, sizeof *l->ep);
	link_init(&l->base, boot->rank, boot->size, options);
	*out = &l->base;
	return 0;
}

static int ucx_probe(int world_size, struct err *e)
{
	(void)world_size;
	(void)e;
	return 0;
}

const struct transport transport_ucx = {"ucx", ucx_probe, ucx_open};
