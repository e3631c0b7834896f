/* Matrix products on a CUDA device, or in the simulator: shapes that the library's best kernels take, which
 * those of op_cases.def are not, in fp8 and with activations; and what a stream keeps from call to call. */
#include <stdlib.h>

#include "base/err.h"
#include "base/rng.h"
#include "kernels/kernels.h"
#include "test/device.h"
#include "test/ops_fixture.h"

static void free_all(struct tensor *t, int n)
{
	for (int i = 0; i < n; i++)
		tensor_free(&t[i]);
}

static int32_t draw(uint64_t seed, int64_t i, int32_t n)
{
	return (int32_t)(rng_uniform(seed, (uint64_t)i) * n);
}

/* The reference and the device, on outputs that begin alike. A device's tensor cores add up products in fp8
 * with fewer bits than f32 has. */
static void check(enum op op, union op_arg arg, const struct tensor *in, const struct tensor *out,
                  double tolerance)
{
	struct tensor want[OP_MAX_OUT] = {{0}}, got[OP_MAX_OUT] = {{0}};
	int n = op_rows[op].n_out;
	char what[100];
	for (int k = 0; k < n; k++) {
		want[k] = tensor_copy(&out[k]);
		got[k] = tensor_copy(&out[k]);
	}
	op_run(&cpu_reference_backend, op, arg, in, want);
	op_run(&cuda_backend, op, arg, in, got);
	for (int k = 0; k < n; k++) {
		snprintf(what, sizeof what, "%s, activation %d, fp8 %d, output %d", op_rows[op].name,
		         arg.linear.kind, arg.linear.fp8, k);
		tensor_compare(&want[k], &got[k],
		               out[k].dtype != DT_f32 ? tolerance
		               : arg.linear.fp8       ? 1e-3
		                                      : 1e-5,
		               what);
		CHECK(tensor_guarded(&got[k]));
	}
	free_all(want, n);
	free_all(got, n);
}

/* x and y of n rows, w, bias, and sums in f32. */
struct layer {
	struct tensor x, w, bias, y, h, dw, db;
};

static struct layer layer_of(enum dtype t, int32_t n, int32_t m, int32_t k)
{
	struct layer l = {TENSOR(t, 1, n, k),  TENSOR(t, 2, m, k), TENSOR(t, 3, m),
	                  TENSOR(t, 4, n, m),  TENSOR(t, 5, n, k), TENSOR(DT_f32, 6, m, k),
	                  TENSOR(DT_f32, 7, m)};
	return l;
}

static void layer_free(struct layer *l)
{
	free_all((struct tensor[]){l->x, l->w, l->bias, l->y, l->h, l->dw, l->db}, 7);
}

static void check_layer(const struct layer *l, int32_t fp8)
{
	union op_arg arg = {.linear = {.fp8 = fp8}};
	struct tensor none = {0}, dw = l->dw;
	for (int with = 0; with < 2; with++)
		check(OP_linear, arg, (struct tensor[]){l->x, l->w, with ? l->bias : none}, &l->y, 8e-3);
	check(OP_linear_dx, arg, (struct tensor[]){l->y, l->w}, &l->x, 8e-3);
	for (int acc = 0; acc < 2; acc++) {
		dw.acc = (uint8_t)acc;
		check(OP_linear_dw, arg, (struct tensor[]){l->y, l->x}, &dw, 0);
	}
}

TEST(products_in_half_precision)
{
	struct layer l = layer_of(DT_f16, 40, 24, 56);
	if (device_is_here())
		check_layer(&l, 0);
	layer_free(&l);
}

/* Tiles that end in the middle, and operands of very different sizes. */
TEST(products_in_fp8)
{
	static const int32_t sizes[][3] = {{80, 144, 48}, {64, 16, 128}, {16, 80, 208}, {24, 40, 20}};
	for (int i = 0; i < 4 && device_is_here(); i++) {
		struct layer l = layer_of(DT_bf16, sizes[i][0], sizes[i][1], sizes[i][2]);
		for (int64_t j = 0; j < tensor_count(&l.x); j++)
			tensor_put(&l.x, j, tensor_at(&l.x, j) * 1e-12);
		for (int64_t j = 0; j < tensor_count(&l.y); j++)
			tensor_put(&l.y, j, tensor_at(&l.y, j) * 1e7);
		memset(l.bias.data, 0, (size_t)tensor_bytes(&l.bias));
		for (int fp8 = 0; fp8 < 2; fp8++)
			check_layer(&l, fp8);
		layer_free(&l);
	}
}

TEST(fp8_of_zeros_and_of_what_is_no_number)
{
	union op_arg arg = {.linear = {.fp8 = 1}};
	for (int i = 0; i < 3 && device_is_here(); i++) {
		struct layer l = layer_of(DT_bf16, 16, 16, 32);
		memset(l.x.data, 0, (size_t)tensor_bytes(&l.x));
		if (i)
			tensor_put(&l.x, 5 * 32 + 1, i == 1 ? NAN : INFINITY);
		op_run(&cuda_backend, OP_linear, arg, (struct tensor[]){l.x, l.w, {0}}, &l.y);
		for (int64_t j = 0; j < tensor_count(&l.y); j++) {
			double y = tensor_at(&l.y, j);
			CHECK(j / 16 != 5 || !i ? y == 0 : i == 1 ? isnan(y) : fabs(y) > 0);
		}
		layer_free(&l);
	}
}

/* GELU goes along with the product where rows are whole 16 bytes; the others, and other rows, behind it. */
TEST(activations_of_products)
{
	for (int i = 0; i < 2 * ACT_COUNT * 2 && device_is_here(); i++) {
		int32_t fp8 = i % 2, kind = i / 2 % ACT_COUNT, odd = i / 2 / ACT_COUNT;
		union op_arg arg = {.linear = {.fp8 = fp8, .kind = kind}};
		struct layer l = layer_of(DT_bf16, 32, odd ? 36 : 48, odd ? 20 : 64);
		struct tensor none = {0}, h = TENSOR(DT_bf16, 9, 32, l.y.dim[1]);
		for (int with = 0; with < 2; with++)
			check(OP_linear_act, arg, (struct tensor[]){l.x, l.w, with ? l.bias : none},
			      (struct tensor[]){l.y, h}, 1e-2);
		check(OP_linear_dx_act, arg, (struct tensor[]){l.y, l.w, l.h}, &l.x, 2e-2);
		tensor_free(&h);
		layer_free(&l);
	}
}

TEST(sums_of_columns_go_with_the_gradient)
{
	struct layer l = layer_of(DT_bf16, 48, 32, 16);
	for (int acc = 0; acc < 4 && device_is_here(); acc++) {
		l.dw.acc = acc % 2;
		l.db.acc = acc / 2;
		check(OP_linear_dw_bias, (union op_arg){0}, (struct tensor[]){l.y, l.x},
		      (struct tensor[]){l.dw, l.db}, 0);
	}
	layer_free(&l);
}

/* Several calls of one stream */

/* A stream that was told of its calls tries what the library offers, and loses nothing by it: not even what
 * is added to, whether or not there is working memory where results may be put meanwhile. */
static void tell(struct stream *s, enum op op, const struct tensor *in, const struct tensor *out,
                 bool of_more)
{
	union op_arg arg = {0};
	struct tensor in_shape[OP_MAX_IN] = {{0}}, out_shape = *out,
	              large = {.dim = {9 << 20, 1, 1, 1}, .nd = 2};
	for (int k = 0; k < op_rows[op].n_in; k++) {
		in_shape[k] = in[k];
		in_shape[k].data = NULL;
	}
	out_shape.data = NULL;
	cuda_backend.workspace(s, &(struct kernel_call){op, &arg, in_shape, &out_shape});
	if (of_more)
		cuda_backend.workspace(s, &(struct kernel_call){OP_permute, &arg, in_shape, &large});
}

static void check_told(enum op op, const struct tensor *in, const struct tensor *out, bool of_more)
{
	union op_arg arg = {0};
	struct stream *s = device_stream();
	int n = op_rows[op].n_in;
	struct tensor want = tensor_copy(out), got = tensor_copy(out), device[OP_MAX_IN] = {{0}};
	if (s) {
		struct tensor y = device_lend(s, out);
		op_run(&cpu_reference_backend, op, arg, in, &want);
		for (int k = 0; k < n; k++)
			device[k] = device_lend(s, &in[k]);
		tell(s, op, in, out, of_more);
		device_run(s, op, &arg, device, &y);
		device_take(s, &y, &got);
		tensor_compare(&want, &got, out->dtype == DT_f32 ? 1e-5 : 8e-3, op_rows[op].name);
		for (int k = 0; k < n; k++)
			device_take(s, &device[k], NULL);
		cuda_backend.close(s);
	}
	tensor_free(&want);
	tensor_free(&got);
}

TEST(products_that_were_told_of_are_the_same)
{
	struct tensor x = TENSOR(DT_bf16, 1, 40, 24), w = TENSOR(DT_bf16, 2, 16, 24),
	              bias = TENSOR(DT_bf16, 3, 16), y = TENSOR(DT_bf16, 4, 40, 16),
	              dw = TENSOR(DT_f32, 5, 16, 24);
	check_told(OP_linear, (struct tensor[]){x, w, bias}, &y, false);
	check_told(OP_linear_dx, (struct tensor[]){y, w}, &x, false);
	for (int i = 0; i < 3; i++) {
		dw.acc = i > 0;
		check_told(OP_linear_dw, (struct tensor[]){y, x}, &dw, i > 1);
	}
	free_all((struct tensor[]){x, w, bias, y, dw}, 5);
}

/* Sizes that change from step to step, all in one stream: what was chosen for one serves the next. */
TEST(grouped_products_of_changing_sizes)
{
	enum { EXPERTS = 3, ROWS = 90, STEPS = 12 };
	union op_arg arg = {.expert = {.count = EXPERTS}};
	struct stream *s = device_stream();
	struct tensor x = TENSOR(DT_bf16, 1, ROWS, 8), w = TENSOR(DT_bf16, 2, EXPERTS * 16, 8),
	              y = TENSOR(DT_bf16, 3, ROWS, 16), want = tensor_copy(&y), got = tensor_copy(&y),
	              sizes = TENSOR(DT_i32, 0, 1, EXPERTS);
	if (s) {
		struct tensor in[] = {device_lend(s, &x), device_lend(s, &w), device_lend(s, &sizes)},
		              out = device_lend(s, &y);
		for (int step = 0; step < STEPS; step++) {
			for (int k = 0; k < EXPERTS; k++)
				tensor_put(&sizes, k, draw(11, step * EXPERTS + k, ROWS / EXPERTS + 1));
			cuda_backend.upload(s, in[2].data, sizes.data, (size_t)tensor_bytes(&sizes));
			device_run(s, OP_grouped_linear, &arg, in, &out);
			cuda_backend.download(s, got.data, out.data, (size_t)tensor_bytes(&out));
			op_run(&cpu_reference_backend, OP_grouped_linear, arg, (struct tensor[]){x, w, sizes},
			       &want);
			tensor_compare(&want, &got, 8e-3, "grouped_linear");
		}
		for (int k = 0; k < 3; k++)
			device_take(s, &in[k], NULL);
		device_take(s, &out, NULL);
		cuda_backend.close(s);
	}
	free_all((struct tensor[]){x, w, y, want, got, sizes}, 6);
}

int main(int argc, char **argv)
{
	return test_main(argc, argv);
}
