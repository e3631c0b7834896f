#include "kernels/cpu/router.h"

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
