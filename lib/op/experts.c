#include "op/experts.h"
#include "base/err.h"

int route_check(const union op_arg *arg, const struct tensor *logits, const struct tensor *index,
                struct err *e)
{
	int64_t experts = tensor_row(logits), chosen = tensor_row(index), eligible = experts;
	int32_t groups = arg->route.num_groups, best = arg->route.group_topk;
	if (groups && (groups < 0 || experts % groups || best < 1 || best > groups))
		return err_set(
		        e, EXIT_INTERNAL,
		        "route: the best %d of %d groups of %lld experts; equal groups and at most all "
		        "of them are allowed",
		        best, groups, (long long)experts);
	if (groups)
		eligible = experts / groups * best;
	if (chosen != arg->route.topk || chosen > eligible)
		return err_set(e, EXIT_INTERNAL,
		               "route: %lld experts a row where %d are asked for; at most %lld can be chosen",
		               (long long)chosen, arg->route.topk, (long long)eligible);
	return 0;
}

int index_check(const char *op, const struct tensor *index, int64_t experts, struct err *e)
{
	const int32_t *expert = index->data;
	int64_t count = tensor_count(index);
	for (int64_t i = 0; i < count; i++)
		if (expert[i] < 0 || expert[i] >= experts)
			return err_set(e, EXIT_INTERNAL,
			               "%s: choice %lld is expert %d; 0 to %lld are allowed", op,
			               (long long)i, expert[i], (long long)experts - 1);
	return 0;
}

int sequence_check(const char *op, const union op_arg *arg, int64_t rows, const struct tensor *counts,
                   struct err *e)
{
	int32_t sequences = counts->dim[0], first = arg->balance.first_row;
	if (sequences > 1 && (arg->balance.sequence_rows < 1 || first < 0 ||
	                      first + rows > (int64_t)sequences * arg->balance.sequence_rows))
		return err_set(e, EXIT_INTERNAL,
		               "%s: rows [%d, %lld) are not among %d sequences of %d rows each", op, first,
		               (long long)(first + rows), sequences, arg->balance.sequence_rows);
	return 0;
}

int capacity_check(const union op_arg *arg, const struct tensor *in, const struct tensor *out, struct err *e)
{
	int64_t rows = in[0].dim[0], choices = tensor_row(&in[0]);
	int32_t ranks = arg->capacity.ranks, rank = arg->capacity.rank, length = arg->capacity.seq_length,
	        context = arg->capacity.context_ranks > 1 ? 2 * arg->capacity.context_ranks : 1;
	if (ranks < 1 || rank < 0 || rank >= ranks || rows % ranks || rows / ranks != out[0].dim[0])
		return err_set(e, EXIT_INTERNAL,
		               "capacity: %d rows are block %d of %d equal ones of %lld rows; they are not",
		               out[0].dim[0], rank, ranks, (long long)rows);
	if (length < 1 || length % context || rows % length)
		return err_set(e, EXIT_INTERNAL,
		               "capacity: %lld rows of samples of %d tokens in %d chunks; whole samples and "
		               "equal chunks are allowed",
		               (long long)rows, length, context);
	if (arg->capacity.limit < 0 || rows * choices > UINT32_MAX)
		return err_set(e, EXIT_INTERNAL,
		               "capacity: %lld choices, of which an expert keeps %d; below 2^32, and 0 or "
		               "more, are allowed",
		               (long long)(rows * choices), arg->capacity.limit);
	return 0;
}

int plan_check(const union op_arg *arg, const struct tensor *counts, struct err *e)
{
	int32_t ranks = counts->dim[0], experts = counts->dim[1], rank = arg->dispatch.rank;
	if (ranks != arg->dispatch.ranks || experts != arg->dispatch.experts || ranks < 1 ||
	    experts % ranks || rank < 0 || rank >= ranks || arg->dispatch.capacity < 0)
		return err_set(
		        e, EXIT_INTERNAL,
		        "dispatch_plan: counts of %d ranks and %d experts where rank %d of %d deals %d, "
		        "capacity %d; as many experts on each rank are allowed",
		        ranks, experts, rank, arg->dispatch.ranks, arg->dispatch.experts,
		        arg->dispatch.capacity);
	if (arg->dispatch.first < 0 || arg->dispatch.count < 0 ||
	    arg->dispatch.first > experts - arg->dispatch.count)
		return err_set(e, EXIT_INTERNAL, "dispatch_plan: experts %d to %d of %d", arg->dispatch.first,
		               arg->dispatch.first + arg->dispatch.count, experts);
	return 0;
}

int slot_check(const char *op, const struct tensor *slot, int64_t rows, struct err *e)
{
	const int32_t *at = slot->data;
	int64_t count = tensor_count(slot);
	for (int64_t i = 0; i < count; i++)
		if (at[i] >= rows)
			return err_set(e, EXIT_INTERNAL,
			               "%s: slot %d of choice %lld is outside the %lld rows", op, at[i],
			               (long long)i, (long long)rows);
	return 0;
}

static int own_check(const char *op, const union op_arg *arg, const struct tensor *sizes, struct err *e)
{
	int32_t experts = sizes->dim[1], first = arg->expert.first, count = arg->expert.count;
	const int32_t *size = sizes->data;
	if (first < 0 || count < 0 || count > experts - first)
		return err_set(e, EXIT_INTERNAL, "%s: own experts [%d, %d) are not among the %d of sizes", op,
		               first, first + count, experts);
	for (int32_t r = 0; r < sizes->dim[0]; r++)
		for (int32_t i = first; i < first + count; i++)
			if (size[(int64_t)r * experts + i] < 0)
				return err_set(
				        e, EXIT_INTERNAL,
				        "%s: rank %d sends %d rows to expert %d; 0 or more are allowed", op,
				        r, size[(int64_t)r * experts + i], i);
	return 0;
}

int expert_check(const char *op, const union op_arg *arg, const struct tensor *sizes, int64_t rows,
                 struct err *e)
{
	if (own_check(op, arg, sizes, e))
		return e->code;
	int64_t total = expert_total(arg, sizes);
	if (total > rows)
		return err_set(e, EXIT_INTERNAL,
		               "%s: sizes say %lld rows for experts [%d, %d); the tensors have %lld", op,
		               (long long)total, arg->expert.first, arg->expert.first + arg->expert.count,
		               (long long)rows);
	return 0;
}

int regroup_check(const union op_arg *arg, const struct tensor *sizes, int64_t sent, int64_t grouped,
                  struct err *e)
{
	union op_arg as_sent = *arg;
	as_sent.expert.pad = 0;
	if (expert_check("regroup", arg, sizes, grouped, e) ||
	    expert_check("regroup", &as_sent, sizes, sent, e))
		return e->code;
	for (int32_t i = 0; i < arg->expert.count && arg->expert.pad; i++)
		if (expert_sent(arg, sizes, i) > arg->expert.pad)
			return err_set(e, EXIT_INTERNAL,
			               "regroup: expert %d gets %lld rows; %d, to which it is filled up, "
			               "are allowed",
			               arg->expert.first + i, (long long)expert_sent(arg, sizes, i),
			               arg->expert.pad);
	return 0;
}

static int64_t fewest(const struct tensor *a, const struct tensor *b)
{
	return a->dim[0] < b->dim[0] ? a->dim[0] : b->dim[0];
}

int grouped_check(const char *op, const union op_arg *arg, const struct tensor *sizes, const struct tensor *x,
                  const struct tensor *y, const struct tensor *w, struct err *e)
{
	if (w->dim[0] != arg->expert.count * tensor_row(y) || tensor_row(w) != tensor_row(x))
		return err_set(
		        e, EXIT_INTERNAL,
		        "%s: weights [%d,%lld] of %d experts from %lld columns to %lld; [experts · to, "
		        "from] is allowed",
		        op, w->dim[0], (long long)tensor_row(w), arg->expert.count, (long long)tensor_row(x),
		        (long long)tensor_row(y));
	return expert_check(op, arg, sizes, fewest(x, y), e);
}

int activation_check(const char *op, const union op_arg *arg, const struct tensor *sizes,
                     const struct tensor *x, const struct tensor *y, const struct tensor *w, struct err *e)
{
	int64_t weights = tensor_count(w), rows = fewest(x, y);
	if (tensor_row(x) != (arg->expert.gated ? 2 : 1) * tensor_row(y))
		return err_set(e, EXIT_INTERNAL, "%s: %lld columns from %lld; %s are allowed", op,
		               (long long)tensor_row(y), (long long)tensor_row(x),
		               arg->expert.gated ? "half as many" : "as many");
	return expert_check(op, arg, sizes, weights < rows ? weights : rows, e);
}
