/* pentad bench matmul: the matrix products of a transformer's layers on this machine. */
#include "apps/bench.h"
#include "apps/options.h"
#include "base/clock.h"
#include "base/err.h"
#include "base/json.h"
#include "base/log.h"
#include "base/mem.h"
#include "base/text.h"
#include "kernels/cpu/matmul.h"
#include "kernels/kernels.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_REPEAT = 1000, MAX_SIZE = 1 << 20 };

struct sizes {
	int64_t tokens, hidden, vocab, threads, repeat; /* vocab 0: no output layer */
	bool json;
};

/* The products of one layer: y[tokens, out] = x[tokens, in] w[out, in]', and its gradients. */
struct layer {
	const char *name;
	int64_t in, out;
};

struct bench {
	struct sizes size;
	struct stream *stream;
	void *x, *w, *y; /* hold the largest layer's operands in f32 */
	struct buf out;
};

static int compare(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;
	return (x > y) - (x < y);
}

/* Median of seconds a call, after one that is not counted. */
static double measure(const struct bench *b, matmul_fn *run, const struct matmul *g)
{
	double seconds[MAX_REPEAT];
	run(b->stream, g);
	for (int64_t i = 0; i < b->size.repeat; i++) {
		double begin = clock_now_s();
		run(b->stream, g);
		seconds[i] = clock_now_s() - begin;
	}
	qsort(seconds, (size_t)b->size.repeat, sizeof *seconds, compare);
	return seconds[b->size.repeat / 2];
}

static void put_result(struct bench *b, const struct layer *l, const struct matmul_impl *impl,
                       enum dtype dtype, const char *pass, double seconds)
{
	double gflops = 2e-9 * (double)b->size.tokens * (double)l->in * (double)l->out / seconds;
	if (b->size.json)
		buf_printf(&b->out,
		           "%s{\"implementation\": \"%s\", \"dtype\": \"%s\", \"layer\": \"%s\", \"pass\": "
		           "\"%s\", "
		           "\"tokens\": %" PRId64 ", \"in\": %" PRId64 ", \"out\": %" PRId64
		           ", \"ms\": %.4f, \"gflops\": %.2f}",
		           b->out.length ? ",\n" : "", impl->name, dtype_rows[dtype].name, l->name, pass,
		           b->size.tokens, l->in, l->out, 1e3 * seconds, gflops);
	else
		printf(" %8.1f", gflops);
}

static void bench_layer(struct bench *b, const struct layer *l, const struct matmul_impl *impl,
                        enum dtype dtype)
{
	int64_t n = b->size.tokens, in = l->in, out = l->out;
	const struct {
		const char *name;
		struct matmul g;
	} passes[] = {
	        {"forward", {.m = n, .n = out, .k = in, .b_transposed = true, .c_dtype = dtype}},
	        {"dx", {.m = n, .n = in, .k = out, .c_dtype = dtype}},
	        {"dw", {.m = out, .n = in, .k = n, .a_transposed = true, .c_dtype = DT_f32, .acc = true}},
	};
	if (!b->size.json)
		printf("%-12s %-5s %-8s %6" PRId64 " %6" PRId64, impl->name, dtype_rows[dtype].name, l->name,
		       in, out);
	for (size_t i = 0; i < sizeof passes / sizeof *passes; i++) {
		struct matmul g = passes[i].g;
		bool forward = i == 0, weights = i == 2;
		g.dtype = dtype;
		g.a = forward ? b->x : b->y;
		g.b = weights ? b->x : b->w;
		g.c = forward ? b->y : weights ? b->w : b->x;
		put_result(b, l, impl, dtype, passes[i].name, measure(b, impl->run[dtype], &g));
	}
	if (!b->size.json)
		putchar('\n');
}

/* Values in [-1, 1): zeros would run cooler, and faster, than a model does. */
static void fill(void *to, int64_t n, enum dtype dtype, uint64_t key)
{
	for (int64_t i = 0; i < n; i++) {
		uint64_t bits = (key + (uint64_t)i) * 0x9E3779B97F4A7C15u;
		float x = (float)(int32_t)(bits >> 32) * 0x1p-31f;
		if (dtype == DT_f32)
			((float *)to)[i] = x;
		else
			((uint16_t *)to)[i] = half_from_f32(dtype, x);
	}
}

static void bench_layers(struct bench *b, const struct layer *layers, size_t n, int64_t widest)
{
	for (enum dtype dtype = DT_f32; dtype <= DT_f16; dtype++)
		for (int i = 0; matmul_at(i); i++)
			for (size_t l = 0; l < n && matmul_at(i)->run[dtype]; l++) {
				fill(b->x, b->size.tokens * 4 * b->size.hidden, dtype, 1);
				fill(b->w, widest * b->size.hidden, dtype, 2);
				fill(b->y, b->size.tokens * layers[l].out, dtype, 3);
				bench_layer(b, &layers[l], matmul_at(i), dtype);
			}
}

static void print_head(const struct bench *b)
{
	printf("%s; %" PRId64 " tokens, %" PRId64 " threads (0: OpenMP's default), median of %" PRId64
	       "; GF/s\n%-12s %-5s %-8s %6s %6s %8s %8s %8s\n",
	       cpu_backend.describe(), b->size.tokens, b->size.threads, b->size.repeat, "by", "type", "layer",
	       "in", "out", "forward", "dx", "dw");
}

static void print_json(struct bench *b)
{
	struct buf text = {0};
	json_put_string(&text, cpu_backend.describe(), strlen(cpu_backend.describe()));
	printf("{\"kernels\": %s, \"threads\": %" PRId64 ", \"repeat\": %" PRId64 ", \"rows\": [\n%s]}\n",
	       text.data, b->size.threads, b->size.repeat, b->out.data);
	buf_free(&text);
}

static int bench_matmul(const struct sizes *size, struct err *e)
{
	struct bench b = {.size = *size};
	const int64_t hidden = size->hidden;
	const struct layer layers[] = {{"qkv", hidden, 3 * hidden},
	                               {"proj", hidden, hidden},
	                               {"fc1", hidden, 4 * hidden},
	                               {"fc2", 4 * hidden, hidden},
	                               {"head", hidden, size->vocab}};
	int64_t widest = size->vocab > 4 * hidden ? size->vocab : 4 * hidden;
	int rc = cpu_backend.open(&b.stream, THREADS((int)size->threads), e);
	if (rc)
		return rc;
	b.x = mem_aligned((size_t)(size->tokens * 4 * hidden) * sizeof(float));
	b.w = mem_aligned((size_t)(widest * hidden) * sizeof(float));
	b.y = mem_aligned((size_t)(size->tokens * widest) * sizeof(float));
	if (!size->json)
		print_head(&b);
	bench_layers(&b, layers, size->vocab ? 5 : 4, widest);
	if (size->json)
		print_json(&b);
	buf_free(&b.out);
	free(b.x);
	free(b.w);
	free(b.y);
	cpu_backend.close(b.stream);
	return 0;
}

static int check(const struct sizes *s, struct err *e)
{
	const struct {
		const char *name;
		int64_t value, least, most;
	} rows[] = {{"tokens", s->tokens, 1, MAX_SIZE},
	            {"hidden", s->hidden, 1, MAX_SIZE / 4},
	            {"vocab", s->vocab, 0, MAX_SIZE},
	            {"threads", s->threads, 0, 4096},
	            {"repeat", s->repeat, 1, MAX_REPEAT}};
	for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
		if (rows[i].value < rows[i].least || rows[i].value > rows[i].most)
			return err_set(e, EXIT_USAGE,
			               "--%s %" PRId64 ": %" PRId64 " to %" PRId64 " are allowed",
			               rows[i].name, rows[i].value, rows[i].least, rows[i].most);
	return 0;
}

int bench_matmul_main(int argc, char **argv)
{
	struct sizes size = {.tokens = 2048, .hidden = 768, .vocab = 50304, .repeat = 7};
	struct cli_option options[] = {
	        {"tokens", CLI_INT, &size.tokens, "N", "rows of the activations; default 2048"},
	        {"hidden", CLI_INT, &size.hidden, "N", "width of the model; default 768, GPT-2 124M"},
	        {"vocab", CLI_INT, &size.vocab, "N", "width of the output layer, 0 for none; default 50304"},
	        {"threads", CLI_INT, &size.threads, "N", "threads; default 0, what OpenMP gives"},
	        {"repeat", CLI_INT, &size.repeat, "N", "calls of which the median is taken; default 7"},
	        {"json", CLI_FLAG, &size.json, NULL, "prints one JSON object"},
	};
	struct cli cli = {
	        .usage = "bench matmul [--tokens N] [--hidden N] [--vocab N] [--threads N] [--repeat N] "
	                 "[--json]",
	        .doc = "Measures the matrix products of a transformer's layers, by every implementation in "
	               "this "
	               "build; the first listed is what training uses.",
	        .example = "bench matmul --hidden 1024 --vocab 0",
	        .options = options,
	        .n = sizeof options / sizeof *options,
	};
	int code;
	struct err e = {0};
	if (!cli_parse(&cli, argc, argv, &code))
		return code;
	if (!check(&size, &e))
		bench_matmul(&size, &e);
	code = e.code;
	if (code)
		log_error("bench: %s", e.text);
	cli_free(&cli);
	return code;
}
