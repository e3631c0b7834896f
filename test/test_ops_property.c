/* What operations must satisfy whatever their inputs, and what their kernels do with bad ones. */
#include <pthread.h>
#include <stdlib.h>

#include "base/err.h"
#include "base/rng.h"
#include "kernels/cpu/mask.h"
#include "kernels/cpu/vmath.h"
#include "kernels/kernels.h"
#include "test/ops_fixture.h"

static const union op_arg no_arg;

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
	struct tensor in[2] = {TENSOR(DT_f32, 1, 3, 4), TENSOR(DT_i32, 1, 3)};
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
	op_run(&cpu_backend, OP_square_sum, no_arg, in, &squares[0]);
	op_run(&cpu_backend, OP_square_sum, no_arg, &y, &squares[1]);
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
	struct tensor in[2] = {TENSOR(DT_f32, 1, 48, 128), {0}};
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
	struct tensor in[2] = {TENSOR(DT_f32, 1, 48, 128), {0}};
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
	struct tensor in[2] = {TENSOR(DT_f32, 1, 24, 128), {0}}, position = ascending(24);
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
	static const float hyper[HYPER_COUNT] = {0.1f, 0.9f, 0.99f, 1e-8f, 0.5f, 0, 1, 1};
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

/* Bad tokens and positions are refused with a sentence, before anything is read out of bounds. */
TEST(bad_indices_are_refused)
{
	static const struct {
		enum op op;
		int index;
		const char *part;
	} bad[] = {{OP_cross_entropy, 1, "cross_entropy: target 100000 of row 3"},
	           {OP_cross_entropy_bwd, 1, "cross_entropy: target 100000 of row 3"},
	           {OP_rope, 2, "rope: position 100000 of row 3"},
	           {OP_attention_cache, 3, "attention_cache: position 100000 of row 3"}};
	const struct backend *backends[] = {&cpu_reference_backend, &cpu_backend};
	for (size_t i = 0; i < 2 * sizeof bad / sizeof *bad; i++) {
		const struct backend *b = backends[i % 2];
		struct fixture f =
		        fixture_open(op_case_of(bad[i / 2].op), (struct setup){1, 0, DT_f32, false, false});
		struct stream *s;
		struct err e = {0};
		MUST(b->open(&s, 1, &e) == 0);
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
	const struct backend *backends[] = {&cpu_reference_backend, &cpu_backend};
	for (int i = 0; i < 2; i++) {
		const struct backend *b = backends[i];
		struct stream *s;
		struct err e = {0};
		char here[100] = "in and out";
		MUST(b->probe(&e) == 0);
		CHECK(*b->name && *b->describe());
		CHECK_INT(b->open(&s, -1, &e), EXIT_CONFIG);
		MUST(b->open(&s, 0, &e) == 0);
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
