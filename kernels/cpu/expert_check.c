#include "kernels/cpu/expert.h"

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
