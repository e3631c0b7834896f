/* pentad bench step: training steps of a configuration on made-up data, and what its pipeline waits for. Run
 * alone, under `pentad launch` or srun. */
#include "apps/bench.h"
#include "apps/join.h"
#include "base/clock.h"
#include "base/err.h"
#include "base/json.h"
#include "base/mem.h"
#include "base/text.h"
#include "comm/comm.h"
#include "model/model.h"
#include "train/auto.h"
#include "train/estimate.h"
#include "train/pieces.h"
#include "train/run.h"
#include "train/step.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { MAX_STEPS = 1000, KINDS = N_SLOT_KINDS };

struct request {
	struct cli_config layers;
	int64_t steps;
	bool json, operations, help;
};

struct sample { /* of one step, on this rank or averaged over ranks */
	double step_s;
	double pass_s, busy_s; /* the pipeline's part: from the first slot to the last; working */
};

struct result {
	struct sample median;
	double bubble, predicted; /* idle part of the pass: measured, and as the slots' own times have it */
	double flop;              /* of the model, of one rank in a step */
	double datasheet_peak, matmul_peak; /* flop/s of a rank's device, 0: not known */
	int64_t planned_bytes, taken_bytes; /* of rank 0; taken: of a device's memory, 0 on a host */
	double seconds[OP_COUNT];           /* of all timed steps, by operation */
	int64_t nodes[OP_COUNT];
};

static int by_time(const void *a, const void *b)
{
	const struct sample *x = a, *y = b;
	return (x->step_s > y->step_s) - (x->step_s < y->step_s);
}

static int one_step(struct step *s, int64_t i, struct sample *out, struct err *e)
{
	struct step_result result;
	double begin = clock_now_s();
	int rc = step_gradients(s, NULL, (uint64_t)(i * s->config->train.global_batch_size), &result, e);
	if (!rc && !result.skipped)
		rc = step_update(s, i + 1, 0, e);
	s->at.backend->wait(s->at.stream);
	*out = (struct sample){.step_s = clock_now_s() - begin, .pass_s = s->pass_s};
	for (size_t k = 0; k < s->program.schedule.n; k++)
		out->busy_s += s->slot_s[k];
	return rc;
}

/* Mean seconds of each kind of slot, by chunk. */
static void mean_times(const struct step *s, struct schedule_times *time)
{
	const struct schedule *order = &s->program.schedule;
	double *sum = mem_array((size_t)order->spec.chunks * KINDS, sizeof *sum);
	int *n = mem_array((size_t)order->spec.chunks * KINDS, sizeof *n);
	for (size_t k = 0; k < order->n; k++) {
		int at = order->slot[k].chunk * KINDS + order->slot[k].kind;
		sum[at] += s->slot_s[k];
		n[at]++;
	}
	for (int c = 0; c < order->spec.chunks; c++) {
		double mean[KINDS];
		for (int k = 0; k < KINDS; k++)
			mean[k] = n[c * KINDS + k] ? sum[c * KINDS + k] / n[c * KINDS + k] : 0;
		time[c] = (struct schedule_times){.forward = mean[SLOT_FORWARD],
		                                  .backward = mean[SLOT_BACKWARD],
		                                  .weight = mean[SLOT_WEIGHT]};
	}
	free(sum);
	free(n);
}

/* What the schedule makes of the times that this pipeline's slots took in the last step. */
static int predict(struct step *s, double *bubble, struct err *e)
{
	const struct schedule_spec *spec = &s->program.schedule.spec;
	size_t chunks = (size_t)spec->chunks, stages = (size_t)spec->stages,
	       fields = sizeof(struct schedule_times) / 8;
	struct comm *pipeline = groups_find(s->at.groups, AXIS_BIT(pp));
	struct schedule_result played = {0};
	*bubble = 0;
	if (!pipeline)
		return 0;
	struct schedule_times *mine = mem_array(chunks, sizeof *mine),
	                      *all = mem_array(chunks * stages, sizeof *all),
	                      *time = mem_array(chunks * stages, sizeof *time);
	mean_times(s, mine);
	int rc = comm_all_gather(pipeline, mine, all, chunks * fields, DT_f64, e);
	for (size_t stage = 0; stage < stages; stage++)
		for (size_t c = 0; c < chunks; c++)
			time[c * stages + stage] = all[stage * chunks + c];
	if (!rc)
		rc = schedule_play(spec, time, s->program.prog.edge_slots, &played, e);
	*bubble = played.bubble;
	free(mine);
	free(all);
	free(time);
	return rc;
}

static int measure(struct step *s, const struct request *q, struct result *out, struct err *e)
{
	struct sample *list = mem_array((size_t)q->steps, sizeof *list), warm;
	int rc = one_step(s, 0, &warm, e);
	exec_take_times(s->exec, out->seconds, out->nodes); /* the first step chooses and allocates */
	for (int64_t i = 0; i < q->steps && !rc; i++)
		rc = one_step(s, i + 1, &list[i], e);
	double predicted = 0;
	exec_take_times(s->exec, out->seconds, out->nodes);
	if (!rc)
		rc = predict(s, &predicted, e);
	qsort(list, (size_t)q->steps, sizeof *list, by_time);
	out->median = list[q->steps / 2];
	double sums[2] = {1 - out->median.busy_s / out->median.pass_s, predicted};
	if (!rc && s->at.world)
		rc = comm_all_reduce(s->at.world, sums, 2, DT_f64, REDUCE_SUM, e);
	out->bubble = sums[0] / (s->at.world ? s->at.world->size : 1);
	out->predicted = sums[1] / (s->at.world ? s->at.world->size : 1);
	free(list);
	return rc;
}

static void print_json(const struct config *c, const struct result *r)
{
	double tokens = (double)c->train.global_batch_size * (double)c->model.seq_length,
	       rate = r->flop / r->median.step_s;
	struct buf b = {0};
	buf_printf(
	        &b,
	        "{\"step_ms\": %.3f, \"tokens_per_s\": %.1f, \"bubble\": %.4f, \"bubble_predicted\": %.4f, ",
	        1e3 * r->median.step_s, tokens / r->median.step_s, r->bubble, r->predicted);
	buf_printf(&b, "\"tflops\": %.3f, \"mfu\": %.4f, \"mfu_measured\": %.4f, ", rate / 1e12,
	           r->datasheet_peak > 0 ? rate / r->datasheet_peak : 0,
	           r->matmul_peak > 0 ? rate / r->matmul_peak : 0);
	buf_printf(&b, "\"planned_bytes\": %lld, \"taken_bytes\": %lld, \"operations\": {",
	           (long long)r->planned_bytes, (long long)r->taken_bytes);
	bool any = false;
	for (int op = 0; op < OP_COUNT; op++)
		if (r->nodes[op]) {
			buf_printf(&b, "%s\"%s\": {\"ms\": %.3f, \"nodes\": %lld}", any ? ", " : "",
			           op_rows[op].name, 1e3 * r->seconds[op], (long long)r->nodes[op]);
			any = true;
		}
	printf("%s}}\n", b.data);
	buf_free(&b);
}

/* The operations that took time, longest first. */
static void print_operations(const struct result *r, int64_t steps)
{
	double sum = 0, last = INFINITY;
	for (int op = 0; op < OP_COUNT; op++)
		sum += r->seconds[op];
	if (sum > 0)
		printf("\n%-24s %10s %8s %7s   (each waited for: the sum is more than a step)\n", "operation",
		       "ms a step", "nodes", "share");
	for (int n = 0; n < OP_COUNT && sum > 0; n++) {
		int next = -1;
		for (int op = 0; op < OP_COUNT; op++)
			if (r->seconds[op] < last && (next < 0 || r->seconds[op] > r->seconds[next]))
				next = op;
		if (next < 0 || !r->nodes[next])
			return;
		last = r->seconds[next];
		printf("%-24s %10.3f %8lld %6.1f%%\n", op_rows[next].name, 1e3 * last / (double)steps,
		       (long long)(r->nodes[next] / steps), 100 * last / sum);
	}
}

static void print_result(const struct config *c, const struct result *r, const struct request *q)
{
	double tokens = (double)c->train.global_batch_size * (double)c->model.seq_length,
	       rate = r->flop / r->median.step_s;
	char planned[32], taken[32];
	printf("step    %10.2f ms, %.1f tokens/s, %.4g TFLOP/s a rank", 1e3 * r->median.step_s,
	       tokens / r->median.step_s, rate / 1e12);
	if (r->matmul_peak > 0)
		printf(", %.1f %% of its matrix products' peak", 100 * rate / r->matmul_peak);
	if (r->datasheet_peak > 0)
		printf(", %.1f %% of its data sheet's", 100 * rate / r->datasheet_peak);
	printf("\nmemory  %13s planned", text_bytes(planned, sizeof planned, (double)r->planned_bytes));
	if (r->taken_bytes)
		printf(", %s taken of the device", text_bytes(taken, sizeof taken, (double)r->taken_bytes));
	printf("\n");
	if (c->parallel.pipeline_model_parallel_size > 1)
		printf("bubble  %9.1f %% of the pipeline's time, averaged over ranks; the slots' own times "
		       "give %.1f %%\n",
		       100 * r->bubble, 100 * r->predicted);
	print_operations(r, q->steps);
}

/* What is asked of the device before the step takes its memory. */
static int look_at_device(struct joined *j, struct place_of_rank *at, struct result *r, int64_t *free_bytes,
                          struct err *e)
{
	const struct config *c = &j->config;
	struct memory planned;
	double tokens = (double)c->train.global_batch_size * (double)c->model.seq_length;
	int rc = run_measure_device(c, j->host, &r->matmul_peak, e);
	if (!rc)
		rc = estimate_memory(&planned, c, j->world->rank, j->host, true, e);
	if (!rc)
		rc = run_open_device(c, j->host, &at->backend, &at->stream, e);
	if (rc)
		return rc;
	r->flop = model_flops(&c->model, c->derived.padded_vocab_size, tokens) / j->world->size;
	r->planned_bytes = memory_total(&planned);
	if (at->backend->datasheet_peak)
		r->datasheet_peak = at->backend->datasheet_peak(at->stream, program_dtype(c));
	if (at->backend->memory)
		at->backend->memory(at->stream, free_bytes, &(int64_t){0});
	return 0;
}

static void look_again(const struct place_of_rank *at, struct result *r, int64_t free_before)
{
	int64_t free_bytes, total;
	if (!at->backend->memory)
		return;
	at->backend->memory(at->stream, &free_bytes, &total);
	r->taken_bytes = free_before - free_bytes;
}

static int run(struct joined *j, void *argument, struct err *e)
{
	const struct request *q = argument;
	struct groups groups = {0};
	struct place_of_rank at = {.world = j->world->size > 1 ? j->world : NULL, .groups = &groups};
	struct step s = {0};
	struct result result = {0};
	int64_t free_bytes = 0;
	auto_say(j->why);
	int rc = q->operations
	                 ? config_replace(&j->config, "profiling.time_operations", "true", "--operations", e)
	                 : 0;
	if (!rc)
		rc = look_at_device(j, &at, &result, &free_bytes, e);
	if (!(rc = comm_any(j->world, rc, e)) &&
	    !(rc = step_create(&s, &j->config, MODEL_TRAIN, &at, NULL, e))) {
		pieces_fill(&s.program, s.exec, (uint64_t)j->config.rng.seed);
		rc = comm_any(j->world, measure(&s, q, &result, e), e);
		look_again(&at, &result, free_bytes);
		if (!rc && j->world->rank == 0 && q->json)
			print_json(&j->config, &result);
		else if (!rc && j->world->rank == 0)
			print_result(&j->config, &result, q);
		step_free(&s);
	}
	groups_close(&groups);
	if (at.stream)
		at.backend->close(at.stream);
	return rc;
}

int bench_step_main(int argc, char **argv)
{
	struct request q = {.steps = 5};
	struct err e = {0};
	struct cli_option options[] = {
	        CLI_CONFIG(&q.layers),
	        {"steps", CLI_INT, &q.steps, "N", "steps of which the median is taken; default 5"},
	        {"operations", CLI_FLAG, &q.operations, NULL,
	         "also the time of every operation, each waited for: the step then takes longer"},
	        {"json", CLI_FLAG, &q.json, NULL, "prints one JSON object"},
	};
	struct cli cli = {
	        .usage = "bench step -c FILE [-c FILE…] [--set a.b=c…] [--steps N] [--operations] [--json]",
	        .doc = "Times training steps on made-up data, and the pipeline's bubble: measured, "
	               "and as the "
	               "schedule has it.",
	        .example = "launch -n 2 bench step -c configs/quickstart.yaml",
	        .options = options,
	        .n = sizeof options / sizeof *options};
	int rc = cli_read(&cli, argc, argv, &q.help, &e);
	if (!rc && !q.help && (q.steps < 1 || q.steps > MAX_STEPS))
		rc = err_set(&e, EXIT_USAGE, "bench step: --steps %lld: 1 to %d are allowed",
		             (long long)q.steps, MAX_STEPS);
	if (q.help) {
		struct buf b = {0};
		cli_help(&cli, &b);
		fputs(b.data, stdout);
		buf_free(&b);
	} else {
		rc = join_and_run(&(struct join){&q.layers, .salt = (uint64_t)q.steps, .run = run, .q = &q},
		                  rc, &e);
	}
	cli_free(&cli);
	return rc;
}
