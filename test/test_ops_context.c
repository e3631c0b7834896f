/* Attention and masks where samples are shared by context-parallel ranks, documents within a sample, and what
 * changes rows and columns around attention. */
#include <stdlib.h>

#include "base/err.h"
#include "base/rng.h"
#include "kernels/kernels.h"
#include "test/ops_fixture.h"

static const struct backend *const both[] = {&cpu_reference_backend, &cpu_backend};
static const struct tensor none;

static void free_all(struct tensor *t, int n)
{
	for (int i = 0; i < n; i++)
		tensor_free(&t[i]);
}

static bool same_bits(const struct tensor *a, const struct tensor *b)
{
	return !memcmp(a->data, b->data, (size_t)tensor_bytes(a));
}

/* All NaN, so that what is not written, or should not be read, shows. */
static struct tensor spoilt(enum dtype dtype, int32_t rows, int32_t width)
{
	struct tensor t = TENSOR(dtype, 1, rows, width);
	memset(t.data, 0xff, (size_t)tensor_bytes(&t));
	return t;
}

static bool all_are(const struct tensor *t, double x)
{
	bool same = true;
	for (int64_t i = 0; i < tensor_count(t); i++)
		same &= tensor_at(t, i) == x;
	return same;
}

/* Rows of whole samples of `length` that a context names, in its order. */
static int32_t context_rows(struct context c, int32_t samples, int32_t length)
{
	return samples * length / c.ranks * c.count;
}

static int32_t whole_row(struct context c, int32_t samples, int32_t length, int32_t n)
{
	int32_t each = length / c.ranks, rank = (c.first + n / (samples * each)) % c.ranks;
	return n / each % samples * length + context_position(length, c.ranks, rank, n % each);
}

/* Columns [first, first + width) of the rows that a context names; width 0: one-dimensional. */
static struct tensor gather(const struct tensor *t, struct context c, int32_t length, int32_t first,
                            int32_t width)
{
	int32_t samples = t->dim[0] / length, rows = context_rows(c, samples, length), w = width ? width : 1;
	struct tensor part = width ? TENSOR(t->dtype, 1, rows, width) : TENSOR(t->dtype, 1, rows);
	for (int32_t i = 0; i < rows * w; i++) {
		int64_t row = whole_row(c, samples, length, i / w);
		tensor_put(&part, i, tensor_at(t, row * tensor_row(t) + first + i % w));
	}
	return part;
}

/* One attention over whole samples: K columns of queries, G(D+V) of keys and values. */
struct whole {
	enum dtype dtype;
	int32_t samples, queries, rest, o;
	union op_arg arg;
	struct tensor dout, qkv, out[2], keys, begins, dqkv;
};

enum { WINDOW = 1, DOCUMENTS = 2, DROPOUT = 4 };

/* GQA, V smaller than D. Documents of 1 to 70 rows. */
static struct whole whole_open(const struct backend *b, enum dtype dtype, int32_t length, int features)
{
	struct whole w = {
	        .dtype = dtype, .samples = 2, .queries = 4 * 20, .rest = 2 * (20 + 12), .o = 4 * 12};
	int32_t rows = 2 * length;
	w.arg.attention.seq_length = length;
	w.arg.attention.heads = 4;
	w.arg.attention.groups = 2;
	w.arg.attention.head_dim = 20;
	w.arg.attention.value_dim = 12;
	w.arg.attention.window = features & WINDOW ? length / 3 : 0;
	w.arg.attention.scale = 0.25f;
	w.arg.attention.dropout = features & DROPOUT ? 0.2f : 0;
	w.arg.attention.salt = 6;
	w.dout = TENSOR(dtype, 1, rows, w.o);
	w.qkv = TENSOR(dtype, 2, rows, w.queries + w.rest);
	w.out[0] = TENSOR(dtype, 3, rows, w.o);
	w.out[1] = TENSOR(DT_f32, 3, rows, 4);
	w.dqkv = TENSOR(dtype, 4, rows, w.queries + w.rest);
	w.keys = TENSOR(DT_i64, 5, 2);
	tensor_put(&w.keys, 0, 12345);
	tensor_put(&w.keys, 1, 54321);
	if (features & DOCUMENTS)
		w.begins = TENSOR(DT_i32, 6, rows);
	for (int32_t i = 0, begin = 0, left = 0; i < rows && w.begins.data; i++, left--) {
		begin = i % length && left ? begin : i % length;
		left = left ? left : 1 + (int32_t)(rng_uniform(3, (uint64_t)i) * 70);
		tensor_put(&w.begins, i, begin);
	}
	op_run(b, OP_attention, w.arg, (struct tensor[]){w.qkv, w.keys, w.begins}, w.out);
	op_run(b, OP_attention_bwd, w.arg,
	       (struct tensor[]){w.dout, w.qkv, w.out[0], w.out[1], w.keys, w.begins}, &w.dqkv);
	return w;
}

static void whole_close(struct whole *w)
{
	free_all((struct tensor[]){w->dout, w->qkv, w->out[0], w->out[1], w->keys, w->begins, w->dqkv}, 7);
}

/* How far parts may be from the whole: rounding of sums in another order. */
static double tolerance(const struct whole *w)
{
	return w->dtype == DT_f32 ? 1e-5 : 2e-2;
}

/* What one rank has, and what it gets by parts. */
struct rank {
	struct tensor dout, q, begins, o, lse, dq;
};

static struct rank rank_open(const struct whole *w, struct context c)
{
	int32_t length = w->arg.attention.seq_length;
	struct rank r = {.dout = gather(&w->dout, c, length, 0, w->o),
	                 .q = gather(&w->qkv, c, length, 0, w->queries)};
	r.begins = w->begins.data ? gather(&w->begins, c, length, 0, 0) : none;
	r.dq = TENSOR(DT_f64, 1, r.q.dim[0], w->queries);
	memset(r.dq.data, 0, (size_t)tensor_bytes(&r.dq));
	return r;
}

static void rank_close(struct rank *r)
{
	free_all((struct tensor[]){r->dout, r->q, r->begins, r->o, r->lse, r->dq}, 6);
}

static void add(const struct tensor *to, const struct tensor *x, int64_t at)
{
	for (int64_t i = 0; i < tensor_count(x); i++)
		tensor_put(to, at + i, tensor_at(to, at + i) + tensor_at(x, i));
}

/* Joins the keys of one context to what the rank has so far. */
static void part_forward(const struct backend *b, const struct whole *w, struct rank *r, struct context c,
                         union op_arg arg)
{
	int32_t rows = r->q.dim[0];
	struct tensor kv = gather(&w->qkv, c, arg.attention.seq_length, w->queries, w->rest);
	struct tensor out[2] = {spoilt(arg.attention.goes_on ? DT_f32 : w->dtype, rows, w->o),
	                        spoilt(DT_f32, rows, 4)};
	op_run(b, OP_attention_part, arg, (struct tensor[]){r->q, kv, r->o, r->lse, w->keys, r->begins}, out);
	free_all((struct tensor[]){kv, r->o, r->lse}, 3);
	r->o = out[0];
	r->lse = out[1];
}

/* dq grows, dkv[all rows, rank-major] of these keys grows. */
static void part_backward(const struct backend *b, const struct whole *w, struct rank *r, struct context c,
                          union op_arg arg, const struct tensor *dkv)
{
	struct tensor kv = gather(&w->qkv, c, arg.attention.seq_length, w->queries, w->rest);
	struct tensor out[2] = {spoilt(w->dtype, r->q.dim[0], w->queries),
	                        spoilt(w->dtype, kv.dim[0], w->rest)};
	op_run(b, OP_attention_part_bwd, arg,
	       (struct tensor[]){r->dout, r->q, kv, r->o, r->lse, w->keys, r->begins}, out);
	add(&r->dq, &out[0], 0);
	add(dkv, &out[1], (int64_t)w->samples * w->arg.attention.seq_length / c.ranks * c.first * w->rest);
	free_all((struct tensor[]){kv, out[0], out[1]}, 3);
}

static void compare(const struct whole *w, const struct tensor *whole, struct context c, int32_t first,
                    const struct tensor *part, double allowed, const char *what)
{
	struct tensor want = gather(whole, c, w->arg.attention.seq_length, first, part->dim[1]);
	tensor_compare(&want, part, allowed, what);
	tensor_free(&want);
}

/* All ranks, each by `parts` calls that see as many ranks' keys each, its own first, then around a ring in
 * either direction. */
static void check_ranks(const struct backend *b, const struct whole *w, int32_t ranks, int32_t parts,
                        int32_t step)
{
	const struct context all = {ranks, 0, ranks};
	struct tensor dkv = TENSOR(DT_f64, 1, w->qkv.dim[0], w->rest);
	memset(dkv.data, 0, (size_t)tensor_bytes(&dkv));
	for (int32_t i = 0; i < ranks; i++) {
		const struct context own = {ranks, i, 1};
		struct rank r = rank_open(w, own);
		union op_arg arg[16];
		for (int32_t k = 0; k < parts; k++) {
			arg[k] = w->arg;
			arg[k].attention.queries = own;
			arg[k].attention.rows =
			        parts == 1 ? all : (struct context){ranks, (i + ranks + k * step) % ranks, 1};
			arg[k].attention.goes_on = k + 1 < parts;
			part_forward(b, w, &r, arg[k].attention.rows, arg[k]);
		}
		for (int32_t k = 0; k < parts; k++)
			part_backward(b, w, &r, arg[k].attention.rows, arg[k], &dkv);
		compare(w, &w->out[0], own, 0, &r.o, tolerance(w), "o of parts");
		compare(w, &w->out[1], own, 0, &r.lse, 1e-5, "lse of parts");
		compare(w, &w->dqkv, own, 0, &r.dq, 2 * tolerance(w), "dq of parts");
		rank_close(&r);
	}
	compare(w, &w->dqkv, all, w->queries, &dkv, 2 * tolerance(w), "dkv of parts");
	tensor_free(&dkv);
}

static const struct {
	enum dtype dtype;
	int32_t length;
	int features;
} wholes[] = {{DT_f32, 400, 0},
              {DT_f32, 400, WINDOW | DROPOUT},
              {DT_f32, 400, DOCUMENTS | DROPOUT},
              {DT_bf16, 400, WINDOW | DOCUMENTS | DROPOUT}};

/* Some queries' chunks are longer than a block, some keys' too; the reference takes short ones. */
TEST(parts_of_attention_add_up)
{
	for (size_t i = 0; i < 2 * sizeof wholes / sizeof *wholes; i++) {
		const struct backend *b = both[i % 2];
		int32_t length = i % 2 ? wholes[i / 2].length : 48;
		struct whole w = whole_open(b, wholes[i / 2].dtype, length, wholes[i / 2].features);
		check_ranks(b, &w, 2, 2, 1);
		check_ranks(b, &w, 4, 4, i % 3 ? 1 : -1);
		if (w.arg.attention.window)
			check_ranks(b, &w, 4, 1, 0);
		whole_close(&w);
	}
}

/* All ranks' rows, rank after rank, are the rows of the samples in another order. */
TEST(attention_on_rows_of_all_ranks_is_attention)
{
	for (size_t i = 0; i < 2 * sizeof wholes / sizeof *wholes; i++) {
		const struct backend *b = both[i % 2];
		int32_t length = i % 2 ? wholes[i / 2].length : 48, ranks = i % 3 ? 2 : 4;
		const struct context all = {ranks, 0, ranks};
		struct whole w = whole_open(b, wholes[i / 2].dtype, length, wholes[i / 2].features);
		union op_arg arg = w.arg;
		arg.attention.queries = all;
		struct tensor qkv = gather(&w.qkv, all, length, 0, w.queries + w.rest);
		struct tensor dqkv = spoilt(w.dtype, 2 * length, w.queries + w.rest);
		struct tensor out[2] = {spoilt(w.dtype, 2 * length, w.o), spoilt(DT_f32, 2 * length, 4)};
		struct rank r = rank_open(&w, all);
		op_run(b, OP_attention, arg, (struct tensor[]){qkv, w.keys, r.begins}, out);
		op_run(b, OP_attention_bwd, arg,
		       (struct tensor[]){r.dout, qkv, out[0], out[1], w.keys, r.begins}, &dqkv);
		compare(&w, &w.out[0], all, 0, &out[0], tolerance(&w), "o in rank-major rows");
		compare(&w, &w.out[1], all, 0, &out[1], 1e-5, "lse in rank-major rows");
		compare(&w, &w.dqkv, all, 0, &dqkv, 2 * tolerance(&w), "dqkv in rank-major rows");
		free_all((struct tensor[]){qkv, dqkv, out[0], out[1]}, 4);
		rank_close(&r);
		whole_close(&w);
	}
}

/* Rows [first, first + n) where they lie: not to be freed. */
static struct tensor rows_at(const struct tensor *t, int32_t first, int32_t n)
{
	struct tensor part = *t;
	part.data = (char *)t->data + first * tensor_row(t) * dtype_rows[t->dtype].bytes;
	part.dim[0] = n;
	return part;
}

/* What `begins` says is what each document alone would get. */
TEST(documents_are_on_their_own)
{
	for (int i = 0; i < 2; i++) {
		struct whole w = whole_open(both[i], DT_f32, 150, DOCUMENTS);
		const int32_t *begin = w.begins.data;
		for (int32_t at = 0, end; at < 300; at = end) {
			for (end = at + 1; end % 150 && begin[end] == begin[at];)
				end++;
			union op_arg arg = w.arg;
			arg.attention.seq_length = end - at;
			struct tensor dout = rows_at(&w.dout, at, end - at),
			              qkv = rows_at(&w.qkv, at, end - at);
			struct tensor o[2] = {rows_at(&w.out[0], at, end - at),
			                      rows_at(&w.out[1], at, end - at)};
			struct tensor dqkv = rows_at(&w.dqkv, at, end - at);
			struct tensor got[3] = {spoilt(DT_f32, end - at, w.o), spoilt(DT_f32, end - at, 4),
			                        spoilt(DT_f32, end - at, w.queries + w.rest)};
			op_run(both[i], OP_attention, arg, (struct tensor[]){qkv, none, none}, got);
			op_run(both[i], OP_attention_bwd, arg,
			       (struct tensor[]){dout, qkv, got[0], got[1], none, none}, &got[2]);
			tensor_compare(&got[0], &o[0], 1e-5, "o of a document");
			tensor_compare(&got[1], &o[1], 1e-5, "lse of a document");
			tensor_compare(&got[2], &dqkv, 2e-5, "dqkv of a document");
			free_all(got, 3);
		}
		whole_close(&w);
	}
}

/* Rank 0 of 4 sees none of the keys of rank 2 through a window of 3: zeros and -inf, whatever is said to have
 * been there with weight 0, and no gradients. Joined with own keys, before or behind, it changes nothing. */
TEST(a_part_that_sees_nothing)
{
	for (int i = 0; i < 4; i++) {
		const struct backend *b = both[i % 2];
		struct whole w = whole_open(b, i / 2 ? DT_bf16 : DT_f32, 48, WINDOW);
		const struct context own = {4, 0, 1}, other = {4, 2, 1};
		struct rank r[3] = {rank_open(&w, own), rank_open(&w, own), rank_open(&w, own)};
		struct tensor dkv = TENSOR(DT_f64, 1, 96, w.rest);
		union op_arg arg = w.arg;
		arg.attention.window = 3;
		arg.attention.queries = own;
		arg.attention.goes_on = 1;
		arg.attention.rows = other;
		r[0].o = spoilt(DT_f32, r[0].q.dim[0], w.o);
		r[0].lse = spoilt(DT_f32, r[0].q.dim[0], 4);
		for (int64_t k = 0; k < tensor_count(&r[0].lse); k++)
			tensor_put(&r[0].lse, k, -INFINITY);
		part_forward(b, &w, &r[0], other, arg);
		CHECK(all_are(&r[0].o, 0) && all_are(&r[0].lse, -INFINITY));
		memset(dkv.data, 0, (size_t)tensor_bytes(&dkv));
		part_backward(b, &w, &r[0], other, arg, &dkv);
		CHECK(all_are(&r[0].dq, 0) && all_are(&dkv, 0));
		arg.attention.rows = own;
		part_forward(b, &w, &r[0], own, arg);
		part_forward(b, &w, &r[1], own, arg);
		part_forward(b, &w, &r[2], own, arg);
		CHECK(same_bits(&r[0].o, &r[1].o) && same_bits(&r[0].lse, &r[1].lse));
		arg.attention.rows = other;
		part_forward(b, &w, &r[2], other, arg);
		CHECK(same_bits(&r[1].o, &r[2].o));
		tensor_compare(&r[1].lse, &r[2].lse, 1e-6, "lse joined with nothing");
		for (int k = 0; k < 3; k++)
			rank_close(&r[k]);
		tensor_free(&dkv);
		whole_close(&w);
	}
}

/* A row that sees no key at all has zeros and -inf; its gradients are zeros; a NaN is not taken for nothing.
 */
TEST(a_query_that_sees_nothing)
{
	for (int i = 0; i < 2; i++) {
		struct whole w = whole_open(both[i], DT_f32, 96, DOCUMENTS);
		struct tensor in[6] = {w.dout, w.qkv, w.out[0], w.out[1], w.keys, w.begins};
		tensor_put(&w.begins, 10, 11);
		tensor_put(&w.qkv, 80 * (w.queries + w.rest), NAN);
		op_run(both[i], OP_attention, w.arg, &in[1], w.out);
		CHECK(isnan(tensor_at(&w.out[0], 80 * w.o)) && isnan(tensor_at(&w.out[1], 80L * 4)));
		struct tensor o[2] = {w.out[0], w.out[1]};
		op_run(both[i], OP_attention, w.arg, (struct tensor[]){w.qkv, w.keys, w.begins}, o);
		for (int32_t c = 0; c < w.o; c++)
			CHECK(tensor_at(&w.out[0], 10 * w.o + c) == 0);
		for (int32_t h = 0; h < 4; h++)
			CHECK(tensor_at(&w.out[1], 10 * 4 + h) == -INFINITY);
		tensor_put(&w.qkv, 80 * (w.queries + w.rest), 0);
		op_run(both[i], OP_attention, w.arg, (struct tensor[]){w.qkv, w.keys, w.begins}, o);
		op_run(both[i], OP_attention_bwd, w.arg, in, &w.dqkv);
		for (int32_t c = 0; c < w.queries; c++)
			CHECK(tensor_at(&w.dqkv, 10 * (w.queries + w.rest) + c) == 0);
		for (int64_t k = 0; k < tensor_count(&w.dqkv); k++)
			CHECK(isfinite(tensor_at(&w.dqkv, k)));
		whole_close(&w);
	}
}

/* Rows of each rank, cut anywhere, with keys of all samples: the whole's rows bit for bit, masks and jitter.
 */
TEST(dropout_of_a_context_parallel_rank)
{
	for (int i = 0; i < 4; i++) {
		union op_arg arg = {.dropout = {.p = 0.4f, .salt = 2, .seq_length = 24, .jitter = i / 2}};
		struct tensor in[2] = {TENSOR(DT_f32, 1, 48, 33), TENSOR(DT_i64, 2, 2)};
		struct tensor whole = tensor_copy(&in[0]);
		tensor_put(&in[1], 0, 77);
		tensor_put(&in[1], 1, 78);
		op_run(both[i % 2], OP_dropout, arg, in, &whole);
		for (int32_t rank = 0; rank < 4; rank++) {
			const struct context own = {4, rank, 1};
			struct tensor x = gather(&in[0], own, 24, 0, 33),
			              want = gather(&whole, own, 24, 0, 33);
			struct tensor y = tensor_copy(&x);
			arg.dropout.rows = own;
			for (int32_t first = 0; first < 12; first += 5) {
				int32_t n = first + 5 < 12 ? 5 : 12 - first;
				struct tensor part[2] = {rows_at(&x, first, n), in[1]},
				              to = rows_at(&y, first, n);
				arg.dropout.first_row = first;
				op_run(both[i % 2], OP_dropout, arg, part, &to);
			}
			CHECK(same_bits(&want, &y));
			CHECK(!same_bits(&x, &y));
			free_all((struct tensor[]){x, y, want}, 3);
		}
		free_all((struct tensor[]){in[0], in[1], whole}, 3);
	}
}

/* Jitter is uniform in [1-p, 1+p), and of the same words as the mask: large factors survive. */
TEST(jitter_is_uniform)
{
	union op_arg arg = {.dropout = {.p = 0.25f, .salt = 9, .seq_length = 100}};
	struct tensor in[2] = {TENSOR(DT_f32, 1, 100, 999), TENSOR(DT_i64, 2, 1)};
	struct tensor y = tensor_copy(&in[0]), mask = tensor_copy(&in[0]);
	double sum = 0, squares = 0, n = 100 * 999;
	for (int64_t i = 0; i < tensor_count(&in[0]); i++)
		tensor_put(&in[0], i, 1);
	tensor_put(&in[1], 0, 12345);
	op_run(&cpu_backend, OP_dropout, arg, in, &mask);
	arg.dropout.jitter = 1;
	op_run(&cpu_backend, OP_dropout, arg, in, &y);
	for (int64_t i = 0; i < tensor_count(&y); i++) {
		double factor = tensor_at(&y, i);
		CHECK(factor >= 0.75 && factor <= 1.25);
		CHECK((factor < 0.875) == (tensor_at(&mask, i) == 0));
		sum += factor / n;
		squares += (factor - 1) * (factor - 1) / n;
	}
	CHECK_NEAR(sum, 1, 2e-3);
	CHECK_NEAR(squares, 0.25 * 0.25 / 3, 2e-4);
	free_all((struct tensor[]){in[0], in[1], y, mask}, 4);
}

/* Neighbours are halves in another order: column 2i of a head is i, 2i + 1 is i + R/2. */
TEST(interleaved_rope_is_rope_in_another_order)
{
	enum { N = 20, HEADS = 3, SIZE = 14, R = 8, WIDTH = (HEADS + 1) * SIZE };
	for (int i = 0; i < 4; i++) {
		union op_arg arg = {.rope = {.heads = 2, .groups = 1, .head_dim = SIZE, .inverse = i / 2}};
		struct tensor in[3] = {TENSOR(DT_f32, 1, N, WIDTH), TENSOR(DT_f32, 2, N, R),
		                       TENSOR(DT_i32, 3, N)};
		struct tensor y = tensor_copy(&in[0]), halves[3] = {tensor_copy(&in[0]), in[1], in[2]};
		for (int32_t n = 0; n < N; n++)
			tensor_put(&in[2], n, n * 7 % N);
		int32_t from[WIDTH];
		for (int32_t c = 0; c < WIDTH; c++) {
			int32_t at = c % SIZE;
			from[c] = at < R ? c - at + (at < R / 2 ? 2 * at : 2 * (at - R / 2) + 1) : c;
		}
		for (int32_t k = 0; k < N * WIDTH; k++)
			tensor_put(&halves[0], k, tensor_at(&in[0], k / WIDTH * WIDTH + from[k % WIDTH]));
		struct tensor want = tensor_copy(&y);
		op_run(both[i % 2], OP_rope, arg, halves, &want);
		arg.rope.interleaved = 1;
		op_run(both[i % 2], OP_rope, arg, in, &y);
		for (int32_t k = 0; k < N * WIDTH; k++)
			CHECK_NEAR(tensor_at(&y, k / WIDTH * WIDTH + from[k % WIDTH]), tensor_at(&want, k),
			           1e-6);
		free_all((struct tensor[]){in[0], in[1], in[2], halves[0], y, want}, 6);
	}
}

static double dot(const struct tensor *a, const struct tensor *b)
{
	double sum = 0;
	for (int64_t i = 0; i < tensor_count(a); i++)
		sum += tensor_at(a, i) * tensor_at(b, i);
	return sum;
}

/* <pack(q, kv, key), y> = <(q, kv, key), unpack(y)>: that unpack is the adjoint. Parts that are not rotated
 * are where they belong. */
TEST(mla_unpack_is_the_adjoint_of_mla_pack)
{
	enum { N = 9, H = 3, D = 10, R = 4, V = 7, P = D - R };
	for (int i = 0; i < 4; i++) {
		union op_arg arg = {.mla = {H, D, V, i / 2}};
		struct tensor in[5] = {TENSOR(DT_f32, 1, N, H * D), TENSOR(DT_f32, 2, N, H * (P + V)),
		                       TENSOR(DT_f32, 3, N, R), TENSOR(DT_f32, 4, N, R),
		                       TENSOR(DT_i32, 5, N)};
		struct tensor packed = spoilt(DT_f32, N, H * (2 * D + V)),
		              y = TENSOR(DT_f32, 6, N, H * (2 * D + V));
		struct tensor back[3] = {spoilt(DT_f32, N, H * D), spoilt(DT_f32, N, H * (P + V)),
		                         spoilt(DT_f32, N, R)};
		for (int32_t n = 0; n < N; n++)
			tensor_put(&in[4], n, n * 5 % N);
		op_run(both[i % 2], OP_mla_pack, arg, in, &packed);
		op_run(both[i % 2], OP_mla_unpack, arg, (struct tensor[]){y, in[3], in[4]}, back);
		double want = dot(&packed, &y), got = 0;
		for (int k = 0; k < 3; k++)
			got += dot(&in[k], &back[k]);
		CHECK_NEAR(got, want, 1e-4);
		int32_t row = 4 * H * (2 * D + V);
		CHECK(tensor_at(&packed, row + 2 * D) == tensor_at(&in[0], 4 * H * D + 2 * D));
		CHECK(tensor_at(&packed, row + (H + 2) * D) ==
		      tensor_at(&in[1], 4 * H * (P + V) + 2 * (P + V)));
		CHECK(tensor_at(&packed, row + (H + 1) * D + P) == tensor_at(&packed, row + (H + 2) * D + P));
		CHECK(tensor_at(&packed, row + 2 * H * D + V) ==
		      tensor_at(&in[1], 4 * H * (P + V) + 2 * P + V));
		free_all(in, 5);
		free_all(back, 3);
		free_all((struct tensor[]){packed, y}, 2);
	}
}

/* Each element says where it was. */
static struct tensor numbered(enum dtype dtype, int32_t rows, int32_t width)
{
	struct tensor t = TENSOR(dtype, 1, rows, width);
	for (int32_t i = 0; i < rows * width; i++)
		tensor_put(&t, i, i);
	return t;
}

TEST(split_and_join_are_inverse)
{
	for (int i = 0; i < 4; i++) {
		const struct backend *b = both[i % 2];
		union op_arg columns = {.columns = {5}}, heads = {.heads = {2, {8, 4, 0}}};
		struct tensor x = numbered(i / 2 ? DT_bf16 : DT_f32, 10, 12), back = spoilt(x.dtype, 10, 12);
		struct tensor part[2] = {spoilt(x.dtype, 10, 5), spoilt(x.dtype, 10, 7)};
		op_run(b, OP_split_columns, columns, &x, part);
		CHECK(tensor_at(&part[0], 3 * 5 + 4) == 3 * 12 + 4 &&
		      tensor_at(&part[1], 3 * 7) == 3 * 12 + 5);
		op_run(b, OP_join_columns, columns, part, &back);
		CHECK(same_bits(&x, &back));
		struct tensor split = spoilt(x.dtype, 20, 6);
		memset(back.data, 0, (size_t)tensor_bytes(&back));
		op_run(b, OP_split_heads, heads, &x, &split);
		static const int32_t column[2][6] = {{0, 1, 2, 3, 8, 9}, {4, 5, 6, 7, 10, 11}};
		for (int32_t k = 0; k < 120; k++)
			CHECK(tensor_at(&split, k) == k / 6 % 10 * 12 + column[k / 60][k % 6]);
		op_run(b, OP_join_heads, heads, &split, &back);
		CHECK(same_bits(&x, &back));
		free_all((struct tensor[]){x, back, part[0], part[1], split}, 5);
	}
}

/* Bytes that a fresh stream holds after one call; told: it knew of the call, and holds what it expected. */
static int64_t held_by(struct fixture *f, int threads, bool told)
{
	struct stream *s;
	struct err e = {0};
	struct workspace w = {0};
	struct kernel_call call = {f->c->op, &f->arg, f->in, f->out};
	if (cpu_backend.open(&s, THREADS(threads), &e))
		return -1;
	if (told)
		w = cpu_backend.workspace(s, &call);
	CHECK(cpu_backend.kernel[f->c->op](s, &f->arg, f->in, f->out, &e) == 0);
	int64_t held = cpu_backend.workspace(s, NULL).held;
	CHECK(!told || held == w.expected);
	cpu_backend.close(s);
	return held;
}

/* No more and no less than is used. */
TEST(working_memory_is_told_exactly)
{
	static const enum op ops[] = {OP_attention,          OP_attention_bwd,   OP_attention_part,
	                              OP_attention_part_bwd, OP_attention_cache, OP_mla_pack,
	                              OP_mla_unpack};
	for (size_t i = 0; i < sizeof ops / sizeof *ops; i++)
		for (int variant = 0; variant < op_case_of(ops[i])->variants; variant++)
			for (int threads = 1; threads <= 3; threads++) {
				struct setup setup = {SIZES - 1, variant, DT_bf16, true, false};
				struct fixture f = fixture_open(op_case_of(ops[i]), setup);
				if (held_by(&f, threads, true) != held_by(&f, threads, false))
					test_failed(__FILE__, __LINE__, "%s: expects more than it uses",
					            fixture_text(&f));
				fixture_close(&f);
			}
}
