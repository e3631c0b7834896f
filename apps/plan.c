/* pentad plan: what a configuration costs, before a node-hour is spent. Bytes and operations are those of the
 * programs that `train` would run; only times rest on assumptions, and these are printed. */
#include "apps/commands.h"
#include "apps/options.h"
#include "base/err.h"
#include "base/json.h"
#include "base/log.h"
#include "base/text.h"
#include "train/estimate.h"
#include "train/probe.h"
#include "train/run.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { COLUMNS = 6, MAX_WORLD = 1 << 24, MAX_ALTERNATIVES = 6, MAX_CHANGES = 3 };

struct request {
	struct cli_config layers;
	int64_t world_size, ranks_per_node; /* 0: not given */
	double memory_gib, tflops;          /* 0: not given */
	bool explain, json;
};

/* The same configuration with other values of a few keys. */
struct alternative {
	const char *name;
	const char *set[MAX_CHANGES]; /* "key=value"; NULL behind the last */
	bool is_now;
	bool legal;
	double bubble, flop_critical;
	int64_t saved_bytes, total_bytes;
};

struct plan {
	const struct request *q;
	struct config c;
	struct estimate x;
	struct alternative schedule[MAX_ALTERNATIVES], recompute[MAX_ALTERNATIVES];
	int n_schedule, n_recompute;
	int64_t ranks_per_node, nodes, node_bytes, limit_bytes;
	double rate; /* flop/s of a rank */
	double step_s;
	bool fits;
};

/* The configuration */

/* What every rank needs to have at least one of: world size 0 means that. */
static int64_t smallest_world(const struct config *c)
{
	const struct parallel_config *p = &c->parallel;
	return p->tensor_model_parallel_size * p->context_parallel_size * p->pipeline_model_parallel_size *
	       c->ddp.num_distributed_optimizer_instances;
}

/* The files and sets of the request, then these. */
static int load(const struct request *q, const char *const *set, size_t n, struct config *c, struct err *e)
{
	struct config_source source = cli_config_source(&q->layers);
	const char **sets = mem_array(source.n_sets + n, sizeof *sets);
	for (size_t i = 0; i < source.n_sets + n; i++)
		sets[i] = i < source.n_sets ? source.sets[i] : set[i - source.n_sets];
	source.sets = sets;
	source.n_sets += n;
	int rc = config_load(c, &source, e);
	free(sets);
	if (!rc)
		rc = run_complete_config(c, e);
	if (rc)
		return rc;
	int64_t world = q->world_size ? q->world_size : smallest_world(c);
	if (world > MAX_WORLD)
		return err_set(e, EXIT_CONFIG, "the layout needs %lld ranks; at most %d are allowed",
		               (long long)world, MAX_WORLD);
	c->dist.device = DEVICE_AUTO; /* none is needed to plan for it */
	return config_check(c, (int)world, e);
}

/* Alternatives */

static int64_t ranks_on_a_node(const struct request *q, const struct config *c)
{
	int64_t cores = sysconf(_SC_NPROCESSORS_ONLN), world = c->derived.world_size;
	int64_t ranks = q->ranks_per_node ? q->ranks_per_node : cores;
	return ranks < world ? ranks : world;
}

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
	char vocabulary[48];
	const char *set[MAX_CHANGES + 1];
	size_t n = 0;
	struct config c;
	struct estimate x = {0};
	struct err e = {0};
	if (a->is_now) {
		summarise(a, &p->x);
		return;
	}
	while (n < MAX_CHANGES && a->set[n]) {
		set[n] = a->set[n];
		n++;
	}
	snprintf(vocabulary, sizeof vocabulary, "model.vocab_size=%lld", (long long)p->c.model.vocab_size);
	set[n++] = vocabulary; /* so that no tokenizer is read again */
	if (!load(p->q, set, n, &c, &e) && !estimate_layout(&x, &c, (int)p->ranks_per_node, &e))
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
	        .set = {arena_printf(keep, "%s=%s", key, word),
	                arena_printf(keep, "%s=%lld", chunks_key, (long long)chunks)},
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
		*a = (struct alternative){.name = word,
		                          .set = {arena_printf(&p->c.arena, "recompute.granularity=%s", word),
		                                  g == RECOMPUTE_FULL ? NULL : "recompute.num_layers=null"},
		                          .is_now = (int)p->c.recompute.granularity == g};
		try_alternative(p, a);
	}
}

/* Assumptions */

static int64_t host_bytes(void)
{
	return (int64_t)sysconf(_SC_PHYS_PAGES) * sysconf(_SC_PAGESIZE);
}

static int measure_rate(struct plan *p, struct err *e)
{
	const struct backend *backend;
	struct stream *stream;
	int rc = run_open_device(&p->c, (int)p->ranks_per_node, &backend, &stream, e);
	if (rc)
		return rc;
	p->rate = probe_matmul_peak(backend, stream, p->c.mixed_precision.precision == PRECISION_BF16);
	backend->close(stream);
	return 0;
}

static int assume(struct plan *p, struct err *e)
{
	const struct request *q = p->q;
	int64_t world = p->c.derived.world_size;
	p->nodes = (world + p->ranks_per_node - 1) / p->ranks_per_node;
	p->node_bytes = estimate_node_bytes(&p->x, world, p->ranks_per_node);
	p->limit_bytes = q->memory_gib > 0 ? (int64_t)(q->memory_gib * (1 << 30)) : host_bytes();
	p->fits = p->node_bytes <= p->limit_bytes;
	p->rate = 1e12 * q->tflops;
	int rc = q->tflops > 0 ? 0 : measure_rate(p, e);
	p->step_s = p->rate > 0 ? p->x.flop_critical / p->rate : NAN;
	return rc;
}

static double run_s(const struct plan *p)
{
	return p->step_s * (double)p->c.train.train_iters;
}

static double node_hours(const struct plan *p)
{
	return run_s(p) / 3600 * (double)p->nodes;
}

/* For programs */

static void put_memory(struct buf *b, const struct memory *m)
{
	buf_printf(b, "{\"total\": %lld", (long long)memory_total(m));
	for (int i = 0; i < MEMORY_COUNT; i++)
		buf_printf(b, ", \"%s\": %lld", memory_rows[i].name, (long long)m->bytes[i]);
	buf_puts(b, "}");
}

static void put_number(struct buf *b, const char *name, double x)
{
	buf_printf(b, ", \"%s\": ", name);
	json_put_number(b, x);
}

static void put_wire(struct buf *b, const double *wire_bytes)
{
	double sum = 0;
	for (int a = 0; a < AXIS_COUNT; a++)
		sum += wire_bytes[a];
	buf_puts(b, "{\"total\": ");
	json_put_number(b, sum);
	for (int a = 0; a < AXIS_COUNT; a++)
		if (AXES_DENSE >> a & 1)
			put_number(b, mesh_axis_name((enum mesh_axis)a), wire_bytes[a]);
	buf_puts(b, "}");
}

static void put_stage(struct buf *b, const struct estimate_stage *s)
{
	buf_printf(b, "{\"rank\": %d, \"layers\": %lld, \"parameters\": %lld, \"operations\": %zu", s->rank,
	           (long long)s->layers, (long long)s->parameters, s->operations);
	put_number(b, "flops_per_step", s->flop);
	buf_puts(b, ", \"memory_bytes\": ");
	put_memory(b, &s->memory);
	buf_puts(b, ", \"wire_bytes_per_step\": ");
	put_wire(b, s->wire_bytes);
	buf_puts(b, ", \"chunks\": [");
	for (int i = 0; i < s->n_chunk; i++) {
		const struct estimate_chunk *k = &s->chunk[i];
		buf_printf(b, "%s{\"saved_bytes\": %lld, \"in_flight\": %d", i ? ", " : "",
		           (long long)k->saved_bytes, k->in_flight);
		put_number(b, "forward_flops", k->flop.forward);
		put_number(b, "backward_flops", k->flop.backward);
		put_number(b, "weight_flops", k->flop.weight);
		buf_puts(b, "}");
	}
	buf_puts(b, "]}");
}

static void put_alternatives(struct buf *b, const char *name, const struct alternative *list, int n)
{
	bool any = false;
	buf_printf(b, ", \"%s\": [", name);
	for (int i = 0; i < n; i++) {
		if (!list[i].legal)
			continue;
		buf_printf(
		        b,
		        "%s{\"name\": \"%s\", \"chosen\": %s, \"saved_bytes\": %lld, \"total_bytes\": %lld",
		        any ? ", " : "", list[i].name, list[i].is_now ? "true" : "false",
		        (long long)list[i].saved_bytes, (long long)list[i].total_bytes);
		put_number(b, "bubble", list[i].bubble);
		put_number(b, "critical_flops", list[i].flop_critical);
		buf_puts(b, "}");
		any = true;
	}
	buf_puts(b, "]");
}

static void put_assumptions(struct buf *b, const struct plan *p)
{
	put_number(b, "tflops_per_rank", p->rate / 1e12);
	buf_printf(b, ", \"tflops_from\": \"%s\"",
	           p->q->tflops > 0 ? "given" : "matrix products of this machine");
	put_number(b, "seconds_per_step", p->step_s);
	put_number(b, "seconds", run_s(p));
	put_number(b, "node_hours", node_hours(p));
	buf_printf(b,
	           ", \"nodes\": %lld, \"ranks_per_node\": %lld, \"node_bytes\": %lld, "
	           "\"node_limit_bytes\": %lld, \"fits\": %s",
	           (long long)p->nodes, (long long)p->ranks_per_node, (long long)p->node_bytes,
	           (long long)p->limit_bytes, p->fits ? "true" : "false");
}

static void print_json(const struct plan *p)
{
	const struct estimate *x = &p->x;
	struct buf b = {0};
	buf_printf(&b, "{\"parameters\": %lld, \"world_size\": %lld", (long long)x->parameters,
	           (long long)p->c.derived.world_size);
	put_number(&b, "flops_per_step", x->flop_per_step);
	buf_printf(&b, ", \"checkpoint_bytes\": %lld", (long long)x->checkpoint_bytes);
	put_number(&b, "bubble", x->bubble);
	put_number(&b, "critical_flops", x->flop_critical);
	buf_printf(&b, ", \"most_loaded_stage\": %d, \"memory_bytes\": ", x->most_loaded);
	put_memory(&b, &x->stage[x->most_loaded].memory);
	buf_puts(&b, ", \"stages\": [");
	for (int s = 0; s < x->n_stage; s++) {
		buf_puts(&b, s ? ", " : "");
		put_stage(&b, &x->stage[s]);
	}
	buf_puts(&b, "]");
	put_alternatives(&b, "schedules", p->schedule, p->n_schedule);
	put_alternatives(&b, "recompute", p->recompute, p->n_recompute);
	put_assumptions(&b, p);
	buf_puts(&b, "}");
	puts(b.data);
	buf_free(&b);
}

/* For people */

static const char *seconds(char *out, size_t cap, double s)
{
	if (s < 60)
		snprintf(out, cap, "%.3g s", s);
	return s < 60 ? out : text_duration(out, cap, s);
}

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
			       seconds(time, sizeof time, list[i].flop_critical / p->rate));
	}
}

static void print_times(const struct plan *p)
{
	char a[32], b[32], c[32];
	printf("checkpoint        %12s\n", text_bytes(a, sizeof a, (double)p->x.checkpoint_bytes));
	printf("time              %12s   a step at least: all work at %.3g Tflop/s a rank (%s), "
	       "communication "
	       "not counted\n",
	       seconds(a, sizeof a, p->step_s), p->rate / 1e12,
	       p->q->tflops > 0 ? "--tflops" : "matrix products of this machine, now; --tflops");
	printf("                  %12s   for %lld steps: %s node-hours of %lld node%s of %lld rank%s "
	       "(--ranks-per-node)\n",
	       seconds(a, sizeof a, run_s(p)), (long long)p->c.train.train_iters,
	       hours(b, sizeof b, node_hours(p)), (long long)p->nodes, p->nodes == 1 ? "" : "s",
	       (long long)p->ranks_per_node, p->ranks_per_node == 1 ? "" : "s");
	printf("%s: the fullest node takes %s of %s (%s)\n", p->fits ? "fits" : "does NOT fit",
	       text_bytes(b, sizeof b, (double)p->node_bytes),
	       text_bytes(c, sizeof c, (double)p->limit_bytes),
	       p->q->memory_gib > 0 ? "--memory" : "this host's; --memory");
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

static int plan(struct plan *p, struct err *e)
{
	int rc = load(p->q, NULL, 0, &p->c, e);
	if (rc)
		return rc;
	p->ranks_per_node = ranks_on_a_node(p->q, &p->c);
	rc = estimate_layout(&p->x, &p->c, (int)p->ranks_per_node, e);
	if (!rc)
		rc = assume(p, e);
	if (rc)
		return rc;
	compare_schedules(p);
	compare_recomputation(p);
	if (p->q->explain && (rc = explain(p, e)))
		return rc;
	(p->q->json ? print_json : print_people)(p);
	return !p->fits;
}

static int check(const struct request *q, struct err *e)
{
	if (!q->layers.files.n)
		return err_set(e, EXIT_USAGE, "plan: no configuration; give at least one -c FILE");
	if (q->world_size < 0 || q->world_size > MAX_WORLD || q->ranks_per_node < 0)
		return err_set(e, EXIT_USAGE,
		               "plan: --world-size, --ranks-per-node: allowed is 1 to 16777216");
	if (!(q->memory_gib >= 0 && q->memory_gib < 1e9) || !(q->tflops >= 0 && q->tflops < 1e9))
		return err_set(e, EXIT_USAGE, "plan: --memory, --tflops: allowed is more than 0");
	return 0;
}

int plan_main(int argc, char **argv)
{
	struct request q = {0};
	struct cli_option options[] = {
	        CLI_CONFIG(&q.layers),
	        {"world-size", CLI_INT, &q.world_size, "N", "ranks to plan for (as few as the layout needs)"},
	        {"ranks-per-node", CLI_INT, &q.ranks_per_node, "N",
	         "ranks on a node, which is like this host (one a core)"},
	        {"memory", CLI_DOUBLE, &q.memory_gib, "GIB", "memory of a node (this host's)"},
	        {"tflops", CLI_DOUBLE, &q.tflops, "X",
	         "Tflop/s that a rank sustains (its matrix products on this host, measured)"},
	        {"explain", CLI_FLAG, &q.explain, NULL, "print every operation of the step first"},
	        {"json", CLI_FLAG, &q.json, NULL, "one JSON object"},
	};
	struct cli cli = {
	        .usage = "plan -c FILE [-c FILE…] [--set a.b=c…] [--world-size N] "
	                 "[--ranks-per-node N] [--memory GIB] [--tflops X] [--explain] [--json]",
	        .doc = "Parameters, flop, exact memory of every rank, bubble, traffic, time. Exit 0: "
	               "a node holds its ranks, 1: it does not.",
	        .example = "plan -c configs/gpt2_124m.yaml --world-size 8",
	        .options = options,
	        .n = sizeof options / sizeof *options};
	int code;
	if (!cli_parse(&cli, argc, argv, &code))
		return code;
	struct plan *p = mem_array(1, sizeof *p);
	struct err e = {0};
	p->q = &q;
	int rc = check(&q, &e);
	if (!rc) {
		rc = plan(p, &e);
		estimate_free(&p->x);
		config_free(&p->c);
	}
	if (rc > 1)
		log_error("%s", e.text);
	free(p);
	cli_free(&cli);
	return rc;
}
