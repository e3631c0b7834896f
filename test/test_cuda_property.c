/* What the sizes of op_cases.def do not reach on a CUDA device: rows that take several warps or are walked
 * through, more rows than blocks, tokens of which one is most, values that the processor would refuse. Every
 * call is told of before, so that one that takes more scratch than it said ends the program. */
#include <stdlib.h>

#include "base/err.h"
#include "base/rng.h"
#include "kernels/kernels.h"
#include "test/ops_fixture.h"

enum { ALL = OP_MAX_IN + OP_MAX_OUT };

/* Inputs in t[0 …], outputs in t[OP_MAX_IN …]; absent ones are zeros. */
static void run_on(const struct backend *b, struct stream *s, enum op op, const union op_arg *arg,
                   struct tensor *t, struct err *e)
{
	struct tensor shape[ALL], device[ALL];
	for (int k = 0; k < ALL; k++) {
		shape[k] = device[k] = t[k];
		shape[k].data = NULL;
		if (!t[k].data)
			continue;
		device[k].data = b->alloc(s, (size_t)tensor_bytes(&t[k]));
		b->upload(s, device[k].data, t[k].data, (size_t)tensor_bytes(&t[k]));
	}
	b->workspace(s, &(struct kernel_call){op, arg, shape, shape + OP_MAX_IN});
	if (b->kernel[op](s, arg, device, device + OP_MAX_IN, e) == 0)
		b->status(s, e);
	for (int k = 0; k < ALL; k++) {
		if (!t[k].data)
			continue;
		if (k >= OP_MAX_IN)
			b->download(s, t[k].data, device[k].data, (size_t)tensor_bytes(&t[k]));
		b->free(s, device[k].data);
	}
}

static void run_cuda(enum op op, const union op_arg *arg, struct tensor *t)
{
	struct stream *s;
	struct err e = {0};
	MUST(cuda_backend.open(&s, THREADS(0), &e) == 0);
	run_on(&cuda_backend, s, op, arg, t, &e);
	if (e.code)
		test_failed(__FILE__, __LINE__, "%s: %s", op_rows[op].name, e.text);
	cuda_backend.close(s);
}

/* Frees the tensors. */
static void agree(enum op op, union op_arg arg, struct tensor *t, double tolerance)
{
	char what[100];
	struct tensor expected[ALL] = {{0}};
	for (int k = 0; k < ALL; k++)
		expected[k] = tensor_copy(&t[k]);
	op_run(&cpu_reference_backend, op, arg, expected, expected + OP_MAX_IN);
	run_cuda(op, &arg, t);
	for (int k = OP_MAX_IN; k < ALL; k++) {
		snprintf(what, sizeof what, "%s, rows of %lld %s, output %d", op_rows[op].name,
		         (long long)tensor_row(&t[0]), dtype_rows[t[0].dtype].name, k - OP_MAX_IN);
		tensor_compare(&expected[k], &t[k], tolerance, what);
	}
	for (int k = 0; k < ALL; k++) {
		tensor_free(&t[k]);
		tensor_free(&expected[k]);
	}
}

#define OUT(k) t[OP_MAX_IN + (k)]
static const union op_arg eps = {.norm = {.eps = 1e-5f}};

static void check_layernorm(enum dtype type, int32_t rows, int32_t width)
{
	double tolerance = type == DT_f32 ? 1e-5 : 8e-3;
	struct tensor x = TENSOR(type, 1, rows, width), w = TENSOR(type, 2, width), t[ALL] = {{0}};
	struct tensor mean = TENSOR(DT_f32, 3, rows), rstd = TENSOR(DT_f32, 4, rows);
	t[0] = tensor_copy(&x), t[1] = tensor_copy(&w), t[2] = TENSOR(type, 5, width);
	OUT(0) = TENSOR(type, 6, rows, width), OUT(1) = tensor_copy(&mean), OUT(2) = tensor_copy(&rstd);
	agree(OP_layernorm, eps, t, tolerance);

	struct tensor back[ALL] = {TENSOR(type, 7, rows, width), x, w, mean, rstd,
	                           TENSOR(type, 8, rows, width)};
	back[OP_MAX_IN] = TENSOR(type, 9, rows, width);
	for (int k = 1; k < 3; k++) {
		back[OP_MAX_IN + k] = TENSOR(DT_f32, 9, width);
		back[OP_MAX_IN + k].acc = k == 1;
	}
	agree(OP_layernorm_bwd, eps, back, tolerance);
}

static void check_rmsnorm(enum dtype type, int32_t rows, int32_t width)
{
	double tolerance = type == DT_f32 ? 1e-5 : 8e-3;
	struct tensor x = TENSOR(type, 1, rows, width), w = TENSOR(type, 2, width), t[ALL] = {{0}};
	t[0] = tensor_copy(&x), t[1] = tensor_copy(&w);
	OUT(0) = TENSOR(type, 6, rows, width), OUT(1) = TENSOR(DT_f32, 4, rows);
	agree(OP_rmsnorm, eps, t, tolerance);

	struct tensor back[ALL] = {TENSOR(type, 7, rows, width), x, w, TENSOR(DT_f32, 4, rows)};
	back[OP_MAX_IN] = TENSOR(type, 9, rows, width), back[OP_MAX_IN + 1] = TENSOR(DT_f32, 9, width);
	agree(OP_rmsnorm_bwd, eps, back, tolerance);
}

/* One warp, several, a block's share, and beyond it; in packs and in single elements. */
TEST(norms_of_wide_rows)
{
	static const int32_t widths[] = {1024, 1536, 8192, 8200, 300, 2051};
	for (size_t i = 0; i < sizeof widths / sizeof *widths; i++)
		for (enum dtype type = DT_f32; type <= DT_bf16; type++) {
			check_layernorm(type, 3, widths[i]);
			check_rmsnorm(type, 3, widths[i]);
		}
}

/* 264 blocks of 256 threads have room for 422 teams of 160 at once, and for 16,896 of 4. */
TEST(norms_of_more_rows_than_blocks)
{
	check_layernorm(DT_f32, 430, 1241);
	check_rmsnorm(DT_f32, 17000, 30);
}

static struct tensor integers(int32_t n, int32_t below, uint64_t seed)
{
	struct tensor t = TENSOR(DT_i32, seed, n);
	for (int32_t i = 0; i < n; i++)
		tensor_put(&t, i, (double)(rng_bits(seed, (uint64_t)i) % (uint64_t)below));
	return t;
}

/* Several chunks to sort, runs over many tiles, ids of other ranks; the sums are long, so f32 is felt. */
static void check_skewed_tokens(enum dtype type, int32_t width)
{
	enum { TOKENS = 1600, ROWS = 600 };
	union op_arg arg = {.embedding = {.first_row = 3}};
	struct tensor t[ALL] = {TENSOR(type, 1, TOKENS, width), integers(TOKENS, ROWS + 20, 2)};
	for (int i = 0; i < TOKENS; i++)
		if (i % 7 > 1)
			tensor_put(&t[1], i, i % 7 == 2 ? 11 : 515);
	OUT(0) = TENSOR(DT_f32, 3, ROWS, width);
	OUT(0).acc = type == DT_f32;
	agree(OP_embedding_bwd, arg, t, 1e-5);
}

TEST(embedding_gradients_of_skewed_tokens)
{
	check_skewed_tokens(DT_f32, 40);
	check_skewed_tokens(DT_bf16, 40);
	check_skewed_tokens(DT_bf16, 3);
}

TEST(sums_over_many_rows)
{
	struct tensor t[ALL] = {TENSOR(DT_bf16, 1, 5000, 40)};
	OUT(0) = TENSOR(DT_f32, 2, 40);
	agree(OP_bias_grad, (union op_arg){0}, t, 1e-5);

	struct tensor square[ALL] = {TENSOR(DT_f32, 1, 1100, 1001)};
	square[OP_MAX_IN] = TENSOR(DT_f64, 2, 1);
	agree(OP_square_sum, (union op_arg){.square_sum = {1}}, square, 1e-12);
}

/* Logits of a wide vocabulary, some of them far apart or -inf. */
static struct tensor wide_logits(enum dtype type, int32_t rows, int32_t width)
{
	struct tensor t = TENSOR(type, 1, rows, width);
	for (int32_t i = 0; i < rows * width; i++)
		tensor_put(&t, i, i % 11 ? tensor_at(&t, i) * (double)(1 + i / width * 9) : -INFINITY);
	return t;
}

TEST(losses_of_wide_rows)
{
	enum { ROWS = 3, WIDTH = 5000, VOCABULARY = 4990 };
	union op_arg arg = {.cross_entropy = {.vocab_size = VOCABULARY}};
	for (enum dtype type = DT_f32; type <= DT_bf16; type++) {
		struct tensor t[ALL] = {wide_logits(type, ROWS, WIDTH), integers(ROWS, 10, 2)};
		OUT(0) = TENSOR(DT_f64, 3, 1), OUT(1) = TENSOR(DT_f32, 4, ROWS),
		OUT(2) = TENSOR(DT_f32, 5, ROWS);
		agree(OP_cross_entropy, arg, t, 1e-5);
	}
}

/* The processor refuses them; here they must only not be followed. */
TEST(targets_outside_the_vocabulary)
{
	enum { ROWS = 4, WIDTH = 24, VOCABULARY = 20 };
	union op_arg arg = {.cross_entropy = {.vocab_size = VOCABULARY}};
	struct tensor t[ALL] = {TENSOR(DT_bf16, 1, ROWS, WIDTH), integers(ROWS, VOCABULARY, 2)};
	tensor_put(&t[1], 1, VOCABULARY);
	tensor_put(&t[1], 2, INT32_MAX);
	OUT(0) = TENSOR(DT_f64, 3, 1), OUT(1) = TENSOR(DT_f32, 4, ROWS), OUT(2) = TENSOR(DT_f32, 5, ROWS);
	run_cuda(OP_cross_entropy, &arg, t);
	CHECK_NEAR(tensor_at(&OUT(2), 1), tensor_at(&OUT(1), 1), 0);
	CHECK_NEAR(tensor_at(&OUT(2), 2), tensor_at(&OUT(1), 2), 0);
	CHECK(tensor_at(&OUT(2), 3) > 0 && tensor_at(&OUT(2), 3) < 20);
	for (int k = 0; k < ALL; k++)
		tensor_free(&t[k]);
}

TEST(positions_outside_the_table)
{
	enum { ROWS = 5, HEAD = 16, WIDTH = 3 * HEAD };
	union op_arg arg = {.rope = {.heads = 1, .groups = 1, .head_dim = HEAD}};
	struct tensor t[ALL] = {TENSOR(DT_f32, 1, ROWS, WIDTH), TENSOR(DT_f32, 2, 4, HEAD),
	                        integers(ROWS, 4, 3)};
	tensor_put(&t[2], 1, -1);
	tensor_put(&t[2], 2, 4);
	tensor_put(&t[2], 4, INT32_MIN);
	OUT(0) = TENSOR(DT_f32, 4, ROWS, WIDTH);
	run_cuda(OP_rope, &arg, t);
	for (int n = 0; n < ROWS; n++) {
		size_t at = (size_t)n * WIDTH, bytes = WIDTH * sizeof(float);
		bool same = !memcmp((float *)t[0].data + at, (float *)OUT(0).data + at, bytes);
		CHECK_INT(same, n == 1 || n == 2 || n == 4);
	}
	for (int k = 0; k < ALL; k++)
		tensor_free(&t[k]);
}

int main(int argc, char **argv)
{
	struct err e = {0};
	if (cuda_backend.probe(&e)) {
		printf("no device: %s\n", e.text);
		return 0;
	}
	return test_main(argc, argv);
}
