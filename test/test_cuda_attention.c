/* Attention of the CUDA device in the simulator: more rows than a tile has, heads of usual sizes, on tensor
 * cores and without. test_cuda has the odd sizes. */
#include <stdlib.h>

#include "base/err.h"
#include "kernels/cuda/cuda.h"
#include "kernels/kernels.h"
#include "test/ops_fixture.h"

enum { ALL = OP_MAX_IN + OP_MAX_OUT };
static const struct tensor none;

/* What is tried; `shared`: bytes of shared memory that a block has, 0 as the simulator says. */
struct trial {
	enum dtype dtype;
	int32_t samples, length, heads, groups, size, value, window;
	float dropout;
	bool documents;
	size_t shared;
};

static union op_arg arg_of(const struct trial *t)
{
	union op_arg arg = {0};
	arg.attention.seq_length = t->length;
	arg.attention.heads = t->heads;
	arg.attention.groups = t->groups;
	arg.attention.head_dim = t->size;
	arg.attention.value_dim = t->value;
	arg.attention.window = t->window;
	arg.attention.scale = 1 / sqrtf((float)t->size);
	arg.attention.dropout = t->dropout;
	arg.attention.salt = 9;
	return arg;
}

/* One operation on the device's own memory, with less of the shared kind where `shared` says so. */
static int run(size_t shared, enum op op, const union op_arg *arg, const struct tensor *in,
               const struct tensor *out, struct err *e)
{
	const struct backend *b = &cuda_backend;
	int n_in = op_rows[op].n_in, n = n_in + op_rows[op].n_out;
	struct tensor host[ALL], device[ALL];
	struct stream *s;
	if (!CHECK(b->open(&s, THREADS(1), e) == 0))
		return e->code;
	if (shared)
		s->properties.sharedMemPerBlockOptin = shared;
	memcpy(host, in, (size_t)n_in * sizeof *in);
	memcpy(host + n_in, out, (size_t)(n - n_in) * sizeof *out);
	for (int k = 0; k < n; k++) {
		device[k] = host[k];
		if (!host[k].data)
			continue;
		device[k].data = b->alloc(s, (size_t)tensor_bytes(&host[k]));
		b->upload(s, device[k].data, host[k].data, (size_t)tensor_bytes(&host[k]));
	}
	int rc = b->kernel[op](s, arg, device, device + n_in, e);
	for (int k = 0; k < n; k++) {
		if (!host[k].data)
			continue;
		if (k >= n_in)
			b->download(s, host[k].data, device[k].data, (size_t)tensor_bytes(&host[k]));
		b->free(s, device[k].data);
	}
	rc = rc ? rc : b->status(s, e);
	b->close(s);
	return rc;
}

static void must_run(size_t shared, enum op op, union op_arg arg, const struct tensor *in,
                     const struct tensor *out)
{
	struct err e = {0};
	if (run(shared, op, &arg, in, out, &e))
		test_failed(__FILE__, __LINE__, "%s: %s", op_rows[op].name, e.text);
}

/* Everything about one attention: what goes in, and what the processor makes of it. */
struct whole {
	struct trial t;
	union op_arg arg;
	struct tensor qkv, dout, keys, begins, o, lse, dqkv;
};

static int32_t packed_width(const struct trial *t)
{
	return (t->heads + t->groups) * t->size + t->groups * t->value;
}

/* Documents of 50 rows; but in the first sample the last rows see nothing. */
static struct tensor documents_of(const struct trial *t)
{
	struct tensor begins = TENSOR(DT_i32, 1, t->samples * t->length);
	for (int32_t i = 0; i < t->samples * t->length; i++) {
		int32_t at = i % t->length;
		tensor_put(&begins, i, i < t->length && at > t->length - 70 ? at + 1 : at / 50 * 50);
	}
	return begins;
}

static struct whole whole_open(struct trial t)
{
	int32_t rows = t.samples * t.length;
	struct whole w = {.t = t, .arg = arg_of(&t)};
	w.qkv = TENSOR(t.dtype, 1, rows, packed_width(&t));
	w.dout = TENSOR(t.dtype, 2, rows, t.heads * t.value);
	w.o = TENSOR(t.dtype, 3, rows, t.heads * t.value);
	w.lse = TENSOR(DT_f32, 4, rows, t.heads);
	w.dqkv = TENSOR(t.dtype, 5, rows, packed_width(&t));
	w.keys = TENSOR(DT_i64, 6, t.samples);
	w.begins = t.documents ? documents_of(&t) : none;
	for (int i = 0; i < t.samples; i++)
		tensor_put(&w.keys, i, 12345 + i);
	op_run(&cpu_backend, OP_attention, w.arg, (struct tensor[]){w.qkv, w.keys, w.begins},
	       (struct tensor[]){w.o, w.lse});
	op_run(&cpu_backend, OP_attention_bwd, w.arg,
	       (struct tensor[]){w.dout, w.qkv, w.o, w.lse, w.keys, w.begins}, &w.dqkv);
	return w;
}

static void whole_close(struct whole *w)
{
	struct tensor *all[] = {&w->qkv, &w->dout, &w->keys, &w->begins, &w->o, &w->lse, &w->dqkv};
	for (size_t i = 0; i < sizeof all / sizeof *all; i++)
		tensor_free(all[i]);
}

/* All NaN, so that what is not written, or should not be read, shows. */
static struct tensor spoilt(enum dtype dtype, int32_t rows, int32_t width)
{
	struct tensor t = TENSOR(dtype, 1, rows, width);
	memset(t.data, 0xff, (size_t)tensor_bytes(&t));
	return t;
}

static struct tensor spoilt_like(const struct tensor *t)
{
	return spoilt(t->dtype, t->dim[0], t->dim[1]);
}

static double tolerance(const struct whole *w)
{
	return w->t.dtype == DT_f32 ? 1e-5 : 2e-2;
}

static void check_trial(struct trial t)
{
	struct whole w = whole_open(t);
	struct tensor got[3] = {spoilt_like(&w.o), spoilt_like(&w.lse), spoilt_like(&w.dqkv)};
	struct tensor again = spoilt_like(&w.dqkv);
	const struct tensor in[] = {w.dout, w.qkv, w.o, w.lse, w.keys, w.begins};
	must_run(t.shared, OP_attention, w.arg, (struct tensor[]){w.qkv, w.keys, w.begins}, got);
	must_run(t.shared, OP_attention_bwd, w.arg, in, &got[2]);
	must_run(t.shared, OP_attention_bwd, w.arg, in, &again);
	tensor_compare(&w.o, &got[0], tolerance(&w), "o");
	tensor_compare(&w.lse, &got[1], 1e-5, "lse");
	tensor_compare(&w.dqkv, &got[2], 2 * tolerance(&w), "dqkv");
	CHECK(!memcmp(got[2].data, again.data, (size_t)tensor_bytes(&again)));
	for (int k = 0; k < 3; k++)
		tensor_free(&got[k]);
	tensor_free(&again);
	whole_close(&w);
}

TEST(groups_of_heads_of_64)
{
	check_trial((struct trial){DT_bf16, 1, 200, 2, 1, 64, 64, 0, 0, false, 0});
}

TEST(a_window_on_heads_of_128)
{
	check_trial((struct trial){DT_bf16, 1, 160, 1, 1, 128, 128, 50, 0, false, 0});
}

TEST(documents_and_dropout)
{
	check_trial((struct trial){DT_bf16, 2, 200, 1, 1, 64, 64, 0, 0.2f, true, 0});
	check_trial((struct trial){DT_f32, 1, 100, 2, 1, 64, 64, 30, 0.2f, true, 0});
}

TEST(values_narrower_than_keys)
{
	check_trial((struct trial){DT_bf16, 1, 100, 1, 1, 192, 128, 0, 0, false, 0});
	check_trial((struct trial){DT_bf16, 2, 80, 1, 1, 80, 40, 0, 0, false, 0});
}

TEST(single_precision)
{
	check_trial((struct trial){DT_f32, 1, 100, 2, 1, 128, 128, 0, 0, false, 0});
	check_trial((struct trial){DT_f32, 1, 50, 1, 1, 256, 256, 20, 0, false, 0});
}

/* Half the rows a tile where a block has less memory; what does not fit at all says so. */
TEST(a_smaller_device)
{
	enum { LESS = 99 << 10 };
	const struct trial wide = {DT_f32, 1, 16, 1, 1, 256, 256, 0, 0, false, LESS};
	struct whole w = whole_open(wide);
	struct err e = {0};
	check_trial((struct trial){DT_bf16, 1, 150, 1, 1, 128, 128, 0, 0, false, LESS});
	CHECK(run(LESS, OP_attention_bwd, &w.arg,
	          (struct tensor[]){w.dout, w.qkv, w.o, w.lse, w.keys, w.begins}, &w.dqkv,
	          &e) == EXIT_UNAVAILABLE);
	CHECK_HAS(e.text, "bytes of shared memory");
	whole_close(&w);
}

/* Rows of the ranks that a context names, in its order; columns [first, first + width). */
static struct tensor gather(const struct tensor *t, struct context c, int32_t length, int32_t first,
                            int32_t width)
{
	int32_t each = length / c.ranks, samples = t->dim[0] / length, rows = samples * each * c.count;
	struct tensor part = TENSOR(t->dtype, 1, rows, width);
	for (int32_t i = 0; i < rows * width; i++) {
		int32_t n = i / width, rank = (c.first + n / (samples * each)) % c.ranks;
		int64_t row = n / each % samples * length + context_position(length, c.ranks, rank, n % each);
		tensor_put(&part, i, tensor_at(t, row * tensor_row(t) + first + i % width));
	}
	return part;
}

/* o and lse of rank 1 of 2: first of the other's keys, on top of nothing that is NaN, then of its own. Then
 * what its own keys give its queries, and theirs. */
static void check_parts(struct trial t)
{
	const struct context own = {2, 1, 1}, other = {2, 0, 1};
	struct whole w = whole_open(t);
	int32_t queries = t.heads * t.size, rest = packed_width(&t) - queries, wide = t.heads * t.value;
	int32_t rows = t.samples * t.length / 2;
	struct tensor q = gather(&w.qkv, own, t.length, 0, queries);
	struct tensor kv[2] = {gather(&w.qkv, other, t.length, queries, rest),
	                       gather(&w.qkv, own, t.length, queries, rest)};
	struct tensor before[2] = {spoilt(DT_f32, rows, wide), spoilt(DT_f32, rows, t.heads)};
	struct tensor half[2] = {spoilt(DT_f32, rows, wide), spoilt(DT_f32, rows, t.heads)};
	struct tensor got[2] = {spoilt(t.dtype, rows, wide), spoilt(DT_f32, rows, t.heads)};
	struct tensor want[2] = {gather(&w.o, own, t.length, 0, wide),
	                         gather(&w.lse, own, t.length, 0, t.heads)};
	struct tensor dout = gather(&w.dout, own, t.length, 0, wide);
	struct tensor dq[3] = {spoilt_like(&q), spoilt_like(&q), gather(&w.dqkv, own, t.length, 0, queries)};
	struct tensor dkv[2] = {spoilt_like(&kv[0]), spoilt_like(&kv[1])};
	for (int64_t i = 0; i < tensor_count(&before[1]); i++)
		tensor_put(&before[1], i, -INFINITY);
	w.arg.attention.queries = own;
	w.arg.attention.rows = other;
	w.arg.attention.goes_on = 1;
	must_run(0, OP_attention_part, w.arg, (struct tensor[]){q, kv[0], before[0], before[1], w.keys, none},
	         half);
	w.arg.attention.rows = own;
	w.arg.attention.goes_on = 0;
	must_run(0, OP_attention_part, w.arg, (struct tensor[]){q, kv[1], half[0], half[1], w.keys, none},
	         got);
	tensor_compare(&want[0], &got[0], tolerance(&w), "o of parts");
	tensor_compare(&want[1], &got[1], 1e-5, "lse of parts");
	for (int i = 0; i < 2; i++) {
		w.arg.attention.rows = i ? own : other;
		must_run(0, OP_attention_part_bwd, w.arg,
		         (struct tensor[]){dout, q, kv[i], got[0], got[1], w.keys, none},
		         (struct tensor[]){dq[i], dkv[i]});
	}
	for (int64_t i = 0; i < tensor_count(&dq[0]); i++)
		tensor_put(&dq[0], i, tensor_at(&dq[0], i) + tensor_at(&dq[1], i));
	tensor_compare(&dq[2], &dq[0], 2 * tolerance(&w), "dq of parts");
	struct tensor *all[] = {&q,       &kv[0],  &kv[1],  &before[0], &before[1], &half[0],
	                        &half[1], &got[0], &got[1], &want[0],   &want[1],   &dout,
	                        &dq[0],   &dq[1],  &dq[2],  &dkv[0],    &dkv[1]};
	for (size_t i = 0; i < sizeof all / sizeof *all; i++)
		tensor_free(all[i]);
	whole_close(&w);
}

TEST(parts_longer_than_a_tile)
{
	check_parts((struct trial){DT_bf16, 1, 288, 2, 1, 64, 64, 0, 0, false, 0});
	check_parts((struct trial){DT_f32, 2, 160, 1, 1, 32, 48, 90, 0.2f, false, 0});
}

int main(int argc, char **argv)
{
	return test_main(argc, argv);
}
