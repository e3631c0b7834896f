/* Columns cut apart and put together: copies of blocks, whatever their elements are. */
#include "kernels/cuda/rows.cuh"

/* Rows of `width` units: row n of block r lies `step` · r + `stride` · n units behind the first. */
struct side {
	int64_t stride, step;
};
struct blocks {
	int64_t rows, width;
	struct side from, to;
	int ranks;
};

template <class U> __global__ void copy_kernel(struct blocks b, const U *from, U *to)
{
	from += blockIdx.y * b.from.step;
	to += blockIdx.y * b.to.step;
	int64_t teams = (int64_t)gridDim.x * blockDim.y;
	for (int64_t n = (int64_t)blockIdx.x * blockDim.y + threadIdx.y; n < b.rows; n += teams)
		for (int64_t c = threadIdx.x; c < b.width; c += blockDim.x)
			to[n * b.to.stride + c] = from[n * b.from.stride + c];
}

/* `lanes` threads a row, so that narrow rows fill their warps too. */
static struct shape copy_shape(const struct blocks *b)
{
	unsigned lanes = 1;
	while (lanes < WARP && lanes < b->width)
		lanes *= 2;
	int64_t each = BLOCK / lanes, blocks = (b->rows + each - 1) / each, most = 1 << 16;
	struct shape s = {dim3((unsigned)(blocks < most ? blocks : most), (unsigned)b->ranks),
	                  dim3(lanes, (unsigned)each), 0};
	return s;
}

template <class U>
static int copy_units(struct stream *s, const char *name, struct blocks b, const char *from, char *to,
                      struct err *e)
{
	int64_t *const sizes[] = {&b.width, &b.from.stride, &b.from.step, &b.to.stride, &b.to.step};
	for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
		*sizes[i] /= (int64_t)sizeof(U);
	if (!b.width)
		return 0;
	return launch(s, name, copy_shape(&b), e, copy_kernel<U>, b, (const U *)from, (U *)to);
}

/* Sizes in bytes; in units of 16 of them where everything is whole, else of 2. */
static int copy_blocks(struct stream *s, const char *name, struct blocks b, const char *from, char *to,
                       struct err *e)
{
	uint64_t all = (uint64_t)(b.width | b.from.stride | b.from.step | b.to.stride | b.to.step) |
	               (uintptr_t)from | (uintptr_t)to;
	return (all % 16 == 0  ? copy_units<uint4>
	        : all % 4 == 0 ? copy_units<uint32_t>
	                       : copy_units<uint16_t>)(s, name, b, from, to, e);
}

static int64_t row_bytes(const struct tensor *t)
{
	return tensor_row(t) * dtype_rows[t->dtype].bytes;
}

static char *bytes_of(const struct tensor *t)
{
	return (char *)t->data;
}

int cuda_split_columns(struct stream *s, const union op_arg *arg, const struct tensor *in,
                       const struct tensor *out, struct err *e)
{
	(void)arg;
	int64_t first = row_bytes(&out[0]), rest = row_bytes(&out[1]), all = first + rest;
	struct blocks a = {in[0].dim[0], first, {all, 0}, {first, 0}, 1};
	struct blocks b = {in[0].dim[0], rest, {all, 0}, {rest, 0}, 1};
	int rc = copy_blocks(s, "split_columns", a, bytes_of(&in[0]), bytes_of(&out[0]), e);
	return rc ? rc : copy_blocks(s, "split_columns", b, bytes_of(&in[0]) + first, bytes_of(&out[1]), e);
}

int cuda_join_columns(struct stream *s, const union op_arg *arg, const struct tensor *in,
                      const struct tensor *out, struct err *e)
{
	(void)arg;
	int64_t first = row_bytes(&in[0]), rest = row_bytes(&in[1]), all = first + rest;
	struct blocks a = {out[0].dim[0], first, {first, 0}, {all, 0}, 1};
	struct blocks b = {out[0].dim[0], rest, {rest, 0}, {all, 0}, 1};
	int rc = copy_blocks(s, "join_columns", a, bytes_of(&in[0]), bytes_of(&out[0]), e);
	return rc ? rc : copy_blocks(s, "join_columns", b, bytes_of(&in[1]), bytes_of(&out[0]) + first, e);
}

/* Part by part: of the whole rows of `wide` into the ranks' blocks of `narrow`, or back. */
static int exchange_heads(struct stream *s, const char *name, const union op_arg *arg,
                          const struct tensor *wide, const struct tensor *narrow, bool join, struct err *e)
{
	int64_t ranks = arg->heads.ranks, bytes = dtype_rows[wide->dtype].bytes, before = 0;
	int64_t rows = wide->dim[0], short_row = row_bytes(wide) / ranks;
	int rc = 0;
	for (int i = 0; i < 3 && !rc; i++) {
		int64_t width = arg->heads.part[i] / ranks * bytes;
		struct side whole = {row_bytes(wide), width}, part = {short_row, rows * short_row};
		char *in_wide = bytes_of(wide) + before * ranks, *in_narrow = bytes_of(narrow) + before;
		struct blocks b = {rows, width, join ? part : whole, join ? whole : part, (int)ranks};
		rc = copy_blocks(s, name, b, join ? in_narrow : in_wide, join ? in_wide : in_narrow, e);
		before += width;
	}
	return rc;
}

int cuda_split_heads(struct stream *s, const union op_arg *arg, const struct tensor *in,
                     const struct tensor *out, struct err *e)
{
	return exchange_heads(s, "split_heads", arg, &in[0], &out[0], false, e);
}

int cuda_join_heads(struct stream *s, const union op_arg *arg, const struct tensor *in,
                    const struct tensor *out, struct err *e)
{
	return exchange_heads(s, "join_heads", arg, &out[0], &in[0], true, e);
}
