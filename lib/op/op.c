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
