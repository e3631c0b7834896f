/* What is planned is what is allocated: on every rank of several layouts, for every kernel, for every
 * reduction. Work, idle time and traffic against plain arithmetic. */
#include "base/err.h"
#include "base/json.h"
#include "base/mem.h"
#include "base/sys.h"
#include "comm/comm.h"
#include "graph/exec.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/matmul.h"
#include "kernels/kernels.h"
#include "test/ranks.h"
#include "test/test.h"
#include "train/estimate.h"
#include "train/pieces.h"
#include "train/step.h"

#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

static const struct rank_on_host alone = {0, 1};

enum { MAX_SETS = 40, MAX_RANKS = 16, MICRO_BATCHES = 4, ROWS = 12, WIDTH = 24 };

/* The text is "key=value key=value …". */
static bool open_config(struct config *c, int ranks, const char *text)
{
	static const char *const common[] = {"model.num_layers=4",
	                                     "model.hidden_size=24",
	                                     "model.num_attention_heads=4",
	                                     "model.num_query_groups=4",
	                                     "model.ffn_hidden_size=40",
	                                     "model.vocab_size=131",
	                                     "model.seq_length=12",
	                                     "model.add_qkv_bias=true",
	                                     "model.make_vocab_size_divisible_by=4",
	                                     "validation.eval_interval=1",
	                                     "dataset.split=90,10,0",
	                                     "train.train_iters=5",
	                                     "train.micro_batch_size=1",
	                                     "dist.num_threads=2"};
	const char *sets[MAX_SETS];
	struct err e = {0};
	size_t n = sizeof common / sizeof *common;
	memcpy(sets, common, sizeof common);
	char *copy = mem_strdup(text), *rest = copy;
	for (char *word; (word = strsep(&rest, " "));)
		if (*word)
			sets[n++] = word;
	struct config_source source = {.sets = sets, .n_sets = n};
	bool good = !config_load(c, &source, &e) && !config_check(c, ranks, &e);
	if (!good)
		test_failed(__FILE__, __LINE__, "%d ranks, %s: %s", ranks, text, e.text);
	free(copy);
	return good;
}

/* Memory */

#define TP "parallel.tensor_model_parallel_size="
#define PP "parallel.pipeline_model_parallel_size="
#define SP "parallel.sequence_parallel=true "
#define VPP "parallel.virtual_pipeline_model_parallel_size="
#define SCHEDULE "parallel.pipeline_schedule="

static const struct {
	int ranks;
	const char *text;
} layouts[] = {
        {1, "train.global_batch_size=4"},
        {1, "train.global_batch_size=2 mixed_precision=bf16 recompute.granularity=full"},
        {1, "train.global_batch_size=2 model.qk_layernorm=true model.activation=gelu "
            "model.normalization=LayerNorm model.add_bias_linear=true model.hidden_dropout=0.1 "
            "model.attention_dropout=0.1"},
        {2, "train.global_batch_size=8 ddp.zero_stage=0"},
        {3, "train.global_batch_size=6 ddp.zero_stage=2 ddp.bucket_size=1000"},
        {2, "train.global_batch_size=8 ddp.zero_stage=3 mixed_precision=bf16"},
        {1, "train.global_batch_size=2 mixed_precision=fp16"},
        {2, "train.global_batch_size=4 " SP TP "2"},
        {2, "train.global_batch_size=4 " PP "2"},
        {2, "train.global_batch_size=4 " PP "2 " SCHEDULE "zero_bubble "
            "model.untie_embeddings_and_output_weights=false"},
        {2, "train.global_batch_size=4 " PP "2 " SCHEDULE "interleaved " VPP "2"},
        {8, "train.global_batch_size=8 " PP "2 " SP TP "2 ddp.zero_stage=1"},
};
enum { LAYOUTS = sizeof layouts / sizeof *layouts };

struct lived { /* what the ranks of a layout held */
	const struct config *c;
	struct memory planned[MAX_RANKS];
	struct err error[MAX_RANKS];
	bool refuses_other[MAX_RANKS];
};

/* A plan that is a byte off in one of its rows, where the run can know it. */
static bool refuses_others(const struct memory *planned, const struct step *step, const struct step *eval)
{
	static const int rows[] = {R_PARAM, R_SAVED, MEMORY_validation, MEMORY_workspace,
	                           MEMORY_communication};
	bool good = true;
	for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
		struct memory other = *planned;
		struct err e = {0};
		other.bytes[rows[i]]++;
		good = good && memory_check(&other, step, eval, &e) == EXIT_INTERNAL;
	}
	return good;
}

/* A step and an evaluation on made-up data, then the comparison. */
static void live(int rank, struct comm *world, void *shared)
{
	struct lived *l = shared;
	struct groups groups = {0};
	struct place_of_rank at = {&cpu_backend, NULL, world, world ? &groups : NULL};
	struct err *e = &l->error[rank], ignored = {0};
	struct step step = {0}, eval = {0};
	struct step_result result;
	double loss;
	int rc = estimate_memory(&l->planned[rank], l->c, rank, alone, false, e);
	rc = rc ? rc : cpu_backend.open(&at.stream, THREADS(2), e);
	rc = world ? comm_any(world, rc, &ignored) : rc;
	if (!rc && !(rc = step_create(&step, l->c, MODEL_TRAIN, &at, NULL, e)))
		rc = step_create(&eval, l->c, MODEL_EVALUATE, &at, &step, e);
	if (!rc) {
		pieces_init(&step.program, step.exec, 1);
		pieces_refresh_masters(&step.program, step.exec);
		rc = step_gradients(&step, NULL, 0, &result, e);
	}
	if (!rc && !(rc = step_update(&step, 1, 1e-3, e)))
		rc = step_evaluate(&eval, NULL, 0, 1, &loss, e);
	if (!rc && !memory_check(&l->planned[rank], &step, &eval, e))
		l->refuses_other[rank] = refuses_others(&l->planned[rank], &step, &eval);
	step_free(&eval);
	step_free(&step);
	groups_close(&groups);
	cpu_backend.close(at.stream);
}

TEST(what_is_planned_is_held_on_every_rank)
{
	for (size_t i = 0; i < LAYOUTS; i++) {
		struct config c;
		struct lived *l = mem_array(1, sizeof *l);
		l->c = &c;
		if (open_config(&c, layouts[i].ranks, layouts[i].text))
			ranks_run(layouts[i].ranks, live, l);
		for (int r = 0; r < layouts[i].ranks; r++)
			if (l->error[r].code || !l->refuses_other[r])
				test_failed(__FILE__, __LINE__, "%s, rank %d: %s", layouts[i].text, r,
				            l->error[r].code ? l->error[r].text : "another plan passes");
		config_free(&c);
		free(l);
	}
}

/* estimate_layout looks at one rank of a stage: the others must have the same memory. */
TEST(ranks_of_a_stage_are_alike)
{
	static const struct {
		int ranks;
		const char *text;
	} more[] = {{12, PP "2 " SP TP "2 ddp.zero_stage=3 train.global_batch_size=24"},
	            {8, PP "2 " TP "4 ddp.zero_stage=0 train.global_batch_size=4 model.vocab_size=130"},
	            {8, PP "2 ddp.num_distributed_optimizer_instances=2 ddp.zero_stage=2 "
	                   "train.global_batch_size=8 " SCHEDULE "interleaved " VPP "2"}};
	for (size_t i = 0; i < sizeof more / sizeof *more; i++) {
		struct config c;
		struct estimate x = {0};
		struct err e = {0};
		if (open_config(&c, more[i].ranks, more[i].text) && CHECK(!estimate_layout(&x, &c, 1, &e)))
			for (int r = 0; r < more[i].ranks; r++) {
				struct memory m;
				int stage = r / (more[i].ranks / x.n_stage);
				CHECK_INT(estimate_memory(&m, &c, r, alone, false, &e), 0);
				if (memcmp(&m, &x.stage[stage].memory, sizeof m))
					test_failed(__FILE__, __LINE__, "%s: rank %d is not like its stage",
					            more[i].text, r);
			}
		estimate_free(&x);
		config_free(&c);
	}
}

TEST(a_dry_run_plans_neither_validation_nor_staging)
{
	struct config c;
	struct memory whole, dry;
	struct err e = {0};
	MUST(open_config(&c, 1, "train.global_batch_size=1"));
	CHECK_INT(estimate_memory(&whole, &c, 0, alone, false, &e), 0);
	CHECK_INT(estimate_memory(&dry, &c, 0, alone, true, &e), 0);
	CHECK(whole.bytes[MEMORY_validation] > 0);
	CHECK_INT(whole.bytes[MEMORY_staging], 132 * WIDTH * 4); /* the embedding */
	CHECK_INT(dry.bytes[MEMORY_validation] + dry.bytes[MEMORY_staging], 0);
	CHECK_INT(dry.bytes[R_SAVED], whole.bytes[R_SAVED]);
	config_free(&c);
}

/* Kernels */

static struct tensor matrix(int32_t rows, int32_t columns)
{
	return (struct tensor){.dim = {rows, columns, 1, 1}, .nd = 2, .dtype = DT_f32};
}

static struct workspace tell(struct stream *s, int32_t width)
{
	struct tensor in[OP_MAX_IN] = {matrix(300, width), matrix(width, 1), matrix(width, 1)};
	struct tensor out[OP_MAX_OUT] = {matrix(300, width), matrix(300, 1), matrix(300, 1)};
	union op_arg arg = {.norm = {.eps = 1e-5f}};
	return cpu_backend.workspace(s, &(struct kernel_call){OP_layernorm, &arg, in, out});
}

static int normalise(struct stream *s, int32_t width)
{
	union op_arg arg = {.norm = {.eps = 1e-5f}};
	struct err e = {0};
	struct tensor in[OP_MAX_IN] = {matrix(300, width), matrix(width, 1), matrix(width, 1)};
	struct tensor out[OP_MAX_OUT] = {matrix(300, width), matrix(300, 1), matrix(300, 1)};
	for (int k = 0; k < 3; k++) {
		in[k].data = mem_aligned((size_t)tensor_bytes(&in[k]));
		out[k].data = mem_aligned((size_t)tensor_bytes(&out[k]));
	}
	int rc = cpu_backend.kernel[OP_layernorm](s, &arg, in, out, &e);
	for (int k = 0; k < 3; k++) {
		free(in[k].data);
		free(out[k].data);
	}
	return rc;
}

TEST(a_stream_takes_what_it_was_told_of)
{
	struct stream *s;
	struct err e = {0};
	MUST(!cpu_backend.open(&s, THREADS(2), &e));
	CHECK_INT(cpu_backend.workspace(s, NULL).expected, 0);
	CHECK_INT(tell(s, 1000).expected, 2 * mem_reserved(4 * 1000 * 4));
	CHECK_INT(tell(s, 500).expected, 2 * mem_reserved(4 * 1000 * 4)); /* the largest decides */
	CHECK_INT(cpu_backend.workspace(s, NULL).held, 0);
	CHECK_INT(normalise(s, 500), 0);
	struct workspace after = cpu_backend.workspace(s, NULL);
	CHECK_INT(after.held, after.expected);
	cpu_backend.close(s);
}

TEST(to_take_more_than_was_told_is_fatal)
{
	int status = 0;
	pid_t child = fork();
	if (child == 0) {
		struct stream *s;
		struct err e = {0};
		if (!freopen("/dev/null", "w", stderr) || cpu_backend.open(&s, THREADS(1), &e))
			_exit(1);
		tell(s, 500);
		normalise(s, 501);
		_exit(0);
	}
	MUST(child > 0 && waitpid(child, &status, 0) == child);
	CHECK(WIFEXITED(status));
	CHECK_INT(WEXITSTATUS(status), EXIT_INTERNAL);
}

/* What a product takes on a stream that was told of nothing, and the most that it says it takes. */
static void check_product(const struct matmul_impl *impl, int64_t m, int64_t n, int64_t k, enum dtype dtype,
                          enum dtype c_dtype)
{
	struct stream *s;
	struct err e = {0};
	struct matmul g = {.m = m, .n = n, .k = k, .b_transposed = true, .dtype = dtype, .c_dtype = c_dtype};
	void *a = mem_aligned((size_t)(m * k) * 4), *b = mem_aligned((size_t)(n * k) * 4),
	     *c = mem_aligned((size_t)(m * n) * 4);
	g.a = a;
	g.b = b;
	g.c = c;
	MUST(!cpu_backend.open(&s, THREADS(3), &e));
	struct cpu_space says = impl->space(s, &g);
	impl->run[dtype](s, &g);
	size_t most = mem_reserved(says.shared) + (size_t)says.parts * mem_reserved(says.part);
	size_t held = (size_t)cpu_backend.workspace(s, NULL).held;
	if (held > most || 2 * held < most)
		test_failed(__FILE__, __LINE__, "%s %s [%lld,%lld,%lld]: %zu bytes held, %zu announced",
		            impl->name, dtype_rows[dtype].name, (long long)m, (long long)n, (long long)k,
		            held, most);
	cpu_backend.close(s);
	free(a);
	free(b);
	free(c);
}

TEST(products_take_what_they_say)
{
	static const int64_t sizes[][3] = {{1, 1, 1},      {100, 70, 33},    {512, 768, 300},
	                                   {37, 50, 9000}, {1300, 40, 9000}, {40, 2500, 4100}};
	static const enum dtype types[][2] = {
	        {DT_f32, DT_f32}, {DT_bf16, DT_bf16}, {DT_bf16, DT_f32}, {DT_f16, DT_f16}};
	for (int i = 0; matmul_at(i); i++)
		for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++)
			for (size_t t = 0; t < sizeof types / sizeof *types; t++)
				if (matmul_at(i)->run[types[t][0]])
					check_product(matmul_at(i), sizes[k][0], sizes[k][1], sizes[k][2],
					              types[t][0], types[t][1]);
}

/* Reductions */

struct reductions {
	size_t held[MAX_RANKS], planned;
	bool failed;
};

static void reduce_some(int rank, struct comm *world, void *shared)
{
	static const size_t counts[] = {1, 100, 1500, 3000, 100000};
	static const enum dtype types[] = {DT_f32, DT_bf16, DT_f16, DT_f64, DT_i64};
	struct reductions *r = shared;
	char *data = mem_array(100000, 8), *part = mem_array(100000, 8);
	struct err e = {0};
	size_t most = 0;
	for (size_t k = 0; k < sizeof counts / sizeof *counts; k++)
		for (size_t t = 0; t < sizeof types / sizeof *types; t++) {
			size_t need = comm_all_reduce_bytes(world->size, counts[k], types[t]);
			most = need > most ? need : most;
			r->failed |= comm_all_reduce(world, data, counts[k], types[t], REDUCE_SUM, &e) != 0;
			r->failed |= comm_scratch_bytes(world) != most;
		}
	size_t need = comm_reduce_scatter_bytes(world->size, DT_f64);
	most = need > most ? need : most;
	r->failed |= comm_reduce_scatter(world, data, part, 100, DT_f64, REDUCE_SUM, &e) != 0;
	r->held[rank] = comm_scratch_bytes(world);
	r->planned = most;
	free(data);
	free(part);
}

TEST(reductions_hold_what_was_planned)
{
	for (int n = 2; n <= 5; n++) {
		struct reductions r = {0};
		MUST(ranks_run(n, reduce_some, &r));
		CHECK(!r.failed && r.planned > 0);
		for (int i = 0; i < n; i++)
			CHECK_INT(r.held[i], r.planned);
	}
	CHECK_INT(comm_all_reduce_bytes(1, 1000, DT_f32), 0);
	CHECK_INT(comm_all_reduce_bytes(4, 0, DT_f32), 0);
}

/* Work, idle time, traffic */

static bool estimate_text(struct estimate *x, int ranks, const char *text)
{
	struct config c;
	struct err e = {0};
	bool good = open_config(&c, ranks, text) && CHECK(!estimate_layout(x, &c, 1, &e));
	config_free(&c);
	return good;
}

/* 1 - busy / (stages · makespan), where busy is all the flop of the slots. */
TEST(bubble_is_the_idle_part_of_the_makespan)
{
	static const char *const schedules[] = {"1f1b", "zero_bubble", "interleaved " VPP "2"};
	double bubble[3];
	int64_t saved[3];
	for (int k = 0; k < 3; k++) {
		struct estimate x;
		char text[200];
		double busy = 0, end = 0;
		snprintf(text, sizeof text, "train.global_batch_size=4 " PP "2 " SCHEDULE "%s", schedules[k]);
		MUST(estimate_text(&x, 2, text));
		for (int s = 0; s < 2; s++) {
			busy += x.stage[s].flop - x.stage[s].flop_at_end;
			end = fmax(end, x.stage[s].flop_at_end);
		}
		bubble[k] = x.bubble;
		saved[k] = estimate_saved_bytes(&x);
		CHECK_NEAR(x.bubble, 1 - busy / (2 * (x.flop_critical - end)), 1e-12);
		estimate_free(&x);
	}
	CHECK(bubble[1] < bubble[0] && bubble[2] < bubble[0] && bubble[1] > 0);
	CHECK(saved[1] >= saved[0]);
}

TEST(recomputation_saves_memory_for_flop)
{
	static const char *const granularities[] = {"none", "selective", "full"};
	int64_t saved[3], total[3];
	double flop[3];
	for (int k = 0; k < 3; k++) {
		struct estimate x;
		char text[200];
		snprintf(text, sizeof text, "train.global_batch_size=2 recompute.granularity=%s",
		         granularities[k]);
		MUST(estimate_text(&x, 1, text));
		saved[k] = estimate_saved_bytes(&x);
		total[k] = memory_total(&x.stage[0].memory);
		flop[k] = x.stage[0].flop;
		CHECK(x.bubble == 0);
		estimate_free(&x);
	}
	for (int k = 0; k < 2; k++)
		CHECK(saved[k + 1] < saved[k] && total[k + 1] < total[k] && flop[k + 1] > flop[k]);
}

/* Sums of a few scalars are sent too: a kibibyte more. */
TEST(traffic_is_gradients_and_edges)
{
	struct estimate x;
	MUST(estimate_text(&x, 3, "train.global_batch_size=3 ddp.zero_stage=0"));
	double gradients = 4 * (double)x.stage[0].parameters;
	CHECK_NEAR(x.stage[0].wire_bytes[AXIS_dp], 2 * gradients * 2 / 3, 1024);
	CHECK(x.stage[0].wire_bytes[AXIS_tp] == 0 && x.stage[0].wire_bytes[AXIS_pp] == 0);
	estimate_free(&x);
	MUST(estimate_text(&x, 4, "train.global_batch_size=4 " PP "4"));
	for (int s = 0; s < 4; s++)
		CHECK_NEAR(x.stage[s].wire_bytes[AXIS_pp],
		           (s == 0 || s == 3 ? 1 : 2) * MICRO_BATCHES * ROWS * WIDTH * 4, 1024);
	int64_t parameters = 0, layers = 0;
	for (int s = 0; s < 4; s++) {
		parameters += x.stage[s].parameters;
		layers += x.stage[s].layers;
	}
	CHECK_INT(parameters, x.parameters);
	CHECK_INT(layers, 4);
	CHECK_INT(x.checkpoint_bytes, 12 * x.parameters);
	estimate_free(&x);
}

TEST(the_fullest_node_holds_consecutive_ranks)
{
	struct estimate_stage stage[2] = {{0}};
	struct estimate x = {.n_stage = 2, .stage = stage};
	stage[0].memory.bytes[R_PARAM] = 100;
	stage[1].memory.bytes[R_PARAM] = 1;
	CHECK_INT(estimate_node_bytes(&x, 8, 1), 100);
	CHECK_INT(estimate_node_bytes(&x, 8, 3), 300);
	CHECK_INT(estimate_node_bytes(&x, 8, 8), 404);
	CHECK_INT(estimate_node_bytes(&x, 8, 5), 401);
	CHECK_INT(estimate_node_bytes(&x, 8, 100), 404);
}

/* The peak is not below what is resident now, and stays when it is given back. */
TEST(peak_resident_memory_is_seen)
{
	int64_t before = sys_peak_resident(), bytes = before + (64 << 20);
	MUST(before > 0);
	char *p = mem_aligned((size_t)bytes);
	CHECK(sys_peak_resident() >= bytes && sys_peak_resident() <= bytes + before);
	free(p);
	CHECK(sys_peak_resident() >= bytes);
	CHECK(sys_mapped_files() > 0 && sys_mapped_files() < sys_peak_resident());
	CHECK_INT(mem_reserved(0), 0);
	CHECK_INT(mem_reserved(65), 128);
	CHECK_INT(mem_reserved(5 << 20), 6 << 20);
	CHECK_INT(mem_reserved(6 << 20), 6 << 20);
}

/* The command */

/* Runs `pentad plan -c FILE ARGUMENTS` and returns its exit code; its output into text[cap]. */
static int run_plan(const char *arguments, char *text, size_t cap)
{
	char command[1000];
	snprintf(command, sizeof command, "'%s' plan -c %s/plan.yaml %s 2>&1", getenv("PENTAD"), test_dir(),
	         arguments);
	FILE *out = popen(command, "r");
	if (!out)
		return -1;
	size_t n = fread(text, 1, cap - 1, out);
	text[n] = 0;
	int status = pclose(out);
	return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static void write_plan_config(void)
{
	static const char yaml[] =
	        "model: {num_layers: 4, hidden_size: 24, num_attention_heads: 4, ffn_hidden_size: 40, "
	        "vocab_size: 131, seq_length: 12}\n"
	        "parallel: {pipeline_model_parallel_size: 2}\n"
	        "train: {global_batch_size: 4, train_iters: 10}\n";
	char path[500];
	struct err e = {0};
	snprintf(path, sizeof path, "%s/plan.yaml", test_dir());
	CHECK_INT(sys_write_file(path, yaml, strlen(yaml), &e), 0);
}

static void check_plan(const struct json *plan)
{
	const struct json *stages = json_get_type(plan, "stages", JSON_ARRAY);
	CHECK_INT(json_get_integer(plan, "world_size", -1), 4);
	CHECK(json_get_bool(plan, "fits", false));
	CHECK_NEAR(json_get_number(plan, "seconds", -1), 10 * json_get_number(plan, "seconds_per_step", -1),
	           1e-6);
	CHECK_NEAR(json_get_number(plan, "seconds_per_step", -1),
	           json_get_number(plan, "critical_flops", -1) / 2e12, 1e-15);
	CHECK(json_get_type(plan, "schedules", JSON_ARRAY)->count == 3);
	CHECK(json_get_type(plan, "recompute", JSON_ARRAY)->count == 3);
	MUST(stages && stages->count == 2);
	JSON_EACH (stage, stages) {
		const struct json *memory = json_get_type(stage, "memory_bytes", JSON_OBJECT);
		int64_t sum = 0;
		JSON_EACH (row, memory)
			sum += strcmp(row->key, "total") ? row->integer : 0;
		CHECK_INT(sum, json_get_integer(memory, "total", -1));
		const struct json *chunk = json_get_type(stage, "chunks", JSON_ARRAY)->child;
		CHECK_INT(json_get_integer(memory, "saved", -1),
		          json_get_integer(chunk, "saved_bytes", -1) *
		                  json_get_integer(chunk, "in_flight", -1));
	}
}

TEST(plan_prints_json_and_judges)
{
	static char text[100000];
	struct arena a = {0};
	struct err e = {0};
	struct json *plan;
	MUST(getenv("PENTAD"));
	write_plan_config();
	CHECK_INT(run_plan("--world-size 4 --tflops 2 --json", text, sizeof text), 0);
	if (CHECK(!json_parse(&a, "plan", text, strlen(text), &plan, &e)))
		check_plan(plan);
	arena_free(&a);
	CHECK_INT(run_plan("--tflops 1", text, sizeof text), 0);
	CHECK_HAS(text, "data_parallel 1 = world 2"); /* as few ranks as the layout needs */
	CHECK_HAS(text, "zero_bubble");
	CHECK_HAS(text, "--tflops)");
	CHECK_INT(run_plan("--tflops 1 --memory 0.01", text, sizeof text), 1);
	CHECK_HAS(text, "does NOT fit");
	CHECK_INT(run_plan("--tflops -1", text, sizeof text), EXIT_USAGE);
	CHECK_INT(run_plan("--world-size 3", text, sizeof text), EXIT_CONFIG);
}

int main(int argc, char **argv)
{
	return test_main(argc, argv);
}
