/* Data of every rank is a pure function of (rank, element), so each rank can redo the whole collective in a
 * serial loop and compare bytes. Magnitudes differ widely: a sum in another order is another sum. */
#include "test/comm_checks.h"
#include "base/err.h"
#include "base/mem.h"

#include <math.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const size_t sizes[] = {0, 1, 7, 1000, 100003};
enum { NUM_SIZES = sizeof sizes / sizeof *sizes };
static const enum dtype types[] = {DT_f32, DT_bf16, DT_f64, DT_i32, DT_i64};
enum { NUM_TYPES = sizeof types / sizeof *types };

/* What a failed check says; the check then returns 1. */
#define FAIL(...) return snprintf(why, cap, __VA_ARGS__), 1
#define RUN(call)                            \
	do {                                 \
		struct err e_ = {0};         \
		struct err *e = &e_;         \
		if (call)                    \
			FAIL("%s", e_.text); \
	} while (0)

static uint64_t mix(uint64_t x)
{
	x = (x ^ x >> 31) * 0x9e3779b97f4a7c15;
	return x ^ x >> 29;
}

static double value(int rank, size_t i)
{
	uint64_t h = mix((uint64_t)rank * 1000003 + i + 1);
	return ldexp((double)(h % 2001) - 1000, (int)(h >> 40) % 20 - 10);
}

static void put(void *data, size_t at, enum dtype t, double x)
{
	if (t == DT_f32)
		((float *)data)[at] = (float)x;
	else if (t == DT_bf16)
		((uint16_t *)data)[at] = bf16_from_f32((float)x);
	else if (t == DT_f64)
		((double *)data)[at] = x;
	else if (t == DT_i32)
		((int32_t *)data)[at] = (int32_t)x;
	else
		((int64_t *)data)[at] = (int64_t)(x * 1000);
}

/* n elements of `rank` from element `from` on. */
static void *data_of(int rank, size_t from, size_t n, enum dtype t)
{
	char *data = mem_array(n, dtype_rows[t].bytes);
	for (size_t i = 0; i < n; i++)
		put(data, i, t, value(rank, from + i));
	return data;
}

#define FOLD(type, a, x)                                \
	((op) == REDUCE_SUM   ? (type)((a) + (x))       \
	 : (op) == REDUCE_MAX ? ((x) > (a) ? (x) : (a)) \
	                      : ((x) < (a) ? (x) : (a)))
#define SERIAL(type)                                   \
	do {                                           \
		type *a = out, *x = next;              \
		for (size_t i = 0; i < n; i++)         \
			a[i] = FOLD(type, a[i], x[i]); \
	} while (0)

/* The reduction of all ranks' elements [from, from + n), one rank after the other. */
static void *reduced(int ranks, size_t from, size_t n, enum dtype t, enum comm_reduction op)
{
	enum dtype in = t == DT_bf16 ? DT_f32 : t; /* added in f32, rounded once */
	void *out = data_of(0, from, n, t);
	float *wide = mem_array(n, sizeof *wide);
	for (size_t i = 0; t == DT_bf16 && i < n; i++)
		wide[i] = bf16_to_f32(((uint16_t *)out)[i]);
	for (int r = 1; r < ranks; r++) {
		void *next = data_of(r, from, n, t);
		if (t == DT_bf16)
			for (size_t i = 0; i < n; i++) {
				float x = bf16_to_f32(((uint16_t *)next)[i]);
				wide[i] = FOLD(float, wide[i], x);
			}
		else if (in == DT_f32)
			SERIAL(float);
		else if (in == DT_f64)
			SERIAL(double);
		else if (in == DT_i32)
			SERIAL(int32_t);
		else
			SERIAL(int64_t);
		free(next);
	}
	for (size_t i = 0; t == DT_bf16 && i < n; i++)
		((uint16_t *)out)[i] = bf16_from_f32(wide[i]);
	free(wide);
	return out;
}

static bool same(const void *a, const void *b, size_t n, enum dtype t)
{
	return !n || !memcmp(a, b, n * dtype_rows[t].bytes);
}

static int all_reduce_one(struct comm *c, size_t n, enum dtype t, enum comm_reduction op, char *why,
                          size_t cap)
{
	void *data = data_of(c->rank, 0, n, t), *want = reduced(c->size, 0, n, t, op);
	RUN(comm_all_reduce(c, data, n, t, op, e));
	bool ok = same(data, want, n, t);
	free(data);
	free(want);
	if (!ok)
		FAIL("%zu of %s, reduction %d: other bits than the serial loop", n, dtype_rows[t].name, op);
	return 0;
}

static int check_all_reduce(struct comm *c, char *why, size_t cap)
{
	for (int s = 0; s < NUM_SIZES; s++)
		for (int t = 0; t < NUM_TYPES; t++)
			for (int op = 0; op < REDUCE_COUNT; op++)
				if ((sizes[s] < 10000 || op == REDUCE_SUM) &&
				    all_reduce_one(c, sizes[s], types[t], op, why, cap))
					return 1;
	return 0;
}

/* The same bits whatever the timing. */
static int check_repeats(struct comm *c, char *why, size_t cap)
{
	enum { N = 20011 };
	float *first = NULL;
	for (int round = 0; round < 8; round++) {
		float *data = data_of(c->rank, 0, N, DT_f32);
		for (int i = 0; i < (c->rank * 7 + round * 3) % 11; i++)
			sched_yield();
		RUN(comm_all_reduce(c, data, N, DT_f32, REDUCE_SUM, e));
		if (first && !same(first, data, N, DT_f32))
			FAIL("round %d has other bits than the first", round);
		if (first)
			free(data);
		else
			first = data;
	}
	free(first);
	return 0;
}

static int check_nan(struct comm *c, char *why, size_t cap)
{
	for (int op = 0; op < REDUCE_COUNT; op++)
		for (int who = 0; who < c->size; who++) {
			float x = c->rank == who ? NAN : 1;
			RUN(comm_all_reduce(c, &x, 1, DT_f32, op, e));
			if (!isnan(x))
				FAIL("rank %d's NaN is lost in reduction %d", who, op);
		}
	return 0;
}

static int reduce_scatter_one(struct comm *c, size_t n, enum dtype t, bool in_place, char *why, size_t cap)
{
	size_t bytes = dtype_rows[t].bytes;
	char *send = data_of(c->rank, 0, n * c->size, t), *recv = mem_array(n, bytes);
	char *to = in_place ? send + c->rank * n * bytes : recv;
	void *want = reduced(c->size, c->rank * n, n, t, REDUCE_SUM);
	RUN(comm_reduce_scatter(c, send, to, n, t, REDUCE_SUM, e));
	bool ok = same(to, want, n, t);
	free(send);
	free(recv);
	free(want);
	if (!ok)
		FAIL("%zu of %s, in place %d", n, dtype_rows[t].name, in_place);
	return 0;
}

static int check_reduce_scatter(struct comm *c, char *why, size_t cap)
{
	for (int s = 0; s < NUM_SIZES; s++)
		for (int t = 0; t < NUM_TYPES; t++)
			for (int in_place = 0; in_place < 2; in_place++)
				if ((sizes[s] < 10000 || types[t] == DT_f32) &&
				    reduce_scatter_one(c, sizes[s], types[t], in_place, why, cap))
					return 1;
	return 0;
}

/* Parts of 0, 3000, 6000, … elements, longer than a tile. */
static size_t uneven(int rank)
{
	return (size_t)rank * 3000 % 100000;
}

static int check_uneven(struct comm *c, char *why, size_t cap)
{
	size_t *counts = mem_array(c->size, sizeof *counts), total = 0, before = 0;
	for (int i = 0; i < c->size; i++) {
		counts[i] = uneven(i);
		before += i < c->rank ? counts[i] : 0;
		total += counts[i];
	}
	float *send = data_of(c->rank, 0, total, DT_f32), *recv = mem_array(total, sizeof *recv);
	float *want = reduced(c->size, 0, total, DT_f32, REDUCE_SUM);
	RUN(comm_reduce_scatter_v(c, send, recv + before, counts, DT_f32, REDUCE_SUM, e));
	if (!same(recv + before, want + before, counts[c->rank], DT_f32))
		FAIL("reduce_scatter_v");
	RUN(comm_all_gather_v(c, recv + before, recv, counts, DT_f32, e));
	if (!same(recv, want, total, DT_f32))
		FAIL("all_gather_v after it does not make an all_reduce");
	free(counts);
	free(send);
	free(recv);
	free(want);
	return 0;
}

static int check_all_gather(struct comm *c, char *why, size_t cap)
{
	for (int s = 0; s < NUM_SIZES; s++)
		for (int in_place = 0; in_place < 2; in_place++) {
			size_t n = sizes[s];
			int32_t *mine = data_of(c->rank, 0, n, DT_i32),
			        *all = mem_array(n * c->size, sizeof *all);
			if (in_place && n)
				memcpy(all + c->rank * n, mine, n * sizeof *mine);
			RUN(comm_all_gather(c, in_place ? all + c->rank * n : mine, all, n, DT_i32, e));
			for (int r = 0; r < c->size; r++) {
				int32_t *want = data_of(r, 0, n, DT_i32);
				if (!same(all + r * n, want, n, DT_i32))
					FAIL("%zu elements, part %d", n, r);
				free(want);
			}
			free(mine);
			free(all);
		}
	return 0;
}

static int check_broadcast(struct comm *c, char *why, size_t cap)
{
	for (int s = 0; s < NUM_SIZES; s++)
		for (int root = 0; root < c->size; root++) {
			size_t n = sizes[s];
			double *data = data_of(c->rank, 0, n, DT_f64), *want = data_of(root, 0, n, DT_f64);
			RUN(comm_broadcast(c, data, n, DT_f64, root, e));
			if (!same(data, want, n, DT_f64))
				FAIL("%zu elements from %d", n, root);
			free(data);
			free(want);
		}
	return 0;
}

static int check_all_to_all(struct comm *c, char *why, size_t cap)
{
	for (int s = 0; s < NUM_SIZES; s++) {
		size_t n = sizes[s];
		int32_t *send = data_of(c->rank, 0, n * c->size, DT_i32), *recv = mem_array(n * c->size, 4);
		RUN(comm_all_to_all(c, send, recv, n, DT_i32, e));
		for (int r = 0; r < c->size; r++) {
			int32_t *want = data_of(r, c->rank * n, n, DT_i32);
			if (!same(recv + r * n, want, n, DT_i32))
				FAIL("%zu elements from %d", n, r);
			free(want);
		}
		free(send);
		free(recv);
	}
	return 0;
}

/* From rank i to rank j: many, few or none. */
static size_t pair_count(int i, int j)
{
	return (size_t)mix(i * 131 + j + 5) % 3 * (500 + 10 * j + i);
}

static int check_all_to_all_v(struct comm *c, char *why, size_t cap)
{
	size_t *give = mem_array(c->size, sizeof *give), *take = mem_array(c->size, sizeof *take);
	size_t given = 0, taken = 0, at = 0;
	for (int i = 0; i < c->size; i++) {
		given += give[i] = pair_count(c->rank, i);
		taken += take[i] = pair_count(i, c->rank);
	}
	float *send = data_of(c->rank, 0, given, DT_f32), *recv = mem_array(taken, sizeof *recv);
	RUN(comm_all_to_all_v(c, send, give, recv, take, DT_f32, e));
	for (int r = 0; r < c->size; at += take[r++]) {
		size_t from = 0;
		for (int j = 0; j < c->rank; j++)
			from += pair_count(r, j);
		float *want = data_of(r, from, take[r], DT_f32);
		if (!same(recv + at, want, take[r], DT_f32))
			FAIL("%zu elements from %d", take[r], r);
		free(want);
	}
	free(give);
	free(take);
	free(send);
	free(recv);
	return 0;
}

/* Around the ring, both ways at once, in one go and with two tags out of order. */
static int check_messages(struct comm *c, char *why, size_t cap)
{
	enum { N = 70001 };
	int next = (c->rank + 1) % c->size, last = (c->rank + c->size - 1) % c->size;
	float *mine = data_of(c->rank, 0, N, DT_f32), *from_last = mem_array(N, 4),
	      *from_next = mem_array(N, 4);
	struct comm_request r[4];
	RUN(comm_irecv(c, from_last, N, DT_f32, last, 1, &r[0], e));
	RUN(comm_isend(c, mine, 5, DT_f32, last, 2, &r[1], e));
	RUN(comm_isend(c, mine, N, DT_f32, next, 1, &r[2], e));
	RUN(comm_irecv(c, from_next, 5, DT_f32, next, 2, &r[3], e));
	RUN(comm_wait(r, 4, e));
	float *want_last = data_of(last, 0, N, DT_f32), *want_next = data_of(next, 0, 5, DT_f32);
	if (!same(from_last, want_last, N, DT_f32) || !same(from_next, want_next, 5, DT_f32))
		FAIL("a message has come out changed");
	if (c->size > 1 && c->rank < 2) {
		int32_t x = c->rank ? 0 : 42;
		if (c->rank)
			RUN(comm_recv(c, &x, 1, DT_i32, 0, 9, e));
		else
			RUN(comm_send(c, &x, 1, DT_i32, 1, 9, e));
		if (x != 42)
			FAIL("send and recv: %d", x);
	}
	free(mine);
	free(from_last);
	free(from_next);
	free(want_last);
	free(want_next);
	return 0;
}

static int group_sums(struct comm *world, struct comm *group, char *why, size_t cap)
{
	int64_t sum = world->rank, want = 0;
	for (int i = 0; i < group->size; i++)
		want += group->world_rank[i];
	RUN(comm_all_reduce(group, &sum, 1, DT_i64, REDUCE_SUM, e));
	if (sum != want || group->world_rank[group->rank] != world->rank)
		FAIL("group %s: sum %lld, not %lld", group->name, (long long)sum, (long long)want);
	return 0;
}

static int check_split(struct comm *world, char *why, size_t cap)
{
	struct comm *parity, *inner, *some;
	RUN(comm_split(world, &parity, world->rank % 2, "parity", e));
	RUN(comm_split(parity, &inner, parity->rank / 2, "inner", e));
	RUN(comm_split(world, &some, world->rank ? 0 : -1, "all but the first", e));
	if (!world->rank != !some)
		FAIL("colour -1 makes no group");
	if (group_sums(world, inner, why, cap) || (some && group_sums(world, some, why, cap)) ||
	    group_sums(world, parity, why, cap))
		return 1;
	comm_close(inner);
	comm_close(some);
	comm_close(parity);
	return 0;
}

static int check_mesh(struct comm *world, char *why, size_t cap)
{
	static const unsigned axes[] = {
	        AXIS_BIT(tp), AXIS_BIT(dp),  AXIS_BIT(pp), AXIS_BIT(tp) | AXIS_BIT(dp),
	        AXIS_BIT(ep), AXIS_BIT(edp), AXES_DENSE};
	enum { N = sizeof axes / sizeof *axes };
	struct comm *group[N];
	struct mesh m;
	int even = world->size % 2 ? 1 : 2, pp = world->size % 4 ? 1 : 2;
	RUN(mesh_init(&m, world->size, &(struct mesh_sizes){.tp = even, .pp = pp, .ep = even, .etp = 1}, e));
	for (int i = 0; i < N; i++) {
		RUN(comm_split_axes(world, &group[i], &m, axes[i], e));
		if (group[i]->size != mesh_group_size(&m, axes[i]) ||
		    group[i]->rank != mesh_group(&m, axes[i], world->rank, NULL))
			FAIL("group %s is not the mesh's", group[i]->name);
	}
	/* Groups whose calls interleave do not see each other's messages. */
	for (int i = 0; i < N; i++)
		if (group_sums(world, group[i], why, cap))
			return 1;
	for (int i = 0; i < N; i++)
		comm_close(group[i]);
	return 0;
}

static int check_barrier(struct comm *c, char *why, size_t cap)
{
	for (int i = 0; i < 50; i++)
		RUN(comm_barrier(c, e));
	return 0;
}

const struct comm_check comm_checks[] = {
        {"all_reduce", check_all_reduce},
        {"repeated all_reduce", check_repeats},
        {"NaN", check_nan},
        {"reduce_scatter", check_reduce_scatter},
        {"uneven parts", check_uneven},
        {"all_gather", check_all_gather},
        {"broadcast", check_broadcast},
        {"all_to_all", check_all_to_all},
        {"all_to_all_v", check_all_to_all_v},
        {"messages", check_messages},
        {"split", check_split},
        {"mesh groups", check_mesh},
        {"barrier", check_barrier},
};
const size_t comm_num_checks = sizeof comm_checks / sizeof *comm_checks;
