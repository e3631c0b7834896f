/* The matrix kernels against plain loops: every instruction set that this processor runs, awkward sizes, both
 * element types; the same bits for any number of threads. */
#include "kernels/cpu/matmul.h"

#include <pthread.h>
#include <stdlib.h>

#include "base/mem.h"
#include "base/rng.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/matmul_tile.h"
#include "kernels/kernels.h"
#include "test/test.h"

static struct tensor tensor_new(enum dtype dtype, int32_t rows, int32_t columns)
{
	struct tensor t = {.dim = {rows, columns, 1, 1}, .nd = 2, .dtype = (uint8_t)dtype};
	t.data = mem_aligned((size_t)tensor_bytes(&t));
	return t;
}

static struct tensor tensor_random(enum dtype dtype, int32_t rows, int32_t columns, uint64_t key)
{
	struct tensor t = tensor_new(dtype, rows, columns);
	for (int64_t i = 0; i < tensor_count(&t); i++)
		cpu_set(&t, i, 2 * rng_uniform(key, (uint64_t)i) - 1);
	return t;
}

static struct stream *stream_new(int num_threads)
{
	struct stream *s;
	struct err e;
	return cpu_backend.open(&s, THREADS(num_threads), &e) ? NULL : s;
}

/* Largest difference over the largest magnitude. */
static double difference(const struct tensor *a, const struct tensor *b)
{
	double most = 0, top = 1e-30;
	for (int64_t i = 0; i < tensor_count(b); i++) {
		double x = cpu_get(a, i), y = cpu_get(b, i);
		most = fabs(x - y) <= most ? most : fabs(x - y); /* a NaN stays */
		top = fmax(top, fabs(y));
	}
	return most / top;
}

static double tolerance(enum dtype dtype)
{
	return dtype == DT_bf16 ? 1. / 128 : dtype == DT_f16 ? 1. / 1024 : 2e-6;
}

/* C of a product by plain loops; both operands may be transposed. */
static void multiply_plainly(const struct matmul *g, const struct tensor *c)
{
	struct tensor a = {.data = (void *)g->a, .dtype = (uint8_t)g->dtype},
	              b = {.data = (void *)g->b, .dtype = (uint8_t)g->dtype};
	for (int64_t i = 0; i < g->m; i++)
		for (int64_t j = 0; j < g->n; j++) {
			double sum = g->bias ? cpu_get(g->bias, j) : 0;
			for (int64_t k = 0; k < g->k; k++)
				sum += cpu_get(&a, g->a_transposed ? k * g->m + i : i * g->k + k) *
				       cpu_get(&b, g->b_transposed ? j * g->k + k : k * g->n + j);
			cpu_set(c, i * g->n + j, g->acc ? cpu_get(c, i * g->n + j) + sum : sum);
		}
}

/* bits: 1 A transposed, 2 B transposed, 4 accumulate, 8 bias, 16 operands of two bytes, 32 such a C. */
static void check_product(struct stream *s, const struct tile *tile, int m, int n, int k, int bits,
                          enum dtype half)
{
	enum dtype dtype = bits & 16 ? half : DT_f32, c_dtype = bits & 32 ? half : DT_f32;
	struct tensor a = tensor_random(dtype, m, k, 1), b = tensor_random(dtype, k, n, 2),
	              bias = tensor_random(dtype, 1, n, 3), c = tensor_random(c_dtype, m, n, 4),
	              wanted = tensor_random(c_dtype, m, n, 4);
	struct matmul g = {m,        n,     k,      a.data,  b.data,   bits & 1,
	                   bits & 2, dtype, c.data, c_dtype, bits & 4, bits & 8 ? &bias : NULL,
	                   0};
	matmul_blocked_with(s, &g, tile);
	multiply_plainly(&g, &wanted);
	double off = difference(&c, &wanted);
	if (!(off <= tolerance(c_dtype)))
		test_failed(__FILE__, __LINE__, "%s: %d x %d x %d, case %d (%s) is off by %g", tile->name, m,
		            n, k, bits, dtype_rows[half].name, off);
	free(a.data), free(b.data), free(bias.data), free(c.data), free(wanted.data);
}

TEST(products_of_every_tile)
{
	static const int sizes[][3] = {{1, 1, 1},      {7, 31, 33},    {31, 7, 1},
	                               {12, 32, 16},   {13, 33, 17},   {127, 1, 9},
	                               {33, 127, 385}, {200, 70, 129}, {1, 300, 5}};
	struct stream *s = stream_new(2);
	bool runs;
	for (int t = 0; tile_at(t, &runs); t++)
		for (size_t i = 0; runs && i < sizeof sizes / sizeof *sizes; i++)
			for (int bits = 0; bits < 64; bits++) {
				check_product(s, tile_at(t, &runs), sizes[i][0], sizes[i][1], sizes[i][2],
				              bits, DT_bf16);
				if ((bits & ~3) == 48) /* packed and written like no other */
					check_product(s, tile_at(t, &runs), sizes[i][0], sizes[i][1],
					              sizes[i][2], bits, DT_f16);
			}
	cpu_backend.close(s);
}

/* Every finite f16 times one, in both ways of packing; fewer columns than a panel has too. */
TEST(halves_are_packed_as_they_are)
{
	enum { ALL = 63488, DEPTH = 31 };
	struct tensor a = tensor_new(DT_f16, ALL / DEPTH, DEPTH), one = tensor_new(DT_f16, DEPTH, DEPTH),
	              c = tensor_new(DT_f32, ALL / DEPTH, DEPTH);
	struct stream *s = stream_new(1);
	bool runs;
	for (int i = 0; i < ALL; i++)
		((uint16_t *)a.data)[i] = (uint16_t)(i / 2 | i % 2 << 15);
	for (int i = 0; i < DEPTH; i++)
		cpu_set(&one, i * DEPTH + i, 1);
	for (int t = 0; tile_at(t, &runs); t++)
		for (int across = 0; runs && across < 2; across++) {
			struct matmul g = {
			        .m = ALL / DEPTH, .n = DEPTH, .k = DEPTH, .a = a.data, .b = one.data};
			if (across)
				g = (struct matmul){
				        .m = DEPTH, .n = ALL / DEPTH, .k = DEPTH, .a = one.data, .b = a.data};
			g.b_transposed = false;
			g.dtype = DT_f16;
			g.c = c.data;
			matmul_blocked_with(s, &g, tile_at(t, &runs));
			for (int i = 0; i < ALL; i++)
				CHECK(cpu_get(&c, i) == cpu_get(&a, i));
		}
	cpu_backend.close(s);
	free(a.data), free(one.data), free(c.data);
}

/* Beyond what is packed at a time, in the depth and across. */
TEST(products_in_several_parts)
{
	struct stream *s = stream_new(2);
	for (int bits = 0; bits < 64; bits += 1 + 2 + 4)
		check_product(s, tile_best(), 5, 40, 9001, bits, bits & 4 ? DT_f16 : DT_bf16);
	check_product(s, tile_best(), 2700, 3, 4100, 0, DT_bf16);
	check_product(s, tile_best(), 3, 2700, 4100, 16 + 32, DT_bf16);
	cpu_backend.close(s);
}

/* Some columns of a transposed A give some rows of C, by every implementation. */
TEST(products_of_some_rows_are_a_slice)
{
	enum { M = 50, N = 40, K = 90, FIRST = 13, ROWS = 30 };
	struct stream *s = stream_new(2);
	for (int i = 0; i < 4; i++) {
		enum dtype dtype = i % 2 ? DT_bf16 : DT_f32;
		const struct matmul_impl *impl = matmul_at(i / 2);
		if (!impl || !impl->run[dtype])
			continue;
		struct tensor a = tensor_random(dtype, K, M, 1), b = tensor_random(dtype, K, N, 2);
		struct tensor whole = tensor_new(DT_f32, M, N), part = tensor_new(DT_f32, ROWS, N),
		              slice = part;
		struct matmul g = {.m = M, .n = N, .k = K, .a = a.data, .b = b.data, .c = whole.data};
		g.a_transposed = true;
		g.dtype = dtype;
		impl->run[dtype](s, &g);
		g.a = (char *)a.data + FIRST * dtype_rows[dtype].bytes;
		g.a_pitch = M;
		g.m = ROWS;
		g.c = part.data;
		impl->run[dtype](s, &g);
		slice.data = (float *)whole.data + FIRST * N;
		CHECK(difference(&part, &slice) <= tolerance(DT_f32));
		free(a.data), free(b.data), free(whole.data), free(part.data);
	}
	cpu_backend.close(s);
}

TEST(products_do_not_depend_on_threads)
{
	struct tensor a = tensor_random(DT_f32, 150, 800, 1), b = tensor_random(DT_f32, 800, 170, 2);
	struct tensor c[2] = {tensor_new(DT_f32, 150, 170), tensor_new(DT_f32, 150, 170)};
	struct stream *one = stream_new(1), *three = stream_new(3);
	struct matmul g = {.m = 150, .n = 170, .k = 800, .a = a.data, .b = b.data, .c = c[0].data};
	matmul_blocked_with(one, &g, tile_best());
	g.c = c[1].data;
	matmul_blocked_with(three, &g, tile_best());
	CHECK(!memcmp(c[0].data, c[1].data, (size_t)tensor_bytes(&c[0])));
	cpu_backend.close(one), cpu_backend.close(three);
	free(a.data), free(b.data), free(c[0].data), free(c[1].data);
}

/* The operations, by whichever implementation this build chooses, against their references. */
static const union op_arg plain;

static void check_linear(struct stream *s, enum dtype dtype, int rows, int depth, int width, bool acc)
{
	struct tensor x = tensor_random(dtype, rows, depth, 1), w = tensor_random(dtype, width, depth, 2);
	struct tensor dy = tensor_random(dtype, rows, width, 3), bias = tensor_random(dtype, 1, width, 4),
	              none = {0};
	const struct {
		kernel_fn *fast, *reference;
		struct tensor in[3];
		enum dtype out;
		int rows, columns;
	} cases[] = {{cpu_fast_linear, cpu_ref_linear, {x, w, bias}, dtype, rows, width},
	             {cpu_fast_linear, cpu_ref_linear, {x, w, none}, dtype, rows, width},
	             {cpu_fast_linear_dx, cpu_ref_linear_dx, {dy, w}, dtype, rows, depth},
	             {cpu_fast_linear_dw, cpu_ref_linear_dw, {dy, x}, DT_f32, width, depth},
	             {cpu_fast_bias_grad, cpu_ref_bias_grad, {dy}, DT_f32, 1, width}};
	for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
		struct tensor got = tensor_random(cases[i].out, cases[i].rows, cases[i].columns, 5);
		struct tensor wanted = tensor_random(cases[i].out, cases[i].rows, cases[i].columns, 5);
		struct err e;
		got.acc = wanted.acc = acc && i >= 3;
		CHECK_INT(cases[i].fast(s, &plain, cases[i].in, &got, &e), 0);
		cases[i].reference(s, &plain, cases[i].in, &wanted, &e);
		double off = difference(&got, &wanted);
		if (!(off <= tolerance(cases[i].out)))
			test_failed(__FILE__, __LINE__, "case %zu, %s, %d x %d x %d is off by %g", i,
			            dtype_rows[dtype].name, rows, depth, width, off);
		free(got.data), free(wanted.data);
	}
	free(x.data), free(w.data), free(dy.data), free(bias.data);
}

TEST(linear_is_its_reference)
{
	static const int sizes[][3] = {{1, 1, 1}, {7, 31, 33}, {127, 7, 31}, {33, 127, 7}, {200, 64, 300}};
	static const enum dtype types[] = {DT_f32, DT_bf16, DT_f16};
	struct stream *s = stream_new(2);
	for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
		for (int bits = 0; bits < 6; bits++)
			check_linear(s, types[bits % 3], sizes[i][0], sizes[i][1], sizes[i][2], bits / 3);
	cpu_backend.close(s);
}

static void *linear_in_a_thread(void *unused)
{
	struct stream *s = stream_new(1);
	for (int i = 0; i < 20; i++)
		check_linear(s, i % 2 ? DT_bf16 : DT_f32, 20 + i, 30, 40, i & 2);
	cpu_backend.close(s);
	return unused;
}

/* Ranks may be threads of one process. */
TEST(streams_at_once)
{
	pthread_t thread[3];
	for (int i = 0; i < 3; i++)
		MUST(!pthread_create(&thread[i], NULL, linear_in_a_thread, NULL));
	for (int i = 0; i < 3; i++)
		pthread_join(thread[i], NULL);
}

TEST(linear_refuses_other_types)
{
	struct stream *s = stream_new(1);
	struct tensor x = tensor_new(DT_f32, 2, 2), w = tensor_new(DT_bf16, 2, 2), in[3] = {x, w}, y = x;
	struct err e = {0};
	CHECK_INT(cpu_fast_linear(s, NULL, in, &y, &e), EXIT_INTERNAL);
	CHECK_HAS(e.text, "operands f32 and bf16");
	cpu_backend.close(s);
	free(x.data), free(w.data);
}

/* 2^x and what attention makes of it, for every instruction set. */
static void check_softmax(const struct tile *tile)
{
	enum { ROWS = 5, COLUMNS = 48 };
	float s[ROWS][COLUMNS], p[ROWS][COLUMNS], top[ROWS], sum[ROWS], shrink[ROWS], lse[ROWS];
	for (int i = 0; i < ROWS; i++) {
		top[i] = -1e30f;
		sum[i] = 0;
		lse[i] = 3.5f * (float)i;
		for (int j = 0; j < COLUMNS; j++)
			s[i][j] = p[i][j] = (float)(40 * rng_uniform((uint64_t)i, (uint64_t)j) - 30);
		s[i][i] = p[i][i] = -INFINITY;
	}
	tile->softmax(ROWS, 16, s[0], COLUMNS, top, sum, shrink);
	tile->softmax(ROWS, COLUMNS - 16, s[0] + 16, COLUMNS, top, sum, shrink);
	for (int i = 0; i < ROWS; i++) {
		double total = 0, first_top = -1e30;
		for (int j = 0; j < COLUMNS; j++)
			total += exp2((double)p[i][j] - top[i]);
		for (int j = 0; j < 16; j++)
			first_top = fmax(first_top, p[i][j]);
		CHECK_NEAR(sum[i] / total, 1, 1e-6);
		CHECK_NEAR(shrink[i], exp2(first_top - top[i]), 1e-6);
		CHECK(s[i][i] == 0);
	}
	tile->exponent(ROWS, COLUMNS, p[0], COLUMNS, lse);
	CHECK_NEAR(p[1][20], s[1][20] * exp2((double)top[1] - lse[1]), 1e-6 * p[1][20]);
	p[2][7] = NAN;
	tile->exponent(ROWS, COLUMNS, p[0], COLUMNS, lse);
	CHECK(isnan(p[2][7]) && !isnan(p[2][8]));
}

TEST(softmax_of_every_tile)
{
	bool runs;
	for (int t = 0; tile_at(t, &runs); t++)
		if (runs)
			check_softmax(tile_at(t, &runs));
}

/* Both orders of A, an odd number of vectors, and a pitch. */
static void check_multiply(const struct tile *tile)
{
	enum { M = 24, N = 48, K = 13, PITCH = 64 };
	static float a[M * PITCH], b[K * PITCH], c[M * PITCH];
	for (int i = 0; i < M * PITCH; i++)
		a[i] = (float)(i % 7 - 3);
	for (int i = 0; i < K * PITCH; i++)
		b[i] = (float)(i % 5 - 2);
	for (int transposed = 0; transposed < 2; transposed++) {
		int a_row = transposed ? 1 : PITCH, a_depth = transposed ? PITCH : 1;
		for (int add = 0; add < 2; add++)
			tile->multiply(M, N, K, a, a_row, a_depth, b, PITCH, c, PITCH, add);
		for (int i = 0; i < M; i++)
			for (int j = 0; j < N; j++) {
				float sum = 0;
				for (int k = 0; k < K; k++)
					sum += 2 * a[i * a_row + k * a_depth] * b[k * PITCH + j];
				CHECK(c[i * PITCH + j] == sum);
			}
	}
	CHECK_NEAR(tile->dot(37, a, b), tile_best()->dot(37, a, b), 0);
}

TEST(block_products_of_every_tile)
{
	bool runs;
	for (int t = 0; tile_at(t, &runs); t++)
		if (runs)
			check_multiply(tile_at(t, &runs));
}

struct attention_case {
	int samples, length, heads, groups, size, window;
	float dropout;
};

static struct tensor run_kernel(struct stream *s, kernel_fn *fn, const union op_arg *arg,
                                const struct tensor *in, enum dtype dtype, int rows, int columns,
                                struct tensor *second)
{
	struct tensor out[2] = {tensor_new(dtype, rows, columns), {0}};
	struct err e = {0};
	if (second)
		out[1] = *second;
	if (fn(s, arg, in, out, &e))
		test_failed(__FILE__, __LINE__, "%s", e.text);
	return out[0];
}

static void check_attention(struct stream *s, const struct attention_case *c, enum dtype dtype)
{
	union op_arg arg = {.attention = {.seq_length = c->length,
	                                  .heads = c->heads,
	                                  .groups = c->groups,
	                                  .head_dim = c->size,
	                                  .window = c->window,
	                                  .scale = 1 / sqrtf((float)c->size),
	                                  .dropout = c->dropout,
	                                  .salt = 77}};
	int rows = c->samples * c->length, width = c->heads * c->size, all = width + 2 * c->groups * c->size;
	struct tensor qkv = tensor_random(dtype, rows, all, 1), dout = tensor_random(dtype, rows, width, 2);
	struct tensor keys = tensor_new(DT_i64, c->samples, 1);
	struct tensor lse = tensor_new(DT_f32, rows, c->heads),
	              wanted_lse = tensor_new(DT_f32, rows, c->heads);
	for (int i = 0; i < c->samples; i++)
		((int64_t *)keys.data)[i] = 1000 + i;
	struct tensor in[3] = {qkv, keys};
	struct tensor o = run_kernel(s, cpu_fast_attention, &arg, in, dtype, rows, width, &lse);
	struct tensor wanted_o = run_kernel(s, cpu_ref_attention, &arg, in, dtype, rows, width, &wanted_lse);
	struct tensor back[6] = {dout, qkv, wanted_o, wanted_lse, keys};
	struct tensor d = run_kernel(s, cpu_fast_attention_bwd, &arg, back, dtype, rows, all, NULL);
	struct tensor wanted_d = run_kernel(s, cpu_ref_attention_bwd, &arg, back, dtype, rows, all, NULL);
	double off[] = {difference(&o, &wanted_o), difference(&lse, &wanted_lse), difference(&d, &wanted_d)};
	for (int i = 0; i < 3; i++)
		if (!(off[i] <= (i == 1 ? 2e-6 : tolerance(dtype))))
			test_failed(__FILE__, __LINE__,
			            "T %d H %d G %d D %d window %d %s: output %d is off by %g", c->length,
			            c->heads, c->groups, c->size, c->window, dtype_rows[dtype].name, i,
			            off[i]);
	free(qkv.data), free(dout.data), free(keys.data), free(lse.data), free(wanted_lse.data);
	free(o.data), free(wanted_o.data), free(d.data), free(wanted_d.data);
}

TEST(attention_is_its_reference)
{
	static const struct attention_case cases[] = {
	        {1, 1, 1, 1, 1, 0, 0},      {2, 7, 2, 1, 7, 0, 0},       {1, 31, 4, 2, 12, 5, 0},
	        {2, 33, 3, 3, 33, 0, 0.3f}, {1, 127, 4, 2, 31, 100, 0},  {1, 200, 2, 1, 64, 0, 0.1f},
	        {1, 97, 2, 2, 128, 1, 0},   {3, 49, 6, 2, 16, 48, 0.5f}, {1, 290, 1, 1, 16, 97, 0}};
	struct stream *s = stream_new(2);
	for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
		check_attention(s, &cases[i], DT_f32);
		check_attention(s, &cases[i], DT_bf16);
		check_attention(s, &cases[i], DT_f16);
	}
	cpu_backend.close(s);
}

TEST(attention_does_not_depend_on_threads)
{
	union op_arg arg = {
	        .attention = {.seq_length = 150, .heads = 3, .groups = 1, .head_dim = 20, .scale = 0.2f}};
	struct tensor qkv = tensor_random(DT_f32, 150, 100, 1), dout = tensor_random(DT_f32, 150, 60, 2);
	struct tensor o[2], d[2], lse = tensor_new(DT_f32, 150, 3);
	for (int i = 0; i < 2; i++) {
		struct stream *s = stream_new(1 + 3 * i);
		struct tensor in[3] = {qkv};
		o[i] = run_kernel(s, cpu_fast_attention, &arg, in, DT_f32, 150, 60, &lse);
		struct tensor back[6] = {dout, qkv, o[i], lse};
		d[i] = run_kernel(s, cpu_fast_attention_bwd, &arg, back, DT_f32, 150, 100, NULL);
		cpu_backend.close(s);
	}
	CHECK(!memcmp(o[0].data, o[1].data, (size_t)tensor_bytes(&o[0])));
	CHECK(!memcmp(d[0].data, d[1].data, (size_t)tensor_bytes(&d[0])));
	free(qkv.data), free(dout.data), free(lse.data);
	free(o[0].data), free(o[1].data), free(d[0].data), free(d[1].data);
}

/* Five rows behind thirty that are already there. */
static void check_cache(struct stream *s, enum dtype dtype, int heads, int groups, int size, int window)
{
	enum { ROWS = 5, LIMIT = 40, FIRST = 30 };
	union op_arg arg = {.attention = {.seq_length = ROWS,
	                                  .heads = heads,
	                                  .groups = groups,
	                                  .head_dim = size,
	                                  .window = window,
	                                  .scale = 0.3f}};
	struct tensor position = tensor_new(DT_i32, ROWS, 1), o[2], in[2][4];
	for (int i = 0; i < ROWS; i++)
		((int32_t *)position.data)[i] = FIRST + i;
	for (int i = 0; i < 2; i++) {
		in[i][0] = tensor_random(dtype, ROWS, (heads + 2 * groups) * size, 1);
		in[i][1] = tensor_random(dtype, LIMIT, groups * size, 2);
		in[i][2] = tensor_random(dtype, LIMIT, groups * size, 3);
		in[i][3] = position;
		o[i] = run_kernel(s, i ? cpu_ref_attention_cache : cpu_fast_attention_cache, &arg, in[i],
		                  dtype, ROWS, heads * size, NULL);
	}
	CHECK_NEAR(difference(&o[0], &o[1]), 0, tolerance(dtype));
	CHECK(difference(&in[0][1], &in[1][1]) == 0 && difference(&in[0][2], &in[1][2]) == 0);
	((int32_t *)position.data)[ROWS - 1] = LIMIT;
	struct err e = {0};
	CHECK_INT(cpu_fast_attention_cache(s, &arg, in[0], o, &e), EXIT_INTERNAL);
	CHECK_HAS(e.text, "position 40 of row 4 is outside the cache of 40");
	for (int i = 0; i < 2; i++)
		free(in[i][0].data), free(in[i][1].data), free(in[i][2].data), free(o[i].data);
	free(position.data);
}

TEST(cached_attention_is_its_reference)
{
	struct stream *s = stream_new(2);
	for (int bits = 0; bits < 4; bits++) {
		enum dtype dtype = bits & 1 ? DT_bf16 : DT_f32;
		check_cache(s, dtype, 4, 2, 16, bits & 2 ? 6 : 0);
		check_cache(s, dtype, 3, 1, 7, bits & 2 ? 1 : 0);
	}
	cpu_backend.close(s);
}

int main(int argc, char **argv)
{
	return test_main(argc, argv);
}
