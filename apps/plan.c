/* pentad plan: what a configuration costs, before a node-hour is spent. The numbers are those of the program
 * that `train` would run: nothing here estimates. */
#include "apps/commands.h"
#include "apps/options.h"
#include "base/err.h"
#include "base/json.h"
#include "base/log.h"
#include "base/text.h"
#include "train/program.h"
#include "train/run.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

struct request {
	struct cli_config layers;
	int64_t world_size;
	bool explain, json;
};

struct estimate {
	int64_t parameters, memory_bytes, checkpoint_bytes, host_bytes;
	double flops_per_step;            /* Megatron's formula, all ranks */
	double hardware_flops[SEG_COUNT]; /* of one rank and micro-batch; STEP and REDUCE once a step */
	double wire_bytes;                /* sent by one rank in a step */
	bool fits;
};

static struct estimate make_estimate(const struct config *c, const struct program *t)
{
	double tokens = (double)c->train.global_batch_size * (double)c->model.seq_length;
	struct estimate x = {.parameters = model_count_parameters(&c->model, c->derived.padded_vocab_size),
	                     .host_bytes = (int64_t)sysconf(_SC_PHYS_PAGES) * sysconf(_SC_PAGESIZE),
	                     .flops_per_step = model_flops(&c->model, c->derived.padded_vocab_size, tokens)};
	for (int s = 0; s < SEG_COUNT; s++) {
		struct cost cost = prog_cost(&t->prog, (enum segment)s);
		double times = s == SEG_FWD || s == SEG_BWD ? (double)c->derived.accumulation : 1;
		x.hardware_flops[s] = cost.flop * times;
		for (int a = 0; a < AXIS_COUNT; a++)
			x.wire_bytes += cost.wire_bytes[a] * times;
	}
	for (int r = 0; r < R_COUNT; r++)
		x.memory_bytes += t->prog.bytes[r];
	x.checkpoint_bytes = t->prog.bytes[R_PARAM] + t->prog.bytes[R_OPT];
	x.fits = x.memory_bytes < x.host_bytes;
	return x;
}

static void print_json(const struct config *c, const struct program *t, const struct estimate *x)
{
	struct buf b = {0};
	buf_printf(&b, "{\"parameters\": %lld, \"world_size\": %lld, \"flops_per_step\": ",
	           (long long)x->parameters, (long long)c->derived.world_size);
	json_put_number(&b, x->flops_per_step);
	buf_printf(&b, ", \"memory_bytes\": {\"total\": %lld", (long long)x->memory_bytes);
	for (int r = 0; r < R_COUNT; r++)
		buf_printf(&b, ", \"%s\": %lld", region_names[r], (long long)t->prog.bytes[r]);
	buf_puts(&b, "}, \"hardware_flops_per_rank\": {");
	for (int s = 0; s < SEG_COUNT; s++) {
		buf_printf(&b, "%s\"%s\": ", s ? ", " : "", segment_names[s]);
		json_put_number(&b, x->hardware_flops[s]);
	}
	buf_puts(&b, "}, \"wire_bytes_per_rank\": ");
	json_put_number(&b, x->wire_bytes);
	buf_printf(&b, ", \"checkpoint_bytes\": %lld, \"operations\": %zu, \"fits\": %s}",
	           (long long)x->checkpoint_bytes, t->prog.n_node, x->fits ? "true" : "false");
	puts(b.data);
	buf_free(&b);
}

static void print_people(const struct config *c, const struct program *t, const struct estimate *x)
{
	static const char *const what[R_COUNT] = {
#define REGION_DOC(name, word, doc) doc,
	        REGIONS(REGION_DOC)
#undef REGION_DOC
	};
	char a[32], b[32];
	for (size_t i = 0; i < c->derived.equations.n; i++)
		printf("%s\n", c->derived.equations.items[i]);
	printf("parameters        %12lld   %s\n", (long long)x->parameters,
	       text_count(a, sizeof a, (double)x->parameters));
	printf("flop a step       %12.4g   %.4g a token (model); one rank computes %.4g\n", x->flops_per_step,
	       x->flops_per_step / ((double)c->train.global_batch_size * (double)c->model.seq_length),
	       x->hardware_flops[SEG_FWD] + x->hardware_flops[SEG_BWD] + x->hardware_flops[SEG_STEP]);
	printf("operations        %12zu   in the step program\n", t->prog.n_node);
	printf("memory of one rank, exact:\n");
	for (int r = 0; r < R_COUNT; r++)
		if (t->prog.bytes[r])
			printf("  %-8s %20lld   %10s   %s\n", region_names[r], (long long)t->prog.bytes[r],
			       text_bytes(a, sizeof a, (double)t->prog.bytes[r]), what[r]);
	printf("  %-8s %20lld   %10s\n", "total", (long long)x->memory_bytes,
	       text_bytes(a, sizeof a, (double)x->memory_bytes));
	printf("sent by one rank  %12s   a step\n", text_bytes(a, sizeof a, x->wire_bytes));
	printf("checkpoint        %12s   %lld steps in all\n",
	       text_bytes(a, sizeof a, (double)x->checkpoint_bytes), (long long)c->train.train_iters);
	printf("%s: one rank takes %s of this host's %s\n", x->fits ? "fits" : "does NOT fit",
	       text_bytes(a, sizeof a, (double)x->memory_bytes),
	       text_bytes(b, sizeof b, (double)x->host_bytes));
}

static int plan(const struct request *q, struct config *c, struct err *e)
{
	struct config_source source = cli_config_source(&q->layers);
	struct program t;
	int rc = config_load(c, &source, e);
	if (!rc)
		rc = run_complete_config(c, e);
	if (!rc)
		rc = config_check(c, (int)q->world_size, e);
	if (rc)
		return rc;
	rc = program_build(&t, c, MODEL_TRAIN, 0, 0, e);
	if (!rc) {
		struct estimate x = make_estimate(c, &t);
		struct buf listing = {0};
		if (q->explain) {
			prog_print(&t.prog, &listing);
			fputs(listing.data, stdout);
		}
		(q->json ? print_json : print_people)(c, &t, &x);
		buf_free(&listing);
		rc = !x.fits;
	}
	program_free(&t);
	return rc;
}

int plan_main(int argc, char **argv)
{
	struct request q = {.world_size = 1};
	struct cli_option options[] = {
	        CLI_CONFIG(&q.layers),
	        {"world-size", CLI_INT, &q.world_size, "N", "ranks to plan for (1)"},
	        {"explain", CLI_FLAG, &q.explain, NULL, "print every operation of the step first"},
	        {"json", CLI_FLAG, &q.json, NULL, "one JSON object"},
	};
	struct cli cli = {
	        .usage = "plan -c FILE [-c FILE…] [--set a.b=c…] [--world-size N] [--explain] [--json]",
	        .doc = "Parameters, flop, exact memory of a rank. Exit 0: it fits this host, 1: it does not.",
	        .example = "plan -c configs/gpt2_124m.yaml --world-size 8",
	        .options = options,
	        .n = sizeof options / sizeof *options};
	int code;
	if (!cli_parse(&cli, argc, argv, &code))
		return code;
	struct config c;
	struct err e = {0};
	int rc = !q.layers.files.n
	                 ? err_set(&e, EXIT_USAGE, "plan: no configuration; give at least one -c FILE")
	         : q.world_size < 1 || q.world_size > 1 << 24
	                 ? err_set(&e, EXIT_USAGE, "plan: --world-size: allowed is 1 to 16777216")
	                 : 0;
	if (!rc) {
		rc = plan(&q, &c, &e);
		config_free(&c);
	}
	if (rc > 1)
		log_error("%s", e.text);
	cli_free(&cli);
	return rc;
}
