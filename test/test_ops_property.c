/* What operations must satisfy whatever their inputs, and what their kernels do with bad ones. */
#include <pthread.h>
#include <stdlib.h>

#include "base/err.h"
#include "base/rng.h"
#include "kernels/cpu/mask.h"
#include "kernels/cpu/vmath.h"
#include "kernels/kernels.h"
#include "test/ops_fixture.h"

static const union op_arg counted = {.square_sum = {.counts = 1}};

static void free_all(struct tensor *t, int n)
{
	for (int i = 0; i < n; i++)
		tensor_free(&t[i]);
}

static struct tensor ascending(int32_t n)
{
	struct tensor t = TENSOR(DT_i32, 0, n);
	for (int32_t i = 0; i < n; i++)
		tensor_put(&t, i, i);
	return t;
}

static const struct backend *const both[] = {&cpu_reference_backend, &cpu_backend};

static bool same_bits(const struct tensor *a, const struct tensor *b)
{
	return !memcmp(a->data, b->data, (size_t)tensor_bytes(a));
}

/* All NaN, so that what is not written shows. */
static void spoil(const struct tensor *t)
{
	memset(t->data, 0xff, (size_t)tensor_bytes(t));
}

/* Rows [first, first + n) where they lie: not to be freed. */
static struct tensor rows_at(const struct tensor *t, int32_t first, int32_t n)
{
	struct tensor part = *t;
	part.data = (char *)t->data + first * tensor_row(t) * dtype_rows[t->dtype].bytes;
	part.dim[0] = n;
	return part;
}

/* Columns [first, first + n) of a matrix go to columns [at, at + n) of another. */
static void columns_copy(const struct tensor *from, int32_t first, int32_t n, const struct tensor *to,
                         int32_t at)
{
	size_t bytes = dtype_rows[from->dtype].bytes, width = (size_t)from->dim[1],
	       pitch = (size_t)to->dim[1];
	for (size_t row = 0; row < (size_t)from->dim[0]; row++)
		memcpy((char *)to->data + (row * pitch + (size_t)at) * bytes,
		       (const char *)from->data + (row * width + (size_t)first) * bytes, (size_t)n * bytes);
}

static struct tensor columns_of(const struct tensor *t, int32_t first, int32_t n)
{
	struct tensor part = TENSOR(t->dtype, 1, t->dim[0], n);
	columns_copy(t, first, n, &part, 0);
	return part;
}

/* a·x has the RMSNorm of x, and a·x + b the LayerNorm of x. */
static void check_norm(enum op op, double scale, double shift)
{
	union op_arg arg = {.norm = {.eps = 1e-12f}};
	struct tensor in[3] = {TENSOR(DT_f32, 1, 9, 77), TENSOR(DT_f32, 2, 77), TENSOR(DT_f32, 3, 77)};
	struct tensor y[3] = {TENSOR(DT_f32, 4, 9, 77), TENSOR(DT_f32, 4, 9), TENSOR(DT_f32, 4, 9)};
	struct tensor moved[3] = {tensor_copy(&y[0]), tensor_copy(&y[1]), tensor_copy(&y[2])};
	op_run(&cpu_backend, op, arg, in, y);
	for (int64_t i = 0; i < tensor_count(&in[0]); i++)
		tensor_put(&in[0], i, tensor_at(&in[0], i) * scale + shift);
	op_run(&cpu_backend, op, arg, in, moved);
	tensor_compare(&y[0], &moved[0], 2e-5, op_rows[op].name);
	free_all(in, 3);
	free_all(y, 3);
	free_all(moved, 3);
}

TEST(norms_do_not_see_scale_or_shift)
{
	check_norm(OP_rmsnorm, 37, 0);
	check_norm(OP_layernorm, 0.125, 3);
}

TEST(cross_entropy_does_not_see_a_shift)
{
	union op_arg arg = {.cross_entropy = {.vocab_size = 1500}};
	struct tensor in[4] = {TENSOR(DT_f32, 1, 5, 1536), ascending(5), {0}, TENSOR(DT_f32, 2, 1)};
	struct tensor out[3] = {TENSOR(DT_f64, 3, 1), TENSOR(DT_f32, 3, 5), TENSOR(DT_f32, 3, 5)};
	struct tensor dx = TENSOR(DT_f32, 4, 5, 1536);
	op_run(&cpu_backend, OP_cross_entropy, arg, in, out);
	double loss = tensor_at(&out[0], 0);
	for (int64_t i = 0; i < tensor_count(&in[0]); i++)
		tensor_put(&in[0], i, tensor_at(&in[0], i) + 50);
	op_run(&cpu_backend, OP_cross_entropy, arg, in, out);
	CHECK_NEAR(tensor_at(&out[0], 0), loss, 1e-4);
	in[2] = out[1];
	op_run(&cpu_backend, OP_cross_entropy_bwd, arg, in, &dx);
	for (int64_t n = 0; n < 5; n++) {
		double sum = 0;
		for (int64_t v = 0; v < 1536; v++)
			sum += tensor_at(&dx, n * 1536 + v);
		CHECK_NEAR(sum, 0, 2e-5);
		CHECK(tensor_at(&dx, n * 1536 + 1500) == 0);
	}
	in[2].data = NULL;
	free_all(in, 4);
	free_all(out, 3);
	tensor_free(&dx);
}

/* Huge, infinite and undefined logits: exact where there is an answer, NaN where there is none. */
TEST(cross_entropy_of_extremes)
{
	union op_arg arg = {.cross_entropy = {.vocab_size = 4}};
	struct tensor in[3] = {TENSOR(DT_f32, 1, 3, 4), TENSOR(DT_i32, 1, 3), {0}};
	struct tensor out[3] = {TENSOR(DT_f64, 3, 1), TENSOR(DT_f32, 3, 3), TENSOR(DT_f32, 3, 3)};
	const float logits[] = {1e30f, -1e30f, 0, 1, -INFINITY, 2, -INFINITY, -INFINITY, NAN, 1, 2, 3};
	memcpy(in[0].data, logits, sizeof logits);
	for (int i = 0; i < 3; i++)
		tensor_put(&in[1], i, i == 1);
	op_run(&cpu_backend, OP_cross_entropy, arg, in, out);
	CHECK(tensor_at(&out[2], 0) == 0);
	CHECK(tensor_at(&out[2], 1) == 0);
	CHECK(isnan(tensor_at(&out[2], 2)));
	free_all(in, 2);
	free_all(out, 3);
}

/* The vocabulary cut into shards: columns of a sharded output layer. */
enum { SHARD_ROWS = 14, SHARD_VOCABULARY = 1700, SHARD_COLUMNS = 2500, SHARDS = 4 };
static const int32_t vocabulary_cuts[SHARDS][SHARDS + 1] = {
        {0, SHARD_COLUMNS},
        {0, 700, SHARD_COLUMNS},
        {0, 1, SHARD_VOCABULARY, SHARD_COLUMNS},
        {0, 1024, 1100, SHARD_VOCABULARY + 1, SHARD_COLUMNS}};

/* Logits, targets from -1 to the last of the vocabulary, no statistics, whole outputs. */
struct loss {
	struct tensor in[3], out[3], scale, dx;
};

static struct loss loss_open(enum dtype dtype)
{
	struct loss l = {{TENSOR(dtype, 1, SHARD_ROWS, SHARD_COLUMNS), TENSOR(DT_i32, 1, SHARD_ROWS), {0}},
	                 {TENSOR(DT_f64, 2, 1), TENSOR(DT_f32, 2, SHARD_ROWS), TENSOR(DT_f32, 2, SHARD_ROWS)},
	                 TENSOR(DT_f32, 3, 1),
	                 TENSOR(dtype, 4, SHARD_ROWS, SHARD_COLUMNS)};
	for (int64_t n = 0; n < SHARD_ROWS; n++) {
		tensor_put(&l.in[1], n, (double)(n * SHARD_VOCABULARY / (SHARD_ROWS - 1) - 1));
		for (int64_t v = 0; v < SHARD_COLUMNS; v++) {
			int64_t at = n * SHARD_COLUMNS + v;
			bool excluded = n == 10 && v < 1100; /* whole shards and blocks of it */
			tensor_put(&l.in[0], at,
			           excluded ? -INFINITY : 3 * tensor_at(&l.in[0], at) + 4 * (double)(n - 5));
		}
	}
	return l;
}

static struct loss loss_copy(const struct loss *l)
{
	struct loss copy = {.scale = tensor_copy(&l->scale), .dx = tensor_copy(&l->dx)};
	for (int k = 0; k < 3; k++) {
		copy.in[k] = tensor_copy(&l->in[k]);
		copy.out[k] = tensor_copy(&l->out[k]);
	}
	return copy;
}

static void loss_close(struct loss *l)
{
	free_all(l->in, 3);
	free_all(l->out, 3);
	free_all(&l->scale, 1);
	free_all(&l->dx, 1);
}

static union op_arg shard_arg(int32_t first)
{
	return (union op_arg){.cross_entropy = {.vocab_size = SHARD_VOCABULARY, .first_column = first}};
}

/* Loss, lse, row losses and gradient by what `shards` ranks would compute; the logits are not there for
 * cross_entropy. */
static void loss_of_shards(const struct backend *b, struct loss *l, int32_t shards)
{
	const int32_t *cut = vocabulary_cuts[shards - 1];
	struct tensor part[SHARDS], stats = TENSOR(DT_f32, 5, shards * SHARD_ROWS, 2);
	for (int32_t r = 0; r < shards; r++) {
		part[r] = columns_of(&l->in[0], cut[r], cut[r + 1] - cut[r]);
		struct tensor of_shard = rows_at(&stats, r * SHARD_ROWS, SHARD_ROWS);
		op_run(b, OP_logit_stats, shard_arg(cut[r]), (struct tensor[]){part[r], l->in[1]}, &of_shard);
	}
	struct tensor in[3] = {l->in[0], l->in[1], stats};
	in[0].data = NULL;
	op_run(b, OP_cross_entropy, shard_arg(0), in, l->out);
	for (int32_t r = 0; r < shards; r++) {
		struct tensor bwd[4] = {part[r], l->in[1], l->out[1], l->scale}, dx = tensor_copy(&part[r]);
		op_run(b, OP_cross_entropy_bwd, shard_arg(cut[r]), bwd, &dx);
		columns_copy(&dx, 0, dx.dim[1], &l->dx, cut[r]);
		tensor_free(&dx);
	}
	free_all(part, shards);
	tensor_free(&stats);
}

TEST(a_vocabulary_in_shards_is_the_whole)
{
	static const enum dtype dtypes[] = {DT_f32, DT_bf16, DT_f16};
	for (int i = 0; i < 6; i++) {
		const struct backend *b = both[i / 3];
		struct loss whole = loss_open(dtypes[i % 3]);
		op_run(b, OP_cross_entropy, shard_arg(0), whole.in, whole.out);
		op_run(b, OP_cross_entropy_bwd, shard_arg(0),
		       (struct tensor[]){whole.in[0], whole.in[1], whole.out[1], whole.scale}, &whole.dx);
		CHECK(tensor_at(&whole.out[2], 0) == 0 && isfinite(tensor_at(&whole.out[0], 0)));
		for (int32_t shards = 1; shards <= SHARDS; shards++) {
			struct loss cut = loss_copy(&whole);
			spoil(&cut.dx);
			for (int k = 0; k < 3; k++)
				spoil(&cut.out[k]);
			loss_of_shards(b, &cut, shards);
			tensor_compare(&whole.out[0], &cut.out[0], 1e-6, "loss of shards");
			tensor_compare(&whole.out[1], &cut.out[1], 2e-7, "lse of shards");
			tensor_compare(&whole.out[2], &cut.out[2], 1e-6, "row loss of shards");
			tensor_compare(&whole.dx, &cut.dx, i % 2 ? 8e-3 : 1e-5, "gradient of shards");
			loss_close(&cut);
		}
		loss_close(&whole);
	}
}

/* Shards whose exponents are out of each other's reach. */
TEST(statistics_of_shards_may_lie_far_apart)
{
	static const float stats[] = {-1e4f, 0, 1000, 998, 999, 0, -INFINITY, 0};
	for (int i = 0; i < 2; i++) {
		struct tensor in[3] = {
		        {.dim = {1, 8, 1, 1}, .nd = 2}, TENSOR(DT_i32, 1, 1), TENSOR(DT_f32, 1, 4, 2)};
		struct tensor out[3] = {TENSOR(DT_f64, 3, 1), TENSOR(DT_f32, 3, 1), TENSOR(DT_f32, 3, 1)};
		tensor_put(&in[1], 0, 2);
		memcpy(in[2].data, stats, sizeof stats);
		op_run(both[i], OP_cross_entropy, shard_arg(0), in, out);
		CHECK_NEAR(tensor_at(&out[1], 0), 1000 + log1p(exp(-1)), 1e-4);
		CHECK_NEAR(tensor_at(&out[0], 0), 2 + log1p(exp(-1)), 1e-6);
		free_all(in, 3);
		free_all(out, 3);
	}
}

/* A shard of padding alone, one that has the target, one that has not. */
TEST(logit_stats_of_each_kind_of_shard)
{
	for (int i = 0; i < 2; i++) {
		struct tensor in[2] = {TENSOR(DT_f32, 1, 2, 3), TENSOR(DT_i32, 1, 2)},
		              y = TENSOR(DT_f32, 2, 2, 2);
		const float logits[] = {0, 0, 7, -INFINITY, -INFINITY, 9};
		memcpy(in[0].data, logits, sizeof logits);
		tensor_put(&in[1], 0, SHARD_VOCABULARY - 1);
		tensor_put(&in[1], 1, SHARD_VOCABULARY - 1);
		op_run(both[i], OP_logit_stats, shard_arg(SHARD_VOCABULARY), in, &y);
		for (int64_t n = 0; n < 2; n++)
			CHECK(tensor_at(&y, 2 * n) == -INFINITY && tensor_at(&y, 2 * n + 1) == 0);
		op_run(both[i], OP_logit_stats, shard_arg(SHARD_VOCABULARY - 2), in, &y);
		CHECK_NEAR(tensor_at(&y, 0), log(2), 1e-7);
		CHECK(tensor_at(&y, 2) == -INFINITY);
		op_run(both[i], OP_logit_stats, shard_arg(SHARD_VOCABULARY - 3), in, &y);
		CHECK_NEAR(tensor_at(&y, 0), 7 + log1p(2 * exp(-7)), 1e-6);
		CHECK(tensor_at(&y, 1) == 7 && tensor_at(&y, 2) == 9 && tensor_at(&y, 3) == 9);
		free_all(in, 2);
		tensor_free(&y);
	}
}

/* A rotation and its inverse give back what was there, in place; lengths stay. */
TEST(rope_is_a_rotation)
{
	union op_arg arg = {.rope = {.heads = 3, .groups = 1, .head_dim = 12}};
	struct tensor in[3] = {TENSOR(DT_f32, 1, 20, 60), TENSOR(DT_f32, 2, 20, 8), ascending(20)};
	struct tensor y = tensor_copy(&in[0]), squares[2] = {TENSOR(DT_f64, 1, 1), TENSOR(DT_f64, 1, 1)};
	for (int32_t p = 0; p < 20; p++)
		for (int32_t i = 0; i < 4; i++) {
			tensor_put(&in[1], p * 8 + i, cos(p * pow(100, -i / 4.0)));
			tensor_put(&in[1], p * 8 + 4 + i, sin(p * pow(100, -i / 4.0)));
		}
	op_run(&cpu_backend, OP_rope, arg, in, &y);
	op_run(&cpu_backend, OP_square_sum, counted, in, &squares[0]);
	op_run(&cpu_backend, OP_square_sum, counted, &y, &squares[1]);
	tensor_compare(&squares[0], &squares[1], 1e-6, "rope keeps lengths");
	CHECK(tensor_at(&y, 61) != tensor_at(&in[0], 61));
	CHECK(tensor_at(&y, 60 + 48) == tensor_at(&in[0], 60 + 48));
	struct tensor back[3] = {y, in[1], in[2]};
	arg.rope.inverse = 1;
	op_run(&cpu_backend, OP_rope, arg, back, &y);
	tensor_compare(&in[0], &y, 1e-6, "inverse of rope");
	free_all(in, 3);
	free_all(squares, 2);
	tensor_free(&y);
}

static const union op_arg small_attention = {
        .attention = {.seq_length = 24, .heads = 4, .groups = 2, .head_dim = 16, .scale = 0.25f}};

/* Later keys and values change nothing; a changed key of the first row changes all that see it. */
TEST(attention_is_causal)
{
	struct tensor in[3] = {TENSOR(DT_f32, 1, 48, 128), {0}, {0}};
	struct tensor a[2] = {TENSOR(DT_f32, 2, 48, 64), TENSOR(DT_f32, 2, 48, 4)};
	struct tensor b[2] = {tensor_copy(&a[0]), tensor_copy(&a[1])};
	op_run(&cpu_backend, OP_attention, small_attention, in, a);
	for (int64_t i = 10 * 128; i < 24 * 128; i++)
		tensor_put(&in[0], i, 100);
	op_run(&cpu_backend, OP_attention, small_attention, in, b);
	CHECK(!memcmp(a[0].data, b[0].data, 10 * 64 * sizeof(float)));
	CHECK(memcmp((float *)a[0].data + 10 * 64, (float *)b[0].data + 10 * 64, 64 * sizeof(float)));
	CHECK(!memcmp((float *)a[0].data + 24 * 64, (float *)b[0].data + 24 * 64, 24 * 64 * sizeof(float)));
	free_all(in, 1);
	free_all(a, 2);
	free_all(b, 2);
}

/* The first token sees itself alone, and so does every token under a window of one. */
TEST(attention_to_one_token_is_its_value)
{
	union op_arg arg = small_attention;
	struct tensor in[3] = {TENSOR(DT_f32, 1, 48, 128), {0}, {0}};
	struct tensor out[2] = {TENSOR(DT_f32, 2, 48, 64), TENSOR(DT_f32, 2, 48, 4)};
	arg.attention.window = 1;
	op_run(&cpu_backend, OP_attention, arg, in, out);
	for (int64_t n = 0; n < 48; n++)
		for (int64_t c = 0; c < 64; c++)
			CHECK_NEAR(tensor_at(&out[0], n * 64 + c),
			           tensor_at(&in[0], n * 128 + 96 + c / 32 * 16 + c % 16), 1e-6);
	free_all(in, 1);
	free_all(out, 2);
}

/* Row by row through the caches gives what the whole sequence gives. */
TEST(cached_attention_is_attention)
{
	union op_arg arg = small_attention;
	struct tensor in[3] = {TENSOR(DT_f32, 1, 24, 128), {0}, {0}}, position = ascending(24);
	struct tensor out[2] = {TENSOR(DT_f32, 2, 24, 64), TENSOR(DT_f32, 2, 24, 4)};
	struct tensor cache[2] = {TENSOR(DT_f32, 3, 30, 32), TENSOR(DT_f32, 4, 30, 32)};
	arg.attention.window = 7;
	op_run(&cpu_backend, OP_attention, arg, in, out);
	struct tensor o = tensor_copy(&out[0]);
	for (int32_t n = 0, count; n < 24; n += count) {
		count = n < 8 ? 8 : 1; /* a prompt, then a token at a time */
		struct tensor row[4] = {in[0], cache[0], cache[1], position}, y = o;
		row[0].data = (float *)in[0].data + n * 128;
		row[3].data = (int32_t *)position.data + n;
		y.data = (float *)o.data + n * 64;
		row[0].dim[0] = row[3].dim[0] = y.dim[0] = count;
		op_run(&cpu_backend, OP_attention_cache, arg, row, &y);
	}
	tensor_compare(&out[0], &o, 1e-5, "attention_cache");
	free_all(in, 1);
	free_all(out, 2);
	free_all(cache, 2);
	tensor_free(&position);
	tensor_free(&o);
}

/* Of qkv or its gradient [N, (6+2·3)·32]: the heads of key-value groups [first, first + n). */
static struct tensor groups_of(const struct tensor *qkv, int32_t first, int32_t n)
{
	struct tensor part = TENSOR(qkv->dtype, 1, qkv->dim[0], 4 * n * 32);
	columns_copy(qkv, first * 64, n * 64, &part, 0);
	columns_copy(qkv, (6 + first) * 32, n * 32, &part, n * 64);
	columns_copy(qkv, (9 + first) * 32, n * 32, &part, n * 96);
	return part;
}

/* Attention forward and backward: do, qkv, o, lse, keys, begins, in the order of attention_bwd, then dqkv. */
static void attend(const struct backend *b, union op_arg arg, struct tensor t[7])
{
	op_run(b, OP_attention, arg, (struct tensor[]){t[1], t[4], t[5]}, &t[2]);
	op_run(b, OP_attention_bwd, arg, t, &t[6]);
}

static void check_groups(const struct backend *b, union op_arg arg, struct tensor whole[7], int32_t first,
                         int32_t n)
{
	struct tensor part[7] = {columns_of(&whole[0], first * 64, n * 64),
	                         groups_of(&whole[1], first, n),
	                         TENSOR(whole[1].dtype, 2, whole[1].dim[0], n * 64),
	                         TENSOR(DT_f32, 3, whole[1].dim[0], 2 * n),
	                         whole[4],
	                         whole[5],
	                         TENSOR(whole[1].dtype, 4, whole[1].dim[0], 4 * n * 32)};
	struct tensor want[3] = {columns_of(&whole[2], first * 64, n * 64),
	                         columns_of(&whole[3], 2 * first, 2 * n), groups_of(&whole[6], first, n)};
	arg.attention.first_head = 2 * first;
	arg.attention.heads = 2 * n;
	arg.attention.groups = n;
	attend(b, arg, part);
	CHECK(same_bits(&want[0], &part[2]));
	CHECK(same_bits(&want[1], &part[3]));
	CHECK(same_bits(&want[2], &part[6]));
	free_all(part, 4);
	free_all(&part[6], 1);
	free_all(want, 3);
}

/* A rank's heads do what they do among all heads, dropout included, bit for bit. */
TEST(attention_on_some_heads_is_a_slice)
{
	static const enum dtype dtypes[] = {DT_f32, DT_bf16};
	union op_arg arg = {.attention = {.seq_length = 110, .heads = 6, .groups = 3, .head_dim = 32}};
	arg.attention.scale = 0.2f;
	arg.attention.dropout = 0.25f;
	arg.attention.salt = 3;
	for (int i = 0; i < 4; i++) {
		enum dtype t = dtypes[i % 2];
		struct tensor whole[7] = {TENSOR(t, 1, 220, 192), TENSOR(t, 2, 220, 384),
		                          TENSOR(t, 3, 220, 192), TENSOR(DT_f32, 4, 220, 6),
		                          TENSOR(DT_i64, 5, 2),   {0},
		                          TENSOR(t, 6, 220, 384)};
		tensor_put(&whole[4], 0, 1234567);
		tensor_put(&whole[4], 1, 7654321);
		attend(both[i / 2], arg, whole);
		check_groups(both[i / 2], arg, whole, 0, 1);
		check_groups(both[i / 2], arg, whole, 1, 2);
		free_all(whole, 7);
	}
}

TEST(dropout_keeps_the_mean)
{
	union op_arg arg = {.dropout = {.p = 0.3f, .salt = 9, .seq_length = 100}};
	struct tensor in[2] = {TENSOR(DT_f32, 1, 200, 999), TENSOR(DT_i64, 2, 2)}, y = tensor_copy(&in[0]);
	double sum = 0, kept = 0;
	for (int64_t i = 0; i < tensor_count(&in[0]); i++)
		tensor_put(&in[0], i, 1);
	tensor_put(&in[1], 0, 12345);
	tensor_put(&in[1], 1, 12346);
	op_run(&cpu_backend, OP_dropout, arg, in, &y);
	for (int64_t i = 0; i < 200 * 999; i++) {
		sum += tensor_at(&y, i) / (200 * 999);
		kept += tensor_at(&y, i) != 0;
	}
	CHECK_NEAR(sum, 1, 0.01);
	CHECK_NEAR(kept / (200 * 999), 0.7, 0.005);
	CHECK(memcmp(y.data, (float *)y.data + 100 * 999, 999 * sizeof(float)));
	free_all(in, 2);
	tensor_free(&y);
}

/* A sample's mask does not depend on where it stands in the batch. */
TEST(dropout_belongs_to_the_sample)
{
	union op_arg arg = {.dropout = {.p = 0.5f, .salt = 1, .seq_length = 3}};
	struct tensor in[2] = {TENSOR(DT_f32, 1, 6, 55), TENSOR(DT_i64, 2, 2)}, y = tensor_copy(&in[0]);
	size_t half = 3 * 55 * sizeof(float);
	memcpy((float *)in[0].data + 3 * 55, in[0].data, half);
	tensor_put(&in[1], 0, 7);
	tensor_put(&in[1], 1, 7);
	op_run(&cpu_backend, OP_dropout, arg, in, &y);
	CHECK(!memcmp(y.data, (float *)y.data + 3 * 55, half));
	free_all(in, 2);
	tensor_free(&y);
}

/* Rows cut anywhere, keys of all samples: slices of the whole, bit for bit. */
TEST(dropout_on_some_rows_is_a_slice)
{
	static const enum dtype dtypes[] = {DT_f32, DT_bf16};
	static const int32_t cut[] = {0, 5, 6, 14, 20, 21};
	union op_arg arg = {.dropout = {.p = 0.4f, .salt = 2, .seq_length = 7}};
	for (int i = 0; i < 4; i++) {
		struct tensor in[2] = {TENSOR(dtypes[i % 2], 1, 21, 1030), TENSOR(DT_i64, 2, 3)};
		struct tensor whole = tensor_copy(&in[0]), part = tensor_copy(&in[0]);
		for (int k = 0; k < 3; k++)
			tensor_put(&in[1], k, 1000 + k);
		arg.dropout.first_row = 0;
		op_run(both[i / 2], OP_dropout, arg, in, &whole);
		for (int k = 0; k < 5; k++) {
			int32_t n = cut[k + 1] - cut[k];
			struct tensor x[2] = {rows_at(&in[0], cut[k], n), in[1]},
			              y = rows_at(&part, cut[k], n);
			arg.dropout.first_row = cut[k];
			op_run(both[i / 2], OP_dropout, arg, x, &y);
		}
		CHECK(same_bits(&whole, &part));
		CHECK(!same_bits(&whole, &in[0]));
		free_all(in, 2);
		tensor_free(&whole);
		tensor_free(&part);
	}
}

TEST(mask_row_agrees_with_its_definition)
{
	float out[301];
	for (uint64_t first = (1ull << 33) - 9; first < (1ull << 33) + 9; first += 3)
		for (int64_t n = 0; n <= 300; n += n < 10 ? 1 : 97) {
			out[n] = 42;
			mask_row(99, 3, first, n, 0.6f, out);
			for (int64_t i = 0; i < n; i++) {
				bool kept = mask_survives(99, 3, first + (uint64_t)i, mask_threshold(0.6f));
				CHECK(out[i] == (kept ? mask_scale(0.6f) : 0));
			}
			CHECK(out[n] == 42);
		}
}

CPU_CLONES static void exp_row(const float *x, float *y, int n)
{
#pragma omp simd
	for (int i = 0; i < n; i++)
		y[i] = vexp(x[i]);
}

CPU_CLONES static void normal_row(const float *x, float *y, int n)
{
#pragma omp simd
	for (int i = 0; i < n; i++)
		y[i] = vnormal(x[i]);
}

TEST(elementary_functions_are_accurate)
{
	enum { COUNT = 100000 };
	static float x[COUNT], y[COUNT];
	double worst = 0, worst_normal = 0;
	for (int i = 0; i < COUNT; i++)
		x[i] = -87 + 175 * (float)i / COUNT;
	exp_row(x, y, COUNT);
	for (int i = 0; i < COUNT; i++)
		worst = fmax(worst, fabs(y[i] / exp(x[i]) - 1));
	CHECK(worst < 3e-7);
	for (int i = 0; i < COUNT; i++)
		x[i] /= 10;
	normal_row(x, y, COUNT);
	for (int i = 0; i < COUNT; i++)
		worst_normal = fmax(worst_normal, fabs(y[i] - 0.5 * erfc(-x[i] * M_SQRT1_2)));
	CHECK(worst_normal < 3e-7);
	CHECK(vexp(0) == 1 && vexp(-INFINITY) == 0 && vexp(-1e30f) == 0);
	CHECK(vexp(INFINITY) == INFINITY && vexp(100) == INFINITY && isnan(vexp(NAN)));
	CHECK(vsigmoid(-1e30f) == 0 && vsigmoid(1e30f) == 1);
}

/* Far from zero an activation is 0 or x and its slope 0 or 1; NaN is not swallowed. */
TEST(activations_of_extremes)
{
	static const float far[] = {-1e30f, -1e4f, -50, 50, 1e4f, 1e15f};
	for (int kind = 0; kind < ACT_COUNT; kind++) {
		union op_arg arg = {.activation = {.kind = kind}};
		struct tensor in[2] = {TENSOR(DT_f32, 1, 7), TENSOR(DT_f32, 1, 7)}, y = TENSOR(DT_f32, 1, 7);
		for (int i = 0; i < 7; i++) {
			tensor_put(&in[1], i, i < 6 ? (double)far[i] : NAN);
			tensor_put(&in[0], i, 1);
		}
		op_run(&cpu_backend, OP_activation, arg, &in[1], &y);
		CHECK(isnan(tensor_at(&y, 6)));
		for (int i = 0; i < 6; i++) {
			double power = kind == ACT_squared_relu ? 2 : 1;
			double want = far[i] < 0 ? 0 : pow(far[i], power);
			CHECK_NEAR(tensor_at(&y, i), want, 1e-6 * fabs(want) + 1e-15);
		}
		op_run(&cpu_backend, OP_activation_bwd, arg, in, &y);
		for (int i = 0; i < 6; i++)
			CHECK_NEAR(tensor_at(&y, i),
			           far[i] < 0                 ? 0
			           : kind == ACT_squared_relu ? 2 * (double)far[i]
			                                      : 1,
			           1e-6 + 1e-7 * fabs((double)far[i]) * (kind == ACT_squared_relu));
		free_all(in, 2);
		tensor_free(&y);
	}
}

/* With a gradient of zero from the start, only the decay moves the weight. */
TEST(adamw_decays_alone)
{
	union op_arg arg = {.adamw = {.decay = 1}};
	struct tensor in[7] = {TENSOR(DT_f32, 1, 100), TENSOR(DT_f32, 1, 100), {0},
	                       TENSOR(DT_f32, 1, 100), TENSOR(DT_f32, 1, 100), TENSOR(DT_f32, 1, 8),
	                       TENSOR(DT_f64, 1, 1)};
	static const float hyper[HYPER_COUNT] = {0.1f, 0.9f, 0.99f, 1e-8f, 0.5f, 0, 1, 1, 1};
	memset(in[1].data, 0, 400);
	memset(in[3].data, 0, 400);
	memset(in[4].data, 0, 400);
	memcpy(in[5].data, hyper, sizeof hyper);
	struct tensor before = tensor_copy(&in[0]);
	op_run(&cpu_backend, OP_adamw, arg, in, NULL);
	for (int64_t i = 0; i < 100; i++)
		CHECK_NEAR(tensor_at(&in[0], i), 0.95 * tensor_at(&before, i), 1e-6);
	free_all(in, 7);
	tensor_free(&before);
}

/* Rows of more than one block. */
TEST(bias_add_of_wide_rows)
{
	static const enum dtype dtypes[] = {DT_f32, DT_bf16, DT_f16};
	for (int i = 0; i < 3; i++) {
		struct tensor in[2] = {TENSOR(dtypes[i], 1, 5, 2500), TENSOR(dtypes[i], 2, 2500)};
		struct tensor y = tensor_copy(&in[0]), want = tensor_copy(&in[0]);
		op_run(&cpu_reference_backend, OP_bias_add, (union op_arg){0}, in, &want);
		op_run(&cpu_backend, OP_bias_add, (union op_arg){0}, in, &y);
		CHECK(same_bits(&want, &y));
		free_all(in, 2);
		free_all((struct tensor[]){y, want}, 2);
	}
}

/* The rows of a table on several ranks: partial results sum to the whole, gradients are its rows. Two ids are
 * nobody's. */
TEST(an_embedding_in_shards_is_the_whole)
{
	static const int32_t cut[] = {0, 7, 8, 50};
	for (int i = 0; i < 2; i++) {
		const struct backend *b = both[i];
		struct tensor in[2] = {TENSOR(DT_f32, 1, 50, 33), TENSOR(DT_i32, 2, 70)},
		              dy = TENSOR(DT_f32, 3, 70, 33);
		struct tensor y = tensor_copy(&dy), sum = tensor_copy(&dy), part = tensor_copy(&dy);
		struct tensor dtable = tensor_copy(&in[0]), rows = tensor_copy(&in[0]);
		for (int32_t n = 0; n < 70; n++)
			tensor_put(&in[1], n, n % 52 - 1);
		op_run(b, OP_embedding, (union op_arg){0}, in, &y);
		op_run(b, OP_embedding_bwd, (union op_arg){0}, (struct tensor[]){dy, in[1]}, &dtable);
		CHECK(tensor_at(&y, 0) == 0 && tensor_at(&y, 51 * 33) == 0 && tensor_at(&y, 50 * 33) != 0);
		for (int r = 0; r < 3; r++) {
			union op_arg arg = {.embedding = {.first_row = cut[r]}};
			struct tensor shard[2] = {rows_at(&in[0], cut[r], cut[r + 1] - cut[r]), in[1]};
			struct tensor dshard = rows_at(&rows, cut[r], cut[r + 1] - cut[r]);
			op_run(b, OP_embedding, arg, shard, &part);
			sum.acc = r > 0;
			op_run(b, OP_accumulate, arg, &part, &sum);
			op_run(b, OP_embedding_bwd, arg, (struct tensor[]){dy, in[1]}, &dshard);
		}
		tensor_compare(&y, &sum, 0, "embedding of shards");
		CHECK(same_bits(&dtable, &rows));
		free_all(in, 2);
		free_all((struct tensor[]){dy, y, sum, part, dtable, rows}, 6);
	}
}

/* The f32 that lies in the middle of two neighbours of a type, and what it rounds to. */
struct rounding {
	enum dtype dtype;
	uint16_t one_up; /* 1 and a last bit */
	float in[10], out[10];
};
static const struct rounding roundings[] = {
        {DT_bf16,
         0x3f81,
         {1 + 0x1p-8f, 1 + 0x3p-8f, 1 + 0x1.01p-8f, -1 - 0x1p-8f, 0x1.fffffep127f, 0x1p-149f, -0.f,
          -0x1p-140f, 0x1.fep127f, -INFINITY},
         {1, 1 + 0x1p-6f, 1 + 0x1p-7f, -1, INFINITY, 0, -0.f, -0.f, 0x1.fep127f, -INFINITY}},
        {DT_f16,
         0x3c01,
         {1 + 0x1p-11f, 1 + 0x3p-11f, 1 + 0x1.01p-11f, -1 - 0x1p-11f, 65520, 0x1.ffdffep15f, 0x1p-25f,
          -0x3p-25f, -0x1.7fep-15f, 0x1.000002p-25f},
         {1, 1 + 0x1p-9f, 1 + 0x1p-10f, -1, INFINITY, 65504, 0, -0x1p-23f, -0x1.8p-15f, 0x1p-24f}}};

/* Every bf16 or f16 is an f32 and comes back; between two of them the nearest is taken, of equally near the
 * even one. */
static void check_rounding(const struct backend *b, const struct rounding *r)
{
	union op_arg to_f32 = {.cast = {DT_f32}}, to_half = {.cast = {(int32_t)r->dtype}};
	struct tensor all = TENSOR(r->dtype, 1, 1 << 16), wide = TENSOR(DT_f32, 1, 1 << 16),
	              back = tensor_copy(&all);
	for (int32_t x = 0; x < 1 << 16; x++)
		((uint16_t *)all.data)[x] = (uint16_t)x;
	op_run(b, OP_cast, to_f32, &all, &wide);
	op_run(b, OP_cast, to_half, &wide, &back);
	for (int32_t x = 0; x < 1 << 16; x++)
		CHECK(((uint16_t *)back.data)[x] == x ||
		      (isnan(tensor_at(&all, x)) && isnan(tensor_at(&back, x))));
	CHECK(tensor_at(&wide, r->one_up) == 1 + (r->dtype == DT_bf16 ? 0x1p-7 : 0x1p-10));
	struct tensor x = TENSOR(DT_f32, 1, 10), y = TENSOR(r->dtype, 1, 10);
	memcpy(x.data, r->in, sizeof r->in);
	op_run(b, OP_cast, to_half, &x, &y);
	for (int k = 0; k < 10; k++)
		CHECK(tensor_at(&y, k) == (double)r->out[k] &&
		      !signbit(tensor_at(&y, k)) == !signbit(r->out[k]));
	free_all((struct tensor[]){all, wide, back, x, y}, 5);
}

TEST(casts_round_to_nearest_even)
{
	for (int i = 0; i < 4; i++)
		check_rounding(both[i % 2], &roundings[i / 2]);
}

/* The value of a half by its fields. */
static double half_value(int32_t x)
{
	int exponent = x >> 10 & 31, fraction = x & 1023;
	double size = exponent == 31 ? (fraction ? NAN : INFINITY)
	              : exponent     ? ldexp(1024 + fraction, exponent - 25)
	                             : ldexp(fraction, -24);
	return x & 0x8000 ? -size : size;
}

/* All values, and between any two neighbours what is nearer to either; at equal distance the even one. */
TEST(halves_are_what_their_fields_say)
{
	for (int32_t x = 0; x < 1 << 16; x++) {
		double have = f16_to_f32((uint16_t)x), want = half_value(x);
		CHECK((isnan(have) && isnan(want)) || (have == want && !signbit(have) == !signbit(want)));
	}
	for (int32_t x = 0; x < 0x7c00; x++) {
		/* 2^16 takes the place of infinity. */
		float low = (float)half_value(x), high = x < 0x7bff ? (float)half_value(x + 1) : 65536;
		float middle = low / 2 + high / 2;
		CHECK_INT(f16_from_f32(middle), x & 1 ? x + 1 : x);
		CHECK_INT(f16_from_f32(nextafterf(middle, 0)), x);
		CHECK_INT(f16_from_f32(nextafterf(-middle, -INFINITY)), (x + 1) | 0x8000);
	}
	CHECK(isnan(f16_to_f32(f16_from_f32(NAN))) && isnan(f16_to_f32(f16_from_f32(-NAN))));
	CHECK_INT(f16_from_f32(0x1p-149f), 0);
	CHECK_INT(f16_from_f32(-0x1p-127f), 0x8000);
}

TEST(zero_of_every_type)
{
	for (int i = 0; i < 2 * DT_COUNT; i++) {
		struct tensor y = TENSOR((enum dtype)(i / 2), 1, 333);
		op_run(both[i % 2], OP_zero, (union op_arg){0}, NULL, &y);
		for (int64_t k = 0; k < 333; k++)
			CHECK(tensor_at(&y, k) == 0);
		CHECK(tensor_guarded(&y));
		tensor_free(&y);
	}
}

/* Where another rank counts the same tensor: 0 is written, nothing is added. */
TEST(square_sum_that_does_not_count)
{
	for (int i = 0; i < 2; i++) {
		struct tensor x = TENSOR(DT_f32, 1, 100), y = TENSOR(DT_f64, 1, 1);
		op_run(both[i], OP_square_sum, (union op_arg){.square_sum = {0}}, &x, &y);
		CHECK(tensor_at(&y, 0) == 0);
		tensor_put(&y, 0, 7);
		y.acc = 1;
		op_run(both[i], OP_square_sum, (union op_arg){.square_sum = {0}}, &x, &y);
		CHECK(tensor_at(&y, 0) == 7);
		op_run(both[i], OP_square_sum, counted, &x, &y);
		CHECK(tensor_at(&y, 0) > 7);
		free_all((struct tensor[]){x, y}, 2);
	}
}

/* More elements than 512 blocks: a thread's share is cut by the shape alone. */
TEST(square_sum_of_a_bucket)
{
	struct tensor x = TENSOR(DT_f32, 1, 3 * 512 * 1024 + 77), y[3], want = TENSOR(DT_f64, 1, 1);
	op_run(&cpu_reference_backend, OP_square_sum, counted, &x, &want);
	for (int threads = 1; threads <= 3; threads++) {
		struct stream *s;
		struct err e = {0};
		y[threads - 1] = TENSOR(DT_f64, 1, 1);
		MUST(cpu_backend.open(&s, THREADS(threads), &e) == 0);
		CHECK(cpu_backend.kernel[OP_square_sum](s, &counted, &x, &y[threads - 1], &e) == 0);
		cpu_backend.close(s);
		tensor_compare(&want, &y[threads - 1], 1e-12, "square_sum of a bucket");
		CHECK(same_bits(&y[0], &y[threads - 1]));
	}
	free_all(y, 3);
	free_all((struct tensor[]){x, want}, 2);
}

/* A bucket is updated as its tensors are, bit for bit. */
TEST(adamw_of_a_bucket_is_that_of_its_tensors)
{
	static const int32_t cut[] = {0, 3, 1027, 30000, 70001};
	static const float hyper[HYPER_COUNT] = {0.01f, 0.9f, 0.95f, 1e-8f, 0.1f, 0.5f, 2.5f, 4.0f, 1};
	union op_arg arg = {.adamw = {.decay = 1}};
	for (int master = 0; master < 2; master++) {
		struct tensor none = {0}, in[7], copy[7];
		for (int k = 0; k < 5; k++)
			in[k] = k == 2 && !master
			                ? none
			                : TENSOR(master && k < 2 ? DT_bf16 : DT_f32, (uint64_t)k, 70001);
		in[5] = TENSOR(DT_f32, 5, HYPER_COUNT);
		in[6] = TENSOR(DT_f64, 6, 1);
		memcpy(in[5].data, hyper, sizeof hyper);
		tensor_put(&in[6], 0, 300);
		for (int64_t i = 0; i < 70001; i++)
			tensor_put(&in[4], i, fabs(tensor_at(&in[4], i)));
		for (int k = 0; k < 7; k++)
			copy[k] = tensor_copy(&in[k]);
		op_run(&cpu_backend, OP_adamw, arg, in, NULL);
		for (int piece = 0; piece < 4; piece++) {
			struct tensor part[7] = {[5] = copy[5], copy[6]};
			for (int k = 0; k < 5; k++)
				if (copy[k].data)
					part[k] = rows_at(&copy[k], cut[piece], cut[piece + 1] - cut[piece]);
			op_run(&cpu_backend, OP_adamw, arg, part, NULL);
		}
		for (int k = 0; k < 5; k++)
			CHECK(!in[k].data || same_bits(&in[k], &copy[k]));
		free_all(in, 7);
		free_all(copy, 7);
	}
}

/* A gradient that is 1024 times as large, and is divided by that, gives the same bits, clipped or not. */
TEST(adamw_takes_the_scale_off)
{
	static const float hyper[HYPER_COUNT] = {0.01f, 0.9f, 0.95f, 1e-8f, 0.1f, 0.5f, 2.5f, 4.0f, 1};
	union op_arg arg = {.adamw = {.decay = 1}};
	for (int i = 0; i < 4; i++) {
		struct tensor once[7] = {
		        TENSOR(DT_f32, 1, 3000), TENSOR(DT_f32, 2, 3000), {0},
		        TENSOR(DT_f32, 3, 3000), TENSOR(DT_f32, 4, 3000), TENSOR(DT_f32, 5, HYPER_COUNT),
		        TENSOR(DT_f64, 6, 1)};
		struct tensor scaled[7];
		memcpy(once[5].data, hyper, sizeof hyper);
		tensor_put(&once[6], 0, i / 2 ? 300 : 0.01);
		for (int64_t k = 0; k < 3000; k++)
			tensor_put(&once[4], k, fabs(tensor_at(&once[4], k)));
		for (int k = 0; k < 7; k++)
			scaled[k] = tensor_copy(&once[k]);
		for (int64_t k = 0; k < 3000; k++)
			tensor_put(&scaled[1], k, 1024 * tensor_at(&once[1], k));
		tensor_put(&scaled[5], HYPER_UNSCALE, 0x1p-10);
		tensor_put(&scaled[6], 0, 0x1p20 * tensor_at(&once[6], 0));
		op_run(both[i % 2], OP_adamw, arg, once, NULL);
		op_run(both[i % 2], OP_adamw, arg, scaled, NULL);
		for (int k = 0; k < 5; k++)
			CHECK(k == 1 || k == 2 || same_bits(&once[k], &scaled[k]));
		free_all(once, 7);
		free_all(scaled, 7);
	}
}

/* Bad tokens and positions are refused with a sentence, before anything is read out of bounds. */
TEST(bad_indices_are_refused)
{
	static const struct {
		enum op op;
		int index;
		const char *part;
	} bad[] = {{OP_cross_entropy, 1, "cross_entropy: target 100000 of row 3"},
	           {OP_cross_entropy_bwd, 1, "cross_entropy: target 100000 of row 3"},
	           {OP_logit_stats, 1, "logit_stats: target 100000 of row 3"},
	           {OP_rope, 2, "rope: position 100000 of row 3"},
	           {OP_attention_cache, 3, "attention_cache: position 100000 of row 3"}};
	for (size_t i = 0; i < 2 * sizeof bad / sizeof *bad; i++) {
		const struct backend *b = both[i % 2];
		struct fixture f =
		        fixture_open(op_case_of(bad[i / 2].op), (struct setup){1, 0, DT_f32, false, false});
		struct stream *s;
		struct err e = {0};
		MUST(b->open(&s, THREADS(1), &e) == 0);
		tensor_put(&f.in[bad[i / 2].index], 3, 100000);
		CHECK(b->kernel[f.c->op](s, &f.arg, f.in, f.out, &e) != 0);
		CHECK_HAS(e.text, bad[i / 2].part);
		b->close(s);
		fixture_close(&f);
	}
}

/* Every field of the device table. */
TEST(backends_hold_memory)
{
	for (int i = 0; i < 2; i++) {
		const struct backend *b = both[i];
		struct stream *s;
		struct err e = {0};
		char here[100] = "in and out";
		MUST(b->probe(&e) == 0);
		CHECK(*b->name && *b->describe());
		CHECK_INT(b->open(&s, THREADS(-1), &e), EXIT_CONFIG);
		MUST(b->open(&s, THREADS(0), &e) == 0);
		char *p = b->alloc(s, 1 << 20);
		CHECK((uintptr_t)p % 64 == 0 && p[0] == 0 && p[(1 << 20) - 1] == 0);
		b->upload(s, p + 500, here, sizeof here);
		memset(here, 1, sizeof here);
		b->download(s, here, p + 500, sizeof here);
		b->wait(s);
		CHECK_STR(here, "in and out");
		b->zero(s, p, 1 << 20);
		b->wait(s);
		CHECK(p[500] == 0);
		b->free(s, p);
		b->close(s);
	}
}

static void *rank(void *result)
{
	struct fixture *f = result;
	for (int i = 0; i < 20; i++)
		fixture_run(f, &cpu_backend, 2, -1);
	return NULL;
}

/* Ranks may be threads of one process, each with a stream and a team of its own. */
TEST(streams_are_independent)
{
	struct setup setup = {SIZES - 1, 0, DT_bf16, true, false};
	struct fixture f[3];
	pthread_t thread[3];
	for (int i = 0; i < 3; i++) {
		f[i] = fixture_open(op_case_of(OP_layernorm_bwd), setup);
		MUST(pthread_create(&thread[i], NULL, rank, &f[i]) == 0);
	}
	for (int i = 0; i < 3; i++)
		pthread_join(thread[i], NULL);
	for (int i = 1; i < 3; i++)
		for (int k = 0; k < 3; k++)
			CHECK(!memcmp(f[0].out[k].data, f[i].out[k].data,
			              (size_t)tensor_bytes(&f[0].out[k])));
	for (int i = 0; i < 3; i++)
		fixture_close(&f[i]);
}
