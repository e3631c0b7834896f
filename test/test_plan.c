/* The planner on random programs: memory that is shared and reused changes no bit of a result, and what a
 * pass breaks is refused. */
#include "base/err.h"
#include "base/rng.h"
#include "graph/exec.h"
#include "graph/rule.h"
#include "kernels/kernels.h"
#include "test/test.h"

#include <stdlib.h>

/* A random program: a directed graph of the operations of a network, a loss behind it. */

enum { ROWS = 8, CLASSES = 16, PROGRAMS = 150, MAX_POOL = 64 };

struct random_program {
	struct prog p;
	uint64_t seed, drawn;
	int32_t ids, targets, keys, scale, loss;
	int32_t pool[MAX_POOL];
	int n_pool;
};

static int32_t draw(struct random_program *r, int32_t limit)
{
	return (int32_t)(rng_bits(r->seed, r->drawn++) % (uint64_t)limit);
}

static int32_t outside(struct prog *p, enum region region, enum dtype dtype, int32_t rows, int32_t columns)
{
	int32_t dim[] = {rows, columns};
	return prog_value(p, "outside", region, dtype, columns ? 2 : 1, dim);
}

/* One more operation on values of the pool, the newest most likely; NONE where it does not fit. */
static int32_t random_node(struct random_program *r)
{
	struct prog *p = &r->p;
	int32_t back = draw(r, 3), a = r->pool[r->n_pool > back ? r->n_pool - 1 - back : 0];
	int32_t width = p->value[a].dim[1], b = r->pool[draw(r, r->n_pool)], wide = 8 << draw(r, 3);
	union op_arg act = {.activation = {draw(r, ACT_COUNT)}};
	int32_t gain = outside(p, R_PARAM, DT_f32, width, 0), shift = outside(p, R_PARAM, DT_f32, width, 0);
	switch (draw(r, 8)) {
	case 0:
	case 1:
		return rule_same_shape(p, a, b) ? EMIT(p, add, NO_ARG, a, b) : NONE;
	case 2:
		return EMIT(p, activation, &act, a);
	case 3:
		return EMIT(p, linear, NO_ARG, a, outside(p, R_PARAM, DT_f32, wide, width),
		            draw(r, 2) ? outside(p, R_PARAM, DT_f32, wide, 0) : NONE);
	case 4:
		return EMIT(p, rmsnorm, ARG(.norm = {.eps = 1e-5f}), a, gain);
	case 5:
		return EMIT(p, layernorm, ARG(.norm = {.eps = 1e-5f}), a, gain, shift);
	case 6:
		return width > 8 ? EMIT(p, glu, &act, a) : NONE;
	default:
		return EMIT(p, dropout, ARG(.dropout = {0.25f, (uint32_t)r->drawn, 2}), a, r->keys);
	}
}

static void build_random(struct random_program *r, uint64_t seed)
{
	*r = (struct random_program){.seed = seed};
	struct prog *p = &r->p;
	prog_init(p);
	r->ids = outside(p, R_INPUT, DT_i32, ROWS, 0);
	r->targets = outside(p, R_INPUT, DT_i32, ROWS, 0);
	r->keys = outside(p, R_INPUT, DT_i64, ROWS / 2, 0);
	r->scale = outside(p, R_INPUT, DT_f32, 1, 0);
	r->loss = outside(p, R_STAT, DT_f64, 1, 0);
	r->pool[r->n_pool++] = EMIT(p, embedding, NO_ARG, outside(p, R_PARAM, DT_f32, CLASSES, 16), r->ids);
	int nodes = 4 + draw(r, 30);
	for (int i = 0; i < nodes; i++) {
		p->layer = i / 5;
		int32_t v = random_node(r);
		if (v != NONE)
			r->pool[r->n_pool++] = v;
	}
	p->layer = -1;
	int32_t last = r->pool[r->n_pool - 1], outs[OP_MAX_OUT] = {r->loss, NONE, NONE};
	int32_t head = outside(p, R_PARAM, DT_f32, CLASSES, p->value[last].dim[1]);
	EMIT_INTO(p, cross_entropy, ARG(.cross_entropy = {CLASSES - 3}), outs,
	          EMIT(p, linear, NO_ARG, last, head, NONE), r->targets);
	prog_backward(p, r->loss, r->scale);
	if (draw(r, 2))
		prog_fuse(p);
	prog_recompute(p, (enum repeat)draw(r, 3), draw(r, 2) ? -1 : 2);
	prog_plan(p);
	prog_check(p);
}

/* The planner's invariants, in other words than prog_check's: two values whose lives meet do not share a
 * byte, unless one is computed in place of the other at the very node where that one is read last. */

static int32_t end_of(const struct value *v)
{
	return v->last > v->def ? v->last : v->def;
}

static bool in_place(const struct prog *p, int32_t before, int32_t after)
{
	const struct value *a = &p->value[before], *b = &p->value[after];
	const struct node *n = &p->node[b->def];
	int flags = op_rows[n->op].flags;
	bool allowed =
	        (flags & IN_PLACE_0 && n->in[0] == before) || (flags & IN_PLACE_1 && n->in[1] == before);
	return allowed && n->out[0] == after && a->last == b->def && a->offset_bytes == b->offset_bytes &&
	       value_bytes(a) == value_bytes(b) && n->in[0] != n->in[1];
}

static bool share_bytes(const struct value *a, const struct value *b)
{
	return a->region == b->region && a->offset_bytes < b->offset_bytes + value_bytes(b) &&
	       b->offset_bytes < a->offset_bytes + value_bytes(a);
}

static bool lives_meet(const struct value *a, const struct value *b)
{
	bool both_pass = a->region >= R_SAVED && b->region >= R_SAVED;
	return !both_pass || (a->def <= end_of(b) && b->def <= end_of(a));
}

static void check_memory(const struct prog *p, const char *what)
{
	for (int32_t i = 0; i < (int32_t)p->n_value; i++) {
		const struct value *a = &p->value[i];
		if (a->region >= R_SAVED && a->def == NONE)
			continue; /* written by nobody: a node that a pass removed */
		if (a->offset_bytes < 0 || a->offset_bytes % 64 ||
		    a->offset_bytes + value_bytes(a) > p->bytes[a->region])
			test_failed(__FILE__, __LINE__, "%s: v%d lies outside its region", what, i);
		if (a->region == R_TEMP && a->last != NONE &&
		    p->node[a->def].segment != p->node[a->last].segment)
			test_failed(__FILE__, __LINE__, "%s: v%d outlives its segment in temporary memory",
			            what, i);
		for (int32_t j = 0; j < i; j++) {
			const struct value *b = &p->value[j];
			if ((b->region >= R_SAVED && b->def == NONE) || !share_bytes(a, b) ||
			    !lives_meet(a, b) || in_place(p, i, j) || in_place(p, j, i))
				continue;
			test_failed(__FILE__, __LINE__, "%s: v%d lies on v%d", what, i, j);
		}
	}
}

/* Every passing value gets memory that nothing else uses: what reuse is compared with. */
static void defeat_sharing(struct prog *p)
{
	p->bytes[R_SAVED] = p->bytes[R_TEMP] = 0;
	for (size_t v = 0; v < p->n_value; v++) {
		struct value *x = &p->value[v];
		if (x->region < R_SAVED)
			continue;
		x->region = R_TEMP;
		x->home = (int32_t)v;
		x->offset_bytes = p->bytes[R_TEMP];
		p->bytes[R_TEMP] += (value_bytes(x) + 63) / 64 * 64;
	}
}

static void fill_random(struct random_program *r, struct exec *x, int batch)
{
	int32_t ids[ROWS], targets[ROWS];
	float scale = 0.25f;
	for (int i = 0; i < ROWS; i++) {
		ids[i] = (int32_t)(rng_bits(1, (uint64_t)(batch * ROWS + i)) % CLASSES);
		targets[i] =
		        i == 3 ? -1 : (int32_t)(rng_bits(2, (uint64_t)(batch * ROWS + i)) % (CLASSES - 3));
	}
	exec_upload(x, r->ids, ids);
	exec_upload(x, r->targets, targets);
	exec_upload(x, r->keys, (int64_t[ROWS / 2]){batch, 7, -9, 1LL << 40});
	exec_upload(x, r->scale, &scale);
	for (int32_t v = 0; batch == 0 && v < (int32_t)r->p.n_value; v++)
		if (r->p.value[v].region == R_PARAM)
			rng_normal((uint64_t)v, 0, (size_t)value_count(&r->p.value[v]), 0.5f, 0.5f,
			           exec_data(x, v));
}

/* Nothing that backward needs may lie in temporary memory. */
static void spoil_temporaries(const struct prog *p, struct exec *x)
{
	for (int32_t v = 0; v < (int32_t)p->n_value; v++)
		if (p->value[v].region == R_TEMP && p->value[v].offset_bytes == 0 &&
		    p->value[v].def != NONE) {
			memset(exec_data(x, v), 0xff, (size_t)p->bytes[R_TEMP]);
			return;
		}
}

/* Two micro-batches; returns the loss and all gradients, one behind the other: the caller's. */
static struct buf run_random(struct random_program *r, const struct backend *backend, bool spoil)
{
	struct buf out = {0};
	struct stream *stream;
	struct exec *x = NULL;
	struct err e = {0};
	CHECK(!backend->open(&stream, 1, &e));
	if (CHECK(!exec_create(&x, &r->p, backend, stream, NULL, &e))) {
		for (int batch = 0; batch < 2; batch++) {
			fill_random(r, x, batch);
			CHECK(!exec_run(x, SEG_FWD, batch == 0, &e));
			if (spoil)
				spoil_temporaries(&r->p, x);
			CHECK(!exec_run(x, SEG_BWD, batch == 0, &e));
		}
		for (int32_t v = 0; v < (int32_t)r->p.n_value; v++)
			if (r->p.value[v].region == R_GRAD || r->p.value[v].region == R_STAT)
				buf_add(&out, exec_data(x, v), (size_t)value_bytes(&r->p.value[v]));
		exec_free(x);
	}
	backend->close(stream);
	return out;
}

TEST(shared_and_reused_memory_changes_no_bit)
{
	for (uint64_t seed = 0; seed < PROGRAMS; seed++) {
		struct random_program planned, apart;
		const struct backend *backend = seed % 2 ? &cpu_backend : &cpu_reference_backend;
		char what[40];
		snprintf(what, sizeof what, "program %d", (int)seed);
		build_random(&planned, seed);
		build_random(&apart, seed);
		if (planned.p.e.code) {
			test_failed(__FILE__, __LINE__, "%s: %s", what, planned.p.e.text);
		} else {
			check_memory(&planned.p, what);
			int64_t reused = planned.p.bytes[R_TEMP] + planned.p.bytes[R_SAVED];
			defeat_sharing(&apart.p);
			CHECK(reused < apart.p.bytes[R_TEMP]);
			struct buf a = run_random(&planned, backend, true),
			           b = run_random(&apart, backend, false);
			if (a.length != b.length || !a.length || memcmp(a.data, b.data, a.length))
				test_failed(__FILE__, __LINE__, "%s: results differ", what);
			CHECK(a.length > 8 && isfinite(*(double *)a.data));
			buf_free(&a);
			buf_free(&b);
		}
		prog_free(&planned.p);
		prog_free(&apart.p);
	}
}

/* What prog_check is for: programs that passes broke. */
TEST(a_broken_plan_is_refused)
{
	struct random_program r;
	build_random(&r, 3);
	MUST(!r.p.e.code);
	int refused = 0, tried = 0;
	for (size_t i = 0; i < r.p.n_node; i++)
		for (int k = 0; k < op_rows[r.p.node[i].op].n_in; k++) {
			int32_t in = r.p.node[i].in[k], out = r.p.node[i].out[0];
			if (in == NONE || r.p.value[in].region != R_TEMP || r.p.value[out].region != R_TEMP ||
			    r.p.value[in].home == r.p.value[out].home)
				continue;
			int64_t old = r.p.value[out].offset_bytes;
			r.p.value[out].offset_bytes = r.p.value[in].offset_bytes;
			tried++;
			refused +=
			        prog_check(&r.p) == EXIT_INTERNAL && strstr(r.p.e.text, "still read") != NULL;
			r.p.e.code = 0;
			r.p.value[out].offset_bytes = old;
		}
	CHECK(tried > 5);
	CHECK_INT(refused, tried);
	CHECK(!prog_check(&r.p));
	struct node first = r.p.node[0];
	memmove(r.p.node, r.p.node + 1, (r.p.n_node - 1) * sizeof first);
	r.p.node[r.p.n_node - 1] = first;
	prog_refresh(&r.p);
	CHECK_INT(prog_check(&r.p), EXIT_INTERNAL);
	CHECK_HAS(r.p.e.text, "reads a value before it is written");
	prog_free(&r.p);
}

int main(int argc, char **argv)
{
	return test_main(argc, argv);
}
