/* Transport `ucx`: ranks are processes; shared memory on a node, InfiniBand or TCP between nodes. Tagged
 * messages, one endpoint a peer. It gives the core away while it waits, since ranks may outnumber cores. */
#include "base/err.h"
#include "base/mem.h"
#include "comm/boot.h"
#include "comm/link.h"

#include <sched.h>
#include <stdlib.h>
#include <time.h>
#include <ucp/api/ucp.h>

enum { POLLS = 64, YIELDS = 2000, NAP_NS = 50 * 1000 };

struct ucx_link {
	struct link base;
	ucp_context_h context;
	ucp_worker_h worker;
	ucp_ep_h *ep; /* [size] */
	ucp_address_t *address;
};

static struct ucx_link *self_of(struct link *l)
{
	return (struct ucx_link *)l;
}

static int ucx_error(struct err *e, const char *what, ucs_status_t status)
{
	return err_set(e, EXIT_UNAVAILABLE, "transport ucx: %s: %s", what, ucs_status_string(status));
}

static void finish(struct comm_request *r, ucs_status_t status)
{
	r->is_done = true;
	r->handle = NULL;
	if (status == UCS_ERR_MESSAGE_TRUNCATED)
		r->error = LINK_SIZE_DIFFERS;
	else if (status != UCS_OK && !r->error)
		r->error = LINK_LOST;
}

static void received(void *request, ucs_status_t status, const ucp_tag_recv_info_t *info, void *user)
{
	(void)request;
	struct comm_request *r = user;
	if (status == UCS_OK && info->length != r->bytes)
		r->error = LINK_SIZE_DIFFERS;
}

/* NULL: done already; an error; or a request to ask for later. */
static void started(struct comm_request *r, ucs_status_ptr_t p)
{
	if (UCS_PTR_IS_PTR(p))
		r->handle = p;
	else
		finish(r, UCS_PTR_STATUS(p));
}

static int ucx_send(struct link *l, struct comm_request *r, int peer, struct err *e)
{
	(void)e;
	ucp_request_param_t param = {0};
	started(r, ucp_tag_send_nbx(self_of(l)->ep[peer], r->data, r->bytes, r->tag, &param));
	return 0;
}

static int ucx_recv(struct link *l, struct comm_request *r, int peer, struct err *e)
{
	(void)peer, (void)e;
	ucp_tag_recv_info_t info = {.length = r->bytes};
	ucp_request_param_t param = {.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK |
	                                             UCP_OP_ATTR_FIELD_USER_DATA |
	                                             UCP_OP_ATTR_FIELD_RECV_INFO,
	                             .cb = {.recv = received},
	                             .user_data = r,
	                             .recv_info = {.tag_info = &info}};
	started(r, ucp_tag_recv_nbx(self_of(l)->worker, r->data, r->bytes, r->tag, ~(ucp_tag_t)0, &param));
	if (r->is_done && info.length != r->bytes)
		r->error = LINK_SIZE_DIFFERS;
	return 0;
}

static bool ucx_done(struct link *l, struct comm_request *r)
{
	(void)l;
	if (r->is_done)
		return true;
	ucs_status_t status = ucp_request_check_status(r->handle);
	if (status == UCS_INPROGRESS)
		return false;
	ucp_request_free(r->handle);
	finish(r, status);
	return true;
}

static void ucx_pause(struct link *l, struct comm_request *r, unsigned round)
{
	(void)r;
	for (int i = 0; i < POLLS; i++)
		if (ucp_worker_progress(self_of(l)->worker))
			return;
	if (round < YIELDS)
		sched_yield();
	else
		nanosleep(&(struct timespec){0, NAP_NS}, NULL);
}

static void ucx_cancel(struct link *l, struct comm_request *r)
{
	if (r->is_done)
		return;
	ucp_request_cancel(self_of(l)->worker, r->handle);
	for (int i = 0; i < 1000 && !ucx_done(l, r); i++)
		ucp_worker_progress(self_of(l)->worker);
}

static int ucx_connect(struct link *l, const struct boot *boot, struct err *e)
{
	struct ucx_link *u = self_of(l);
	u->ep = mem_array((size_t)l->size, sizeof *u->ep);
	for (int r = 0; r < l->size; r++) {
		ucp_ep_params_t param = {.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS,
		                         .address = (const ucp_address_t *)boot->peer[r].address};
		ucs_status_t status = ucp_ep_create(u->worker, &param, &u->ep[r]);
		if (status != UCS_OK)
			return err_set(e, EXIT_UNAVAILABLE, "transport ucx: cannot reach rank %d on %s: %s",
			               r, boot->peer[r].host, ucs_status_string(status));
	}
	return 0;
}

static void close_endpoint(struct ucx_link *u, ucp_ep_h ep)
{
	ucp_request_param_t param = {0};
	ucs_status_ptr_t p = ucp_ep_close_nbx(ep, &param);
	if (!UCS_PTR_IS_PTR(p))
		return;
	for (int i = 0; i < 100000 && ucp_request_check_status(p) == UCS_INPROGRESS; i++)
		if (!ucp_worker_progress(u->worker))
			sched_yield();
	ucp_request_free(p);
}

static void ucx_close(struct link *l, bool orderly)
{
	struct ucx_link *u = self_of(l);
	/* Where ranks do not close together, waiting for them would hang; the process ends soon anyway. */
	if (orderly) {
		for (int r = 0; u->ep && r < l->size; r++)
			close_endpoint(u, u->ep[r]);
		ucp_worker_release_address(u->worker, u->address);
		ucp_worker_destroy(u->worker);
		ucp_cleanup(u->context);
	}
	free(u->ep);
	link_free_common(l);
	free(u);
}

static const struct link_ops ucx_ops = {.name = "ucx",
                                        .send = ucx_send,
                                        .recv = ucx_recv,
                                        .done = ucx_done,
                                        .pause = ucx_pause,
                                        .cancel = ucx_cancel,
                                        .connect = ucx_connect,
                                        .close = ucx_close};

static int ucx_probe(int world_size, struct err *e)
{
	(void)world_size, (void)e;
	return 0;
}

static ucs_status_t open_worker(struct ucx_link *u)
{
	ucp_config_t *config;
	size_t bytes = 0;
	ucp_params_t params = {.field_mask = UCP_PARAM_FIELD_FEATURES, .features = UCP_FEATURE_TAG};
	ucp_worker_params_t worker = {.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE,
	                              .thread_mode = UCS_THREAD_MODE_SINGLE};
	ucs_status_t status = ucp_config_read(NULL, NULL, &config);
	if (status != UCS_OK)
		return status;
	status = ucp_init(&params, config, &u->context);
	ucp_config_release(config);
	if (status != UCS_OK)
		return status;
	status = ucp_worker_create(u->context, &worker, &u->worker);
	if (status == UCS_OK)
		status = ucp_worker_get_address(u->worker, &u->address, &bytes);
	u->base.address = u->address;
	u->base.address_bytes = bytes;
	return status;
}

static int ucx_open(struct link **out, struct boot *boot, const struct comm_options *options, struct err *e)
{
	struct ucx_link *u = mem_array(1, sizeof *u);
	ucs_status_t status = open_worker(u);
	if (status != UCS_OK) {
		free(u);
		return ucx_error(e, "cannot start", status);
	}
	u->base.ops = &ucx_ops;
	link_init(&u->base, boot->rank, boot->size, options);
	*out = &u->base;
	return 0;
}

const struct transport transport_ucx = {"ucx", ucx_probe, ucx_open};
