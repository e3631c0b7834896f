#include "op/op.h"

const struct op_row op_rows[OP_COUNT] = {
#define OP(name, n_in, n_out, flags, doc) {#name, n_in, n_out, flags, doc},
#include "op/ops.def"
#undef OP
};

const struct dtype_row dtype_rows[DT_COUNT] = {
#define DTYPE(name, bytes, doc) {#name, bytes},
#include "op/dtypes.def"
#undef DTYPE
};

int64_t tensor_row(const struct tensor *t)
{
	int64_t n = 1;
	for (int k = 1; k < t->nd; k++)
		n *= t->dim[k];
	return n;
}

int64_t tensor_count(const struct tensor *t)
{
	return t->dim[0] * tensor_row(t);
}

int64_t tensor_bytes(const struct tensor *t)
{
	return tensor_count(t) * dtype_rows[t->dtype].bytes;
}

int64_t expert_rows(const union op_arg *arg, const struct tensor *sizes, int32_t i, int64_t *first)
{
	const int32_t *size = sizes->data;
	int32_t ranks = sizes->dim[0], experts = sizes->dim[1];
	int64_t begin = 0, rows = 0;
	for (int32_t k = 0; k <= i; k++) {
		begin += rows;
		rows = k < arg->expert.count ? arg->expert.pad : 0;
		for (int32_t r = 0; r < ranks && k < arg->expert.count && !arg->expert.pad; r++)
			rows += size[r * experts + arg->expert.first + k];
	}
	*first = begin;
	return rows;
}
