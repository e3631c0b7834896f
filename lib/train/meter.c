#include "train/meter.h"
#include "base/err.h"
#include "base/json.h"
#include "base/log.h"
#include "base/sys.h"
#include "base/text.h"
#include "train/expert_load.h"
#include "train/stop.h"

#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Keeps the whole lines whose step is at most `step`. */
static int drop_later(const char *path, int64_t step, struct err *e)
{
	char *text;
	size_t bytes;
	struct stat st;
	if (sys.stat(path, &st) != 0)
		return 0;
	int rc = sys_read_file(path, (size_t)1 << 31, &text, &bytes, e);
	if (rc)
		return rc;
	struct buf kept = {0};
	for (char *line = text, *end; (end = memchr(line, '\n', (size_t)(text + bytes - line)));
	     line = end + 1) {
		const char *at = strstr(line, "\"step\": ");
		if (at && at < end && atoll(at + 8) <= step)
			buf_add(&kept, line, (size_t)(end + 1 - line));
	}
	rc = kept.length == bytes ? 0 : sys_write_file(path, kept.data ? kept.data : "", kept.length, e);
	buf_free(&kept);
	free(text);
	return rc;
}

int meter_open(struct meter *m, const struct config *c, const char *run_dir, int64_t step, struct err *e)
{
	char path[PATH_MAX];
	*m = (struct meter){.config = c};
	if (!run_dir)
		return 0;
	snprintf(path, sizeof path, "%s/metrics.jsonl", run_dir);
	int rc = drop_later(path, step, e);
	if (rc)
		return rc;
	m->file = fopen(path, "ae");
	if (!m->file)
		return err_errno(e, EXIT_IO, "%s: cannot open", path);
	setvbuf(m->file, NULL, _IOLBF, 0);
	return 0;
}

void meter_close(struct meter *m)
{
	if (m->file)
		fclose(m->file);
	m->file = NULL;
}

struct field {
	const char *name;
	double value;
};

static void put_fields(struct buf *b, const struct field *f, size_t n)
{
	for (size_t i = 0; i < n; i++) {
		buf_printf(b, ", \"%s\": ", f[i].name);
		json_put_number(b, f[i].value);
	}
}

/* One object of one line; `more` goes behind the step: members that are no numbers. */
static void write_line(FILE *file, int64_t step, const char *more, const struct field *f, size_t n)
{
	struct buf b = {0};
	if (!file)
		return;
	buf_printf(&b, "{\"step\": %lld%s", (long long)step, more);
	put_fields(&b, f, n);
	fprintf(file, "%s}\n", b.data);
	buf_free(&b);
}

void meter_validation(struct meter *m, int64_t step, double lm_loss)
{
	const struct field f[] = {{"lm_loss", lm_loss}, {"ppl", exp(lm_loss)}};
	m->val_loss = lm_loss;
	m->val_step = step;
	write_line(m->file, step, ", \"split\": \"valid\"", f, sizeof f / sizeof *f);
	log_info("validation at step %lld: loss %.4f, perplexity %.2f", (long long)step, lm_loss,
	         exp(lm_loss));
}

static double physical_memory(void)
{
	return (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE);
}

/* How uneven the experts' loads are, and the part of the choices that found no place. */
static void experts_words(const struct meter *m, const struct step_report *r, char *out, size_t cap)
{
	const struct model_config *c = &m->config->model;
	double choices = (double)m->config->train.global_batch_size * (double)c->seq_length *
	                 (double)c->moe_router_topk * r->experts.layers * (double)m->steps;
	if (!r->experts.layers)
		return;
	int n = snprintf(out, cap, " load %.2fx", expert_load_imbalance(&r->experts));
	if (m->dropped)
		n += snprintf(out + n, cap - (size_t)n, " drop %.2g%%", 100 * (double)m->dropped / choices);
	if (m->overflow)
		snprintf(out + n, cap - (size_t)n, " OVERFLOW %.2g%%", 100 * (double)m->overflow / choices);
}

/* Of fp16 alone: most scales are powers of two. */
static void scale_words(const struct meter *m, const struct step_report *r, char *out, size_t cap)
{
	int power;
	if (m->config->mixed_precision.precision != PRECISION_FP16)
		return;
	if (frexp(r->loss_scale, &power) == 0.5)
		snprintf(out, cap, " scale 2^%d", power - 1);
	else
		snprintf(out, cap, " scale %.4g", r->loss_scale);
}

static void people_line(const struct meter *m, const struct step_report *r, double tokens,
                        double tokens_per_s, double tflops, char *out, size_t cap)
{
	char count[32], rate[32], eta[32], left[48] = "", val[48] = "", mfu[32] = "", experts[96] = "",
	                                   scale[32] = "";
	int64_t total = m->config->train.train_iters;
	double remaining = stop_seconds_left(), gib = 1 << 30;
	if (m->val_step)
		snprintf(val, sizeof val, " val %.4f@%lld", m->val_loss, (long long)m->val_step);
	double peak = m->datasheet_peak > 0 ? m->datasheet_peak : m->matmul_peak;
	if (peak > 0)
		snprintf(mfu, sizeof mfu, " %.1f%%mfu", 100e12 * tflops / peak);
	if (remaining >= 0) {
		char word[32];
		snprintf(left, sizeof left, " left %s", text_duration(word, sizeof word, remaining));
	}
	scale_words(m, r, scale, sizeof scale);
	experts_words(m, r, experts, sizeof experts);
	snprintf(out, cap,
	         "step %lld/%lld %.1f%% loss %.4f%s gnorm %.2f%s lr %.1e tok %s %s/s %.3gTF%s mem "
	         "%.2f/%.0fGiB "
	         "eta %s%s%s%s",
	         (long long)r->step, (long long)total, 100.0 * (double)r->step / (double)total, r->lm_loss,
	         val, r->grad_norm, scale, r->lr, text_count(count, sizeof count, tokens),
	         text_count(rate, sizeof rate, tokens_per_s), tflops, mfu, (double)m->mem_bytes / gib,
	         (m->memory_limit_bytes ? (double)m->memory_limit_bytes : physical_memory()) / gib,
	         text_duration(eta, sizeof eta, m->smooth_step_s * (double)(total - r->step)), left, experts,
	         r->skipped ? " SKIPPED" : "");
}

/* Members of a step's line that models with experts have besides. */
static void put_experts(const struct meter *m, const struct step_report *r, struct buf *b)
{
	const struct step_experts *x = &r->experts;
	const struct field f[] = {{"load_balancing_loss", x->balancing_loss},
	                          {"router_z", x->z},
	                          {"router_entropy", x->entropy},
	                          {"expert_load_imbalance", expert_load_imbalance(x)},
	                          {"dropped_choices", (double)m->dropped},
	                          {"overflow_choices", (double)m->overflow}};
	if (!x->layers)
		return;
	put_fields(b, f, sizeof f / sizeof *f);
	for (int l = 0; l < x->layers; l++)
		buf_printf(b, "%s%d", l ? ", " : ", \"expert_layers\": [", x->layer[l]);
	buf_puts(b, "], \"expert_load\": ");
	expert_load_put_json(x, b);
}

void meter_step(struct meter *m, const struct step_report *r)
{
	const struct config *c = m->config;
	char line[512];
	m->steps++;
	m->seconds += r->seconds;
	m->skipped += r->skipped;
	m->dropped += r->experts.dropped;
	m->overflow += r->experts.overflow;
	m->overflow_sum += r->experts.overflow;
	m->smooth_step_s = m->smooth_step_s > 0 ? 0.95 * m->smooth_step_s + 0.05 * r->seconds : r->seconds;
	double batch = (double)c->train.global_batch_size,
	       tokens_per_step = batch * (double)c->model.seq_length;
	double step_s = m->seconds / (double)m->steps, tokens = tokens_per_step * (double)r->step;
	double tflops = m->flops_per_step / step_s / 1e12 / m->world_size;
	people_line(m, r, tokens, tokens_per_step / step_s, tflops, line, sizeof line);
	bool due = r->step % c->logger.log_interval == 0 || r->step == c->train.train_iters || r->skipped;
	if (!due) {
		log_progress("%s", line);
		return;
	}
	const struct field f[] = {
	        {"lm_loss", r->lm_loss},
	        {"lr", r->lr},
	        {"grad_norm", r->grad_norm},
	        {"loss_scale", r->loss_scale},
	        {"consumed_samples", batch * (double)r->step},
	        {"consumed_tokens", tokens},
	        {"tokens_per_s", tokens_per_step / step_s},
	        {"step_ms", 1e3 * step_s},
	        {"tflops", tflops},
	        {"mfu", m->datasheet_peak > 0 ? 1e12 * tflops / m->datasheet_peak : NAN},
	        {"mfu_measured", m->matmul_peak > 0 ? 1e12 * tflops / m->matmul_peak : NAN},
	        {"mem_bytes", (double)m->mem_bytes},
	        {"skipped", (double)m->skipped},
	};
	struct buf experts = {0};
	put_experts(m, r, &experts);
	write_line(m->file, r->step, experts.data ? experts.data : "", f, sizeof f / sizeof *f);
	buf_free(&experts);
	log_info("%s", line);
	m->seconds = 0;
	m->steps = m->dropped = m->overflow = 0;
}
