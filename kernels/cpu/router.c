/* The router: rows of as many logits as there are experts, in f32; threads share the rows. */
#include "kernels/cpu/cpu.h"
#include "op/experts.h"

#include <math.h>
#include <string.h>

#include "kernels/cpu/vmath.h"

enum {
	GRAIN = 4096,   /* logits below which a further thread costs more than it brings */
	SUM_ROWS = 64,  /* whose losses are added before others join them, whatever the threads */
	ROW_BUFFERS = 4 /* of `experts` elements each, that a part works in */
};

struct job {
	const union op_arg *arg;
	const struct tensor *in, *out;
	int64_t rows, experts;
	double *partial; /* balance: [chunks of SUM_ROWS][outputs] */
};

static int64_t row_grain(int64_t experts)
{
	return GRAIN / experts + 1;
}

static size_t row_bytes(int64_t experts)
{
	return (size_t)experts * (ROW_BUFFERS * sizeof(float) + sizeof(bool));
}

/* Every kernel here works in ROW_BUFFERS rows of a part. */
static struct cpu_space rows_space(const struct stream *s, const struct tensor *logits)
{
	int64_t experts = tensor_row(logits);
	return (struct cpu_space){.part = row_bytes(experts),
	                          .parts = cpu_parts(s, logits->dim[0], row_grain(experts))};
}

static float *row_buffers(const struct job *j, struct stream *s, int part)
{
	return cpu_scratch(s, part, row_bytes(j->experts));
}

CPU_CLONES static float top_of(const float *x, int64_t n)
{
	float top = -INFINITY;
#pragma omp simd reduction(max : top)
	for (int64_t i = 0; i < n; i++)
		top = x[i] > top ? x[i] : top;
	return top;
}

CPU_CLONES static float exponents(const float *x, float top, float *y, int64_t n)
{
	float sum = 0;
#pragma omp simd reduction(+ : sum)
	for (int64_t i = 0; i < n; i++) {
		y[i] = vexp(x[i] - top);
		sum += y[i];
	}
	return sum;
}

CPU_CLONES static void scale_row(const float *x, float scale, float *y, int64_t n)
{
#pragma omp simd
	for (int64_t i = 0; i < n; i++)
		y[i] = x[i] * scale;
}

CPU_CLONES static double dot(const float *a, const float *b, int64_t n)
{
	double sum = 0;
#pragma omp simd reduction(+ : sum)
	for (int64_t i = 0; i < n; i++)
		sum += (double)a[i] * b[i];
	return sum;
}

/* p <- softmax of x, which may be p; returns the log of the sum of exp. */
static float softmax_row(const float *x, float *p, int64_t n)
{
	float top = top_of(x, n), sum = exponents(x, top, p, n);
	scale_row(p, 1 / sum, p, n);
	return top + logf(sum);
}

/* Scores that each expert has for itself, and their slopes. */
CPU_CLONES static void sigmoid_value(const float *x, float *s, int64_t n)
{
#pragma omp simd
	for (int64_t i = 0; i < n; i++)
		s[i] = vsigmoid(x[i]);
}

CPU_CLONES static void sigmoid_slope(const float *x, float *d, int64_t n)
{
#pragma omp simd
	for (int64_t i = 0; i < n; i++)
		d[i] = vsigmoid(x[i]) * vsigmoid(-x[i]);
}

static void sqrtsoftplus_value(const float *x, float *s, int64_t n)
{
	for (int64_t i = 0; i < n; i++)
		s[i] = sqrtf(fmaxf(x[i], 0) + log1pf(expf(-fabsf(x[i]))));
}

static void sqrtsoftplus_slope(const float *x, float *d, int64_t n)
{
	sqrtsoftplus_value(x, d, n);
	for (int64_t i = 0; i < n; i++)
		d[i] = d[i] == 0 ? 0 : vsigmoid(x[i]) / (2 * d[i]);
}

static const struct {
	void (*value)(const float *x, float *s, int64_t n), (*slope)(const float *x, float *d, int64_t n);
} own_scores[SCORE_COUNT] = {[SCORE_sigmoid] = {sigmoid_value, sigmoid_slope},
                             [SCORE_sqrtsoftplus] = {sqrtsoftplus_value, sqrtsoftplus_slope}};

static float sum_of(const float *x, int64_t n)
{
	double sum = 1e-20;
	for (int64_t i = 0; i < n; i++)
		sum += x[i];
	return (float)sum;
}

/* What is not a number is the largest, so that it spoils a result that somebody looks at. */
static bool is_above(float a, float b)
{
	return a > b || (isnan(a) && !isnan(b));
}

/* best[k] <- the k largest that are not closed (NULL: none is), the largest first, the first of equals; there
 * are that many. */
static void best_of(const float *value, const bool *closed, int32_t n, int32_t k, int32_t *best)
{
	int32_t found = 0;
	for (int32_t i = 0; i < n; i++) {
		if ((closed && closed[i]) || (found == k && !is_above(value[i], value[best[k - 1]])))
			continue;
		int32_t at = found < k ? found++ : k - 1;
		for (; at > 0 && is_above(value[i], value[best[at - 1]]); at--)
			best[at] = best[at - 1];
		best[at] = i;
	}
}

/* Group-limited choice (DeepSeek-AI 2024): closes the experts of all groups but the best. */
static void close_groups(const union op_arg *arg, const float *choice, int64_t experts, float *value,
                         int32_t *best, bool *closed)
{
	int32_t groups = arg->route.num_groups, size = (int32_t)experts / groups,
	        voices = group_best(arg, size);
	for (int32_t g = 0; g < groups; g++) {
		best_of(choice + g * size, NULL, size, voices, best);
		value[g] = 0;
		for (int32_t k = 0; k < voices; k++)
			value[g] += choice[g * size + best[k]];
	}
	best_of(value, NULL, groups, arg->route.group_topk, best);
	memset(closed, true, (size_t)experts * sizeof *closed);
	for (int32_t k = 0; k < arg->route.group_topk; k++)
		memset(closed + best[k] * size, false, (size_t)size * sizeof *closed);
}

/* w <- the weights of the chosen, of which w holds the scores. */
static void weigh(const union op_arg *arg, float *w)
{
	int32_t topk = arg->route.topk;
	float factor = arg->route.scaling_factor;
	if (arg->route.score == SCORE_softmax && !arg->route.pre_softmax)
		softmax_row(w, w, topk);
	else if (arg->route.score != SCORE_softmax && topk > 1)
		factor /= sum_of(w, topk);
	scale_row(w, factor, w, topk);
}

/* What the experts of a row are chosen by before the bias, and their weights made of; `room` for them. */
static const float *row_scores(const union op_arg *arg, const float *x, float *room, int64_t experts)
{
	if (arg->route.score == SCORE_softmax && !arg->route.pre_softmax)
		return x;
	if (arg->route.score == SCORE_softmax)
		softmax_row(x, room, experts);
	else
		own_scores[arg->route.score].value(x, room, experts);
	return room;
}

static void route_row(const struct job *j, int64_t row, float *buffer)
{
	const union op_arg *arg = j->arg;
	const int64_t experts = j->experts, topk = arg->route.topk;
	const float *bias = j->in[1].data,
	            *score = row_scores(arg, (const float *)j->in[0].data + row * experts, buffer, experts);
	float *choice = buffer + experts, *group = choice + experts,
	      *w = (float *)j->out[0].data + row * topk;
	int32_t *best = (int32_t *)(group + experts), *index = (int32_t *)j->out[1].data + row * topk;
	bool *closed = arg->route.num_groups ? (bool *)(best + experts) : NULL;
	for (int64_t i = 0; i < experts; i++)
		choice[i] = score[i] + (bias ? bias[i] : 0);
	if (closed)
		close_groups(arg, choice, experts, group, best, closed);
	best_of(choice, closed, (int32_t)experts, (int32_t)topk, index);
	for (int64_t k = 0; k < topk; k++)
		w[k] = score[index[k]];
	weigh(arg, w);
}

static void route_part(struct stream *s, void *job, int64_t begin, int64_t end, int part)
{
	float *buffer = row_buffers(job, s, part);
	for (int64_t row = begin; row < end; row++)
		route_row(job, row, buffer);
}

struct cpu_space cpu_space_route(const struct stream *s, const union op_arg *arg, const struct tensor *in,
                                 const struct tensor *out)
{
	(void)arg, (void)out;
	return rows_space(s, &in[0]);
}

int cpu_fast_route(struct stream *s, const union op_arg *arg, const struct tensor *in,
                   const struct tensor *out, struct err *e)
{
	struct job j = {.arg = arg, .in = in, .out = out, .experts = tensor_row(&in[0])};
	if (route_check(arg, &in[0], &out[1], e))
		return e->code;
	cpu_parallel(s, in[0].dim[0], row_grain(j.experts), route_part, &j);
	return 0;
}

/* Of the chosen p (g - sum of g p); of the others -p times that sum where the softmax saw them. */
static void softmax_backward(const struct job *j, const float *x, const float *g, const int32_t *index,
                             float *dx, float *buffer)
{
	const int64_t experts = j->experts, topk = j->arg->route.topk;
	const float factor = j->arg->route.scaling_factor;
	float *p = buffer, *all = buffer + experts;
	bool pre = j->arg->route.pre_softmax;
	if (pre)
		softmax_row(x, all, experts);
	for (int64_t k = 0; k < topk; k++)
		p[k] = pre ? all[index[k]] : x[index[k]];
	if (!pre)
		softmax_row(p, p, topk);
	float sum = (float)dot(g, p, topk);
	if (pre)
		scale_row(all, -sum * factor, dx, experts);
	for (int64_t k = 0; k < topk; k++)
		dx[index[k]] = factor * (g[k] - sum) * p[k];
}

static void own_score_backward(const struct job *j, const float *x, const float *g, const int32_t *index,
                               float *dx, float *buffer)
{
	const int64_t experts = j->experts, topk = j->arg->route.topk;
	float *chosen = buffer, *value = buffer + experts, *slope = value + experts;
	for (int64_t k = 0; k < topk; k++)
		chosen[k] = x[index[k]];
	own_scores[j->arg->route.score].value(chosen, value, topk);
	own_scores[j->arg->route.score].slope(chosen, slope, topk);
	float sum = sum_of(value, topk), along = (float)dot(g, value, topk) / sum;
	for (int64_t k = 0; k < topk; k++)
		dx[index[k]] =
		        j->arg->route.scaling_factor * slope[k] * (topk == 1 ? g[k] : (g[k] - along) / sum);
}

static void route_bwd_part(struct stream *s, void *job, int64_t begin, int64_t end, int part)
{
	const struct job *j = job;
	const int64_t experts = j->experts, topk = j->arg->route.topk;
	float *buffer = row_buffers(j, s, part);
	for (int64_t row = begin; row < end; row++) {
		const float *g = (const float *)j->in[0].data + row * topk,
		            *x = (const float *)j->in[1].data + row * experts;
		const int32_t *index = (const int32_t *)j->in[2].data + row * topk;
		float *dx = (float *)j->out[0].data + row * experts;
		memset(dx, 0, (size_t)experts * sizeof *dx);
		if (j->arg->route.score == SCORE_softmax)
			softmax_backward(j, x, g, index, dx, buffer);
		else
			own_score_backward(j, x, g, index, dx, buffer);
	}
}

struct cpu_space cpu_space_route_bwd(const struct stream *s, const union op_arg *arg, const struct tensor *in,
                                     const struct tensor *out)
{
	(void)arg, (void)out;
	return rows_space(s, &in[1]);
}

int cpu_fast_route_bwd(struct stream *s, const union op_arg *arg, const struct tensor *in,
                       const struct tensor *out, struct err *e)
{
	struct job j = {.arg = arg, .in = in, .out = out, .experts = tensor_row(&in[1])};
	if (route_check(arg, &in[1], &in[2], e) || index_check("route_bwd", &in[2], j.experts, e))
		return e->code;
	cpu_parallel(s, in[1].dim[0], row_grain(j.experts), route_bwd_part, &j);
	return 0;
}

/* What a row's losses and gradient come from; buffers of a part. */
struct balance_row {
	const float *x, *score; /* p is score / total */
	float *softmax, *own, *price, *slope;
	float lse, total;
	int64_t sequence; /* whose prices these are */
};

static struct balance_row balance_begin(const struct job *j, struct stream *s, int part)
{
	float *buffer = row_buffers(j, s, part);
	return (struct balance_row){.softmax = buffer,
	                            .own = buffer + j->experts,
	                            .price = buffer + 2 * j->experts,
	                            .slope = buffer + 3 * j->experts,
	                            .sequence = -1};
}

/* What the loss has for a unit of each p. */
static void set_prices(const struct job *j, const struct tensor *counts, int64_t sequence, float *price)
{
	const int32_t *count = (const int32_t *)counts->data + sequence * j->experts;
	double routed = 0;
	for (int64_t i = 0; i < j->experts; i++)
		routed += count[i];
	double unit = routed > 0 ? j->arg->balance.aux_coeff * (double)j->experts / routed : 0;
	for (int64_t i = 0; i < j->experts; i++)
		price[i] = (float)(unit * count[i]);
}

static void balance_enter(const struct job *j, const struct tensor *logits, int64_t row,
                          struct balance_row *r)
{
	const struct tensor *counts = logits + 1;
	int64_t sequence = sequence_of(j->arg, counts->dim[0], row);
	if (sequence != r->sequence)
		set_prices(j, counts, sequence, r->price);
	r->sequence = sequence;
	r->x = (const float *)logits->data + row * j->experts;
	r->lse = softmax_row(r->x, r->softmax, j->experts);
	r->score = r->softmax;
	r->total = 1;
	if (j->arg->balance.score != SCORE_softmax) {
		own_scores[j->arg->balance.score].value(r->x, r->own, j->experts);
		r->score = r->own;
		r->total = sum_of(r->own, j->experts);
	}
}

CPU_CLONES static double softmax_entropy(const float *x, const float *p, float lse, int64_t n)
{
	double sum = 0;
#pragma omp simd reduction(+ : sum)
	for (int64_t i = 0; i < n; i++)
		sum += p[i] == 0 ? 0 : (double)p[i] * (lse - x[i]);
	return sum;
}

static double entropy(const struct job *j, const struct balance_row *r)
{
	if (r->score == r->softmax)
		return softmax_entropy(r->x, r->softmax, r->lse, j->experts);
	double sum = 0;
	for (int64_t i = 0; i < j->experts; i++) {
		float p = r->own[i] / r->total;
		sum -= p == 0 ? 0 : p * logf(p);
	}
	return sum;
}

static void balance_part(struct stream *s, void *job, int64_t begin, int64_t end, int part)
{
	const struct job *j = job;
	struct balance_row r = balance_begin(j, s, part);
	for (int64_t chunk = begin; chunk < end; chunk++) {
		double *sum = memset(j->partial + 3 * chunk, 0, 3 * sizeof *sum);
		for (int64_t row = chunk * SUM_ROWS; row < j->rows && row < (chunk + 1) * SUM_ROWS; row++) {
			balance_enter(j, &j->in[0], row, &r);
			double z = (double)r.lse * r.lse;
			sum[0] += dot(r.price, r.score, j->experts) / r.total + j->arg->balance.z_coeff * z;
			sum[1] += z;
			sum[2] += entropy(j, &r);
		}
	}
}

static int64_t chunks_of(int64_t rows)
{
	return (rows + SUM_ROWS - 1) / SUM_ROWS;
}

struct cpu_space cpu_space_balance(const struct stream *s, const union op_arg *arg, const struct tensor *in,
                                   const struct tensor *out)
{
	(void)arg, (void)out;
	int64_t chunks = chunks_of(in[0].dim[0]);
	return (struct cpu_space){.shared = (size_t)chunks * 3 * sizeof(double),
	                          .part = row_bytes(tensor_row(&in[0])),
	                          .parts = cpu_parts(s, chunks, 1)};
}

int cpu_fast_balance(struct stream *s, const union op_arg *arg, const struct tensor *in,
                     const struct tensor *out, struct err *e)
{
	struct job j = {
	        .arg = arg, .in = in, .out = out, .rows = in[0].dim[0], .experts = tensor_row(&in[0])};
	int64_t chunks = chunks_of(j.rows);
	double sum[3] = {0};
	if (sequence_check("balance", arg, j.rows, &in[1], e))
		return e->code;
	j.partial = cpu_scratch(s, CPU_SHARED, (size_t)chunks * sizeof sum);
	cpu_parallel(s, chunks, 1, balance_part, &j);
	for (int64_t i = 0; i < 3 * chunks; i++)
		sum[i % 3] += j.partial[i];
	for (int k = 0; k < 3; k++)
		cpu_accumulate(&out[k], 0, sum[k]);
	return 0;
}

CPU_CLONES static void balance_gradient(const float *price, const float *slope, const float *softmax,
                                        float mean, float scale, float of_z, float *dx, int64_t n)
{
#pragma omp simd
	for (int64_t i = 0; i < n; i++)
		dx[i] = scale * (price[i] - mean) * slope[i] + of_z * softmax[i];
}

static void balance_bwd_part(struct stream *s, void *job, int64_t begin, int64_t end, int part)
{
	const struct job *j = job;
	const float scale = (float)cpu_get(&j->in[0], 0), z_coeff = j->arg->balance.z_coeff;
	const int64_t experts = j->experts;
	struct balance_row r = balance_begin(j, s, part);
	for (int64_t row = begin; row < end; row++) {
		balance_enter(j, &j->in[1], row, &r);
		const float *slope = r.softmax;
		if (r.score != r.softmax) {
			own_scores[j->arg->balance.score].slope(r.x, r.slope, experts);
			slope = r.slope;
		}
		float mean = (float)(dot(r.price, r.score, experts) / r.total);
		balance_gradient(r.price, slope, r.softmax, mean, scale / r.total,
		                 scale * z_coeff * 2 * r.lse, (float *)j->out[0].data + row * experts,
		                 experts);
	}
}

struct cpu_space cpu_space_balance_bwd(const struct stream *s, const union op_arg *arg,
                                       const struct tensor *in, const struct tensor *out)
{
	(void)arg, (void)out;
	return rows_space(s, &in[1]);
}

int cpu_fast_balance_bwd(struct stream *s, const union op_arg *arg, const struct tensor *in,
                         const struct tensor *out, struct err *e)
{
	struct job j = {.arg = arg, .in = in, .out = out, .experts = tensor_row(&in[1])};
	if (sequence_check("balance_bwd", arg, in[1].dim[0], &in[2], e))
		return e->code;
	cpu_parallel(s, in[1].dim[0], row_grain(j.experts), balance_bwd_part, &j);
	return 0;
}
