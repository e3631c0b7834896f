/* The products of experts: one product an expert, in the library or kernel of a linear layer. Threads share
 * the work of all experts in equal parts, wherever an expert begins, and each makes products of its own: none
 * waits for another. Each packs the weights of every expert that it meets, so where rows are few for the
 * threads they share each product instead. What is added to what depends on the shape and the sizes alone. */
#include "kernels/cpu/cpu.h"
#include "op/experts.h"
#include "kernels/cpu/matmul.h"

enum {
	PACK_ROWS = 25,       /* that are multiplied in the time of packing weights for them */
	CUT_BYTES = 24 << 20, /* that a thread's products may take of scratch */
	CUT_ROWS = 384,       /* of such a product */
	DEPTH_ROWS = 1024,    /* of a weight's gradient that are multiplied at a time */
	WRITE_ROWS = 16       /* as much work as to write what they add up to */
};

struct grouped {
	const union op_arg *arg;
	const struct tensor *in, *out, *sizes;
	int64_t from, to; /* columns: C, F */
	/* Rows [first, first + n) of expert i, or rows [first, first + n) of its part of dw. */
	struct matmul (*product)(const struct grouped *j, const struct expert_walk *w, int64_t first,
	                         int64_t n);
	bool is_gradient; /* dw: cut by rows of weights, else by rows of experts */
	struct cpu_space alone;
};

/* Where row `row` of a matrix lies. */
static void *row_of(const struct tensor *t, int64_t row)
{
	return (char *)t->data + row * tensor_row(t) * dtype_rows[t->dtype].bytes;
}

static struct matmul forward(const struct grouped *j, const struct expert_walk *w, int64_t first, int64_t n)
{
	return (struct matmul){.m = n,
	                       .n = j->to,
	                       .k = j->from,
	                       .a = row_of(&j->in[0], w->first + first),
	                       .b = row_of(&j->in[1], w->i * j->to),
	                       .b_transposed = true,
	                       .dtype = j->in[0].dtype,
	                       .c = row_of(j->out, w->first + first),
	                       .c_dtype = j->out->dtype};
}

static struct matmul input_gradient(const struct grouped *j, const struct expert_walk *w, int64_t first,
                                    int64_t n)
{
	return (struct matmul){.m = n,
	                       .n = j->from,
	                       .k = j->to,
	                       .a = row_of(&j->in[0], w->first + first),
	                       .b = row_of(&j->in[1], w->i * j->to),
	                       .dtype = j->in[0].dtype,
	                       .c = row_of(j->out, w->first + first),
	                       .c_dtype = j->out->dtype};
}

static struct matmul weight_gradient(const struct grouped *j, const struct expert_walk *w, int64_t first,
                                     int64_t n)
{
	return (struct matmul){.m = n,
	                       .n = j->from,
	                       .k = w->rows,
	                       .a = (char *)row_of(&j->in[0], w->first) +
	                            first * dtype_rows[j->in[0].dtype].bytes,
	                       .a_transposed = true,
	                       .a_pitch = j->to,
	                       .b = row_of(&j->in[1], w->first),
	                       .dtype = j->in[0].dtype,
	                       .c = row_of(j->out, w->i * j->to + first),
	                       .c_dtype = j->out->dtype,
	                       .acc = j->out->acc};
}

static int64_t least(int64_t a, int64_t b)
{
	return a < b ? a : b;
}

/* Its depth is cut the same way whoever runs it, so that sums are the same. */
static void run_deep(struct stream *s, struct matmul g)
{
	const int64_t depth = g.k, row = dtype_rows[g.dtype].bytes;
	for (int64_t k = 0; k < depth || k == 0; k += DEPTH_ROWS) {
		g.k = least(DEPTH_ROWS, depth - k);
		matmul_run(s, &g);
		g.a = (const char *)g.a + g.k * g.a_pitch * row;
		g.b = (const char *)g.b + g.k * g.n * row;
		g.acc = true;
	}
}

/* Lanes [begin, end) of an expert: rows of its products' results, `most` at a time. */
static void run_lanes(struct stream *s, const struct grouped *j, const struct expert_walk *w, int64_t begin,
                      int64_t end, int64_t most)
{
	for (int64_t at = begin; at < end; at += most) {
		struct matmul g = j->product(j, w, at, least(most, end - at));
		if (j->is_gradient)
			run_deep(s, g);
		else
			matmul_run(s, &g);
	}
}

static int64_t lanes_of(const struct grouped *j, const struct expert_walk *w)
{
	return j->is_gradient ? j->to : w->rows;
}

static int64_t lane_work(const struct grouped *j, const struct expert_walk *w)
{
	return j->is_gradient ? w->rows + WRITE_ROWS : 1;
}

/* The first lane of an expert that is behind so much of its work. */
static int64_t lane_at(int64_t work, int64_t lanes, int64_t lane_work)
{
	int64_t lane = work < 0 ? 0 : (work + lane_work - 1) / lane_work;
	return least(lane, lanes);
}

/* A stream of one thread in the memory of part `part`. */
static struct stream stream_of_part(struct stream *s, int part, const struct cpu_space *space,
                                    struct cpu_scratch scratch[2])
{
	char *memory = cpu_scratch(s, part, space->part + space->shared);
	scratch[0] = (struct cpu_scratch){memory, space->part, space->part};
	scratch[1] = (struct cpu_scratch){memory + space->part, space->shared, space->shared};
	return (struct stream){.num_threads = 1, .scratch = scratch, .is_told = true};
}

static void cut_part(struct stream *s, void *job, int64_t begin, int64_t end, int part)
{
	const struct grouped *j = job;
	struct cpu_scratch scratch[2];
	struct stream alone = stream_of_part(s, part, &j->alone, scratch);
	int64_t done = 0;
	for (struct expert_walk w = expert_begin(j->arg, j->sizes); expert_next(&w);) {
		int64_t lanes = lanes_of(j, &w), each = lane_work(j, &w);
		run_lanes(&alone, j, &w, lane_at(begin - done, lanes, each), lane_at(end - done, lanes, each),
		          CUT_ROWS);
		done += lanes * each;
	}
}

/* The largest product of one thread, or of all. */
static struct matmul largest(const struct grouped *j, int64_t lanes, int64_t rows)
{
	struct expert_walk w = {.rows = least(rows, DEPTH_ROWS)};
	return j->product(j, &w, 0, least(lanes, j->is_gradient ? j->to : rows));
}

static struct cpu_space space_alone(const struct grouped *j, int64_t rows)
{
	const struct stream one = {.num_threads = 1};
	const struct matmul g = largest(j, CUT_ROWS, rows);
	struct cpu_space space = matmul_most(&one, &g);
	space.part = (space.part + 63) / 64 * 64;
	return space;
}

/* Whether threads may share the work of all experts: an answer for the shape. */
static bool may_cut(const struct stream *s, const struct cpu_space *alone)
{
	return s->num_threads > 1 && alone->part + alone->shared <= CUT_BYTES;
}

static struct cpu_space space(const struct stream *s, const struct grouped *j)
{
	int64_t rows = j->in[0].dim[0];
	const struct matmul g = largest(j, INT64_MAX, rows);
	struct cpu_space space = matmul_most(s, &g), alone = space_alone(j, rows);
	if (!may_cut(s, &alone))
		return space;
	space.part = alone.part + alone.shared > space.part ? alone.part + alone.shared : space.part;
	space.parts = s->num_threads;
	return space;
}

/* Whether they do: an answer for the sizes. Each thread but one packs the weights of one expert more, while a
 * shared product loses about a quarter of the threads' time. */
static bool is_cut(const struct stream *s, const struct grouped *j)
{
	int64_t rows = expert_total(j->arg, j->sizes), busy = 0;
	for (struct expert_walk w = expert_begin(j->arg, j->sizes); expert_next(&w);)
		busy += w.rows > 0;
	return may_cut(s, &j->alone) && rows / PACK_ROWS + busy >= 3 * (s->num_threads - 1);
}

static void run(struct stream *s, struct grouped *j)
{
	int64_t work = 0;
	j->alone = space_alone(j, j->in[0].dim[0]);
	bool cut = is_cut(s, j);
	for (struct expert_walk w = expert_begin(j->arg, j->sizes); expert_next(&w);) {
		work += lanes_of(j, &w) * lane_work(j, &w);
		if (!cut)
			run_lanes(s, j, &w, 0, lanes_of(j, &w), INT64_MAX);
	}
	if (cut)
		cpu_parallel(s, work, 1, cut_part, j);
}

/* x and w of the product, y and its columns; `problem` builds it. */
#define GROUPED(op, x, y, w, problem, gradient)                                                   \
	static struct grouped op##_of(const union op_arg *arg, const struct tensor *in,           \
	                              const struct tensor *out)                                   \
	{                                                                                         \
		return (struct grouped){.arg = arg,                                               \
		                        .in = in,                                                 \
		                        .out = out,                                               \
		                        .sizes = &in[2],                                          \
		                        .from = tensor_row(x),                                    \
		                        .to = tensor_row(y),                                      \
		                        .product = problem,                                       \
		                        .is_gradient = gradient};                                 \
	}                                                                                         \
	struct cpu_space cpu_space_##op(const struct stream *s, const union op_arg *arg,          \
	                                const struct tensor *in, const struct tensor *out)        \
	{                                                                                         \
		const struct grouped j = op##_of(arg, in, out);                                   \
		return space(s, &j);                                                              \
	}                                                                                         \
	int cpu_fast_##op(struct stream *s, const union op_arg *arg, const struct tensor *in,     \
	                  const struct tensor *out, struct err *e)                                \
	{                                                                                         \
		struct grouped j = op##_of(arg, in, out);                                         \
		if (grouped_check(#op, arg, &in[2], x, y, w, e) || matmul_check(#op, in, out, e)) \
			return e->code;                                                           \
		run(s, &j);                                                                       \
		return 0;                                                                         \
	}

GROUPED(grouped_linear, &in[0], out, &in[1], forward, false)
GROUPED(grouped_dx, out, &in[0], &in[1], input_gradient, false)
GROUPED(grouped_dw, &in[1], &in[0], out, weight_gradient, true)
