#include "graph/carry.h"
#include "base/err.h"

#include <string.h>

static int carry_all_reduce(const struct comm_job *j, struct err *e)
{
	if (j->out != j->in)
		memcpy(j->out, j->in, j->count * dtype_rows[j->dtype].bytes);
	return comm_all_reduce(j->comm, j->out, j->count, j->dtype, REDUCE_SUM, e);
}

static int carry_all_gather(const struct comm_job *j, struct err *e)
{
	return comm_all_gather(j->comm, j->in, j->out, j->count / (size_t)j->comm->size, j->dtype, e);
}

static int carry_reduce_scatter(const struct comm_job *j, struct err *e)
{
	return comm_reduce_scatter(j->comm, j->in, j->out, j->count, j->dtype, REDUCE_SUM, e);
}

static int carry_share(const struct comm_job *j, struct err *e)
{
	size_t part = j->count / (size_t)j->comm->size;
	const char *mine = (const char *)j->in + part * (size_t)j->comm->rank * dtype_rows[j->dtype].bytes;
	return comm_all_gather(j->comm, mine, j->out, part, j->dtype, e);
}

/* Everyone sends to the rank `step` places on and receives from the one as far before. */
static int carry_shift(const struct comm_job *j, struct err *e)
{
	int size = j->comm->size, step = (j->peer % size + size) % size;
	int to = (j->comm->rank + step) % size, from = (j->comm->rank - step + size) % size;
	struct comm_request request[2] = {{0}};
	if (!step) {
		memcpy(j->out, j->in, j->count * dtype_rows[j->dtype].bytes);
		return 0;
	}
	int rc = comm_irecv(j->comm, j->out, j->count, j->dtype, from, 0, &request[0], e);
	if (!rc)
		rc = comm_isend(j->comm, j->in, j->count, j->dtype, to, 0, &request[1], e);
	return rc ? rc : comm_wait(request, 2, e);
}

/* Rows that rank `from` has for the experts of rank `to`. */
static int64_t rows_between(const struct tensor *sizes, int from, int to)
{
	int32_t own = sizes->dim[1] / sizes->dim[0];
	const int32_t *row = (const int32_t *)sizes->data + (int64_t)from * sizes->dim[1] + (int64_t)to * own;
	int64_t rows = 0;
	for (int32_t i = 0; i < own; i++)
		rows += row[i];
	return rows;
}

int carry_count_rows(const struct carried *c, const struct comm *comm, size_t *out, size_t *in, struct err *e)
{
	int64_t going = 0, coming = 0;
	bool back = c->arg->comm.back;
	if (comm->size > CARRY_MAX_RANKS || c->sizes.dim[0] != comm->size)
		return err_set(e, EXIT_INTERNAL, "all_to_all: %d ranks; at most %d, one a row of sizes (%d)",
		               comm->size, CARRY_MAX_RANKS, c->sizes.dim[0]);
	for (int r = 0; r < comm->size; r++) {
		int64_t to = rows_between(&c->sizes, back ? r : comm->rank, back ? comm->rank : r),
		        from = rows_between(&c->sizes, back ? comm->rank : r, back ? r : comm->rank);
		out[r] = (size_t)(to * tensor_row(&c->in));
		in[r] = (size_t)(from * tensor_row(&c->in));
		going += to;
		coming += from;
	}
	if (going <= c->in.dim[0] && coming <= c->out.dim[0])
		return 0;
	return err_set(e, EXIT_INTERNAL, "all_to_all: %lld rows to send of %d, %lld to receive into %d",
	               (long long)going, c->in.dim[0], (long long)coming, c->out.dim[0]);
}

static int carry_counted_rows(const struct comm_job *j, const struct carried *c, struct err *e)
{
	size_t out[CARRY_MAX_RANKS], in[CARRY_MAX_RANKS];
	int rc = carry_count_rows(c, j->comm, out, in, e);
	return rc ? rc : comm_all_to_all_v(j->comm, j->in, out, j->out, in, j->dtype, e);
}

static int carry_all_to_all(const struct comm_job *j, struct err *e)
{
	const struct carried *c = j->more;
	return c->sizes.data ? carry_counted_rows(j, c, e)
	                     : comm_all_to_all(j->comm, j->in, j->out, j->count / (size_t)j->comm->size,
	                                       j->dtype, e);
}

carry_fn *carry_of(enum op op)
{
	static carry_fn *const table[OP_COUNT] = {
	        [OP_all_reduce] = carry_all_reduce,
	        [OP_all_gather] = carry_all_gather,
	        [OP_reduce_scatter] = carry_reduce_scatter,
	        [OP_share] = carry_share,
	        [OP_shift] = carry_shift,
	        [OP_all_to_all] = carry_all_to_all,
	};
	return table[op];
}
