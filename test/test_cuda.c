/* Every operation of the CUDA device against the reference: on a device where there is one, else in the
 * simulator. */
#include <stdlib.h>

#include "base/err.h"
#include "kernels/kernels.h"
#include "test/device.h"
#include "test/ops_fixture.h"

/* A part of attention that others follow gives f32, but of weights that tensor cores took as halves. */
static double tolerance(const struct fixture *f, int k, const struct tensor *t)
{
	bool weighted = f->c->op == OP_attention_part && k == OP_MAX_IN;
	return case_tolerance(f->c, weighted ? f->setup.dtype : (enum dtype)t->dtype);
}

static void compare(const struct fixture *reference, const struct fixture *device)
{
	char what[300];
	for (int k = 0; k < OP_MAX_IN + OP_MAX_OUT; k++) {
		bool output = k >= OP_MAX_IN;
		const struct tensor *a = output ? &reference->out[k - OP_MAX_IN] : &reference->in[k];
		const struct tensor *b = output ? &device->out[k - OP_MAX_IN] : &device->in[k];
		snprintf(what, sizeof what, "cuda: %s, %s %d", fixture_text(device),
		         output ? "output" : "input", output ? k - OP_MAX_IN : k);
		tensor_compare(a, b, tolerance(reference, k, a), what);
	}
}

static void check_setup(const struct op_case *c, struct setup setup)
{
	struct fixture start = fixture_open(c, setup);
	fixture_consistent(&start);
	struct fixture reference = fixture_copy(&start), device = fixture_copy(&start);
	fixture_run(&reference, &cpu_reference_backend, 1, -1);
	fixture_run(&device, &cuda_backend, 1, -1);
	compare(&reference, &device);
	fixture_check_in_place(&start, &device, &cuda_backend);
	fixture_close(&start);
	fixture_close(&reference);
	fixture_close(&device);
}

/* Sizes of every kind: odd and small, of several blocks, of whole packs; the rest where time is no matter. */
static bool is_wanted(int size, enum dtype dtype)
{
	bool packs = size == SIZES - 1;
	return getenv("PENTAD_LONG_TESTS") || packs || (dtype != DT_f16 && (size == 1 || size == 3));
}

/* What the table has; PENTAD_OPS names some operations where only these are of interest. */
static void check_op(enum op op, enum dtype dtype)
{
	const char *only = getenv("PENTAD_OPS");
	if (only && !strstr(only, op_rows[op].name))
		return;
	for (int i = 0; i < op_case_count; i++) {
		const struct op_case *c = &op_cases[i];
		bool optional = strpbrk(c->in, "?~"), acc = strchr(c->out, '+');
		for (int size = 0; c->op == op && size < SIZES; size++)
			for (int variant = 0; is_wanted(size, dtype) && variant < c->variants; variant++)
				for (int with = 0; with <= optional; with++)
					for (int add = 0; add <= acc; add++)
						check_setup(c,
						            (struct setup){size, variant, dtype, with, add});
	}
}

static void check_all(enum dtype dtype)
{
	for (int op = 0; op < OP_COUNT && device_is_here(); op++)
		if (!(op_rows[op].flags & COMM))
			check_op((enum op)op, dtype);
}

TEST(operations_agree_with_the_reference_f32)
{
	check_all(DT_f32);
}

TEST(operations_agree_with_the_reference_bf16)
{
	check_all(DT_bf16);
}

TEST(operations_agree_with_the_reference_f16)
{
	check_all(DT_f16);
}

int main(int argc, char **argv)
{
	return test_main(argc, argv);
}
