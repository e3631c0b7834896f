/* Experts on a CUDA device, or in the simulator: sizes at which warps, blocks and passes meet, whole numbers
 * like the processor's, data that a processor refuses, and what the host keeps from call to call. */
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

static int32_t at(const struct tensor *t, int64_t i)
{
	return ((const int32_t *)t->data)[i];
}

/* Differing experts of a row, crowded towards the low numbers; some are nowhere. */
static struct tensor choices(uint64_t seed, int32_t rows, int32_t topk, int32_t experts)
{
	struct tensor t = TENSOR(DT_i32, 0, rows, topk);
	for (int64_t i = 0; i < tensor_count(&t); i++) {
		int32_t few = draw(seed, i / topk, 3) ? experts / 4 + 1 : experts;
		bool nowhere = !draw(seed + 1, i, 7);
		tensor_put(&t, i, nowhere ? -1 : (draw(seed + 2, i / topk, few) + i % topk) % experts);
	}
	return t;
}

/* The processor and the device give the same bits. */
static void check_same(enum op op, union op_arg arg, const struct tensor *in, const struct tensor *out, int n)
{
	struct tensor want[OP_MAX_OUT] = {{0}};
	for (int k = 0; k < n; k++) {
		memset(out[k].data, 0xff, (size_t)tensor_bytes(&out[k]));
		if (out[k].acc)
			tensor_put(&out[k], 0, 0.5);
		want[k] = tensor_copy(&out[k]);
	}
	op_run(&cpu_backend, op, arg, in, want);
	op_run(&cuda_backend, op, arg, in, out);
	for (int k = 0; k < n; k++) {
		int64_t i = 0;
		while (i < tensor_count(&out[k]) && tensor_at(&out[k], i) == tensor_at(&want[k], i))
			i++;
		if (i < tensor_count(&out[k]))
			test_failed(__FILE__, __LINE__, "%s: element %lld of output %d is %.17g, not %.17g",
			            op_rows[op].name, (long long)i, k, tensor_at(&out[k], i),
			            tensor_at(&want[k], i));
		CHECK(tensor_guarded(&out[k]));
	}
	free_all(want, n);
}

/* Counts of one rank are those of its index, of the others any. */
static void check_plan(union op_arg arg, int32_t rows, int32_t topk)
{
	int32_t experts = arg.dispatch.experts, ranks = arg.dispatch.ranks;
	struct tensor in[] = {choices(5, rows, topk, experts), TENSOR(DT_i32, 0, ranks, experts)};
	struct tensor out[] = {TENSOR(DT_i32, 0, rows, topk), TENSOR(DT_i32, 0, ranks, experts),
	                       TENSOR(DT_f64, 0, 1)};
	int32_t *own = (int32_t *)in[1].data + arg.dispatch.rank * experts;
	out[2].acc = 1;
	for (int64_t i = 0; i < tensor_count(&in[1]); i++)
		tensor_put(&in[1], i, draw(9, i, 2 * rows * topk / experts + 1));
	memset(own, 0, (size_t)experts * sizeof *own);
	for (int64_t i = 0; i < tensor_count(&in[0]); i++)
		if (at(&in[0], i) >= 0)
			own[at(&in[0], i)]++;
	check_same(OP_dispatch_plan, arg, in, out, 3);
	free_all(in, 2);
	free_all(out, 3);
}

/* More choices than a block has, more blocks than one, experts that are no power of two and more than
 * threads. */
TEST(plans_are_those_of_the_processor)
{
	static const struct {
		int32_t experts, ranks, rank, capacity, first, count, rows, topk;
	} plans[] = {
	        {64, 4, 1, 0, 0, 0, 1500, 8},    {64, 4, 3, 2100, 0, 0, 1500, 8},
	        {300, 3, 2, 0, 0, 0, 401, 5},    {300, 3, 0, 777, 0, 0, 401, 5},
	        {520, 260, 17, 3, 0, 0, 300, 8}, {12, 3, 1, 500, 4, 4, 700, 3},
	        {8, 1, 0, 4095, 0, 0, 2050, 2},  {1, 1, 0, 100, 0, 0, 1025, 1},
	};
	for (size_t i = 0; i < sizeof plans / sizeof *plans && device_is_here(); i++)
		check_plan((union op_arg){.dispatch = {.experts = plans[i].experts,
		                                       .ranks = plans[i].ranks,
		                                       .rank = plans[i].rank,
		                                       .capacity = plans[i].capacity,
		                                       .first = plans[i].first,
		                                       .count = plans[i].count,
		                                       .counts = i != 3}},
		           plans[i].rows, plans[i].topk);
}

/* Few different weights, so that order decides; zeros of both signs, infinities, what is no number. */
static float odd_weight(int64_t i)
{
	static const float odd[] = {0, -0.0f, NAN, INFINITY, -INFINITY, 1e-40f, -1e-40f, 1};
	int32_t n = draw(3, i, 40);
	return n < 8 ? odd[n] : n < 20 ? (float)n / 32 : -(float)n / 64;
}

TEST(an_expert_keeps_what_it_keeps_on_the_processor)
{
	enum { SAMPLES = 4, LENGTH = 192, TOPK = 3, EXPERTS = 10, RANKS = 4, ROWS = SAMPLES * LENGTH };
	int32_t limits[] = {0, 1, 57, 2000, 0};
	struct tensor in[] = {choices(6, ROWS, TOPK, EXPERTS), TENSOR(DT_f32, 1, ROWS, TOPK)};
	struct tensor out[] = {TENSOR(DT_i32, 0, ROWS / RANKS, TOPK), TENSOR(DT_f64, 0, 1)};
	for (int64_t i = 0; i < tensor_count(&in[0]); i++)
		limits[4] += at(&in[0], i) == 3; /* all of one expert just fit */
	tensor_put(&in[0], 100, EXPERTS + 7);
	out[1].acc = 1;
	for (int64_t i = 0; i < tensor_count(&in[1]); i++)
		tensor_put(&in[1], i, odd_weight(i));
	for (int i = 0; i < 2 * 5 && device_is_here(); i++)
		check_same(OP_capacity,
		           (union op_arg){.capacity = {.experts = EXPERTS,
		                                       .limit = limits[i / 2],
		                                       .by_position = i % 2,
		                                       .ranks = RANKS,
		                                       .rank = i % RANKS,
		                                       .context_ranks = i % 3 ? 2 : 0,
		                                       .seq_length = LENGTH}},
		           in, out, 2);
	free_all(in, 2);
	free_all(out, 2);
}

/* Logits of few values: the lower number of equals, through all of a warp's rounds. */
TEST(many_experts_are_chosen_as_on_the_processor)
{
	static const struct {
		int32_t experts, topk, groups, group_topk;
	} sizes[] = {{1024, 64, 0, 0}, {257, 40, 0, 0}, {512, 9, 16, 3}, {4096, 2, 64, 64}, {33, 33, 0, 0}};
	for (int i = 0; i < 5 && device_is_here(); i++) {
		int32_t experts = sizes[i].experts, topk = sizes[i].topk, rows = 5;
		union op_arg arg = {.route = {.topk = topk,
		                              .num_groups = sizes[i].groups,
		                              .group_topk = sizes[i].group_topk,
		                              .scaling_factor = 1}};
		struct tensor in[] = {TENSOR(DT_f32, 1, rows, experts), TENSOR(DT_f32, 2, experts)};
		struct tensor out[] = {TENSOR(DT_f32, 1, rows, topk), TENSOR(DT_i32, 1, rows, topk)};
		struct tensor want[] = {tensor_copy(&out[0]), tensor_copy(&out[1])};
		for (int64_t k = 0; k < tensor_count(&in[0]); k++)
			tensor_put(&in[0], k, draw(7, k, 6) / 4.);
		for (int64_t k = 0; k < experts; k++)
			tensor_put(&in[1], k, draw(8, k, 3) / 4.);
		op_run(&cpu_reference_backend, OP_route, arg, in, want);
		op_run(&cuda_backend, OP_route, arg, in, out);
		tensor_compare(&want[0], &out[0], 1e-5, "weights");
		tensor_compare(&want[1], &out[1], 0, "experts");
		free_all(in, 2);
		free_all(out, 2);
		free_all(want, 2);
	}
}

/* A device that is not asked stays within its tensors: what sizes, slots and choices promise beyond is left
 * out, and nothing is written behind. */
static void check_stays(enum op op, union op_arg arg, const struct tensor *in, const struct tensor *out,
                        int n)
{
	op_run(&cuda_backend, op, arg, in, out);
	for (int k = 0; k < n; k++)
		CHECK(tensor_guarded(&out[k]));
}

TEST(sizes_beyond_the_rows_are_left_out)
{
	static const int32_t size[] = {3, -7, 2000000000, 5};
	struct tensor x = TENSOR(DT_f32, 1, 6, 4), w = TENSOR(DT_f32, 2, 6), y = TENSOR(DT_f32, 3, 9, 4),
	              dw = TENSOR(DT_f32, 4, 6), sizes = TENSOR(DT_i32, 0, 2, 2);
	memcpy(sizes.data, size, sizeof size);
	for (int back = 0; back < 2 && device_is_here(); back++) {
		union op_arg arg = {.expert = {.count = 2, .back = back}};
		check_stays(OP_regroup, arg, (struct tensor[]){x, sizes}, &y, 1);
		arg.expert.pad = 3;
		check_stays(OP_regroup, arg, (struct tensor[]){x, sizes}, &y, 1);
	}
	/* Order of expert: three rows of rank 0's and then more than there are of rank 1's. */
	if (device_is_here()) {
		union op_arg arg = {.expert = {.count = 2}};
		check_stays(OP_regroup, arg, (struct tensor[]){x, sizes}, &y, 1);
		CHECK(!memcmp(x.data, y.data, (size_t)tensor_bytes(&x)));
		arg.expert.kind = ACT_relu;
		check_stays(OP_expert_activation, arg, (struct tensor[]){x, w, sizes}, &x, 1);
		check_stays(OP_expert_activation_bwd, arg, (struct tensor[]){x, x, w, sizes},
		            (struct tensor[]){y, dw}, 2);
	}
	free_all((struct tensor[]){x, w, y, dw, sizes}, 5);
}

TEST(slots_and_choices_outside_are_left_out)
{
	static const int32_t slot[] = {0, 5, -9, 1, 2000000000, 2}, index[] = {0, 9, 3, -1, 2, 2000000000};
	struct tensor x = TENSOR(DT_f32, 1, 3, 4), slots = TENSOR(DT_i32, 0, 3, 2),
	              y = TENSOR(DT_f32, 2, 4, 4), token = TENSOR(DT_f32, 3, 3, 4),
	              p = TENSOR(DT_f32, 4, 3, 2), packed = TENSOR(DT_f32, 5, 4),
	              logits = TENSOR(DT_f32, 6, 3, 4), dlogits = TENSOR(DT_f32, 7, 3, 4);
	union op_arg arg = {.route = {.topk = 2, .scaling_factor = 1, .score = SCORE_sigmoid}}, back = {0};
	if (device_is_here()) {
		memcpy(slots.data, slot, sizeof slot);
		check_stays(OP_permute, back, (struct tensor[]){x, slots}, &y, 1);
		for (int64_t i = 0; i < 16; i++)
			CHECK(tensor_at(&y, i) == (i < 12 ? tensor_at(&x, i) : 0));
		check_stays(OP_unpermute, back, (struct tensor[]){y, slots}, &token, 1);
		CHECK(!memcmp(token.data, x.data, (size_t)tensor_bytes(&x)));
		check_stays(OP_permute_probs, back, (struct tensor[]){p, slots}, &packed, 1);
		back.permute.back = 1;
		check_stays(OP_permute_probs, back, (struct tensor[]){packed, slots}, &p, 1);
		CHECK(tensor_at(&p, 1) == 0 && tensor_at(&p, 3) == tensor_at(&packed, 1));
		memcpy(slots.data, index, sizeof index);
		for (int i = 0; i < SCORE_COUNT; i++) {
			arg.route.score = i;
			check_stays(OP_route_bwd, arg, (struct tensor[]){p, logits, slots}, &dlogits, 1);
		}
	}
	free_all((struct tensor[]){x, slots, y, token, p, packed, logits, dlogits}, 8);
}

/* Counts that are not those of the index: slots stay below what the rank sends. */
TEST(a_plan_of_wrong_counts_stays_within_its_rows)
{
	union op_arg arg = {.dispatch = {.experts = 4, .ranks = 2, .rank = 1, .capacity = 3, .counts = 1}};
	struct tensor in[] = {choices(8, 50, 2, 4), TENSOR(DT_i32, 0, 2, 4)};
	struct tensor out[] = {TENSOR(DT_i32, 0, 50, 2), TENSOR(DT_i32, 0, 2, 4), TENSOR(DT_f64, 0, 1)};
	memcpy(in[1].data, (const int32_t[]){-5, 2, 2000000000, 2000000000, 4, -1, 0, 1}, 32);
	tensor_put(&in[0], 7, 77);
	if (device_is_here()) {
		int32_t sent = 0;
		check_stays(OP_dispatch_plan, arg, in, out, 3);
		for (int k = 0; k < 8; k++)
			CHECK(at(&out[1], k) >= 0 && at(&out[1], k) <= 3);
		for (int k = 4; k < 8; k++)
			sent += at(&out[1], k);
		for (int64_t i = 0; i < tensor_count(&out[0]); i++)
			CHECK(at(&out[0], i) >= -1 && at(&out[0], i) < sent);
	}
	free_all(in, 2);
	free_all(out, 3);
}

/* What the host keeps: several calls of one stream */

static int32_t first_count(struct stream *s, const struct tensor *sizes)
{
	struct err e = {0};
	const int32_t *host = cuda_backend.counts(s, sizes, &e);
	if (!host)
		test_failed(__FILE__, __LINE__, "%s", e.text);
	return host ? host[0] : -1;
}

/* Plans of as many layers and micro-batches as are in flight: whoever asks later gets what was planned last,
 * or what has been uploaded or cleared since. */
TEST(the_host_knows_what_was_planned)
{
	enum { PLANS = 120 };
	union op_arg arg = {.dispatch = {.experts = 1, .ranks = 1}};
	struct stream *s = device_stream();
	struct tensor index = TENSOR(DT_i32, 0, 2, 1), counts = TENSOR(DT_i32, 0, 1, 1), sizes = counts,
	              slot = index, dropped = TENSOR(DT_f64, 0, 1);
	memset(index.data, 0, 8);
	tensor_put(&counts, 0, 2);
	if (s) {
		struct tensor in[] = {device_lend(s, &index), device_lend(s, &counts)}, of[PLANS];
		char *memory = cuda_backend.alloc(s, (size_t)PLANS * 64);
		struct tensor out[] = {device_lend(s, &slot), sizes, device_lend(s, &dropped)};
		for (int i = 0; i < 2 * PLANS; i++) {
			out[1].data = memory + (i % PLANS) * 64;
			of[i % PLANS] = out[1];
			arg.dispatch.capacity = i / PLANS; /* two rows, then one */
			device_run(s, OP_dispatch_plan, &arg, in, out);
		}
		for (int i = 0; i < PLANS; i++)
			CHECK_INT(first_count(s, &of[i]), 1);
		cuda_backend.upload(s, of[7].data, (const int32_t[]){41}, 4);
		CHECK_INT(first_count(s, &of[7]), 41);
		cuda_backend.zero(s, memory, 64 * 4);
		CHECK_INT(first_count(s, &of[3]), 0);
		CHECK_INT(first_count(s, &of[4]), 1);
		of[7].dim[1] = 16; /* another shape of memory that is known, in part */
		of[6].data = (char *)of[7].data - 4;
		CHECK_INT(first_count(s, &of[7]), 41);
		CHECK_INT(first_count(s, &of[6]), 0);
		arg.dispatch.capacity = 0;
		out[1] = of[7];
		out[1].dim[1] = 1;
		device_run(s, OP_dispatch_plan, &arg, in, out);
		CHECK_INT(first_count(s, &out[1]), 2);
		device_take(s, &in[0], NULL);
		device_take(s, &in[1], NULL);
		device_take(s, &out[0], NULL);
		device_take(s, &out[2], NULL);
		cuda_backend.free(s, memory);
		cuda_backend.close(s);
	}
	free_all((struct tensor[]){index, counts, dropped}, 3);
}

/* Sizes that the tensors have no room for come back as an error. */
TEST(grouped_products_refuse_bad_sizes)
{
	static const enum op ops[] = {OP_grouped_linear, OP_grouped_dx, OP_grouped_dw};
	struct tensor x = TENSOR(DT_f32, 1, 6, 4), w = TENSOR(DT_f32, 2, 8, 4),
	              sizes = TENSOR(DT_i32, 0, 1, 2);
	struct stream *s = device_stream();
	union op_arg arg = {.expert = {.count = 2}};
	memcpy(sizes.data, (const int32_t[]){3, 4}, 8);
	if (s) {
		struct tensor t[] = {device_lend(s, &x), device_lend(s, &w), device_lend(s, &sizes),
		                     device_lend(s, &x)};
		for (int i = 0; i < 3; i++) {
			struct tensor in[] = {t[0], ops[i] == OP_grouped_dw ? t[3] : t[1], t[2]};
			struct err e = {0};
			CHECK_INT(cuda_backend.kernel[ops[i]](s, &arg, in, i < 2 ? &t[3] : &t[1], &e),
			          EXIT_INTERNAL);
			CHECK_HAS(e.text, "sizes say 7 rows for experts [0, 2); the tensors have 6");
		}
		for (int i = 0; i < 4; i++)
			device_take(s, &t[i], NULL);
		cuda_backend.close(s);
	}
	free_all((struct tensor[]){x, w, sizes}, 3);
}

int main(int argc, char **argv)
{
	return test_main(argc, argv);
}
