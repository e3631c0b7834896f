#include "test/comm_suite.h"
#include "base/err.h"
#include "base/mem.h"
#include "comm/comm.h"
#include "test/test.h"

#include <stdlib.h>

static const size_t sizes[] = {0, 1, 7, 1000, 100003};
enum { N_SIZES = sizeof sizes / sizeof *sizes, LARGE = 100003 };

/* ---- values: the same on every rank that asks for (rank, i) ---- */

/* Of very different magnitude, so that a sum in another order has other bits. */
static double draw(enum dtype d, int rank, size_t i)
{
	uint64_t x = ((uint64_t)rank + 1) * 0x9e3779b97f4a7c15u + i * 0xd1b54a32d192ed03u;
	x ^= x >> 29;
	x *= 0xbf58476d1ce4e5b9u;
	x ^= x >> 32;
	double whole = (double)(int32_t)(x & 0xffffff) - 0x800000;
	unsigned exponents = d == DT_f16 ? 15 : 31; /* f16 ends at 2^16 */
	return d == DT_i32 || d == DT_i64 ? whole : ldexp(whole, (int)(x >> 40 & exponents) - 30);
}

struct half { /* a type of two bytes */
	int mantissa, bias;
};

static struct half half_of(enum dtype d)
{
	return d == DT_bf16 ? (struct half){7, 127} : (struct half){10, 15};
}

/* Nearest, ties to even, by counting last bits; not for what is too large. */
static uint16_t to_half(enum dtype d, double x)
{
	const struct half h = half_of(d);
	double size = fabs((double)(float)x);
	int exponent;
	frexp(size, &exponent);
	if (size == 0 || exponent < 2 - h.bias)
		exponent = 2 - h.bias; /* that of subnormal numbers */
	int bits = (exponent - 2 + h.bias) << h.mantissa;
	bits += (int)nearbyint(ldexp(size, h.mantissa + 1 - exponent));
	return (uint16_t)(bits | (signbit(x) ? 0x8000 : 0));
}

static double from_half(enum dtype d, uint16_t bits)
{
	const struct half h = half_of(d);
	int exponent = (bits & 0x7fff) >> h.mantissa, fraction = bits & ((1 << h.mantissa) - 1);
	int whole = exponent ? fraction + (1 << h.mantissa) : fraction;
	double size = ldexp(whole, (exponent ? exponent : 1) - h.bias - h.mantissa);
	return bits & 0x8000 ? -size : size;
}

static void put(enum dtype d, void *p, size_t i, double x)
{
	if (d == DT_f32)
		((float *)p)[i] = (float)x;
	else if (d == DT_bf16 || d == DT_f16)
		((uint16_t *)p)[i] = to_half(d, x);
	else if (d == DT_f64)
		((double *)p)[i] = x;
	else if (d == DT_i32)
		((int32_t *)p)[i] = (int32_t)x;
	else
		((int64_t *)p)[i] = (int64_t)x;
}

static double get(enum dtype d, const void *p, size_t i)
{
	if (d == DT_f32)
		return ((const float *)p)[i];
	if (d == DT_f64)
		return ((const double *)p)[i];
	if (d == DT_i32)
		return ((const int32_t *)p)[i];
	if (d == DT_i64)
		return (double)((const int64_t *)p)[i];
	return from_half(d, ((const uint16_t *)p)[i]);
}

static void *filled(enum dtype d, int rank, size_t n)
{
	void *p = mem_array(n, dtype_rows[d].bytes);
	for (size_t i = 0; i < n; i++)
		put(d, p, i, draw(d, rank, i));
	return p;
}

static double as_stored(enum dtype d, double x)
{
	char cell[8] = {0};
	put(d, cell, 0, x);
	return get(d, cell, 0);
}

/* Contributions of all ranks to element i, folded in rank order in the accumulator's precision. */
static double reduced(enum dtype d, enum comm_reduction op, int size, size_t i)
{
	double acc = as_stored(d, draw(d, 0, i));
	for (int r = 1; r < size; r++) {
		double x = as_stored(d, draw(d, r, i));
		if (op == REDUCE_SUM)
			acc = d == DT_f32 || d == DT_bf16 || d == DT_f16 ? (double)(float)(acc + x) : acc + x;
		else
			acc = op == REDUCE_MAX ? fmax(acc, x) : fmin(acc, x);
	}
	return acc;
}

static void *reference(enum dtype d, enum comm_reduction op, int size, size_t first, size_t n)
{
	void *p = mem_array(n, dtype_rows[d].bytes);
	for (size_t i = 0; i < n; i++)
		put(d, p, i, reduced(d, op, size, first + i));
	return p;
}

static void same(enum dtype d, const void *a, const void *b, size_t n, const char *what)
{
	size_t bytes = dtype_rows[d].bytes, i = 0;
	while (i < n && !memcmp((const char *)a + i * bytes, (const char *)b + i * bytes, bytes))
		i++;
	if (i < n)
		test_failed(__FILE__, __LINE__, "%s %s: element %zu of %zu is %.9g, not %.9g", what,
		            dtype_rows[d].name, i, n, get(d, a, i), get(d, b, i));
}

static void ok(int rc, const struct err *e, const char *what)
{
	if (rc)
		test_failed(__FILE__, __LINE__, "%s: %s", what, e->text);
}

/* ---- reductions ---- */

static void try_all_reduce(struct comm *c, enum dtype d, enum comm_reduction op, size_t n)
{
	struct err e = {0};
	void *data = filled(d, c->rank, n), *want = reference(d, op, c->size, 0, n);
	ok(comm_all_reduce(c, data, n, d, op, &e), &e, "all_reduce");
	same(d, data, want, n, "all_reduce");
	free(data);
	free(want);
}

static void try_reduce_scatter(struct comm *c, enum dtype d, enum comm_reduction op, size_t n)
{
	struct err e = {0};
	size_t bytes = dtype_rows[d].bytes, size = (size_t)c->size, rank = (size_t)c->rank;
	void *send = filled(d, c->rank, n * size), *recv = mem_array(n, bytes);
	void *want = reference(d, op, c->size, n * rank, n);
	ok(comm_reduce_scatter(c, send, recv, n, d, op, &e), &e, "reduce_scatter");
	same(d, recv, want, n, "reduce_scatter");
	char *own = (char *)send + n * rank * bytes;
	ok(comm_reduce_scatter(c, send, own, n, d, op, &e), &e, "reduce_scatter in place");
	same(d, own, want, n, "reduce_scatter in place");
	free(send);
	free(recv);
	free(want);
}

/* Uneven parts; that of rank 1 is empty. */
static size_t part(int rank, size_t n)
{
	return rank == 1 ? 0 : n / 2 + (size_t)rank * 3;
}

static size_t parts(const struct comm *c, size_t *counts, size_t n)
{
	size_t first = 0;
	for (int r = 0; r < c->size; r++) {
		counts[r] = part(r, n);
		first += r < c->rank ? counts[r] : 0;
	}
	return first;
}

static size_t total(const struct comm *c, const size_t *counts)
{
	size_t n = 0;
	for (int r = 0; r < c->size; r++)
		n += counts[r];
	return n;
}

static void try_reduce_scatter_v(struct comm *c, enum dtype d, size_t n)
{
	struct err e = {0};
	size_t counts[64] = {0}, first = parts(c, counts, n), own = counts[c->rank];
	void *send = filled(d, c->rank, total(c, counts)), *recv = mem_array(own, dtype_rows[d].bytes);
	void *want = reference(d, REDUCE_SUM, c->size, first, own);
	ok(comm_reduce_scatter_v(c, send, recv, counts, d, REDUCE_SUM, &e), &e, "reduce_scatter_v");
	same(d, recv, want, own, "reduce_scatter_v");
	free(send);
	free(recv);
	free(want);
}

static void reductions(struct comm *c)
{
	for (size_t k = 0; k < N_SIZES; k++)
		for (enum dtype d = 0; d < DT_COUNT; d++) {
			if (sizes[k] == LARGE && d != DT_f32 && d != DT_bf16)
				continue; /* what is large is slow to check, and the type matters little there
				           */
			for (enum comm_reduction op = 0; op < REDUCE_COUNT; op++) {
				try_all_reduce(c, d, op, sizes[k]);
				if (sizes[k] < LARGE || op == REDUCE_SUM)
					try_reduce_scatter(c, d, op, sizes[k]);
			}
			try_reduce_scatter_v(c, d, sizes[k]);
		}
}

/* ---- copies ---- */

static void try_all_gather(struct comm *c, enum dtype d, size_t n)
{
	struct err e = {0};
	size_t bytes = dtype_rows[d].bytes, counts[64] = {0};
	void *send = filled(d, c->rank, n), *recv = mem_array(n * (size_t)c->size, bytes);
	char *own = (char *)recv + n * (size_t)c->rank * bytes;
	ok(comm_all_gather(c, send, recv, n, d, &e), &e, "all_gather");
	for (int again = 0; again < 2; again++) {
		for (int r = 0; r < c->size; r++) {
			void *want = filled(d, r, n);
			same(d, (char *)recv + n * (size_t)r * bytes, want, n, "all_gather");
			free(want);
		}
		memset(recv, 0, n * (size_t)c->size * bytes);
		memcpy(own, send, n * bytes);
		if (!again)
			ok(comm_all_gather(c, own, recv, n, d, &e), &e, "all_gather in place");
	}
	free(send);
	free(recv);
	parts(c, counts, n);
	send = filled(d, c->rank, counts[c->rank]);
	recv = mem_array(total(c, counts), bytes);
	ok(comm_all_gather_v(c, send, recv, counts, d, &e), &e, "all_gather_v");
	char *at = recv;
	for (int r = 0; r < c->size; r++) {
		void *want = filled(d, r, counts[r]);
		same(d, at, want, counts[r], "all_gather_v");
		at += counts[r] * bytes;
		free(want);
	}
	free(send);
	free(recv);
}

static void try_broadcast(struct comm *c, enum dtype d, size_t n)
{
	struct err e = {0};
	for (int root = 0; root < c->size; root++) {
		void *data = filled(d, c->rank, n), *want = filled(d, root, n);
		ok(comm_broadcast(c, data, n, d, root, &e), &e, "broadcast");
		same(d, data, want, n, "broadcast");
		free(data);
		free(want);
	}
}

/* What `from` sends to `to`: even parts of n, or uneven ones, some of them empty. */
static size_t share(int from, int to, size_t n, bool even)
{
	return even ? n : (size_t)((from * 3 + to * 5) % 7) * (n / 7 + 1) / 2;
}

static void try_all_to_all(struct comm *c, enum dtype d, size_t n, bool even)
{
	struct err e = {0};
	size_t bytes = dtype_rows[d].bytes, give[64], take[64];
	for (int r = 0; r < c->size; r++) {
		give[r] = share(c->rank, r, n, even);
		take[r] = share(r, c->rank, n, even);
	}
	void *send = filled(d, c->rank, total(c, give)), *recv = mem_array(total(c, take), bytes);
	if (even)
		ok(comm_all_to_all(c, send, recv, n, d, &e), &e, "all_to_all");
	else
		ok(comm_all_to_all_v(c, send, give, recv, take, d, &e), &e, "all_to_all_v");
	char *at = recv;
	for (int r = 0; r < c->size; r++) {
		size_t before = 0;
		for (int to = 0; to < c->rank; to++)
			before += share(r, to, n, even);
		void *theirs = filled(d, r, before + take[r]);
		same(d, at, (char *)theirs + before * bytes, take[r], even ? "all_to_all" : "all_to_all_v");
		at += take[r] * bytes;
		free(theirs);
	}
	free(send);
	free(recv);
}

static void copies(struct comm *c)
{
	struct err e = {0};
	for (size_t k = 0; k < N_SIZES; k++)
		for (enum dtype d = 0; d < DT_COUNT; d++) {
			if (sizes[k] == LARGE && d != DT_bf16)
				continue;
			try_all_gather(c, d, sizes[k]);
			try_broadcast(c, d, sizes[k]);
			try_all_to_all(c, d, sizes[k], true);
			try_all_to_all(c, d, sizes[k], false);
		}
	ok(comm_barrier(c, &e), &e, "barrier");
}

/* ---- messages ---- */

/* Around the ring, two tags at once that are received in the other order, and to oneself. */
static void try_messages(struct comm *c, size_t n)
{
	struct err e = {0};
	struct comm_request r[4];
	int right = (c->rank + 1) % c->size, left = (c->rank + c->size - 1) % c->size;
	void *out[2] = {filled(DT_f32, c->rank, n), filled(DT_f32, c->rank + 100, n)};
	void *want[2] = {filled(DT_f32, left, n), filled(DT_f32, left + 100, n)};
	void *in[2] = {mem_array(n, 4), mem_array(n, 4)};
	int rc = 0;
	for (int i = 0; i < 2 && !rc; i++)
		rc = comm_irecv(c, in[1 - i], n, DT_f32, left, 1 - i, &r[i], &e);
	for (int i = 0; i < 2 && !rc; i++)
		rc = comm_isend(c, out[i], n, DT_f32, right, i, &r[2 + i], &e);
	ok(rc ? rc : comm_wait(r, 4, &e), &e, "messages around the ring");
	for (int i = 0; i < 2; i++) {
		same(DT_f32, in[i], want[i], n, "message");
		free(in[i]);
		free(out[i]);
		free(want[i]);
	}
}

/* Down the line, as a pipeline does: each waits for the one before. */
static void try_line(struct comm *c, size_t n)
{
	struct err e = {0};
	float *x = mem_array(n, sizeof *x);
	if (c->rank)
		ok(comm_recv(c, x, n, DT_f32, c->rank - 1, 9, &e), &e, "recv");
	for (size_t i = 0; i < n; i++)
		x[i] += 1;
	if (c->rank + 1 < c->size)
		ok(comm_send(c, x, n, DT_f32, c->rank + 1, 9, &e), &e, "send");
	for (size_t i = 0; i < n; i++)
		if (x[i] != (float)(c->rank + 1)) {
			test_failed(__FILE__, __LINE__, "down the line: element %zu is %g on rank %d", i,
			            (double)x[i], c->rank);
			break;
		}
	free(x);
}

/* ---- groups ---- */

static void try_group(struct comm *group, const int *members, int n)
{
	struct err e = {0};
	int64_t sum = 0, want = 0;
	MUST(group != NULL);
	CHECK_INT(group->size, n);
	for (int i = 0; i < group->size && i < n; i++) {
		CHECK_INT(group->world_rank[i], members[i]);
		want += members[i] + 1;
	}
	sum = group->world_rank[group->rank] + 1;
	ok(comm_all_reduce(group, &sum, 1, DT_i64, REDUCE_SUM, &e), &e, "all_reduce of a group");
	CHECK_INT(sum, want);
	try_all_gather(group, DT_bf16, 1000);
	try_messages(group, 1000);
}

static void try_split(struct comm *world)
{
	struct err e = {0};
	struct comm *odd = NULL, *nobody = NULL, *inner = NULL;
	int members[64], n = 0;
	for (int r = world->rank % 2; r < world->size; r += 2)
		members[n++] = r;
	ok(comm_split(world, &odd, world->rank % 2, "halves", &e), &e, "split");
	try_group(odd, members, n);
	ok(comm_split(world, &nobody, world->rank ? 0 : -1, "all but the first", &e), &e,
	   "split with one left out");
	CHECK((nobody == NULL) == (world->rank == 0));
	if (nobody)
		CHECK_INT(nobody->rank, world->rank - 1);
	if (odd)
		ok(comm_split(odd, &inner, odd->rank / 2, "pairs", &e), &e, "split of a group");
	if (inner)
		try_group(inner, odd->world_rank + odd->rank / 2 * 2, inner->size);
	comm_close(inner);
	comm_close(nobody);
	comm_close(odd);
}

static void try_axes(struct comm *world, const struct mesh_sizes *sizes)
{
	static const unsigned sets[] = {
	        AXIS_BIT(tp), AXIS_BIT(cp),  AXIS_BIT(dp), AXIS_BIT(pp),
	        AXIS_BIT(ep), AXIS_BIT(edp), AXES_DENSE,   AXIS_BIT(cp) | AXIS_BIT(dp)};
	struct mesh m;
	struct err e = {0};
	if (mesh_init(&m, world->size, sizes, &e))
		return; /* this world is not a multiple */
	for (size_t i = 0; i < sizeof sets / sizeof *sets; i++) {
		struct comm *group = NULL;
		int members[64], n = mesh_group_size(&m, sets[i]);
		int place = mesh_group(&m, sets[i], world->rank, members);
		ok(comm_split_axes(world, &group, &m, sets[i], &e), &e, "split_axes");
		try_group(group, members, n);
		if (group)
			CHECK_INT(group->rank, place);
		comm_close(group);
	}
}

/* ---- codes ---- */

static void try_any(struct comm *c)
{
	struct err e = {0};
	CHECK_INT(comm_any(c, 0, &e), 0);
	int last = c->size - 1, code = c->rank == last ? 74 : 0;
	if (code)
		err_set(&e, code, "the disk is full");
	CHECK_INT(comm_any(c, code, &e), 74);
	char who[32];
	snprintf(who, sizeof who, "rank %d", last);
	CHECK_HAS(e.text, code ? "the disk is full" : who);
	struct err worst = {0};
	CHECK_INT(comm_any(c, c->rank ? 65 : 79, &worst), 79);
}

void comm_suite(struct comm *world)
{
	static const size_t lengths[] = {0, 1, 1000, 100003};
	reductions(world);
	copies(world);
	for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
		try_messages(world, lengths[i]);
		try_line(world, lengths[i]);
	}
	try_split(world);
	try_axes(world, &(struct mesh_sizes){.tp = 2});
	try_axes(world, &(struct mesh_sizes){.tp = 2, .pp = 2, .ep = 2});
	try_axes(world, &(struct mesh_sizes){.tp = 2, .cp = 2, .ep = 2});
	try_any(world);
}
