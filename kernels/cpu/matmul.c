#include "kernels/cpu/matmul.h"

#include <stdio.h>
#include <string.h>

#include "kernels/cpu/cpu.h"
#include "kernels/cpu/linear.h"
#include "kernels/cpu/matmul_tile.h"

const char *cpu_matmul_describe(void)
{
	static _Thread_local char text[100];
	const struct matmul_impl *library = matmul_onednn();
	snprintf(text, sizeof text, "%s%sown %s kernels", library ? library->name : "no oneDNN",
	         library ? " and " : ", ", tile_best()->name);
	return text;
}

const struct matmul_impl *matmul_at(int i)
{
	const struct matmul_impl *rows[3] = {matmul_onednn(), matmul_blocked(), NULL};
	return i < 0 || i > 2 ? NULL : rows[rows[0] ? i : i + (i < 2)];
}

/* The first that has one, whatever the shape: the same for a shape during a run. */
static const struct matmul_impl *choose(enum dtype dtype)
{
	int i = 0;
	while (!matmul_at(i)->run[dtype])
		i++;
	return matmul_at(i);
}

static bool is_float(const struct tensor *t)
{
	return t->dtype == DT_f32 || dtype_is_half(t->dtype);
}

int matmul_check(const char *op, const struct tensor *in, const struct tensor *out, struct err *e)
{
	if (!is_float(&in[0]) || in[0].dtype != in[1].dtype || !is_float(out))
		return err_set(e, EXIT_INTERNAL,
		               "%s: operands %s and %s into %s; two f32, two bf16 or two f16 are allowed", op,
		               dtype_rows[in[0].dtype].name, dtype_rows[in[1].dtype].name,
		               dtype_rows[out->dtype].name);
	return 0;
}

static bool has_sums(const struct matmul *g)
{
	return g->k > 0 && g->m > 0 && g->n > 0;
}

void matmul_run(struct stream *s, const struct matmul *g)
{
	if (has_sums(g))
		choose(g->dtype)->run[g->dtype](s, g);
	else if (!g->acc) /* no rows: a gradient of zero */
		memset(g->c, 0, (size_t)(g->m * g->n) * dtype_rows[g->c_dtype].bytes);
}

static struct cpu_space space(const struct stream *s, const struct matmul *g)
{
	return has_sums(g) ? choose(g->dtype)->space(s, g) : (struct cpu_space){0};
}

struct cpu_space matmul_most(const struct stream *s, const struct matmul *g)
{
	return has_sums(g) ? choose(g->dtype)->most(s, g) : (struct cpu_space){0};
}

/* The products of a linear layer. The library and the own kernel keep the shared scratch for themselves, so
 * rounded operands lie behind it. */
#define PRODUCT(op, problem, backward)                                                                       \
	int cpu_fast_##op(struct stream *s, const union op_arg *arg, const struct tensor *in,                \
	                  const struct tensor *out, struct err *e)                                           \
	{                                                                                                    \
		struct tensor use[3] = {in[0], in[1], {0}};                                                  \
		if (matmul_check(#op, in, out, e))                                                           \
			return e->code;                                                                      \
		if (arg->linear.fp8)                                                                         \
			linear_operands(s, arg, backward, in, use,                                           \
			                cpu_scratch(s, CPU_ROUNDED, (size_t)linear_rounded_bytes(arg, in))); \
		if (op_rows[OP_##op].n_in > 2)                                                               \
			use[2] = in[2];                                                                      \
		const struct matmul g = problem(use, out);                                                   \
		matmul_run(s, &g);                                                                           \
		return 0;                                                                                    \
	}                                                                                                    \
	struct cpu_space cpu_space_##op(const struct stream *s, const union op_arg *arg,                     \
	                                const struct tensor *in, const struct tensor *out)                   \
	{                                                                                                    \
		struct matmul g = problem(in, out);                                                          \
		if (arg->linear.fp8)                                                                         \
			g.dtype = DT_bf16;                                                                   \
		struct cpu_space need = space(s, &g);                                                        \
		need.rounded = (size_t)linear_rounded_bytes(arg, in);                                        \
		return need;                                                                                 \
	}

static struct matmul forward(const struct tensor *in, const struct tensor *out)
{
	return (struct matmul){.m = in[0].dim[0],
	                       .n = in[1].dim[0],
	                       .k = tensor_row(&in[0]),
	                       .a = in[0].data,
	                       .b = in[1].data,
	                       .b_transposed = true,
	                       .dtype = in[0].dtype,
	                       .c = out[0].data,
	                       .c_dtype = out[0].dtype,
	                       .bias = in[2].data ? &in[2] : NULL};
}
PRODUCT(linear, forward, false)

static struct matmul input_gradient(const struct tensor *in, const struct tensor *out)
{
	return (struct matmul){.m = in[0].dim[0],
	                       .n = tensor_row(&in[1]),
	                       .k = tensor_row(&in[0]),
	                       .a = in[0].data,
	                       .b = in[1].data,
	                       .dtype = in[0].dtype,
	                       .c = out[0].data,
	                       .c_dtype = out[0].dtype};
}
PRODUCT(linear_dx, input_gradient, true)

static struct matmul weight_gradient(const struct tensor *in, const struct tensor *out)
{
	return (struct matmul){.m = tensor_row(&in[0]),
	                       .n = tensor_row(&in[1]),
	                       .k = in[0].dim[0],
	                       .a = in[0].data,
	                       .b = in[1].data,
	                       .a_transposed = true,
	                       .dtype = in[0].dtype,
	                       .c = out[0].data,
	                       .c_dtype = out[0].dtype,
	                       .acc = out[0].acc};
}
PRODUCT(linear_dw, weight_gradient, true)

enum { SUM_ROWS = 64, SUM_COLUMNS = 256 };

struct column_sums {
	const struct tensor *dy, *db;
	int64_t rows, width;
};

CPU_CLONES static void add_rows(const float *row, int64_t n, float *sum)
{
	for (int64_t i = 0; i < n; i++)
		sum[i] += row[i];
}

/* Columns [first, first + n), n at most SUM_COLUMNS: in blocks of rows, so that rounding grows with the root
 * of their number. */
static void sum_columns(const struct column_sums *c, int64_t first, int64_t n)
{
	float total[SUM_COLUMNS] = {0}, buffer[SUM_COLUMNS];
	for (int64_t row = 0; row < c->rows; row += SUM_ROWS) {
		float sum[SUM_COLUMNS] = {0};
		for (int64_t r = row; r < c->rows && r < row + SUM_ROWS; r++)
			add_rows(cpu_read(c->dy, r * c->width + first, n, buffer), n, sum);
		add_rows(sum, n, total);
	}
	for (int64_t i = 0; i < n; i++)
		cpu_accumulate(c->db, first + i, total[i]);
}

static void column_part(struct stream *s, void *job, int64_t begin, int64_t end, int part)
{
	(void)s, (void)part;
	for (int64_t first = begin; first < end; first += SUM_COLUMNS)
		sum_columns(job, first, end - first < SUM_COLUMNS ? end - first : SUM_COLUMNS);
}

int cpu_fast_bias_grad(struct stream *s, const union op_arg *arg, const struct tensor *in,
                       const struct tensor *out, struct err *e)
{
	(void)arg;
	struct column_sums c = {&in[0], &out[0], in[0].dim[0], tensor_row(&in[0])};
	if (!is_float(&in[0]))
		return err_set(e, EXIT_INTERNAL, "bias_grad: dy is %s; f32, bf16 and f16 are allowed",
		               dtype_rows[in[0].dtype].name);
	cpu_parallel(s, c.width, 32, column_part, &c);
	return 0;
}
