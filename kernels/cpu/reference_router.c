#include "kernels/cpu/cpu.h"
#include "op/experts.h"

#include <math.h>
#include <stdlib.h>

#include "base/mem.h"

static double sigmoid(double x)
{
	return 1 / (1 + exp(-x));
}

static double softplus(double x)
{
	return fmax(x, 0) + log1p(exp(-fabs(x)));
}

/* Value and slope of the scores that each expert has for itself. */
static double own_score(int32_t score, double x)
{
	return score == SCORE_sigmoid ? sigmoid(x) : sqrt(softplus(x));
}

static double own_slope(int32_t score, double x)
{
	double s = own_score(score, x);
	return score == SCORE_sigmoid ? s * (1 - s) : s == 0 ? 0 : sigmoid(x) / (2 * s);
}

/* Log-sum-exp of the n elements that `index` names, of elements from `at` on; NULL: of all n. */
static double log_sum_exp(const struct tensor *x, int64_t at, const int32_t *index, int64_t n)
{
	double top = -INFINITY, sum = 0;
	for (int64_t i = 0; i < n; i++)
		top = fmax(top, cpu_get(x, at + (index ? index[i] : i)));
	if (top == -INFINITY)
		top = 0;
	for (int64_t i = 0; i < n; i++)
		sum += exp(cpu_get(x, at + (index ? index[i] : i)) - top);
	return top + log(sum);
}

/* What is not a number is the largest, so that it spoils a result that somebody looks at. */
static bool is_above(double a, double b)
{
	return a > b || (isnan(a) && !isnan(b));
}

/* The best of those that are not taken, the first of equals. */
static int64_t best_left(const double *value, const bool *taken, int64_t n)
{
	int64_t best = -1;
	for (int64_t i = 0; i < n; i++)
		if (!taken[i] && (best < 0 || is_above(value[i], value[best])))
			best = i;
	return best;
}

/* Group-limited choice (DeepSeek-AI 2024): takes the experts of all groups but the best. */
static void close_groups(const union op_arg *arg, const double *choice, bool *taken, int64_t experts)
{
	int64_t groups = arg->route.num_groups, size = experts / groups;
	double *value = mem_array((size_t)groups, sizeof *value);
	bool *is_best = mem_array((size_t)groups, sizeof *is_best);
	for (int64_t g = 0; g < groups; g++) {
		for (int32_t k = 0; k < group_best(arg, size); k++) {
			int64_t i = best_left(choice + g * size, taken + g * size, size);
			value[g] += choice[g * size + i];
			taken[g * size + i] = true;
		}
	}
	for (int32_t k = 0; k < arg->route.group_topk; k++)
		is_best[best_left(value, is_best, groups)] = true;
	for (int64_t i = 0; i < experts; i++)
		taken[i] = !is_best[i / size];
	free(value);
	free(is_best);
}

/* What the experts of the row at `at` are chosen by, and, where it is not taken from the chosen alone, their
 * score. */
static void row_scores(const union op_arg *arg, const struct tensor *in, int64_t at, int64_t experts,
                       double *score, double *choice)
{
	double lse = log_sum_exp(&in[0], at, NULL, experts);
	for (int64_t i = 0; i < experts; i++) {
		double x = cpu_get(&in[0], at + i);
		score[i] = arg->route.score != SCORE_softmax ? own_score(arg->route.score, x)
		           : arg->route.pre_softmax          ? exp(x - lse)
		                                             : x;
		choice[i] = score[i] + (in[1].data ? cpu_get(&in[1], i) : 0);
	}
}

static void row_weights(const union op_arg *arg, const struct tensor *logits, int64_t at, const double *score,
                        const int32_t *index, const struct tensor *probs, int64_t to)
{
	int32_t topk = arg->route.topk;
	bool softmax = arg->route.score == SCORE_softmax;
	double lse = log_sum_exp(logits, at, index, topk), sum = 0;
	for (int32_t k = 0; k < topk; k++)
		sum += score[index[k]];
	for (int32_t k = 0; k < topk; k++) {
		double weight = softmax && !arg->route.pre_softmax ? exp(score[index[k]] - lse)
		                : softmax || topk == 1             ? score[index[k]]
		                                                   : score[index[k]] / (sum + 1e-20);
		cpu_set(probs, to + k, weight * arg->route.scaling_factor);
	}
}

int cpu_ref_route(struct stream *s, const union op_arg *arg, const struct tensor *in,
                  const struct tensor *out, struct err *e)
{
	(void)s;
	if (route_check(arg, &in[0], &out[1], e))
		return e->code;
	int64_t experts = tensor_row(&in[0]), topk = arg->route.topk;
	double *score = mem_array((size_t)experts, 2 * sizeof *score), *choice = score + experts;
	bool *taken = mem_array((size_t)experts, sizeof *taken);
	for (int64_t n = 0; n < in[0].dim[0]; n++) {
		int32_t *index = (int32_t *)out[1].data + n * topk;
		row_scores(arg, in, n * experts, experts, score, choice);
		for (int64_t i = 0; i < experts; i++)
			taken[i] = false;
		if (arg->route.num_groups)
			close_groups(arg, choice, taken, experts);
		for (int64_t k = 0; k < topk; k++) {
			index[k] = (int32_t)best_left(choice, taken, experts);
			taken[index[k]] = true;
		}
		row_weights(arg, &in[0], n * experts, score, index, &out[0], n * topk);
	}
	free(score);
	free(taken);
	return 0;
}

struct route_row {
	const union op_arg *arg;
	const struct tensor *dprobs, *logits, *dlogits;
	const int32_t *index;
	int64_t at, choice, experts; /* first logit, first choice of the row */
};

/* Of the chosen p (g - sum of g p); of the others -p times that sum where the softmax saw them. */
static void softmax_backward(const struct route_row *r)
{
	int32_t topk = r->arg->route.topk;
	bool pre = r->arg->route.pre_softmax;
	double lse = log_sum_exp(r->logits, r->at, pre ? NULL : r->index, pre ? r->experts : topk), sum = 0;
	for (int32_t k = 0; k < topk; k++)
		sum += cpu_get(r->dprobs, r->choice + k) * exp(cpu_get(r->logits, r->at + r->index[k]) - lse);
	for (int64_t i = 0; i < r->experts; i++)
		cpu_set(r->dlogits, r->at + i, pre ? -sum * exp(cpu_get(r->logits, r->at + i) - lse) : 0);
	for (int32_t k = 0; k < topk; k++) {
		int64_t i = r->at + r->index[k];
		double g = cpu_get(r->dprobs, r->choice + k) - sum;
		cpu_set(r->dlogits, i, g * exp(cpu_get(r->logits, i) - lse));
	}
}

static void own_score_backward(const struct route_row *r)
{
	int32_t topk = r->arg->route.topk, score = r->arg->route.score;
	double sum = 1e-20, along = 0;
	for (int32_t k = 0; k < topk; k++) {
		double value = own_score(score, cpu_get(r->logits, r->at + r->index[k]));
		sum += value;
		along += value * cpu_get(r->dprobs, r->choice + k);
	}
	for (int64_t i = 0; i < r->experts; i++)
		cpu_set(r->dlogits, r->at + i, 0);
	for (int32_t k = 0; k < topk; k++) {
		int64_t i = r->at + r->index[k];
		double g = cpu_get(r->dprobs, r->choice + k);
		double slope = own_slope(score, cpu_get(r->logits, i));
		cpu_set(r->dlogits, i, topk == 1 ? g * slope : (g - along / sum) / sum * slope);
	}
}

int cpu_ref_route_bwd(struct stream *s, const union op_arg *arg, const struct tensor *in,
                      const struct tensor *out, struct err *e)
{
	(void)s;
	if (route_check(arg, &in[1], &in[2], e) || index_check("route_bwd", &in[2], tensor_row(&in[1]), e))
		return e->code;
	struct route_row r = {.arg = arg,
	                      .dprobs = &in[0],
	                      .logits = &in[1],
	                      .dlogits = out,
	                      .experts = tensor_row(&in[1])};
	for (int64_t n = 0; n < in[1].dim[0]; n++) {
		r.at = n * r.experts;
		r.choice = n * arg->route.topk;
		r.index = (const int32_t *)in[2].data + r.choice;
		if (arg->route.score == SCORE_softmax)
			softmax_backward(&r);
		else
			own_score_backward(&r);
		for (int64_t i = 0; i < r.experts; i++)
			cpu_set(out, r.at + i, cpu_get(out, r.at + i) * arg->route.scaling_factor);
	}
	return 0;
}

int cpu_ref_expert_counts(struct stream *s, const union op_arg *arg, const struct tensor *in,
                          const struct tensor *out, struct err *e)
{
	(void)s;
	if (sequence_check("expert_counts", arg, in[0].dim[0], out, e))
		return e->code;
	int64_t topk = tensor_row(&in[0]), experts = tensor_row(out);
	const int32_t *index = in[0].data;
	int32_t *counts = out->data;
	for (int64_t i = 0; i < tensor_count(out); i++)
		counts[i] = 0;
	for (int64_t n = 0; n < in[0].dim[0]; n++)
		for (int64_t k = n * topk; k < (n + 1) * topk; k++)
			if (index[k] >= 0 && index[k] < experts)
				counts[sequence_of(arg, out->dim[0], n) * experts + index[k]]++;
	return 0;
}

/* One row of logits as the balance sees it. */
struct balance_row {
	const union op_arg *arg;
	const struct tensor *logits;
	const int32_t *counts; /* of the row's sequence */
	int64_t at, experts;
	double lse, sum, routed; /* of exp; of the scores; of the counts */
};

static double row_score(const struct balance_row *r, int64_t i)
{
	double x = cpu_get(r->logits, r->at + i);
	return r->arg->balance.score == SCORE_softmax ? exp(x - r->lse) : own_score(r->arg->balance.score, x);
}

/* What the loss has for a unit of p. */
static double row_price(const struct balance_row *r, int64_t i)
{
	double share = r->routed > 0 ? r->counts[i] / r->routed : 0;
	return r->arg->balance.aux_coeff * (double)r->experts * share;
}

static struct balance_row balance_row(const union op_arg *arg, const struct tensor *logits,
                                      const struct tensor *counts, int64_t n)
{
	struct balance_row r = {.arg = arg, .logits = logits, .experts = tensor_row(logits)};
	r.at = n * r.experts;
	r.counts = (const int32_t *)counts->data + sequence_of(arg, counts->dim[0], n) * r.experts;
	r.lse = log_sum_exp(logits, r.at, NULL, r.experts);
	r.sum = arg->balance.score == SCORE_softmax ? 0 : 1e-20;
	for (int64_t i = 0; i < r.experts; i++) {
		r.sum += row_score(&r, i);
		r.routed += r.counts[i];
	}
	return r;
}

int cpu_ref_balance(struct stream *s, const union op_arg *arg, const struct tensor *in,
                    const struct tensor *out, struct err *e)
{
	(void)s;
	if (sequence_check("balance", arg, in[0].dim[0], &in[1], e))
		return e->code;
	double loss = 0, z = 0, entropy = 0;
	for (int64_t n = 0; n < in[0].dim[0]; n++) {
		struct balance_row r = balance_row(arg, &in[0], &in[1], n);
		for (int64_t i = 0; i < r.experts; i++) {
			double p = row_score(&r, i) / r.sum;
			loss += row_price(&r, i) * p;
			entropy -= p > 0 ? p * log(p) : p;
		}
		loss += arg->balance.z_coeff * r.lse * r.lse;
		z += r.lse * r.lse;
	}
	cpu_accumulate(&out[0], 0, loss);
	cpu_accumulate(&out[1], 0, z);
	cpu_accumulate(&out[2], 0, entropy);
	return 0;
}

int cpu_ref_balance_bwd(struct stream *s, const union op_arg *arg, const struct tensor *in,
                        const struct tensor *out, struct err *e)
{
	(void)s;
	if (sequence_check("balance_bwd", arg, in[1].dim[0], &in[2], e))
		return e->code;
	double scale = cpu_get(&in[0], 0);
	for (int64_t n = 0; n < in[1].dim[0]; n++) {
		struct balance_row r = balance_row(arg, &in[1], &in[2], n);
		double mean = 0; /* of the prices, weighted by p */
		for (int64_t i = 0; i < r.experts; i++)
			mean += row_price(&r, i) * row_score(&r, i) / r.sum;
		for (int64_t i = 0; i < r.experts; i++) {
			double x = cpu_get(&in[1], r.at + i);
			double slope = arg->balance.score == SCORE_softmax
			                       ? row_score(&r, i)
			                       : own_slope(arg->balance.score, x) / r.sum;
			double of_z = arg->balance.z_coeff * 2 * r.lse * exp(x - r.lse);
			cpu_set(out, r.at + i, scale * ((row_price(&r, i) - mean) * slope + of_z));
		}
	}
	return 0;
}

/* Wang et al. 2024, auxiliary-loss-free balancing. */
int cpu_ref_bias_update(struct stream *s, const union op_arg *arg, const struct tensor *in,
                        const struct tensor *out, struct err *e)
{
	(void)s, (void)out, (void)e;
	int64_t experts = tensor_count(&in[0]);
	const int32_t *counts = in[1].data;
	int64_t sum = 0;
	for (int64_t i = 0; i < experts; i++)
		sum += counts[i];
	for (int64_t i = 0; i < experts; i++) {
		double mean = (double)sum / (double)experts;
		double sign = (mean > counts[i]) - (mean < counts[i]);
		cpu_set(&in[0], i, cpu_get(&in[0], i) + arg->bias_update.rate * sign);
	}
	return 0;
}
