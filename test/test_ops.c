/* Every operation of ops.def: gradients by differences, the fast kernels against the reference. */
#include <stdlib.h>

#include "base/err.h"
#include "base/rng.h"
#include "kernels/kernels.h"
#include "test/ops_fixture.h"

TEST(every_operation_has_a_case)
{
	for (int op = 0; op < OP_COUNT; op++) {
		bool comm = op_rows[op].flags & COMM;
		if (!comm && !op_case_of((enum op)op))
			test_failed(__FILE__, __LINE__, "%s has no row in op_cases.def", op_rows[op].name);
		CHECK((cpu_reference_backend.kernel[op] == NULL) == comm);
		CHECK((cpu_backend.kernel[op] == NULL) == comm);
	}
}

static int words(const char *text)
{
	int n = *text != 0;
	for (; *text; text++)
		n += *text == ' ';
	return n;
}

TEST(cases_agree_with_the_vocabulary)
{
	for (int i = 0; i < op_case_count; i++) {
		CHECK_INT(words(op_cases[i].in), op_rows[op_cases[i].op].n_in);
		CHECK_INT(words(op_cases[i].out), op_rows[op_cases[i].op].n_out);
	}
}

static bool has_gradient_case(enum op op)
{
	for (int i = 0; i < grad_case_count; i++)
		if (grad_cases[i].forward == op || grad_cases[i].backward == op)
			return true;
	return false;
}

TEST(every_gradient_is_checked)
{
	static const enum op without[] = {OP_add,           OP_attention_cache, OP_logit_stats,
	                                  OP_zero,          OP_square_sum,      OP_adamw,
	                                  OP_expert_counts, OP_bias_update,     OP_capacity,
	                                  OP_dispatch_plan, OP_linear_act,      OP_linear_dx_act};
	for (int op = 0; op < OP_COUNT; op++) {
		bool excused = op_rows[op].flags & COMM;
		for (size_t k = 0; k < sizeof without / sizeof *without; k++)
			excused |= op == (int)without[k];
		if (!excused && !has_gradient_case((enum op)op))
			test_failed(__FILE__, __LINE__, "%s is in no GRAD row of op_cases.def",
			            op_rows[op].name);
	}
}

/* sum of r · output 0 */
static double projection(struct fixture *f, const struct tensor *r)
{
	fixture_run(f, &cpu_reference_backend, 1, -1);
	double sum = 0;
	for (int64_t i = 0; i < tensor_count(r); i++)
		sum += tensor_at(r, i) * tensor_at(&f->out[0], i);
	return sum;
}

/* The gradient dx of the projection with respect to input k, at some elements. */
static void check_differences(struct fixture *f, int k, const struct tensor *r, const struct tensor *dx)
{
	const double step = 1e-4;
	int64_t n = tensor_count(dx);
	double squares = 0;
	for (int64_t i = 0; i < n; i++)
		squares += tensor_at(dx, i) * tensor_at(dx, i);
	for (int64_t trial = 0; trial < 24 && trial < n; trial++) {
		int64_t i = n <= 24 ? trial : (int64_t)(rng_uniform(9, (uint64_t)trial) * (double)n);
		double x = tensor_at(&f->in[k], i);
		tensor_put(&f->in[k], i, x + step);
		double above = projection(f, r);
		tensor_put(&f->in[k], i, x - step);
		double slope = (above - projection(f, r)) / (2 * step), want = tensor_at(dx, i);
		tensor_put(&f->in[k], i, x);
		if (!(fabs(slope - want) <= 2e-6 * (fabs(want) + sqrt(squares / (double)n) + 1e-3)))
			test_failed(__FILE__, __LINE__,
			            "%s: gradient of input %d at %lld is %.9g, differences say %.9g",
			            fixture_text(f), k, (long long)i, want, slope);
	}
}

/* The backward fixture's inputs are the tensors that the row names; the outputs stay its own. */
static struct fixture backward_of(const struct grad_case *g, const struct fixture *forward,
                                  const struct tensor *r)
{
	struct fixture b = fixture_open(op_case_of(g->backward), forward->setup);
	const char *word = g->in;
	b.arg = forward->arg;
	if (g->forward == OP_rope)
		b.arg.rope.inverse = !forward->arg.rope.inverse;
	if (g->forward == OP_permute_probs)
		b.arg.permute.back = !forward->arg.permute.back;
	if (g->forward == OP_regroup)
		b.arg.expert.back = !forward->arg.expert.back;
	for (int k = 0; *word; k++) {
		tensor_free(&b.in[k]);
		if (*word == 'd')
			b.in[k] = tensor_copy(r);
		else if (*word != '-')
			b.in[k] = tensor_copy(*word == 'i' ? &forward->in[word[1] - '0']
			                                   : &forward->out[word[1] - '0']);
		word += strcspn(word, " ");
		word += *word == ' ';
	}
	return b;
}

static void check_gradient(const struct grad_case *g, struct setup setup)
{
	struct fixture f = fixture_open(op_case_of(g->forward), setup);
	struct tensor r = tensor_make(DT_f64, f.out[0].nd, f.out[0].dim, 77);
	projection(&f, &r);
	struct fixture b = backward_of(g, &f, &r);
	fixture_run(&b, &cpu_reference_backend, 1, -1);
	for (int k = 0; k < words(g->of); k++)
		check_differences(&f, g->of[3 * k + 1] - '0', &r, &b.out[k]);
	fixture_close(&b);
	fixture_close(&f);
	tensor_free(&r);
}

TEST(gradients_agree_with_differences)
{
	for (int i = 0; i < grad_case_count; i++)
		for (int size = 0; size < 4; size++)
			for (int variant = 0; variant < op_case_of(grad_cases[i].forward)->variants;
			     variant++)
				check_gradient(&grad_cases[i],
				               (struct setup){size, variant, DT_f64, true, false});
}

/* A residual that joins the norm is added to its input's gradient. */
TEST(norm_gradients_take_an_addend)
{
	static const enum op ops[] = {OP_layernorm_bwd, OP_rmsnorm_bwd};
	for (int i = 0; i < 2; i++) {
		struct fixture with =
		        fixture_open(op_case_of(ops[i]), (struct setup){3, 0, DT_f64, true, false});
		struct fixture none = fixture_copy(&with);
		int addend = op_rows[ops[i]].n_in - 1;
		tensor_free(&none.in[addend]);
		fixture_run(&with, &cpu_reference_backend, 1, -1);
		fixture_run(&none, &cpu_reference_backend, 1, -1);
		for (int64_t k = 0; k < tensor_count(&with.out[0]); k++)
			CHECK_NEAR(tensor_at(&with.out[0], k) - tensor_at(&none.out[0], k),
			           tensor_at(&with.in[addend], k), 1e-12);
		fixture_close(&with);
		fixture_close(&none);
	}
}

static void compare(const struct fixture *reference, const struct fixture *fast)
{
	const struct op_case *c = reference->c;
	char what[300];
	for (int k = 0; k < OP_MAX_IN + OP_MAX_OUT; k++) {
		bool output = k >= OP_MAX_IN;
		const struct tensor *a = output ? &reference->out[k - OP_MAX_IN] : &reference->in[k];
		const struct tensor *b = output ? &fast->out[k - OP_MAX_IN] : &fast->in[k];
		snprintf(what, sizeof what, "%s, %s %d", fixture_text(fast), output ? "output" : "input",
		         output ? k - OP_MAX_IN : k);
		tensor_compare(a, b, case_tolerance(c, (enum dtype)a->dtype), what);
	}
}

static void check_fast(const struct op_case *c, struct setup setup)
{
	struct fixture start = fixture_open(c, setup);
	fixture_consistent(&start);
	struct fixture reference = fixture_copy(&start), one = fixture_copy(&start);
	fixture_run(&reference, &cpu_reference_backend, 1, -1);
	fixture_run(&one, &cpu_backend, 1, -1);
	compare(&reference, &one);
	int most = setup.size == SIZES - 1 ? 3 : 2; /* small sizes are not cut further */
	for (int threads = 2; threads <= most; threads++) {
		struct fixture more = fixture_copy(&start);
		fixture_run(&more, &cpu_backend, threads, -1);
		compare(&reference, &more);
		if (c->exact && !fixture_same_bits(&one, &more))
			test_failed(__FILE__, __LINE__, "%s: %d threads give other bits than one",
			            fixture_text(&one), threads);
		fixture_close(&more);
	}
	fixture_check_in_place(&start, &reference, &cpu_reference_backend);
	fixture_check_in_place(&start, &one, &cpu_backend);
	fixture_close(&start);
	fixture_close(&reference);
	fixture_close(&one);
}

static void check_case(const struct op_case *c, enum dtype dtype, int first, int end)
{
	bool optional = strpbrk(c->in, "?~"), acc = strchr(c->out, '+');
	for (int size = first; size < end; size++)
		for (int variant = 0; variant < c->variants; variant++)
			for (int with = 0; with <= optional; with++)
				for (int add = 0; add <= acc; add++)
					check_fast(c, (struct setup){size, variant, dtype, with, add});
}

TEST(fast_agrees_with_reference_f32)
{
	for (int i = 0; i < op_case_count; i++)
		check_case(&op_cases[i], DT_f32, 0, SIZES);
}

TEST(fast_agrees_with_reference_bf16)
{
	for (int i = 0; i < op_case_count; i++)
		check_case(&op_cases[i], DT_bf16, 0, SIZES);
}

/* It differs from bf16 in how elements are read and written alone: some sizes are enough. */
TEST(fast_agrees_with_reference_f16)
{
	for (int i = 0; i < op_case_count; i++)
		if (strpbrk(op_cases[i].in, "tc") || strpbrk(op_cases[i].out, "tc"))
			check_case(&op_cases[i], DT_f16, SIZES - 3, SIZES - 1);
}

int main(int argc, char **argv)
{
	return test_main(argc, argv);
}
