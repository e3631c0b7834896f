/* pentad checkpoint: what is there, is it whole, what differs. */
#include "apps/commands.h"
#include "apps/options.h"
#include "base/err.h"
#include "base/json.h"
#include "base/log.h"
#include "base/mem.h"
#include "base/text.h"
#include "ckpt/ckpt.h"

#include <inttypes.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { DIFFERENT = 1 };

struct request {
	bool json;
	int64_t most_recent_k;
	const char **paths;
	size_t n;
	struct err *e;
};

/* Calls `show` for each step of a path: those of a run, or the one it is. Goes on after a damaged one. */
typedef int show_fn(const struct request *q, const char *path, struct buf *b);

static int each_step(const struct request *q, show_fn *show, struct buf *b)
{
	int rc = 0;
	for (size_t i = 0; i < q->n && !q->e->code; i++) {
		int64_t *steps = NULL;
		size_t n = 0;
		if (ckpt_list(q->paths[i], &steps, &n, q->e))
			return q->e->code;
		for (size_t k = 0; k < n; k++) {
			char path[PATH_MAX];
			if (!ckpt_step_path(q->paths[i], steps[k], path, sizeof path, q->e) &&
			    show(q, path, b))
				rc = EXIT_BAD_DATA;
		}
		free(steps);
		if (!n && show(q, q->paths[i], b))
			rc = EXIT_BAD_DATA;
	}
	return q->e->code ? q->e->code : rc;
}

static void put_comma(const struct buf *b, struct buf *out)
{
	if (b->length > 1)
		buf_puts(out, ",\n");
}

/* One line a step, with or without all checksums compared. */
static int put_step(const struct request *q, const char *path, unsigned flags, struct buf *b)
{
	struct ckpt *c = NULL;
	struct err e = {0};
	char size[32] = "";
	int rc = ckpt_open(path, CKPT_NEWEST, flags | CKPT_STRICT, &c, &e);
	if (rc == EXIT_NO_INPUT) {
		*q->e = e;
		return rc;
	}
	if (q->json) {
		put_comma(b, b);
		buf_puts(b, "{\"path\": ");
		json_put_string(b, path, strlen(path));
		buf_printf(b, ", \"valid\": %s", rc ? "false" : "true");
		if (rc) {
			buf_puts(b, ", \"error\": ");
			json_put_string(b, e.text, strlen(e.text));
		} else {
			buf_printf(b,
			           ", \"step\": %" PRId64
			           ", \"tensors\": %zu, \"bytes\": %zu, \"shards\": %zu, \"world_size\": %d",
			           ckpt_step(c), ckpt_count(c), ckpt_bytes(c), ckpt_file_count(c),
			           ckpt_world_size(c));
		}
		buf_puts(b, "}");
	} else if (rc) {
		buf_printf(b, "%-9s %9s %8s %12s %7s %6s  %s\n", "DAMAGED", "-", "-", "-", "-", "-", path);
		log_error("%s", e.text);
	} else {
		buf_printf(b, "%-9s %9" PRId64 " %8zu %12s %7zu %6d  %s\n",
		           flags & CKPT_VERIFY ? "verified" : "whole", ckpt_step(c), ckpt_count(c),
		           text_bytes(size, sizeof size, (double)ckpt_bytes(c)), ckpt_file_count(c),
		           ckpt_world_size(c), path);
	}
	ckpt_close(c);
	return rc;
}

static int list_step(const struct request *q, const char *path, struct buf *b)
{
	return put_step(q, path, 0, b);
}

static int verify_step(const struct request *q, const char *path, struct buf *b)
{
	return put_step(q, path, CKPT_VERIFY, b);
}

static int table_of_steps(const struct request *q, show_fn *show)
{
	struct buf b = {0};
	if (q->json)
		buf_puts(&b, "[");
	else
		buf_printf(&b, "%-9s %9s %8s %12s %7s %6s  %s\n", "state", "step", "tensors", "size",
		           "shards", "world", "path");
	int rc = each_step(q, show, &b);
	buf_puts(&b, q->json ? "]\n" : "");
	fwrite(b.data, 1, b.length, stdout);
	buf_free(&b);
	return rc;
}

/* A damaged step in a list is not a failure of listing. */
static int ls(const struct request *q)
{
	int rc = table_of_steps(q, list_step);
	return q->e->code ? rc : 0;
}

static int verify(const struct request *q)
{
	return table_of_steps(q, verify_step);
}

static void put_shape(const struct ckpt_entry *t, struct buf *b)
{
	buf_puts(b, "[");
	for (int d = 0; d < t->nd; d++)
		buf_printf(b, d ? ", %" PRId64 : "%" PRId64, t->shape[d]);
	buf_puts(b, "]");
}

static void put_tensor(const struct ckpt_entry *t, bool json, struct buf *b)
{
	struct buf shape = {0};
	put_shape(t, &shape);
	if (json)
		buf_printf(b,
		           "{\"name\": \"%s\", \"kind\": \"%s\", \"dtype\": \"%s\", \"shape\": %s, "
		           "\"pieces\": %zu}",
		           t->name, t->kind, dtype_rows[t->dtype].name, shape.data, t->n_pieces);
	else
		buf_printf(b, "%-11s %-5s %-20s %6zu  %s\n", t->kind, dtype_rows[t->dtype].name, shape.data,
		           t->n_pieces, t->name);
	buf_free(&shape);
}

static void put_checkpoint(const struct ckpt *c, bool json, struct buf *b)
{
	char size[32];
	if (json) {
		buf_puts(b, "{\"path\": ");
		json_put_string(b, ckpt_path(c), strlen(ckpt_path(c)));
		buf_printf(b, ", \"step\": %" PRId64 ", \"world_size\": %d, \"meta\": %s,\n\"tensors\": [\n",
		           ckpt_step(c), ckpt_world_size(c), ckpt_meta_text(c));
	} else {
		buf_printf(b, "%s\nstep %" PRId64 ", written by %d ranks in %zu files, %s\nmeta %s\n\n",
		           ckpt_path(c), ckpt_step(c), ckpt_world_size(c), ckpt_file_count(c),
		           text_bytes(size, sizeof size, (double)ckpt_bytes(c)), ckpt_meta_text(c));
		buf_printf(b, "%-11s %-5s %-20s %6s  %s\n", "kind", "type", "shape", "pieces", "name");
	}
	for (size_t i = 0; i < ckpt_count(c); i++) {
		put_tensor(ckpt_entry(c, i), json, b);
		if (json)
			buf_puts(b, i + 1 < ckpt_count(c) ? ",\n" : "\n");
	}
	buf_puts(b, json ? "]}\n" : "");
}

static int show(const struct request *q)
{
	for (size_t i = 0; i < q->n; i++) {
		struct ckpt *c = NULL;
		struct buf b = {0};
		if (ckpt_open(q->paths[i], CKPT_NEWEST, 0, &c, q->e))
			return q->e->code;
		put_checkpoint(c, q->json, &b);
		fwrite(b.data, 1, b.length, stdout);
		buf_free(&b);
		ckpt_close(c);
	}
	return 0;
}

/* How two tensors of the same shape differ. */
struct difference {
	size_t elements;
	double max_abs;
};

enum { CHUNK_BYTES = 16 << 20 };

static void compare_chunk(const char *a, const char *b, size_t n, enum dtype t, struct difference *out)
{
	size_t bytes = dtype_rows[t].bytes;
	for (size_t i = 0; i < n; i++) {
		float x, y;
		if (!memcmp(a + i * bytes, b + i * bytes, bytes))
			continue;
		out->elements++;
		if (t != DT_f32)
			continue;
		memcpy(&x, a + i * 4, 4);
		memcpy(&y, b + i * 4, 4);
		double d = fabs((double)x - (double)y);
		out->max_abs = isnan(d) ? INFINITY : fmax(out->max_abs, d);
	}
}

/* A few rows at a time; floats as f32, others as they are. */
static int compare_tensor(struct ckpt *a, struct ckpt *b, const struct ckpt_entry *t, struct difference *out,
                          struct err *e)
{
	enum dtype as = dtype_is_half(t->dtype) ? DT_f32 : t->dtype;
	int64_t offset[CKPT_MAX_DIM] = {0}, extent[CKPT_MAX_DIM], rows = t->nd ? t->shape[0] : 1;
	size_t row = t->bytes / dtype_rows[t->dtype].bytes / (size_t)rows; /* elements */
	int64_t step = (int64_t)(CHUNK_BYTES / (row * dtype_rows[as].bytes)) + 1;
	step = step < rows ? step : rows;
	memcpy(extent, t->shape, sizeof extent);
	char *x = mem_array((size_t)step * row, dtype_rows[as].bytes);
	char *y = mem_array((size_t)step * row, dtype_rows[as].bytes);
	int rc = 0;
	for (int64_t r = 0; r < rows && !rc; r += step) {
		int64_t n = rows - r < step ? rows - r : step;
		offset[0] = t->nd ? r : 0;
		extent[0] = n;
		rc = ckpt_read_box(a, t->kind, t->name, offset, extent, as, x, e);
		if (!rc)
			rc = ckpt_read_box(b, t->kind, t->name, offset, extent, as, y, e);
		if (!rc)
			compare_chunk(x, y, (size_t)n * row, as, out);
	}
	free(x);
	free(y);
	return rc;
}

static bool is_float(enum dtype t)
{
	return t == DT_f32 || dtype_is_half(t);
}

static bool same_form(const struct ckpt_entry *x, const struct ckpt_entry *y)
{
	bool same = x->nd == y->nd && !memcmp(x->shape, y->shape, sizeof x->shape);
	bool floats = is_float(x->dtype) && is_float(y->dtype);
	return same && (x->dtype == y->dtype || floats);
}

static int report_missing(const struct ckpt *in, const struct ckpt *from)
{
	int n = 0;
	for (size_t i = 0; i < ckpt_count(in); i++) {
		const struct ckpt_entry *t = ckpt_entry(in, i);
		if (ckpt_find(from, t->kind, t->name))
			continue;
		printf("only in %s: %s (%s)\n", ckpt_path(in), t->name, t->kind);
		n++;
	}
	return n;
}

static int diff_open(struct ckpt *a, struct ckpt *b, struct err *e)
{
	int differences = report_missing(a, b) + report_missing(b, a);
	for (size_t i = 0; i < ckpt_count(a); i++) {
		const struct ckpt_entry *t = ckpt_entry(a, i), *u = ckpt_find(b, t->kind, t->name);
		struct difference d = {0};
		if (!u)
			continue;
		if (!same_form(t, u)) {
			printf("shape or type: %s (%s)\n", t->name, t->kind);
			differences++;
			continue;
		}
		if (compare_tensor(a, b, t, &d, e))
			return e->code;
		if (!d.elements)
			continue;
		printf("%zu elements, at most %.6g apart: %s (%s)\n", d.elements, d.max_abs, t->name,
		       t->kind);
		differences++;
	}
	printf("%s: %zu tensors, %d differences\n", differences ? "DIFFERENT" : "same", ckpt_count(a),
	       differences);
	return differences ? DIFFERENT : 0;
}

static int diff(const struct request *q)
{
	struct ckpt *a = NULL, *b = NULL;
	if (q->n != 2)
		return err_set(q->e, EXIT_USAGE, "diff takes two paths");
	int rc = ckpt_open(q->paths[0], CKPT_NEWEST, 0, &a, q->e);
	if (!rc)
		rc = ckpt_open(q->paths[1], CKPT_NEWEST, 0, &b, q->e);
	if (!rc)
		rc = diff_open(a, b, q->e);
	ckpt_close(a);
	ckpt_close(b);
	return rc;
}

static int prune(const struct request *q)
{
	if (q->most_recent_k < 1 || q->most_recent_k > INT_MAX)
		return err_set(q->e, EXIT_USAGE,
		               "prune needs --most-recent-k N, the checkpoints to keep, 1 or more");
	for (size_t i = 0; i < q->n; i++)
		if (ckpt_prune(q->paths[i], (int)q->most_recent_k, q->e))
			return q->e->code;
	return ls(q);
}

static const struct action {
	const char *name;
	int (*run)(const struct request *);
} actions[] = {{"ls", ls}, {"show", show}, {"verify", verify}, {"diff", diff}, {"prune", prune}};
enum { N_ACTIONS = sizeof actions / sizeof *actions };

static int act(struct request *q, const struct cli *cli)
{
	const char *word = cli->words.n ? cli->words.items[0] : "";
	const char *near = text_nearest(word, &actions[0].name, N_ACTIONS, sizeof *actions);
	for (size_t i = 0; i < N_ACTIONS; i++)
		if (!strcmp(word, actions[i].name) && cli->words.n > 1) {
			q->paths = cli->words.items + 1;
			q->n = cli->words.n - 1;
			return actions[i].run(q);
		}
	return err_set(q->e, EXIT_USAGE,
	               "ls, show, verify, diff or prune, then PATH…%s%s; example: pentad %s",
	               near && strcmp(near, word) ? "; did you mean " : "",
	               near && strcmp(near, word) ? near : "", cli->example);
}

int checkpoint_main(int argc, char **argv)
{
	struct err e = {0};
	struct request q = {.e = &e};
	struct cli_option options[] = {
	        {"json", CLI_FLAG, &q.json, NULL, "ls, show and verify as JSON"},
	        {"most-recent-k", CLI_INT, &q.most_recent_k, "N", "prune: checkpoints to keep"},
	};
	struct cli cli = {
	        .usage = "checkpoint ls|show|verify|diff|prune PATH… [--json] [--most-recent-k N]",
	        .doc = "PATH is a run, its checkpoints folder, or one step-… of it. ls lists the steps, show "
	               "the tensors of "
	               "the newest, verify compares every checksum (65: damaged), diff compares two (1: "
	               "different), prune "
	               "removes old ones.",
	        .example = "checkpoint verify runs/demo",
	        .options = options,
	        .n = sizeof options / sizeof *options,
	        .max_words = 64,
	};
	int code;
	if (!cli_parse(&cli, argc, argv, &code))
		return code;
	code = act(&q, &cli);
	if (e.code)
		log_error("checkpoint: %s", e.text);
	cli_free(&cli);
	return code;
}
