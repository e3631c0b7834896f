/* pentad plan: what a configuration costs, before a node-hour is spent. Bytes and operations are those of the
 * programs that `train` would run; only times rest on assumptions, and these are printed. */
#include "apps/commands.h"
#include "apps/plan.h"
#include "base/err.h"
#include "base/log.h"
#include "base/text.h"
#include "train/run.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { COLUMNS = 6, MAX_WORLD = 1 << 24 };

/* The configuration and the machine */

static int ranks_on_a_node(const struct plan_request *q)
{
	int64_t ranks = q->ranks_per_node ? q->ranks_per_node : sysconf(_SC_NPROCESSORS_ONLN);
	return ranks < MAX_WORLD ? (int)ranks : MAX_WORLD;
}

int plan_read(const struct plan_request *q, struct config *c, struct auto_machine *m, struct err *e)
{
	struct config_source source = cli_config_source(&q->layers);
	int rc = config_load(c, &source, e);
	if (!rc)
		rc = run_complete_config(c, e);
	if (rc)
		return rc;
	int64_t world = q->world_size ? q->world_size : auto_smallest_world(c, MAX_WORLD);
	if (world > MAX_WORLD)
		return err_set(e, EXIT_CONFIG,
		               "the layout needs more than %d ranks; at most as many are allowed", MAX_WORLD);
	*m = auto_machine_of(c, (int)world, ranks_on_a_node(q));
	m->rate = 1e12 * q->tflops;
	if (q->memory_gib > 0)
		m->node_bytes = (int64_t)(q->memory_gib * (1 << 30));
	c->dist.device = DEVICE_AUTO; /* none is needed to plan for it */
	return 0;
}

int plan_measure(const struct config *c, struct auto_machine *m, struct err *e)
{
	return m->rate > 0 ? 0
	                   : run_measure_device(c, (struct rank_on_host){0, m->ranks_per_node}, &m->rate, e);
}

/* Chooses the layout where it is open: the best, or, where none fits, the one that needs least. */
static int choose(struct plan *p, struct err *e)
{
	struct auto_search s = {0};
	if (!config_layout_is_open(&p->c))
		return 0;
	int rc = auto_search(&s, &p->c, &p->machine, e);
	if (!rc) {
		(s.fitting ? auto_put_reason : auto_put_remedies)(&p->why, &s, &p->c);
		rc = auto_apply(&p->c, &auto_best(&s)->layout, p->machine.world, e);
	}
	auto_free(&s);
	return rc;
}

/* Alternatives */

static void summarise(struct alternative *a, const struct estimate *x)
{
	a->legal = true;
	a->bubble = x->bubble;
	a->flop_critical = x->flop_critical;
	a->saved_bytes = estimate_saved_bytes(x);
	a->total_bytes = memory_total(&x->stage[x->most_loaded].memory);
}

/* An alternative that the rules refuse stays out. */
static void try_alternative(struct plan *p, struct alternative *a)
{
	struct config c;
	struct estimate x = {0};
	struct err e = {0};
	int rc = 0;
	if (a->is_now) {
		summarise(a, &p->x);
		return;
	}
	config_copy(&c, &p->c);
	for (int i = 0; i < MAX_CHANGES && a->set[i][0] && !rc; i++)
		rc = config_replace(&c, a->set[i][0], a->set[i][1], "plan", &e);
	if (!rc && !config_check(&c, p->machine.world, &e) &&
	    !estimate_layout(&x, &c, p->machine.ranks_per_node, &e))
		summarise(a, &x);
	estimate_free(&x);
	config_free(&c);
}

static void add_schedule(struct plan *p, enum parallel_schedule kind, int64_t chunks)
{
	static const char key[] = "parallel.pipeline_schedule",
	                  chunks_key[] = "parallel.virtual_pipeline_model_parallel_size";
	const struct parallel_config *now = &p->c.parallel;
	struct alternative *a = &p->schedule[p->n_schedule++];
	const char *word = parallel_schedule_choices[kind].name;
	struct arena *keep = &p->c.arena;
	*a = (struct alternative){
	        .name = chunks > 1 ? arena_printf(keep, "%s, %lld chunks", word, (long long)chunks) : word,
	        .set = {{key, word}, {chunks_key, arena_printf(keep, "%lld", (long long)chunks)}},
	        .is_now = now->pipeline_schedule == kind &&
	                  now->virtual_pipeline_model_parallel_size == chunks};
	try_alternative(p, a);
}

static void compare_schedules(struct plan *p)
{
	int64_t chunks = p->c.parallel.virtual_pipeline_model_parallel_size;
	if (p->x.n_stage == 1)
		return;
	add_schedule(p, PARALLEL_1F1B, 1);
	add_schedule(p, PARALLEL_INTERLEAVED, chunks > 1 ? chunks : 2);
	add_schedule(p, PARALLEL_ZERO_BUBBLE, 1);
}

static void compare_recomputation(struct plan *p)
{
	for (int g = 0; g <= RECOMPUTE_FULL; g++) {
		struct alternative *a = &p->recompute[p->n_recompute++];
		const char *word = recompute_granularity_choices[g].name;
		*a = (struct alternative){
		        .name = word,
		        .set = {{"recompute.granularity", word},
		                {g == RECOMPUTE_FULL ? NULL : "recompute.num_layers", "null"}},
		        .is_now = (int)p->c.recompute.granularity == g};
		try_alternative(p, a);
	}
}

/* Assumptions */

static void assume(struct plan *p)
{
	const struct auto_machine *m = &p->machine;
	p->nodes = (m->world + m->ranks_per_node - 1) / m->ranks_per_node;
	p->node_bytes = estimate_node_bytes(&p->x, m->world, m->ranks_per_node);
	p->fits = p->node_bytes <= m->node_bytes;
	p->step_s = m->rate > 0 ? p->x.flop_critical / m->rate : NAN;
}

double plan_run_s(const struct plan *p)
{
	return p->step_s * (double)p->c.train.train_iters;
}

double plan_node_hours(const struct plan *p)
{
	return plan_run_s(p) / 3600 * (double)p->nodes;
}

/* For people */

static const char *hours(char *out, size_t cap, double h)
{
	if (h < 1000)
		snprintf(out, cap, "%.3g", h);
	return h < 1000 ? out : text_count(out, cap, h);
}

static void print_total(const struct plan *p)
{
	const struct estimate *x = &p->x;
	char a[32];
	if (p->why.length)
		puts(p->why.data);
	for (size_t i = 0; i < p->c.derived.equations.n; i++)
		printf("%s\n", p->c.derived.equations.items[i]);
	for (size_t i = 0; i < p->c.derived.stages.n; i++)
		printf("%s\n", p->c.derived.stages.items[i]);
	printf("parameters        %12lld   %s\n", (long long)x->parameters,
	       text_count(a, sizeof a, (double)x->parameters));
	printf("flop a step       %12.4g   %.4g a token (model)\n", x->flop_per_step,
	       x->flop_per_step / ((double)p->c.train.global_batch_size * (double)p->c.model.seq_length));
}

struct columns { /* stages [first, first + n) */
	const struct estimate *x;
	int first, n;
};

static void print_row(const struct columns *c, const char *name, const char *doc,
                      void (*put)(const struct estimate_stage *s, int row, char *out, size_t cap), int row)
{
	printf("  %-14s", name);
	for (int i = 0; i < c->n; i++) {
		char text[64];
		put(&c->x->stage[c->first + i], row, text, sizeof text);
		printf(" %10s", text);
	}
	printf("%s%s\n", *doc ? "   " : "", doc);
}

static void put_layers(const struct estimate_stage *s, int row, char *out, size_t cap)
{
	(void)row;
	snprintf(out, cap, "%lld", (long long)s->layers);
}

static void put_parameters(const struct estimate_stage *s, int row, char *out, size_t cap)
{
	(void)row;
	text_count(out, cap, (double)s->parameters);
}

static void put_operations(const struct estimate_stage *s, int row, char *out, size_t cap)
{
	(void)row;
	snprintf(out, cap, "%zu", s->operations);
}

static void put_flop(const struct estimate_stage *s, int row, char *out, size_t cap)
{
	(void)row;
	snprintf(out, cap, "%.4g", s->flop);
}

static void put_bytes(const struct estimate_stage *s, int row, char *out, size_t cap)
{
	text_bytes(out, cap, (double)(row < MEMORY_COUNT ? s->memory.bytes[row] : memory_total(&s->memory)));
}

static void put_wire_bytes(const struct estimate_stage *s, int axis, char *out, size_t cap)
{
	text_bytes(out, cap, s->wire_bytes[axis]);
}

/* "4" or, by chunk, "5+3". */
static void put_in_flight(const struct estimate_stage *s, int row, char *out, size_t cap)
{
	size_t n = 0;
	(void)row;
	for (int i = 0; i < s->n_chunk && n < cap; i++)
		n += (size_t)snprintf(out + n, cap - n, "%s%d", i ? "+" : "", s->chunk[i].in_flight);
}

static bool any_bytes(const struct columns *c, int row)
{
	for (int i = 0; i < c->n; i++)
		if (c->x->stage[c->first + i].memory.bytes[row])
			return true;
	return false;
}

static void print_columns(const struct columns *c)
{
	printf("  %-14s", "stage");
	for (int i = 0; i < c->n; i++)
		printf(" %10d", c->first + i);
	printf("\n");
	print_row(c, "layers", "", put_layers, 0);
	print_row(c, "parameters", "that the rank holds", put_parameters, 0);
	print_row(c, "operations", "in its step program", put_operations, 0);
	print_row(c, "flop", "a step, recomputation among them", put_flop, 0);
	for (int i = 0; i < MEMORY_COUNT; i++) {
		if (any_bytes(c, i))
			print_row(c, memory_rows[i].name, memory_rows[i].doc, put_bytes, i);
		if (i == R_SAVED)
			print_row(c, "  in flight", "micro-batches of each chunk at once", put_in_flight, 0);
	}
	print_row(c, "total", "", put_bytes, MEMORY_COUNT);
	for (int a = 0; a < AXIS_COUNT; a++)
		for (int i = 0; i < c->n; i++)
			if (c->x->stage[c->first + i].wire_bytes[a] > 0) {
				char name[32];
				snprintf(name, sizeof name, "sent, %s", mesh_axis_name((enum mesh_axis)a));
				print_row(c, name, "a step", put_wire_bytes, a);
				break;
			}
}

static void print_stages(const struct estimate *x)
{
	char a[32];
	printf("a rank of each pipeline stage, exact:\n");
	for (int first = 0; first < x->n_stage; first += COLUMNS) {
		struct columns c = {x, first, x->n_stage - first < COLUMNS ? x->n_stage - first : COLUMNS};
		print_columns(&c);
	}
	if (x->n_stage > 1)
		printf("most loaded: stage %d, %s a rank\n", x->most_loaded,
		       text_bytes(a, sizeof a, (double)memory_total(&x->stage[x->most_loaded].memory)));
}

static void print_alternatives(const struct plan *p, const char *title, const struct alternative *list, int n)
{
	if (!n)
		return;
	printf("%-24s %8s %10s %10s %10s   (* as configured; saved and memory of the fullest rank)\n", title,
	       "bubble", "saved", "memory", "time");
	for (int i = 0; i < n; i++) {
		char saved[32], total[32], time[32];
		if (list[i].legal)
			printf("%c %-22s %6.1f %% %10s %10s %10s\n", list[i].is_now ? '*' : ' ', list[i].name,
			       100 * list[i].bubble,
			       text_bytes(saved, sizeof saved, (double)list[i].saved_bytes),
			       text_bytes(total, sizeof total, (double)list[i].total_bytes),
			       text_seconds(time, sizeof time, list[i].flop_critical / p->machine.rate));
	}
}

static void print_times(const struct plan *p)
{
	char a[32], b[32], c[32];
	printf("checkpoint        %12s\n", text_bytes(a, sizeof a, (double)p->x.checkpoint_bytes));
	printf("time              %12s   a step at least: all work at %.3g Tflop/s a rank (%s), "
	       "communication "
	       "not counted\n",
	       text_seconds(a, sizeof a, p->step_s), p->machine.rate / 1e12,
	       p->q->tflops > 0 ? "--tflops" : "matrix products of this machine, now; --tflops");
	printf("                  %12s   for %lld steps: %s node-hours of %lld node%s of %lld rank%s "
	       "(--ranks-per-node)\n",
	       text_seconds(a, sizeof a, plan_run_s(p)), (long long)p->c.train.train_iters,
	       hours(b, sizeof b, plan_node_hours(p)), (long long)p->nodes, p->nodes == 1 ? "" : "s",
	       (long long)p->machine.ranks_per_node, p->machine.ranks_per_node == 1 ? "" : "s");
	printf("%s: the fullest node takes %s of %s (%s)\n", p->fits ? "fits" : "does NOT fit",
	       text_bytes(b, sizeof b, (double)p->node_bytes),
	       text_bytes(c, sizeof c, (double)p->machine.node_bytes),
	       p->q->memory_gib > 0                   ? "--memory"
	       : isnan(p->c.dist.memory_per_node_gib) ? "this host's; --memory"
	                                              : "dist.memory_per_node_gib");
}

static void print_people(const struct plan *p)
{
	print_total(p);
	print_stages(&p->x);
	print_alternatives(p, "schedule", p->schedule, p->n_schedule);
	print_alternatives(p, "recomputation", p->recompute, p->n_recompute);
	print_times(p);
}

/* Every operation of the first rank of every stage. */
static int explain(const struct plan *p, struct err *e)
{
	int rc = 0;
	for (int s = 0; s < p->x.n_stage && !rc; s++) {
		struct program t;
		struct buf listing = {0};
		rc = program_build(&t, &p->c, MODEL_TRAIN, 0, p->x.stage[s].rank, e);
		if (!rc) {
			prog_print(&t.prog, &listing);
			printf("%s%d\n%s", p->x.n_stage > 1 ? "stage " : "rank ", s, listing.data);
		}
		buf_free(&listing);
		program_free(&t);
	}
	return rc;
}

static int estimate(struct plan *p, struct err *e)
{
	int rc = config_check(&p->c, p->machine.world, e);
	if (!rc)
		rc = plan_measure(&p->c, &p->machine, e);
	if (!rc)
		rc = choose(p, e);
	return rc ? rc : estimate_layout(&p->x, &p->c, p->machine.ranks_per_node, e);
}

static int plan(struct plan *p, struct err *e)
{
	int rc = plan_read(p->q, &p->c, &p->machine, e);
	if (!rc)
		rc = estimate(p, e);
	if (rc)
		return rc;
	assume(p);
	compare_schedules(p);
	compare_recomputation(p);
	if (p->q->explain && (rc = explain(p, e)))
		return rc;
	(p->q->json ? plan_print_json : print_people)(p);
	return !p->fits;
}

static int plan_one(const struct plan_request *q, struct err *e)
{
	struct plan *p = mem_array(1, sizeof *p);
	p->q = q;
	int rc = plan(p, e);
	estimate_free(&p->x);
	buf_free(&p->why);
	config_free(&p->c);
	free(p);
	return rc;
}

static int check(const struct plan_request *q, struct err *e)
{
	if (!q->layers.files.n)
		return err_set(e, EXIT_USAGE, "plan: no configuration; give at least one -c FILE");
	if (q->search && q->explain)
		return err_set(e, EXIT_USAGE,
		               "plan: --search compares many layouts, --explain lists one; give one of them");
	if (q->world_size < 0 || q->world_size > MAX_WORLD || q->ranks_per_node < 0)
		return err_set(e, EXIT_USAGE,
		               "plan: --world-size, --ranks-per-node: allowed is 1 to 16777216");
	if (!(q->memory_gib >= 0 && q->memory_gib < 1e9) || !(q->tflops >= 0 && q->tflops < 1e9))
		return err_set(e, EXIT_USAGE, "plan: --memory, --tflops: allowed is more than 0");
	return 0;
}

int plan_main(int argc, char **argv)
{
	struct plan_request q = {0};
	struct cli_option options[] = {
	        CLI_CONFIG(&q.layers),
	        {"world-size", CLI_INT, &q.world_size, "N", "ranks to plan for (as few as the layout needs)"},
	        {"ranks-per-node", CLI_INT, &q.ranks_per_node, "N",
	         "ranks on a node, which is like this host (one a core)"},
	        {"memory", CLI_DOUBLE, &q.memory_gib, "GIB", "memory of a node (this host's)"},
	        {"tflops", CLI_DOUBLE, &q.tflops, "X",
	         "Tflop/s that a rank sustains (its matrix products on this host, measured)"},
	        {"explain", CLI_FLAG, &q.explain, NULL, "print every operation of the step first"},
	        {"search", CLI_FLAG, &q.search, NULL,
	         "the layouts that are likely fastest instead; what --set or `layout: auto` gives of the "
	         "group "
	         "parallel stays"},
	        {"json", CLI_FLAG, &q.json, NULL, "one JSON object"},
	};
	struct cli cli = {
	        .usage = "plan -c FILE [-c FILE…] [--set a.b=c…] [--world-size N] "
	                 "[--ranks-per-node N] [--memory GIB] [--tflops X] [--explain] [--search] [--json]",
	        .doc = "Parameters, flop, exact memory of every rank, bubble, traffic, time. Exit 0: "
	               "a node holds its ranks, 1: it does not.",
	        .example = "plan -c configs/gpt2_124m.yaml --world-size 8",
	        .options = options,
	        .n = sizeof options / sizeof *options};
	int code;
	if (!cli_parse(&cli, argc, argv, &code))
		return code;
	struct err e = {0};
	int rc = check(&q, &e);
	if (!rc)
		rc = (q.search ? plan_search : plan_one)(&q, &e);
	if (rc > 1)
		log_error("%s", e.text);
	cli_free(&cli);
	return rc;
}
