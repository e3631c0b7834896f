#include "graph/carry.h"
#include "base/err.h"

/* Which call of a group an operation is, and how many elements it is told: of the whole, or of a part. */
static const struct {
	bool known, of_part, from_part;
	enum group_kind kind;
} calls[OP_COUNT] = {
        [OP_all_reduce] = {true, false, false, GROUP_all_reduce},
        [OP_all_gather] = {true, true, false, GROUP_all_gather},
        [OP_reduce_scatter] = {true, false, false, GROUP_reduce_scatter}, /* its output is the part */
        [OP_share] = {true, true, true, GROUP_all_gather}, /* each sends its part of what it has */
        [OP_shift] = {true, false, false, GROUP_shift},
        [OP_all_to_all] = {true, true, false, GROUP_all_to_all},
};

/* The rows that sizes say; they are on the device, and the host must know them. */
static int count(const struct backend *backend, struct stream *stream, const struct comm *comm,
                 struct carried c, size_t *out, size_t *in, struct err *e)
{
	c.sizes.data = (void *)backend->counts(stream, &c.sizes, e);
	return c.sizes.data ? carry_count_rows(&c, comm, out, in, e) : e->code;
}

int carry_on_device(const struct backend *backend, struct stream *stream, const struct comm *comm,
                    struct group *group, enum op op, const struct carried *c, const char *where,
                    uint64_t *ticket, struct err *e)
{
	size_t out[CARRY_MAX_RANKS], in[CARRY_MAX_RANKS];
	size_t whole = (size_t)tensor_count(&c->out), part = whole / (size_t)comm->size;
	size_t each = dtype_rows[c->out.dtype].bytes;
	struct group_call call = {.kind = calls[op].kind,
	                          .send = c->in.data,
	                          .recv = c->out.data,
	                          .count = calls[op].of_part ? part : whole,
	                          .dtype = (enum dtype)c->out.dtype,
	                          .peer = c->arg->comm.step,
	                          .where = where};
	if (!calls[op].known)
		return err_set(e, EXIT_INTERNAL, "%s: no collective of devices (%s)", op_rows[op].name,
		               where);
	if (calls[op].from_part)
		call.send = (const char *)c->in.data + part * (size_t)comm->rank * each;
	if (c->sizes.data) {
		int rc = count(backend, stream, comm, *c, out, in, e);
		if (rc)
			return rc;
		call.send_counts = out;
		call.recv_counts = in;
	}
	return backend->groups->begin(group, &call, ticket, e);
}
