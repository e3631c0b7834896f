/* Experts: what the router, the dispatch and the experts' products must satisfy, against the plainest code
 * that says the same, and what they do with bad data from other ranks. */
#include <stdlib.h>

#include "base/err.h"
#include "base/mem.h"
#include "base/rng.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/matmul.h"
#include "kernels/kernels.h"
#include "test/ops_fixture.h"

static const struct backend *const both[] = {&cpu_reference_backend, &cpu_backend};

static void free_all(struct tensor *t, int n)
{
	for (int i = 0; i < n; i++)
		tensor_free(&t[i]);
}

/* All NaN, or -1 where they are whole numbers, so that what is not written shows. */
static void spoil(const struct tensor *t)
{
	memset(t->data, 0xff, (size_t)tensor_bytes(t));
}

static bool same_bits(const struct tensor *a, const struct tensor *b)
{
	return !memcmp(a->data, b->data, (size_t)tensor_bytes(a));
}

static int32_t at(const struct tensor *t, int64_t i)
{
	return ((const int32_t *)t->data)[i];
}

static int32_t draw(uint64_t seed, int64_t i, int32_t n)
{
	return (int32_t)(rng_uniform(seed, (uint64_t)i) * n);
}

/* Rows [first, first + n) where they lie: not to be freed. */
static struct tensor rows_at(const struct tensor *t, int64_t first, int32_t n)
{
	struct tensor part = *t;
	part.data = (char *)t->data + first * tensor_row(t) * dtype_rows[t->dtype].bytes;
	part.dim[0] = n;
	return part;
}

/* Whole numbers below n; one in `nowhere` is -1 (0: none). */
static struct tensor integers(uint64_t seed, int32_t rows, int32_t columns, int32_t n, int32_t nowhere)
{
	struct tensor t = TENSOR(DT_i32, 0, rows, columns);
	for (int64_t i = 0; i < tensor_count(&t); i++)
		tensor_put(&t, i, nowhere && !draw(seed + 1000, i, nowhere) ? -1 : draw(seed, i, n));
	return t;
}

/* Experts of each row's choices, all different; one in six is nowhere where asked for. */
static struct tensor choices(uint64_t seed, int32_t rows, int32_t topk, int32_t experts, bool nowhere)
{
	struct tensor t = TENSOR(DT_i32, 0, rows, topk);
	for (int32_t n = 0; n < rows; n++)
		for (int32_t k = 0; k < topk; k++) {
			int32_t first = draw(seed, n, experts) * draw(seed + 1, n, 2), i = n * topk + k;
			tensor_put(&t, i, nowhere && !draw(seed + 2, i, 6) ? -1 : (first + k) % experts);
		}
	return t;
}

static int run(const struct backend *b, enum op op, int threads, union op_arg arg, const struct tensor *in,
               const struct tensor *out, struct err *e)
{
	struct stream *s;
	int rc = b->open(&s, THREADS(threads), e);
	if (rc)
		return rc;
	rc = b->kernel[op](s, &arg, in, out, e);
	b->close(s);
	return rc;
}

/* Refused with numbers, before anything is written. */
static void check_refused(enum op op, union op_arg arg, const struct tensor *in, const struct tensor *out,
                          const char *part)
{
	for (int i = 0; i < 2; i++) {
		struct err e = {0};
		struct tensor before = tensor_copy(out);
		CHECK_INT(run(both[i], op, 2, arg, in, out, &e), EXIT_INTERNAL);
		CHECK_HAS(e.text, part);
		CHECK(same_bits(&before, out) && tensor_guarded(out));
		tensor_free(&before);
	}
}

/* The router */

enum { ROUTE_ROWS = 60, ROUTE_EXPERTS = 16 };

static double score_of(int32_t score, double x)
{
	return score == SCORE_sigmoid        ? 1 / (1 + exp(-x))
	       : score == SCORE_sqrtsoftplus ? sqrt(log(1 + exp(x)))
	                                     : x;
}

/* How many of n come before value i: larger ones, and equal ones with a lower number. */
static int32_t place_of(const double *value, int32_t n, int32_t i)
{
	int32_t place = 0;
	for (int32_t k = 0; k < n; k++)
		place += value[k] > value[i] || (value[k] == value[i] && k < i);
	return place;
}

static double best_sum(const double *value, int32_t n, int32_t best)
{
	double sum = 0;
	for (int32_t i = 0; i < n; i++)
		sum += place_of(value, n, i) < best ? value[i] : 0;
	return sum;
}

/* Row n of index and probs, by counting who is better. */
static void naive_route(const union op_arg *arg, const struct tensor *in, int64_t n, int32_t *index,
                        double *probs)
{
	int32_t topk = arg->route.topk, groups = arg->route.num_groups ? arg->route.num_groups : 1,
	        size = ROUTE_EXPERTS / groups, best = arg->route.num_groups ? arg->route.group_topk : 1;
	double score[ROUTE_EXPERTS], choice[ROUTE_EXPERTS], group[ROUTE_EXPERTS], sum = 0, all = 0;
	bool softmax = arg->route.score == SCORE_softmax;
	for (int32_t i = 0; i < ROUTE_EXPERTS; i++)
		all += exp(tensor_at(&in[0], n * ROUTE_EXPERTS + i));
	for (int32_t i = 0; i < ROUTE_EXPERTS; i++) {
		double x = tensor_at(&in[0], n * ROUTE_EXPERTS + i);
		score[i] = softmax && arg->route.pre_softmax ? exp(x) / all : score_of(arg->route.score, x);
		choice[i] = score[i] + (in[1].data ? tensor_at(&in[1], i) : 0);
	}
	for (int32_t g = 0; g < groups; g++)
		group[g] = best_sum(choice + g * size, size, topk / best > 1 ? topk / best : 1);
	for (int32_t i = 0; i < ROUTE_EXPERTS; i++)
		if (place_of(group, groups, i / size) >= best)
			choice[i] = -INFINITY;
	for (int32_t i = 0; i < ROUTE_EXPERTS; i++)
		if (place_of(choice, ROUTE_EXPERTS, i) < topk)
			index[place_of(choice, ROUTE_EXPERTS, i)] = i;
	for (int32_t k = 0; k < topk; k++) {
		probs[k] = softmax && !arg->route.pre_softmax ? exp(score[index[k]]) : score[index[k]];
		sum += probs[k];
	}
	bool whole = (softmax && arg->route.pre_softmax) || (!softmax && topk == 1);
	for (int32_t k = 0; k < topk; k++)
		probs[k] = arg->route.scaling_factor * probs[k] / (whole ? 1 : sum);
}

static void check_route(const struct backend *b, union op_arg arg, const struct tensor *in)
{
	int32_t topk = arg.route.topk, index[ROUTE_EXPERTS];
	double probs[ROUTE_EXPERTS];
	struct tensor out[2] = {TENSOR(DT_f32, 3, ROUTE_ROWS, topk), TENSOR(DT_i32, 3, ROUTE_ROWS, topk)};
	op_run(b, OP_route, arg, in, out);
	for (int64_t n = 0; n < ROUTE_ROWS; n++) {
		naive_route(&arg, in, n, index, probs);
		for (int32_t k = 0; k < topk; k++) {
			CHECK_INT(at(&out[1], n * topk + k), index[k]);
			CHECK_NEAR(tensor_at(&out[0], n * topk + k), probs[k], 2e-6 * fabs(probs[k]) + 1e-9);
		}
	}
	free_all(out, 2);
}

TEST(a_router_takes_the_best)
{
	static const int32_t topks[] = {1, 2, 3, 4, 8}, groups[][2] = {{0, 0}, {4, 2}, {8, 4}, {2, 1}};
	struct tensor in[2] = {TENSOR(DT_f32, 1, ROUTE_ROWS, ROUTE_EXPERTS),
	                       TENSOR(DT_f32, 2, ROUTE_EXPERTS)};
	for (int i = 0; i < 2 * (SCORE_COUNT + 1) * 2 * 4 * 5; i++) {
		int how = i / 2 % (SCORE_COUNT + 1), bias = i / 8 % 2, g = i / 16 % 4;
		union op_arg arg = {.route = {.score = how ? how - 1 : SCORE_softmax,
		                              .pre_softmax = how == 1,
		                              .topk = topks[i / 64],
		                              .num_groups = groups[g][0],
		                              .group_topk = groups[g][1],
		                              .scaling_factor = 1.5f}};
		struct tensor given[2] = {in[0], bias ? in[1] : (struct tensor){0}};
		check_route(both[i % 2], arg, given);
	}
	free_all(in, 2);
}

/* Logits of few values: the lower number wins, among groups too. */
TEST(a_router_prefers_the_lower_of_equals)
{
	struct tensor in[2] = {TENSOR(DT_f32, 1, ROUTE_ROWS, ROUTE_EXPERTS), {0}};
	for (int64_t i = 0; i < tensor_count(&in[0]); i++)
		tensor_put(&in[0], i, draw(8, i, 3) - 0.5);
	for (int i = 0; i < 4; i++) {
		union op_arg arg = {.route = {.topk = 4, .scaling_factor = 1}};
		arg.route.num_groups = i / 2 ? 4 : 0;
		arg.route.group_topk = i / 2 ? 2 : 0;
		check_route(both[i % 2], arg, in);
	}
	tensor_free(&in[0]);
}

/* Where all scores but one are 0 even in double precision. */
TEST(router_weights_of_extremes)
{
	for (int i = 0; i < 2 * SCORE_COUNT; i++) {
		union op_arg arg = {.route = {.score = i / 2, .topk = 2, .scaling_factor = 3}};
		struct tensor in[2] = {TENSOR(DT_f32, 1, 1, 4), {0}};
		struct tensor out[2] = {TENSOR(DT_f32, 3, 1, 2), TENSOR(DT_i32, 3, 1, 2)};
		memcpy(in[0].data, (const float[]){-3e4f, 3e4f, -2e4f, -INFINITY}, 4 * sizeof(float));
		op_run(both[i % 2], OP_route, arg, in, out);
		CHECK_INT(at(&out[1], 0), 1);
		CHECK_NEAR(tensor_at(&out[0], 0), 3, 1e-6);
		CHECK_NEAR(tensor_at(&out[0], 1), 0, 1e-6);
		struct tensor bwd[3] = {TENSOR(DT_f32, 4, 1, 2), in[0], out[1]}, dx = TENSOR(DT_f32, 5, 1, 4);
		op_run(both[i % 2], OP_route_bwd, arg, bwd, &dx);
		for (int k = 0; k < 4; k++)
			CHECK(isfinite(tensor_at(&dx, k)));
		free_all((struct tensor[]){in[0], out[0], out[1], bwd[0], dx}, 5);
	}
}

/* Experts that exist and differ, whatever the logits; a row without NaN is not spoilt. */
TEST(a_router_survives_what_is_no_number)
{
	static const float odd[] = {NAN, INFINITY, -INFINITY, 0, 1, -NAN};
	for (int i = 0; i < 2 * 2 * (SCORE_COUNT + 1); i++) {
		int how = i / 4;
		union op_arg arg = {.route = {.score = how ? how - 1 : SCORE_softmax,
		                              .pre_softmax = how == 1,
		                              .topk = 4,
		                              .num_groups = i & 2 ? 4 : 0,
		                              .group_topk = i & 2 ? 2 : 0,
		                              .scaling_factor = 1}};
		struct tensor in[2] = {TENSOR(DT_f32, 1, 50, 8), TENSOR(DT_f32, 2, 8)};
		struct tensor out[2] = {TENSOR(DT_f32, 3, 50, 4), TENSOR(DT_i32, 3, 50, 4)};
		for (int k = 0; k < 8 * 49; k++)
			((float *)in[0].data)[k] = k < 8 ? NAN : odd[draw(5, k, k < 200 ? 6 : 3)];
		op_run(both[i % 2], OP_route, arg, in, out);
		for (int n = 0; n < 50; n++) {
			unsigned seen = 0;
			for (int k = 0; k < 4; k++) {
				MUST(at(&out[1], 4 * n + k) >= 0 && at(&out[1], 4 * n + k) < 8);
				seen |= 1u << at(&out[1], 4 * n + k);
			}
			CHECK_INT(__builtin_popcount(seen), 4);
		}
		CHECK(isnan(tensor_at(&out[0], 0)));
		CHECK(isfinite(tensor_at(&out[0], 4 * 49)));
		free_all(in, 2);
		free_all(out, 2);
	}
}

TEST(a_router_refuses_what_cannot_be)
{
	union op_arg arg = {.route = {.topk = 4, .num_groups = 4, .group_topk = 1, .scaling_factor = 1}};
	struct tensor in[2] = {TENSOR(DT_f32, 1, 5, 8), {0}};
	struct tensor out[2] = {TENSOR(DT_f32, 3, 5, 4), TENSOR(DT_i32, 3, 5, 4)};
	check_refused(OP_route, arg, in, out, "at most 2 can be chosen");
	arg.route.num_groups = 3;
	check_refused(OP_route, arg, in, out, "the best 1 of 3 groups of 8 experts");
	arg.route.num_groups = 0;
	struct tensor bwd[3] = {out[0], in[0], choices(1, 5, 4, 8, false)}, dx = TENSOR(DT_f32, 5, 5, 8);
	op_run(&cpu_backend, OP_route_bwd, arg, bwd, &dx);
	tensor_put(&bwd[2], 7, 8);
	check_refused(OP_route_bwd, arg, bwd, &dx, "choice 7 is expert 8; 0 to 7 are allowed");
	tensor_put(&bwd[2], 7, -1);
	check_refused(OP_route_bwd, arg, bwd, &dx, "choice 7 is expert -1");
	free_all((struct tensor[]){in[0], out[0], out[1], bwd[2], dx}, 5);
}

/* Counts and balance */

TEST(counts_of_sequences_sum_to_those_of_all)
{
	union op_arg one = {.balance = {.experts = 6, .sequences = 1}}, three = one;
	three.balance.sequences = 3;
	three.balance.sequence_rows = 10;
	three.balance.first_row = 4;
	for (int i = 0; i < 2; i++) {
		struct tensor index = integers(3, 25, 2, 6, 4), part = rows_at(&index, 0, 6);
		struct tensor all = TENSOR(DT_i32, 0, 1, 6), each = TENSOR(DT_i32, 0, 3, 6),
		              first = TENSOR(DT_i32, 0, 1, 6);
		tensor_put(&index, 13, 6); /* no expert: counted nowhere */
		tensor_put(&index, 14, 2147483647);
		tensor_put(&index, 15, -2147483648.0);
		op_run(both[i], OP_expert_counts, one, &index, &all);
		op_run(both[i], OP_expert_counts, three, &index, &each);
		op_run(both[i], OP_expert_counts, one, &part, &first);
		for (int x = 0; x < 6; x++) {
			int count = 0;
			for (int k = 0; k < 50; k++)
				count += at(&index, k) == x;
			CHECK_INT(at(&all, x), count);
			CHECK_INT(at(&each, x) + at(&each, 6 + x) + at(&each, 12 + x), count);
			CHECK_INT(at(&each, x), at(&first, x));
		}
		three.balance.first_row = 6;
		check_refused(OP_expert_counts, three, &index, &each,
		              "rows [6, 31) are not among 3 sequences");
		three.balance.first_row = 4;
		free_all((struct tensor[]){index, all, each, first}, 4);
	}
}

/* coeff · E / (K T²) · sum over experts of P c, and T times that as the sum over rows (Fedus et al. 2021). */
TEST(balance_of_one_sequence_is_the_auxiliary_loss)
{
	enum { ROWS = 200, EXPERTS = 10, TOPK = 3 };
	union op_arg arg = {.balance = {.experts = EXPERTS, .aux_coeff = 0.25f, .sequences = 1}};
	struct tensor index = choices(4, ROWS, TOPK, EXPERTS, false);
	struct tensor in[2] = {TENSOR(DT_f32, 1, ROWS, EXPERTS), TENSOR(DT_i32, 0, 1, EXPERTS)};
	struct tensor out[3] = {TENSOR(DT_f64, 1, 1), TENSOR(DT_f64, 1, 1), TENSOR(DT_f64, 1, 1)};
	op_run(&cpu_backend, OP_expert_counts, arg, &index, &in[1]);
	double loss = 0, entropy = 0, z = 0;
	for (int64_t n = 0; n < ROWS; n++) {
		double sum = 0, weighted = 0;
		for (int64_t x = 0; x < EXPERTS; x++)
			sum += exp(tensor_at(&in[0], n * EXPERTS + x));
		for (int64_t x = 0; x < EXPERTS; x++) {
			double p = exp(tensor_at(&in[0], n * EXPERTS + x)) / sum;
			weighted += p * at(&in[1], x);
			entropy -= p * log(p);
		}
		loss += 0.25 * EXPERTS / (TOPK * (double)ROWS * ROWS) * weighted;
		z += log(sum) * log(sum);
	}
	for (int i = 0; i < 2; i++) {
		op_run(both[i], OP_balance, arg, in, out);
		CHECK_NEAR(tensor_at(&out[0], 0), loss * ROWS, 1e-6 * loss * ROWS);
		CHECK_NEAR(tensor_at(&out[1], 0), z, 1e-6 * z);
		CHECK_NEAR(tensor_at(&out[2], 0), entropy, 1e-6 * entropy);
	}
	arg.balance.aux_coeff = 0;
	arg.balance.z_coeff = 0.5f;
	for (int i = 0; i < 2; i++) {
		op_run(both[i], OP_balance, arg, in, out);
		CHECK_NEAR(tensor_at(&out[0], 0), z / 2, 1e-6 * z);
	}
	free_all(in, 2);
	free_all(out, 3);
	tensor_free(&index);
}

/* Nothing is routed, nothing is lost; logits out of reach of exp give no NaN where the answer is a number. */
TEST(balance_of_extremes)
{
	for (int i = 0; i < 2 * SCORE_COUNT; i++) {
		union op_arg arg = {.balance = {.score = i / 2, .aux_coeff = 1, .sequences = 1}};
		struct tensor in[3] = {TENSOR(DT_f32, 1, 1), TENSOR(DT_f32, 1, 2, 4),
		                       TENSOR(DT_i32, 0, 1, 4)};
		struct tensor out[3] = {TENSOR(DT_f64, 1, 1), TENSOR(DT_f64, 1, 1), TENSOR(DT_f64, 1, 1)};
		struct tensor dx = TENSOR(DT_f32, 1, 2, 4);
		memset(in[2].data, 0, 16);
		op_run(both[i % 2], OP_balance, arg, &in[1], out);
		CHECK(tensor_at(&out[0], 0) == 0);
		memcpy(in[1].data, (const float[]){-1e30f, 100, -100, 90, 0, -INFINITY, -200, 3},
		       8 * sizeof(float));
		memcpy(in[2].data, (const int32_t[]){1, 2, 3, 4}, 16);
		op_run(both[i % 2], OP_balance, arg, &in[1], out);
		op_run(both[i % 2], OP_balance_bwd, arg, in, &dx);
		CHECK(isfinite(tensor_at(&out[0], 0)) && isfinite(tensor_at(&out[2], 0)));
		for (int k = 0; k < 8; k++)
			CHECK(isfinite(tensor_at(&dx, k)));
		free_all(in, 3);
		free_all(out, 3);
		tensor_free(&dx);
	}
}

/* More rows than one partial sum has: adding once a row is adding once a block, whatever the threads. */
TEST(balance_does_not_depend_on_threads)
{
	union op_arg arg = {.balance = {.score = SCORE_sigmoid, .aux_coeff = 1, .z_coeff = 1}};
	struct tensor in[2] = {TENSOR(DT_f32, 1, 1000, 7), integers(2, 1, 7, 50, 0)}, out[4][3];
	for (int threads = 1; threads <= 4; threads++) {
		struct err e = {0};
		for (int k = 0; k < 3; k++)
			out[threads - 1][k] = TENSOR(DT_f64, 1, 1);
		CHECK_INT(run(&cpu_backend, OP_balance, threads, arg, in, out[threads - 1], &e), 0);
		for (int k = 0; k < 3; k++)
			CHECK(same_bits(&out[0][k], &out[threads - 1][k]));
	}
	for (int i = 0; i < 4; i++)
		free_all(out[i], 3);
	free_all(in, 2);
}

/* Equal counts move nothing, though a third of their sum is rounded. */
TEST(bias_goes_to_those_with_too_little)
{
	static const int32_t counts[][3] = {{1, 1, 1}, {0, 1, 5}, {7, 0, 0}, {2147483647, 2147483647, 0}};
	static const int sign[][3] = {{0, 0, 0}, {1, 1, -1}, {-1, 1, 1}, {-1, -1, 1}};
	union op_arg arg = {.bias_update = {.rate = 0.5f}};
	for (int i = 0; i < 8; i++) {
		struct tensor in[2] = {TENSOR(DT_f32, 1, 3), TENSOR(DT_i32, 1, 3)}, before = tensor_copy(in);
		memcpy(in[1].data, counts[i / 2], sizeof counts[0]);
		op_run(both[i % 2], OP_bias_update, arg, in, NULL);
		for (int x = 0; x < 3; x++)
			CHECK_NEAR(tensor_at(&in[0], x) - tensor_at(&before, x), 0.5 * sign[i / 2][x], 1e-6);
		free_all((struct tensor[]){in[0], in[1], before}, 3);
	}
}

/* Capacity */

enum { CAP_SAMPLES = 3, CAP_LENGTH = 12, CAP_ROWS = CAP_SAMPLES * CAP_LENGTH, CAP_TOPK = 3, CAP_EXPERTS = 5 };

/* Row of (sample, position) where `ranks` context-parallel ranks hold their blocks one behind the other. */
static int32_t row_in_context(int32_t ranks, int32_t sample, int32_t position)
{
	int32_t part = CAP_LENGTH / ranks;
	for (int32_t r = 0; r < ranks; r++)
		for (int32_t j = 0; j < part; j++)
			if (context_position(CAP_LENGTH, ranks, r, j) == position)
				return r * CAP_SAMPLES * part + sample * part + j;
	return -1;
}

/* Pair i, in order of sample, position and choice, stays where fewer than `limit` of its expert are better.
 */
static bool naive_stays(const struct tensor *in, int32_t i, const union op_arg *arg)
{
	int32_t better = 0;
	for (int32_t k = 0; k < CAP_ROWS * CAP_TOPK; k++) {
		double a = tensor_at(&in[1], k), b = tensor_at(&in[1], i);
		bool before = arg->capacity.by_position || a == b ? k < i : a > b;
		better += at(&in[0], k) == at(&in[0], i) && before;
	}
	return at(&in[0], i) >= 0 && better < arg->capacity.limit;
}

/* kept of all blocks, back in order of sample and position. */
static void capacity_in_blocks(const struct backend *b, union op_arg arg, const struct tensor *in,
                               const struct tensor *kept, double *dropped)
{
	int32_t context = arg.capacity.context_ranks, ranks = arg.capacity.ranks;
	struct tensor there[2] = {tensor_copy(&in[0]), tensor_copy(&in[1])}, all = tensor_copy(&in[0]);
	for (int32_t i = 0; i < CAP_ROWS * CAP_TOPK; i++) {
		int32_t row = i / CAP_TOPK,
		        to = row_in_context(context, row / CAP_LENGTH, row % CAP_LENGTH) * CAP_TOPK +
		             i % CAP_TOPK;
		tensor_put(&there[0], to, at(&in[0], i));
		tensor_put(&there[1], to, tensor_at(&in[1], i));
	}
	struct tensor out[2] = {all, TENSOR(DT_f64, 0, 1)};
	tensor_put(&out[1], 0, 0);
	out[1].acc = 1;
	for (arg.capacity.rank = 0; arg.capacity.rank < ranks; arg.capacity.rank++) {
		out[0] = rows_at(&all, arg.capacity.rank * (CAP_ROWS / ranks), CAP_ROWS / ranks);
		op_run(b, OP_capacity, arg, there, out);
	}
	*dropped = tensor_at(&out[1], 0);
	for (int32_t i = 0; i < CAP_ROWS * CAP_TOPK; i++) {
		int32_t row = i / CAP_TOPK;
		tensor_put(kept, i,
		           at(&all, row_in_context(context, row / CAP_LENGTH, row % CAP_LENGTH) * CAP_TOPK +
		                            i % CAP_TOPK));
	}
	free_all((struct tensor[]){there[0], there[1], all, out[1]}, 4);
}

static void check_capacity(const struct backend *b, union op_arg arg, const struct tensor *in)
{
	static const int32_t cuts[][2] = {{1, 1}, {1, 4}, {1, 36}, {2, 2}, {2, 6}, {3, 3}, {3, 9}, {6, 12}};
	struct tensor kept = tensor_copy(&in[0]);
	double dropped, want = 0;
	for (size_t c = 0; c < sizeof cuts / sizeof *cuts; c++) {
		arg.capacity.context_ranks = cuts[c][0];
		arg.capacity.ranks = cuts[c][1];
		spoil(&kept);
		capacity_in_blocks(b, arg, in, &kept, &dropped);
		want = 0;
		for (int32_t i = 0; i < CAP_ROWS * CAP_TOPK; i++) {
			bool stays = naive_stays(in, i, &arg);
			CHECK_INT(at(&kept, i), stays ? at(&in[0], i) : -1);
			want += at(&in[0], i) >= 0 && !stays;
		}
		CHECK(dropped == want);
	}
	tensor_free(&kept);
}

/* Few different weights, so that order decides; some tokens chose fewer experts. */
TEST(an_expert_keeps_its_best_however_rows_are_cut)
{
	struct tensor in[2] = {choices(7, CAP_ROWS, CAP_TOPK, CAP_EXPERTS, true),
	                       TENSOR(DT_f32, 1, CAP_ROWS, CAP_TOPK)};
	for (int32_t i = 0; i < CAP_ROWS * CAP_TOPK; i++)
		tensor_put(&in[1], i, (draw(6, i, 9) - 3) / 8.);
	for (int i = 0; i < 2 * 2 * 4; i++) {
		union op_arg arg = {.capacity = {.experts = CAP_EXPERTS,
		                                 .limit = (const int32_t[]){0, 1, 9, 1000}[i / 4],
		                                 .by_position = i / 2 % 2,
		                                 .seq_length = CAP_LENGTH}};
		check_capacity(both[i % 2], arg, in);
	}
	free_all(in, 2);
}

/* One logit that is no number is chosen first, and seen in the weights. */
TEST(a_router_does_not_hide_what_is_no_number)
{
	for (int i = 0; i < 2 * 2 * SCORE_COUNT; i++) {
		union op_arg arg = {.route = {.score = i / 4, .topk = 2, .scaling_factor = 1}};
		struct tensor in[2] = {TENSOR(DT_f32, 1, 1, 8), {0}};
		struct tensor out[2] = {TENSOR(DT_f32, 3, 1, 2), TENSOR(DT_i32, 3, 1, 2)};
		arg.route.num_groups = i & 2 ? 4 : 0;
		arg.route.group_topk = i & 2 ? 1 : 0;
		tensor_put(&in[0], 0, INFINITY);
		tensor_put(&in[0], 5, NAN);
		op_run(both[i % 2], OP_route, arg, in, out);
		CHECK_INT(at(&out[1], 0), 5);
		CHECK(isnan(tensor_at(&out[0], 0)));
		free_all((struct tensor[]){in[0], out[0], out[1]}, 3);
	}
}

/* Weights that no router gives have an order too, and what is no expert has no place. */
TEST(capacity_of_odd_weights)
{
	static const float probs[] = {-0.0f, 0, -NAN, -INFINITY, INFINITY, -1, -2, 1e-40f};
	static const int32_t want[] = {0, -1, 0, -1, 0, -1, -1, 0};
	for (int i = 0; i < 2; i++) {
		union op_arg arg = {.capacity = {.experts = 1, .limit = 4, .ranks = 1, .seq_length = 10}};
		struct tensor in[2] = {TENSOR(DT_i32, 0, 10, 1), TENSOR(DT_f32, 1, 10, 1)};
		struct tensor out[2] = {TENSOR(DT_i32, 0, 10, 1), TENSOR(DT_f64, 0, 1)};
		memset(in[0].data, 0, 40);
		tensor_put(&in[0], 8, 1);
		tensor_put(&in[0], 9, -5);
		memcpy(in[1].data, probs, sizeof probs);
		op_run(both[i], OP_capacity, arg, in, out);
		for (int k = 0; k < 8; k++)
			CHECK_INT(at(&out[0], k), want[k]);
		CHECK(at(&out[0], 8) == -1 && at(&out[0], 9) == -1);
		CHECK(tensor_guarded(&out[0]));
		arg.capacity.seq_length = 4;
		check_refused(OP_capacity, arg, in, out, "10 rows of samples of 4 tokens");
		free_all(in, 2);
		free_all(out, 2);
	}
}

/* The plan */

/* What r sends of x after the cut, by giving rows out one at a time. */
static void naive_sizes(const struct tensor *counts, int32_t ranks, int32_t experts, int64_t capacity,
                        int32_t *size)
{
	int32_t each = experts / ranks;
	for (int32_t d = 0; d < ranks; d++) {
		int64_t total = 0, given = 0;
		for (int32_t i = 0; i < ranks * each; i++)
			total += at(counts, i / each * experts + d * each + i % each);
		for (int32_t i = 0; i < ranks * each; i++) {
			int32_t k = i / each * experts + d * each + i % each;
			size[k] = at(counts, k);
			if (capacity && total > capacity)
				size[k] = (int32_t)(at(counts, k) * capacity / total);
			given += size[k];
		}
		for (int32_t i = 0; i < ranks * each && capacity && total > capacity; i++) {
			int32_t k = i / each * experts + d * each + i % each;
			if (given < capacity && size[k] < at(counts, k)) {
				size[k]++;
				given++;
			}
		}
		CHECK(!capacity || given == (total < capacity ? total : capacity));
	}
}

/* Every row of the sizes has one slot, in order of expert, then of token; the last of an expert go without.
 */
static void check_slots(const struct tensor *index, const struct tensor *slot, const int32_t *size,
                        int32_t experts, double overflow)
{
	int32_t next = 0;
	double cut = 0;
	for (int32_t x = 0; x < experts; x++) {
		int32_t left = size[x];
		for (int64_t i = 0; i < tensor_count(index); i++) {
			if (at(index, i) != x)
				continue;
			CHECK_INT(at(slot, i), left > 0 ? next : -1);
			next += left > 0;
			cut += left-- <= 0;
		}
		CHECK(left <= 0);
	}
	for (int64_t i = 0; i < tensor_count(index); i++)
		CHECK(at(index, i) >= 0 || at(slot, i) == -1);
	CHECK(overflow == cut);
}

enum { PLAN_ROWS = 30, PLAN_TOPK = 3, PLAN_EXPERTS = 12, PLAN_RANKS = 4 };

static void check_plan(const struct backend *b, int32_t ranks, int32_t capacity)
{
	union op_arg arg = {
	        .dispatch = {.experts = PLAN_EXPERTS, .ranks = ranks, .capacity = capacity, .counts = 1}};
	union op_arg count = {.balance = {.experts = PLAN_EXPERTS, .sequences = 1}};
	struct tensor index[PLAN_RANKS], counts = TENSOR(DT_i32, 0, ranks, PLAN_EXPERTS);
	int32_t size[PLAN_RANKS * PLAN_EXPERTS];
	for (int32_t r = 0; r < ranks; r++) {
		struct tensor row = rows_at(&counts, r, 1);
		index[r] = choices((uint64_t)r + 30, PLAN_ROWS, PLAN_TOPK, PLAN_EXPERTS, r % 2);
		op_run(b, OP_expert_counts, count, &index[r], &row);
	}
	naive_sizes(&counts, ranks, PLAN_EXPERTS, capacity, size);
	for (int32_t r = 0; r < ranks; r++) {
		struct tensor out[3] = {TENSOR(DT_i32, 0, PLAN_ROWS, PLAN_TOPK),
		                        TENSOR(DT_i32, 0, ranks, PLAN_EXPERTS), TENSOR(DT_f64, 0, 1)};
		arg.dispatch.rank = r;
		op_run(b, OP_dispatch_plan, arg, (struct tensor[]){index[r], counts}, out);
		for (int32_t i = 0; i < ranks * PLAN_EXPERTS; i++)
			CHECK_INT(at(&out[1], i), size[i]);
		check_slots(&index[r], &out[0], size + r * PLAN_EXPERTS, PLAN_EXPERTS, tensor_at(&out[2], 0));
		free_all(out, 3);
	}
	free_all(index, ranks);
	tensor_free(&counts);
}

TEST(a_plan_gives_every_row_one_place)
{
	static const int32_t ranks[] = {1, 2, 3, 4}, capacities[] = {0, 1, 7, 50, 89, 1000};
	for (int i = 0; i < 2 * 4 * 6; i++)
		check_plan(both[i % 2], ranks[i / 2 % 4], capacities[i / 8]);
}

TEST(bad_plans_are_refused)
{
	union op_arg arg = {.dispatch = {.experts = 4, .ranks = 2, .rank = 1}};
	struct tensor in[2] = {TENSOR(DT_i32, 0, 2, 2), integers(1, 2, 4, 3, 0)};
	struct tensor out[3] = {TENSOR(DT_i32, 0, 2, 2), TENSOR(DT_i32, 0, 2, 4), TENSOR(DT_f64, 0, 1)};
	memcpy(in[0].data, (const int32_t[]){0, 3, 3, 100}, 16); /* 100 is nowhere */
	memcpy((int32_t *)in[1].data + 4, (const int32_t[]){1, 0, 0, 2}, 16);
	op_run(&cpu_backend, OP_dispatch_plan, arg, in, out);
	CHECK(at(&out[0], 2) == 2 && at(&out[0], 3) == -1 && tensor_at(&out[2], 0) == 0);
	tensor_put(&in[1], 7, 3);
	check_refused(OP_dispatch_plan, arg, in, out, "rank 1 counts 3 rows for expert 3 and has 2");
	tensor_put(&in[1], 7, 2);
	tensor_put(&in[1], 2, -1);
	check_refused(OP_dispatch_plan, arg, in, out, "rank 0 has -1 rows for expert 2");
	tensor_put(&in[1], 2, 2147483647);
	arg.dispatch.capacity = 2147483647; /* the product needs all of 64 bits */
	op_run(&cpu_backend, OP_dispatch_plan, arg, in, out);
	CHECK_INT(at(&out[1], 2) + at(&out[1], 3) + (int64_t)at(&out[1], 6) + at(&out[1], 7), 2147483647);
	arg.dispatch.rank = 2;
	check_refused(OP_dispatch_plan, arg, in, out, "rank 2 of 2");
	free_all(in, 2);
	free_all(out, 3);
}

/* Where all ranks hold all rows, each finds slots for its own experts' alone, and equal copies count once
 * what they lose. */
TEST(a_plan_of_own_experts_leaves_the_others_alone)
{
	const int32_t rows = 20, topk = 2, experts = 6, first = 2, own = 3;
	for (int i = 0; i < 2; i++)
		for (int32_t capacity = 0; capacity < 9; capacity += 4) {
			struct tensor in[2] = {TENSOR(DT_i32, 0, rows, topk), TENSOR(DT_i32, 0, 1, experts)};
			struct tensor out[3] = {TENSOR(DT_i32, 0, rows, topk), TENSOR(DT_i32, 0, 1, experts),
			                        TENSOR(DT_f64, 0, 1)};
			union op_arg arg = {.dispatch = {.experts = experts,
			                                 .ranks = 1,
			                                 .capacity = capacity,
			                                 .first = first,
			                                 .count = own,
			                                 .counts = 1}};
			int32_t taken = 0, wanted = 0, next = 0;
			for (int64_t k = 0; k < experts; k++)
				tensor_put(&in[1], k, 0);
			for (int64_t k = 0; k < rows * topk; k++) {
				int32_t x = (int32_t)((k * 5 + k / 7) % experts);
				tensor_put(&in[0], k, x);
				tensor_put(&in[1], x, tensor_at(&in[1], x) + 1);
				wanted += x >= first && x < first + own;
			}
			op_run(both[i], OP_dispatch_plan, arg, in, out);
			for (int32_t x = 0; x < experts; x++) {
				bool mine = x >= first && x < first + own;
				CHECK(mine ? capacity || at(&out[1], x) == at(&in[1], x)
				           : at(&out[1], x) == 0);
				taken += at(&out[1], x);
				for (int64_t k = 0; k < rows * topk; k++)
					if (at(&in[0], k) == x && at(&out[0], k) >= 0)
						CHECK_INT(at(&out[0], k), next++);
			}
			CHECK_INT(taken, capacity ? capacity : wanted);
			CHECK_INT(next, taken);
			CHECK(tensor_at(&out[2], 0) == wanted - taken);
			arg.dispatch.counts = 0;
			op_run(both[i], OP_dispatch_plan, arg, in, out);
			CHECK(tensor_at(&out[2], 0) == 0);
			arg.dispatch.first = 4;
			check_refused(OP_dispatch_plan, arg, in, out, "experts 4 to 7 of 6");
			free_all(in, 2);
			free_all(out, 3);
		}
}

/* Rows on their way */

/* A partial permutation: some choices have no slot, some rows no choice. */
static struct tensor slots(int32_t rows, int32_t topk)
{
	struct tensor t = TENSOR(DT_i32, 0, rows, topk);
	for (int64_t i = 0; i < rows * topk; i++)
		tensor_put(&t, i, draw(17, i, 4) ? (double)((i * 7919 + 5) % (rows * topk)) : -1);
	return t;
}

static double inner(const struct tensor *a, const struct tensor *b)
{
	double sum = 0;
	for (int64_t i = 0; i < tensor_count(a); i++)
		sum += tensor_at(a, i) * tensor_at(b, i);
	return sum;
}

TEST(unpermute_is_the_adjoint_of_permute)
{
	for (int i = 0; i < 2; i++) {
		struct tensor slot = slots(20, 3), x = TENSOR(DT_f32, 1, 20, 1100), tx = tensor_copy(&x),
		              y = TENSOR(DT_f32, 2, 60, 1100), ty = tensor_copy(&y);
		struct tensor p = TENSOR(DT_f32, 3, 20, 3), tp = tensor_copy(&p), w = TENSOR(DT_f32, 4, 60),
		              tw = tensor_copy(&w);
		spoil(&tx);
		spoil(&ty);
		op_run(both[i], OP_permute, (union op_arg){0}, (struct tensor[]){x, slot}, &ty);
		op_run(both[i], OP_unpermute, (union op_arg){0}, (struct tensor[]){y, slot}, &tx);
		CHECK_NEAR(inner(&ty, &y), inner(&x, &tx), 1e-4);
		CHECK(fabs(inner(&ty, &y)) > 1);
		op_run(both[i], OP_permute_probs, (union op_arg){0}, (struct tensor[]){p, slot}, &tw);
		op_run(both[i], OP_permute_probs, (union op_arg){.permute = {.back = 1}},
		       (struct tensor[]){w, slot}, &tp);
		CHECK_NEAR(inner(&tw, &w), inner(&p, &tp), 1e-4);
		CHECK(fabs(inner(&tw, &w)) > 0.1);
		free_all((struct tensor[]){slot, x, tx, y, ty, p, tp, w, tw}, 9);
	}
}

/* A slot behind the rows is refused; any below 0 is none. */
TEST(slots_outside_are_refused)
{
	struct tensor slot = slots(20, 3), x = TENSOR(DT_f32, 1, 20, 9), y = TENSOR(DT_f32, 2, 60, 9);
	struct tensor p = TENSOR(DT_f32, 3, 20, 3), w = TENSOR(DT_f32, 4, 60);
	tensor_put(&slot, 11, -2147483648.0);
	op_run(&cpu_backend, OP_permute, (union op_arg){0}, (struct tensor[]){x, slot}, &y);
	CHECK(tensor_guarded(&y));
	tensor_put(&slot, 11, 60);
	check_refused(OP_permute, (union op_arg){0}, (struct tensor[]){x, slot}, &y,
	              "permute: slot 60 of choice 11 is outside the 60 rows");
	check_refused(OP_unpermute, (union op_arg){0}, (struct tensor[]){y, slot}, &x,
	              "unpermute: slot 60 of choice 11");
	check_refused(OP_permute_probs, (union op_arg){0}, (struct tensor[]){p, slot}, &w, "slot 60");
	check_refused(OP_permute_probs, (union op_arg){.permute = {.back = 1}}, (struct tensor[]){w, slot},
	              &p, "slot 60");
	free_all((struct tensor[]){slot, x, y, p, w}, 5);
}

enum { EXPERTS = 8 };

/* Sizes of `ranks` ranks; own experts [first, first + count) get *rows, at most *most each. */
static struct tensor sizes_of(uint64_t seed, int32_t ranks, int32_t first, int32_t count, int32_t *rows,
                              int32_t *most)
{
	struct tensor t = integers(seed, ranks, EXPERTS, 9, 0);
	*rows = *most = 0;
	for (int32_t x = 0; x < EXPERTS; x++) {
		int32_t sum = 0;
		for (int32_t r = 0; r < ranks; r++) {
			tensor_put(&t, r * EXPERTS + x, x % 4 == 1 ? 0 : at(&t, r * EXPERTS + x));
			sum += at(&t, r * EXPERTS + x);
		}
		*rows += x >= first && x < first + count ? sum : 0;
		*most = x >= first && x < first + count && sum > *most ? sum : *most;
	}
	return t;
}

/* There and back is where it was; what does not count is as it was. The rows are numbers of their own. */
static void check_regroup(const struct backend *b, enum dtype dtype, int32_t ranks, int32_t width,
                          bool padded)
{
	int32_t rows, most, first = 2, count = EXPERTS - 3;
	struct tensor sizes = sizes_of((uint64_t)ranks, ranks, first, count, &rows, &most);
	union op_arg arg = {.expert = {.first = first, .count = count, .pad = padded ? most + 1 : 0}};
	int32_t grouped = padded ? count * (most + 1) : rows;
	struct tensor x = TENSOR(dtype, 1, rows + 2, width), back = TENSOR(dtype, 2, rows + 2, width),
	              y = TENSOR(dtype, 3, grouped + 3, width), untouched = tensor_copy(&y);
	if (width == 1)
		x.nd = back.nd = y.nd = 1;
	for (int32_t n = 0; n < rows; n++)
		tensor_put(&x, (int64_t)n * width, n + 1);
	memcpy(back.data, x.data, (size_t)tensor_bytes(&x));
	for (int32_t n = 0; n < rows; n++)
		tensor_put(&back, (int64_t)n * width, -1);
	op_run(b, OP_regroup, arg, (struct tensor[]){x, sizes}, &y);
	struct tensor tail = rows_at(&y, grouped, 3), old = rows_at(&untouched, grouped, 3);
	CHECK(same_bits(&tail, &old));
	int64_t sent = 0;
	for (int32_t r = 0; r < ranks; r++)
		for (int32_t i = 0; i < count; i++) {
			int64_t to;
			expert_rows(&arg, &sizes, i, &to);
			for (int32_t k = 0; k < r; k++)
				to += at(&sizes, k * EXPERTS + first + i);
			for (int32_t k = 0; k < at(&sizes, r * EXPERTS + first + i); k++)
				CHECK(tensor_at(&y, (to + k) * width) == (double)++sent);
		}
	CHECK_INT(sent, rows);
	for (int32_t n = 0; n < grouped; n++)
		rows -= tensor_at(&y, (int64_t)n * width) != 0;
	CHECK_INT(rows, 0); /* the others are filled up with zeros */
	arg.expert.back = 1;
	op_run(b, OP_regroup, arg, (struct tensor[]){y, sizes}, &back);
	CHECK(same_bits(&x, &back));
	free_all((struct tensor[]){sizes, x, back, y, untouched}, 5);
}

TEST(regrouped_rows_come_back)
{
	static const enum dtype dtypes[] = {DT_f32, DT_bf16};
	for (int i = 0; i < 2 * 2 * 2 * 2 * 4; i++)
		check_regroup(both[i % 2], dtypes[i / 2 % 2], i / 16 + 1, i / 4 % 2 ? 700 : 1, i / 8 % 2);
}

/* Products */

/* Inputs of grouped_linear, _dx and _dw, and their outputs. */
struct layer {
	union op_arg arg;
	struct tensor x, w, dy, sizes, y, dx, dw;
};

static struct layer layer_open(enum dtype dtype, int32_t rows, int32_t from, int32_t to, int32_t count)
{
	struct layer l = {{.expert = {.count = count}},       TENSOR(dtype, 1, rows, from),
	                  TENSOR(dtype, 2, count * to, from), TENSOR(dtype, 3, rows, to),
	                  TENSOR(DT_i32, 0, 1, count),        TENSOR(dtype, 5, rows, to),
	                  TENSOR(dtype, 6, rows, from),       TENSOR(DT_f32, 7, count * to, from)};
	return l;
}

static void layer_close(struct layer *l)
{
	free_all((struct tensor[]){l->x, l->w, l->dy, l->sizes, l->y, l->dx, l->dw}, 7);
}

static void layer_run(struct stream *s, struct layer *l)
{
	struct err e = {0};
	kernel_fn *const *kernel = cpu_backend.kernel;
	struct tensor linear[] = {l->x, l->w, l->sizes}, dx[] = {l->dy, l->w, l->sizes},
	              dw[] = {l->dy, l->x, l->sizes};
	CHECK_INT(kernel[OP_grouped_linear](s, &l->arg, linear, &l->y, &e), 0);
	CHECK_INT(kernel[OP_grouped_dx](s, &l->arg, dx, &l->dx, &e), 0);
	CHECK_INT(kernel[OP_grouped_dw](s, &l->arg, dw, &l->dw, &e), 0);
	CHECK(tensor_guarded(&l->y) && tensor_guarded(&l->dx) && tensor_guarded(&l->dw));
}

/* What the linear operations of each expert give; its rows end before the first that does not count. */
static void check_layer(const struct layer *l)
{
	int32_t to = tensor_row(&l->y), from = tensor_row(&l->x), first = 0;
	for (int32_t i = 0; i < l->arg.expert.count; i++) {
		int32_t n = at(&l->sizes, i);
		struct tensor x = rows_at(&l->x, first, n), dy = rows_at(&l->dy, first, n),
		              w = rows_at(&l->w, i * to, to), y = rows_at(&l->y, first, n),
		              dx = rows_at(&l->dx, first, n), dw = rows_at(&l->dw, i * to, to);
		struct tensor want[3] = {TENSOR(y.dtype, 1, n ? n : 1, to),
		                         TENSOR(y.dtype, 1, n ? n : 1, from), TENSOR(DT_f32, 1, to, from)};
		want[0].dim[0] = want[1].dim[0] = n;
		double tolerance = y.dtype == DT_bf16 ? 8e-3 : y.dtype == DT_f16 ? 1e-3 : 1e-5;
		op_run(&cpu_backend, OP_linear, l->arg, (struct tensor[]){x, w, {0}}, &want[0]);
		op_run(&cpu_backend, OP_linear_dx, l->arg, (struct tensor[]){dy, w}, &want[1]);
		op_run(&cpu_backend, OP_linear_dw, l->arg, (struct tensor[]){dy, x}, &want[2]);
		tensor_compare(&want[0], &y, tolerance, "grouped_linear");
		tensor_compare(&want[1], &dx, tolerance, "grouped_dx");
		tensor_compare(&want[2], &dw, 1e-5, "grouped_dw");
		free_all(want, 3);
		first += n;
	}
}

/* Rows of each expert: threads with a part of one, with several, one expert with nearly all, empty ones; an
 * expert deeper than what dw multiplies at a time. */
static const int32_t uneven[][6] = {{0, 0, 0, 0, 0, 0},     {3, 0, 1, 9, 0, 2},     {64, 65, 0, 128, 70, 33},
                                    {0, 0, 700, 1, 0, 2},   {0, 1300, 0, 0, 0, 40}, {500, 0, 0, 0, 0, 0},
                                    {40, 400, 7, 200, 0, 9}};
enum { UNEVEN = sizeof uneven / sizeof *uneven };

/* One case on so many threads; `once` is what one thread gave, or not there yet. */
static void check_uneven(enum dtype dtype, const int32_t *sizes, int threads, struct layer *once)
{
	struct layer l = layer_open(dtype, 1400, 24, 40, 6);
	const struct tensor *read[] = {&l.x, &l.dy}, *written[] = {&l.y, &l.dx};
	struct stream *s;
	struct err e = {0};
	int64_t rows;
	MUST(!cpu_backend.open(&s, THREADS(threads), &e));
	memcpy(l.sizes.data, sizes, sizeof uneven[0]);
	expert_rows(&l.arg, &l.sizes, 6, &rows);
	for (int k = 0; k < 4; k++) { /* NaN that nobody reads, and nobody writes */
		struct tensor rest = rows_at((k < 2 ? read : written)[k % 2], rows, 1400 - (int32_t)rows);
		spoil(&rest);
	}
	layer_run(s, &l);
	check_layer(&l);
	for (int k = 0; k < 2; k++)
		for (int64_t i = rows * tensor_row(written[k]); i < tensor_count(written[k]); i++)
			MUST(isnan(tensor_at(written[k], i)));
	bool own = matmul_at(0)->run[dtype] == matmul_blocked()->run[dtype];
	if (threads > 1 && own)
		CHECK(same_bits(&l.y, &once->y) && same_bits(&l.dx, &once->dx) &&
		      same_bits(&l.dw, &once->dw));
	cpu_backend.close(s);
	if (threads > 1)
		layer_close(&l);
	else
		*once = l;
}

TEST(grouped_products_are_linear_layers)
{
	static const enum dtype dtypes[] = {DT_f32, DT_bf16, DT_f16};
	for (int i = 0; i < 3 * UNEVEN; i++) {
		struct layer once;
		for (int threads = 1; threads <= 3; threads++)
			check_uneven(dtypes[i % 3], uneven[i / 3], threads, &once);
		layer_close(&once);
	}
}

/* dw is added to, experts without rows included. */
TEST(grouped_gradients_accumulate)
{
	for (int threads = 1; threads <= 3; threads++) {
		struct layer l = layer_open(DT_f32, 1400, 24, 40, 6);
		struct stream *s;
		struct err e = {0};
		MUST(!cpu_backend.open(&s, THREADS(threads), &e));
		memcpy(l.sizes.data, uneven[4], sizeof uneven[0]);
		layer_run(s, &l);
		struct tensor once = tensor_copy(&l.dw);
		l.dw.acc = 1;
		layer_run(s, &l);
		for (int64_t i = 0; i < tensor_count(&once); i++)
			CHECK_NEAR(tensor_at(&l.dw, i), 2 * tensor_at(&once, i), 1e-3);
		CHECK(tensor_at(&once, 0) == 0 && tensor_at(&once, 40 * 24) != 0);
		tensor_free(&once);
		cpu_backend.close(s);
		layer_close(&l);
	}
}

static void tell(struct stream *s, const struct layer *l)
{
	struct tensor linear[] = {l->x, l->w, l->sizes}, dx[] = {l->dy, l->w, l->sizes},
	              dw[] = {l->dy, l->x, l->sizes}, out[] = {l->y, l->dx, l->dw};
	for (int k = 0; k < 3; k++)
		linear[k].data = dx[k].data = dw[k].data = out[k].data = NULL;
	cpu_backend.workspace(s, &(struct kernel_call){OP_grouped_linear, &l->arg, linear, &out[0]});
	cpu_backend.workspace(s, &(struct kernel_call){OP_grouped_dx, &l->arg, dx, &out[1]});
	cpu_backend.workspace(s, &(struct kernel_call){OP_grouped_dw, &l->arg, dw, &out[2]});
}

/* A stream that was told of the shapes has room for any sizes: to take more is fatal. */
TEST(grouped_products_take_what_they_say)
{
	static const enum dtype dtypes[] = {DT_f32, DT_bf16};
	for (int i = 0; i < 2 * 3; i++) {
		struct layer l = layer_open(dtypes[i % 2], 1400, 70, 130, 6);
		struct stream *s;
		struct err e = {0};
		MUST(!cpu_backend.open(&s, THREADS(i / 2 + 1), &e));
		tell(s, &l);
		for (int k = 0; k < UNEVEN; k++) {
			memcpy(l.sizes.data, uneven[k], sizeof uneven[0]);
			layer_run(s, &l);
		}
		struct workspace w = cpu_backend.workspace(s, NULL);
		CHECK(w.held <= w.expected);
		cpu_backend.close(s);
		layer_close(&l);
	}
}

/* Sizes between which the announced memory has no gap. */
TEST(no_smaller_product_takes_more)
{
	static const int64_t sizes[][3] = {{1, 1, 1}, {100, 70, 33}, {1300, 300, 9000}, {400, 9000, 4200}};
	static const enum dtype types[][2] = {{DT_f32, DT_f32}, {DT_bf16, DT_bf16}, {DT_bf16, DT_f32}};
	for (int i = 0; i < 2 * 3 * 4 * 300; i++) {
		const struct matmul_impl *impl = matmul_at(i / 12 % 2);
		const int64_t *most = sizes[i % 4];
		struct stream s = {.num_threads = i % 7 + 1};
		struct matmul g = {.dtype = types[i / 4 % 3][0], .c_dtype = types[i / 4 % 3][1]};
		if (!impl || !impl->run[g.dtype])
			continue;
		g.m = most[0], g.n = most[1], g.k = most[2];
		struct cpu_space bound = impl->most(&s, &g);
		g.m = draw(1, i, (int32_t)g.m) + 1;
		g.n = draw(2, i, (int32_t)g.n) + 1;
		g.k = draw(3, i, (int32_t)g.k) + 1;
		struct cpu_space says = impl->space(&s, &g);
		CHECK(says.shared <= bound.shared && says.part <= bound.part && says.parts <= bound.parts);
	}
}

/* Sizes come from other ranks: what cannot be is refused, with numbers, and nothing is written. */
TEST(bad_sizes_are_refused)
{
	struct layer l = layer_open(DT_f32, 30, 6, 4, 3);
	struct tensor weight = TENSOR(DT_f32, 1, 30);
	l.arg.expert.kind = ACT_silu;
	static const struct {
		int32_t size[3], pad, first;
		const char *part;
	} bad[] = {{{10, 10, 11}, 0, 0, "sizes say 31 rows for experts [0, 3); the tensors have 30"},
	           {{2147483647, 2147483647, 2147483647}, 0, 0, "sizes say 6442450941 rows"},
	           {{10, -1, 3}, 0, 0, "rank 0 sends -1 rows to expert 1"},
	           {{1, 1, 1}, 11, 0, "sizes say 33 rows"},
	           {{1, 1, 1}, 0, 1, "own experts [1, 4) are not among the 3 of sizes"}};
	for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
		memcpy(l.sizes.data, bad[i].size, sizeof bad[i].size);
		l.arg.expert.pad = bad[i].pad;
		l.arg.expert.first = bad[i].first;
		check_refused(OP_grouped_linear, l.arg, (struct tensor[]){l.x, l.w, l.sizes}, &l.y,
		              bad[i].part);
		check_refused(OP_grouped_dx, l.arg, (struct tensor[]){l.dy, l.w, l.sizes}, &l.dx,
		              bad[i].part);
		check_refused(OP_grouped_dw, l.arg, (struct tensor[]){l.dy, l.x, l.sizes}, &l.dw,
		              bad[i].part);
		check_refused(OP_expert_activation, l.arg, (struct tensor[]){l.x, weight, l.sizes}, &l.dx,
		              bad[i].part);
		check_refused(OP_expert_activation_bwd, l.arg, (struct tensor[]){l.dx, l.x, weight, l.sizes},
		              &l.x, bad[i].part);
		check_refused(OP_regroup, l.arg, (struct tensor[]){l.x, l.sizes}, &l.dx, bad[i].part);
		l.arg.expert.back = 1;
		check_refused(OP_regroup, l.arg, (struct tensor[]){l.x, l.sizes}, &l.dx, bad[i].part);
		l.arg.expert.back = 0;
	}
	memcpy(l.sizes.data, (const int32_t[]){1, 5, 2}, 12);
	l.arg.expert.pad = 4;
	l.arg.expert.first = 0;
	check_refused(OP_regroup, l.arg, (struct tensor[]){l.x, l.sizes}, &l.dx, "expert 1 gets 5 rows; 4,");
	tensor_free(&weight);
	layer_close(&l);
}

/* A whole layer on several ranks */

enum { TOKENS = 48, TOPK = 2, WIDTH = 20, HIDDEN = 12, MOST_RANKS = 4 };

/* Tokens are split over the ranks, experts dealt to them; w1 is gate and up. */
struct moe {
	int32_t ranks;
	struct tensor x, index, probs, w1, w2, y;
};

/* Rank r's rows for the experts of rank d. */
static int64_t rows_between(const struct tensor *sizes, int32_t r, int32_t d, int32_t each)
{
	int64_t rows = 0;
	for (int32_t x = d * each; x < (d + 1) * each; x++)
		rows += at(sizes, r * EXPERTS + x);
	return rows;
}

/* What all_to_all does: parts of rows, from each rank to each, or back. */
static void exchange(const struct tensor *home, const struct tensor *away, const struct tensor *sizes,
                     bool back)
{
	int32_t ranks = sizes->dim[0], each = EXPERTS / ranks;
	int64_t taken[MOST_RANKS] = {0};
	for (int32_t r = 0; r < ranks; r++) {
		int64_t sent = 0;
		for (int32_t d = 0; d < ranks; d++) {
			int64_t n = rows_between(sizes, r, d, each);
			struct tensor from = rows_at(&home[r], sent, (int32_t)n),
			              to = rows_at(&away[d], taken[d], (int32_t)n);
			memcpy(back ? from.data : to.data, back ? to.data : from.data,
			       (size_t)tensor_bytes(&from));
			sent += n;
			taken[d] += n;
		}
	}
}

static void plan_ranks(const struct backend *b, const struct moe *m, struct tensor *slot,
                       struct tensor *sizes)
{
	int32_t n = TOKENS / m->ranks;
	struct tensor counts = TENSOR(DT_i32, 0, m->ranks, EXPERTS), overflow = TENSOR(DT_f64, 0, 1);
	union op_arg count = {.balance = {.experts = EXPERTS, .sequences = 1}},
	             plan = {.dispatch = {.experts = EXPERTS, .ranks = m->ranks}};
	for (int32_t r = 0; r < m->ranks; r++) {
		struct tensor index = rows_at(&m->index, r * n, n), row = rows_at(&counts, r, 1);
		op_run(b, OP_expert_counts, count, &index, &row);
	}
	for (plan.dispatch.rank = 0; plan.dispatch.rank < m->ranks; plan.dispatch.rank++) {
		struct tensor index = rows_at(&m->index, plan.dispatch.rank * n, n);
		slot[plan.dispatch.rank] = TENSOR(DT_i32, 0, n, TOPK);
		op_run(b, OP_dispatch_plan, plan, (struct tensor[]){index, counts},
		       (struct tensor[]){slot[plan.dispatch.rank], *sizes, overflow});
	}
	free_all((struct tensor[]){counts, overflow}, 2);
}

/* The experts of rank d on rows in order of rank, in place. */
static void run_experts(const struct backend *b, const struct moe *m, int32_t d, const struct tensor *sizes,
                        const struct tensor *rows, const struct tensor *weights, int32_t pad)
{
	int32_t each = EXPERTS / m->ranks, most = TOKENS * TOPK > pad * each ? TOKENS * TOPK : pad * each;
	union op_arg arg = {
	        .expert = {.first = d * each, .count = each, .pad = pad, .kind = ACT_silu, .gated = 1}};
	struct tensor x = TENSOR(DT_f32, 1, most, WIDTH), h = TENSOR(DT_f32, 1, most, 2 * HIDDEN),
	              a = TENSOR(DT_f32, 1, most, HIDDEN), y = TENSOR(DT_f32, 1, most, WIDTH),
	              w = TENSOR(DT_f32, 1, most);
	struct tensor w1 = rows_at(&m->w1, (int64_t)d * each * 2 * HIDDEN, each * 2 * HIDDEN),
	              w2 = rows_at(&m->w2, (int64_t)d * each * WIDTH, each * WIDTH);
	op_run(b, OP_regroup, arg, (struct tensor[]){*rows, *sizes}, &x);
	op_run(b, OP_regroup, arg, (struct tensor[]){*weights, *sizes}, &w);
	op_run(b, OP_grouped_linear, arg, (struct tensor[]){x, w1, *sizes}, &h);
	op_run(b, OP_expert_activation, arg, (struct tensor[]){h, w, *sizes}, &a);
	op_run(b, OP_grouped_linear, arg, (struct tensor[]){a, w2, *sizes}, &y);
	arg.expert.back = 1;
	op_run(b, OP_regroup, arg, (struct tensor[]){y, *sizes}, rows);
	free_all((struct tensor[]){x, h, a, y, w}, 5);
}

/* m->y by all operations of a layer. */
static void run_moe(const struct backend *b, const struct moe *m, int32_t pad)
{
	int32_t n = TOKENS / m->ranks, most = TOKENS * TOPK;
	struct tensor slot[MOST_RANKS], sizes = TENSOR(DT_i32, 0, m->ranks, EXPERTS);
	struct tensor home[MOST_RANKS], away[MOST_RANKS], w_home[MOST_RANKS], w_away[MOST_RANKS];
	plan_ranks(b, m, slot, &sizes);
	for (int32_t r = 0; r < m->ranks; r++) {
		struct tensor x = rows_at(&m->x, r * n, n), probs = rows_at(&m->probs, r * n, n);
		home[r] = TENSOR(DT_f32, 1, n * TOPK, WIDTH);
		w_home[r] = TENSOR(DT_f32, 1, n * TOPK);
		away[r] = TENSOR(DT_f32, 2, most, WIDTH);
		w_away[r] = TENSOR(DT_f32, 2, most);
		op_run(b, OP_permute, (union op_arg){0}, (struct tensor[]){x, slot[r]}, &home[r]);
		op_run(b, OP_permute_probs, (union op_arg){0}, (struct tensor[]){probs, slot[r]}, &w_home[r]);
	}
	exchange(home, away, &sizes, false);
	exchange(w_home, w_away, &sizes, false);
	for (int32_t d = 0; d < m->ranks; d++)
		run_experts(b, m, d, &sizes, &away[d], &w_away[d], pad);
	exchange(home, away, &sizes, true);
	for (int32_t r = 0; r < m->ranks; r++) {
		struct tensor y = rows_at(&m->y, r * n, n);
		op_run(b, OP_unpermute, (union op_arg){0}, (struct tensor[]){home[r], slot[r]}, &y);
	}
	free_all(slot, m->ranks);
	free_all(home, m->ranks);
	free_all(away, m->ranks);
	free_all(w_home, m->ranks);
	free_all(w_away, m->ranks);
	tensor_free(&sizes);
}

/* Element c of what expert x gives for token n. */
static double naive_expert(const struct moe *m, int64_t n, int64_t x, int64_t c)
{
	double y = 0;
	for (int64_t f = 0; f < HIDDEN; f++) {
		double gate = 0, up = 0;
		for (int64_t k = 0; k < WIDTH; k++) {
			gate += tensor_at(&m->x, n * WIDTH + k) *
			        tensor_at(&m->w1, (x * 2 * HIDDEN + f) * WIDTH + k);
			up += tensor_at(&m->x, n * WIDTH + k) *
			      tensor_at(&m->w1, (x * 2 * HIDDEN + HIDDEN + f) * WIDTH + k);
		}
		y += gate / (1 + exp(-gate)) * up * tensor_at(&m->w2, (x * WIDTH + c) * HIDDEN + f);
	}
	return y;
}

TEST(a_layer_of_experts_is_the_sum_of_each_token_s)
{
	struct tensor want = TENSOR(DT_f32, 1, TOKENS, WIDTH);
	struct moe m = {1,
	                TENSOR(DT_f32, 1, TOKENS, WIDTH),
	                choices(9, TOKENS, TOPK, EXPERTS, false),
	                TENSOR(DT_f32, 3, TOKENS, TOPK),
	                TENSOR(DT_f32, 4, EXPERTS * 2 * HIDDEN, WIDTH),
	                TENSOR(DT_f32, 5, EXPERTS * WIDTH, HIDDEN),
	                tensor_copy(&want)};
	for (int64_t i = 0; i < TOKENS * WIDTH; i++) {
		double sum = 0;
		for (int64_t k = i / WIDTH * TOPK; k < (i / WIDTH + 1) * TOPK; k++)
			sum += tensor_at(&m.probs, k) *
			       naive_expert(&m, i / WIDTH, at(&m.index, k), i % WIDTH);
		tensor_put(&want, i, sum);
	}
	for (int i = 0; i < 2 * 2 * 3; i++) {
		m.ranks = 1 << i / 4;
		spoil(&m.y);
		run_moe(both[i % 2], &m, i / 2 % 2 ? TOKENS : 0);
		tensor_compare(&want, &m.y, 1e-5, "a layer of experts");
	}
	free_all((struct tensor[]){want, m.x, m.index, m.probs, m.w1, m.w2, m.y}, 7);
}

TEST(counts_accumulate_as_whole_numbers)
{
	for (int i = 0; i < 2; i++) {
		struct tensor x = TENSOR(DT_i32, 0, 3), y = TENSOR(DT_i32, 0, 3);
		memcpy(x.data, (const int32_t[]){16777217, -5, 2147483647}, 12); /* the first is no f32 */
		op_run(both[i], OP_accumulate, (union op_arg){0}, &x, &y);
		CHECK(same_bits(&x, &y));
		y.acc = 1;
		op_run(both[i], OP_accumulate, (union op_arg){0}, &x, &y);
		CHECK(at(&y, 0) == 33554434 && at(&y, 1) == -10 && at(&y, 2) == -2);
		free_all((struct tensor[]){x, y}, 2);
	}
}

int main(int argc, char **argv)
{
	return test_main(argc, argv);
}
