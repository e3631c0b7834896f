#include "train/verdict.h"
#include "base/hash.h"

#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Relative. About five times the worst seen between layouts of two to eight ranks and models up to GPT-2's
 * width and length. Coarse: where bfloat16's 8 bits are between two layouts, a gradient keeps two or three.
 * Half: float16 has three more. */
struct bounds {
	double loss, norm;
	double gradient; /* of the tensor's largest */
	double floor;    /* of the model's largest */
	double weight;   /* of the tensor's largest */
	double ulp;      /* of a weight itself, which is rounded after a step, */
	double least;    /* but no less than this: what lies between the smallest numbers */
	double eps;      /* no bound: Adam's, of the model's largest gradient */
};
static const struct bounds fine = {2e-7, 2e-6, 1e-5, 1e-8, 6e-7, 0, 0, 0.01};
static const struct bounds coarse = {2e-4, 3e-3, 0.1, 2e-6, 6e-7, 0, 0, 0.3};
static const struct bounds half = {2.5e-5, 4e-4, 0.0125, 1e-5, 6e-7, 0, 0, 0.1};
static const double ulps[DT_COUNT] = {[DT_bf16] = 1.0 / 128, [DT_f16] = 1.0 / 1024};
static const double least[DT_COUNT] = {[DT_f16] = 0x1p-24};

struct copy { /* a box, and who was the first to send it */
	int64_t offset[2], extent[2];
	uint64_t hash;
	int rank;
};

struct judged {
	int32_t layer;
	double noise;       /* the bound of its gradient in step 1, as Adam sees it: over eps */
	struct piece whole; /* where it lies on one rank, in this stage */
	bool is_here;       /* some tensors have no gradient, or no master */
	double largest;
	double slack;        /* how far an element may be from that of one rank, its own rounding apart */
	int64_t owned;       /* elements */
	double worst, share; /* difference over `largest`, and over what it may */
	bool differs;
	struct copy *copy;
	size_t n_copy, cap_copy;
};

struct finding {
	bool found;
	int moment, rank;
	size_t tensor;
	char text[700];
};

struct verdict {
	const struct step *reference, *layout;
	struct bounds bounds;
	struct judged *tensor; /* in the order of the model's parts */
	size_t n, n_here;      /* of the model, of this stage */
	enum verdict_stage stage;
	int moment; /* counts stages and steps */
	int64_t step, boxes;
	double largest; /* of all tensors, in this stage */
	struct step_result of_rank_0;
	struct finding number, box;
	float *rows;
	size_t cap_rows;
};

static const struct {
	enum shard_state state;
	const char *when;
	int step; /* 0: the last one */
	const char *one, *all;
} stages[] = {
#define VERDICT_STAGE_ROW(name, state, when, step, one, all) {state, when, step, one, all},
        VERDICT_STAGES(VERDICT_STAGE_ROW)
#undef VERDICT_STAGE_ROW
};

enum shard_state verdict_state(enum verdict_stage stage)
{
	return stages[stage].state;
}

static int64_t columns_of(const struct part *part)
{
	return part->nd > 1 ? part->shape[1] : 1;
}

static int64_t count_of(const struct part *part)
{
	return part->shape[0] * columns_of(part);
}

static struct bounds choose_bounds(const struct config *c, double tolerance)
{
	enum dtype dtype = program_dtype(c);
	bool rough = dtype == DT_bf16 || !c->ddp.grad_reduce_in_fp32;
	struct bounds b = rough ? coarse : dtype == DT_f16 ? half : fine;
	double *const all[] = {&b.loss, &b.norm, &b.gradient, &b.floor, &b.weight, &b.ulp, &b.least};
	b.ulp = ulps[dtype];
	b.least = least[dtype];
	for (size_t i = 0; i < sizeof all / sizeof *all; i++)
		*all[i] *= tolerance;
	return b;
}

struct verdict *verdict_new(const struct step *reference, const struct step *layout, double tolerance)
{
	struct verdict *d = mem_array(1, sizeof *d);
	const struct model *m = &reference->program.model;
	*d = (struct verdict){.reference = reference,
	                      .layout = layout,
	                      .bounds = choose_bounds(layout->config, tolerance),
	                      .tensor = mem_array(m->n_part, sizeof *d->tensor),
	                      .n = m->n_part};
	for (size_t k = 0; k < m->n_param; k++)
		for (int32_t i = 0; i < m->param[k].n_parts; i++)
			d->tensor[m->param[k].first_part + i].layer = m->param[k].layer;
	return d;
}

void verdict_free(struct verdict *d)
{
	if (!d)
		return;
	for (size_t i = 0; i < d->n; i++)
		free(d->tensor[i].copy);
	free(d->tensor);
	free(d->rows);
	free(d);
}

void verdict_put_bounds(const struct verdict *d, struct buf *b)
{
	const struct bounds *k = &d->bounds;
	buf_printf(b, "bounds: loss %.2g, gradient norm %.2g, of themselves\n", k->loss, k->norm);
	buf_printf(b, "        a gradient: %.2g of its tensor's largest + %.2g of the model's\n", k->gradient,
	           k->floor);
	buf_printf(b, "        a weight: %.2g of its tensor's largest + learning rate · steps · ", k->weight);
	buf_puts(b, "its gradient's bound / eps");
	if (k->ulp > 0)
		buf_printf(b, " + the last bit of %s", dtype_rows[program_dtype(d->layout->config)].name);
	buf_puts(b, "\n");
	buf_printf(b, "        copies: none; eps is at least %g of the largest gradient, ", k->eps);
	buf_puts(b, "so that Adam does not magnify rounding\n");
}

/* Findings */

static const char *rank_text(const struct verdict *d, int rank, char *out, size_t cap)
{
	int coord[AXIS_COUNT];
	size_t used = (size_t)snprintf(out, cap, "rank %d", rank);
	bool any = false;
	const struct mesh *m = &d->layout->program.mesh;
	mesh_coords(m, rank, coord);
	for (int a = 0; a < AXIS_COUNT; a++) {
		if (!((AXES_DENSE | AXIS_BIT(ep) | AXIS_BIT(etp)) >> a & 1) || m->size[a] == 1)
			continue;
		used += (size_t)snprintf(out + used, cap - used, "%s%s %d", any ? ", " : " (",
		                         mesh_axis_name((enum mesh_axis)a), coord[a]);
		any = true;
	}
	snprintf(out + used, cap - used, "%s", any ? ")" : "");
	return out;
}

/* Keeps the first: the earliest moment, there the first tensor, there the lowest rank. */
static void keep_first(struct finding *f, const struct finding *with)
{
	bool later = f->moment != with->moment   ? f->moment < with->moment
	             : f->tensor != with->tensor ? f->tensor < with->tensor
	                                         : f->rank <= with->rank;
	if (!f->found || !later)
		*f = *with;
}

/* "in step 1" */
static const char *when_text(const struct verdict *d, char *out, size_t cap)
{
	int step = stages[d->stage].step;
	snprintf(out, cap, "%s %lld", stages[d->stage].when, step ? (long long)step : (long long)d->step);
	return out;
}

/* t NULL: none that one rank knows. */
static void find(struct verdict *d, struct judged *t, int rank, const char *fmt, ...)
        __attribute__((format(printf, 4, 5)));
static void find(struct verdict *d, struct judged *t, int rank, const char *fmt, ...)
{
	struct finding f = {true, d->moment, rank, t ? (size_t)(t - d->tensor) : d->n, ""};
	char when[40], layer[40] = "";
	va_list ap;
	if (t && t->layer >= 0)
		snprintf(layer, sizeof layer, " (layer %d)", (int)t->layer);
	int used = snprintf(f.text, sizeof f.text, "%s: %s %s%s ", when_text(d, when, sizeof when),
	                    stages[d->stage].one, t ? t->whole.part->name : "", layer);
	va_start(ap, fmt);
	vsnprintf(f.text + used, sizeof f.text - (size_t)used, fmt, ap);
	va_end(ap);
	keep_first(&d->box, &f);
	if (t)
		t->differs = true;
}

bool verdict_put_first(const struct verdict *d, struct buf *b)
{
	const struct finding *n = &d->number, *t = &d->box;
	bool number_first = n->found && (!t->found || n->moment < t->moment);
	if (number_first)
		buf_puts(b, n->text);
	if (number_first && t->found)
		buf_puts(b, "; the first tensor: ");
	if (t->found)
		buf_puts(b, t->text);
	return n->found || t->found;
}

/* Numbers */

static void judge_number(struct verdict *d, const char *name, int rank, const double number[3], double bound)
{
	struct finding f = {true, d->moment, rank, 0, ""};
	double have = number[0], want = number[1], of_rank_0 = number[2];
	char who[120];
	rank_text(d, rank, who, sizeof who);
	if (!(fabs(have - want) <= bound * fabs(want)))
		snprintf(f.text, sizeof f.text,
		         "in step %lld: %s is %.9g on %s, one rank has %.9g; the bound is %.2g of it",
		         (long long)d->step, name, have, who, want, bound);
	else if (memcmp(&have, &of_rank_0, sizeof have))
		snprintf(f.text, sizeof f.text,
		         "in step %lld: %s is %.17g on %s, %.17g on rank 0; ranks must agree in every bit",
		         (long long)d->step, name, have, who, of_rank_0);
	else
		return;
	keep_first(&d->number, &f);
}

void verdict_numbers(struct verdict *d, int64_t step, int rank, const struct step_result *have,
                     const struct step_result *want)
{
	if (rank == 0)
		d->of_rank_0 = *have;
	d->moment += step != d->step;
	d->step = step;
	judge_number(d, "lm_loss", rank, (double[]){have->lm_loss, want->lm_loss, d->of_rank_0.lm_loss},
	             d->bounds.loss);
	judge_number(d, "gradient norm", rank,
	             (double[]){have->grad_norm, want->grad_norm, d->of_rank_0.grad_norm}, d->bounds.norm);
}

/* Tensors of one rank */

/* Rows [first, first + n) of a tensor, until the next call. */
static const float *read_rows(struct verdict *d, const struct judged *t, int64_t first, int64_t n)
{
	int64_t columns = columns_of(t->whole.part);
	struct piece rows = t->whole;
	rows.extent[0] = n;
	rows.first += first * columns;
	if (d->cap_rows < (size_t)(n * columns)) {
		d->cap_rows = (size_t)(n * columns);
		free(d->rows);
		d->rows = mem_array(d->cap_rows, sizeof *d->rows);
	}
	step_read_piece(d->reference, &rows, stages[d->stage].state, d->rows);
	return d->rows;
}

static double largest_of(struct verdict *d, const struct judged *t)
{
	const float *x = read_rows(d, t, 0, t->whole.part->shape[0]);
	double largest = 0;
	for (int64_t i = 0; i < count_of(t->whole.part); i++)
		largest = fmax(largest, fabs(x[i]));
	return largest;
}

static double slack_at_start(const struct verdict *d, const struct judged *t)
{
	(void)d, (void)t;
	return 0;
}

static double slack_of_gradient(const struct verdict *d, const struct judged *t)
{
	return d->bounds.gradient * t->largest + d->bounds.floor * d->largest;
}

static double slack_of_weight(const struct verdict *d, const struct judged *t)
{
	double moved = d->reference->config->optimizer.lr * (double)d->step;
	return d->bounds.weight * t->largest + moved * t->noise;
}

typedef double slack_fn(const struct verdict *d, const struct judged *t);
static slack_fn *const slack_of[] = {[VERDICT_START] = slack_at_start,
                                     [VERDICT_GRADIENTS] = slack_of_gradient,
                                     [VERDICT_WEIGHTS] = slack_of_weight,
                                     [VERDICT_MASTERS] = slack_of_weight};

void verdict_begin(struct verdict *d, enum verdict_stage stage)
{
	const struct program *t = &d->reference->program;
	struct piece *list;
	size_t n = pieces_list(t, stages[stage].state, &list);
	ASSERT(n <= d->n);
	d->stage = stage;
	d->n_here = n;
	for (size_t i = 0; i < d->n; i++)
		d->tensor[i].is_here = false;
	d->moment++;
	d->boxes = 0;
	d->largest = 0;
	for (size_t i = 0; i < n; i++) {
		struct judged *to = &d->tensor[list[i].part - t->model.part];
		to->whole = list[i];
		to->is_here = true;
		to->owned = 0;
		to->n_copy = 0;
		to->worst = to->share = 0;
		to->differs = false;
		to->largest = largest_of(d, to);
		d->largest = fmax(d->largest, to->largest);
	}
	free(list);
	for (size_t i = 0; i < d->n; i++) {
		struct judged *j = &d->tensor[i];
		j->slack = j->is_here ? slack_of[stage](d, j) : 0;
		if (stage == VERDICT_GRADIENTS)
			j->noise = d->largest > 0 ? j->slack / (d->bounds.eps * d->largest) : 0;
	}
}

double verdict_adam_eps(const struct verdict *d, double grad_norm)
{
	const struct optimizer_config *o = &d->reference->config->optimizer;
	double clip = o->clip_grad > 0 && grad_norm > o->clip_grad ? o->clip_grad / grad_norm : 1;
	return fmax(o->adam_eps, d->bounds.eps * d->largest * clip);
}

/* Boxes */

static void find_element(struct verdict *d, struct judged *t, int rank, int64_t at, double have, double want,
                         double bound)
{
	int64_t columns = columns_of(t->whole.part);
	char who[120], element[60];
	snprintf(element, sizeof element, t->whole.part->nd > 1 ? "[%lld,%lld]" : "[%lld]",
	         (long long)(at / columns), (long long)(at % columns));
	find(d, t, rank, "differs on %s: element %s is %.9g, one rank has %.9g; the bound is %.2g",
	     rank_text(d, rank, who, sizeof who), element, have, want, bound);
}

static void judge_elements(struct verdict *d, struct judged *t, int rank, const struct verdict_box *box,
                           const float *data)
{
	int64_t columns = columns_of(t->whole.part);
	const float *rows = read_rows(d, t, box->offset[0], box->extent[0]);
	bool rounded = d->stage == VERDICT_WEIGHTS;
	double ulp = rounded ? d->bounds.ulp : 0, least_step = rounded ? d->bounds.least : 0;
	bool told = false;
	for (int64_t i = 0; i < box->extent[0]; i++)
		for (int64_t j = box->offset[1]; j < box->offset[1] + box->extent[1]; j++) {
			int64_t at = (box->offset[0] + i) * columns + j;
			double have = *data++, want = rows[i * columns + j];
			double difference = fabs(have - want),
			       bound = t->slack + fmax(ulp * fabs(want), least_step);
			if (difference > bound * t->share) {
				t->share = difference / bound;
				t->worst = difference / t->largest;
			}
			if (!(difference <= bound) && !told) {
				find_element(d, t, rank, at, have, want, bound);
				told = true;
			}
		}
}

static void judge_copy(struct verdict *d, struct judged *t, int rank, const struct verdict_box *box,
                       const float *data)
{
	struct copy c = {.rank = rank};
	char who[120], other[120];
	memcpy(c.offset, box->offset, sizeof c.offset);
	memcpy(c.extent, box->extent, sizeof c.extent);
	c.hash = hash_bytes(data, (size_t)(box->extent[0] * box->extent[1]) * sizeof *data, 0);
	for (size_t i = 0; i < t->n_copy; i++) {
		const struct copy *k = &t->copy[i];
		if (memcmp(k->offset, c.offset, sizeof c.offset) ||
		    memcmp(k->extent, c.extent, sizeof c.extent))
			continue;
		if (k->hash != c.hash)
			find(d, t, rank, "differs on %s: its copy does not hold the bits of that of %s",
			     rank_text(d, rank, who, sizeof who), rank_text(d, k->rank, other, sizeof other));
		return;
	}
	t->copy = mem_grow(t->copy, t->n_copy, &t->cap_copy, sizeof *t->copy);
	t->copy[t->n_copy++] = c;
}

static struct judged *judged_named(struct verdict *d, const char *name)
{
	for (size_t i = 0; i < d->n; i++)
		if (!strcmp(d->tensor[i].whole.part->name, name))
			return &d->tensor[i];
	return NULL;
}

static bool lies_within(const struct verdict_box *box, const struct part *part)
{
	int64_t shape[] = {part->shape[0], columns_of(part)};
	for (int k = 0; k < 2; k++)
		if (box->offset[k] < 0 || box->extent[k] < 1 || box->offset[k] + box->extent[k] > shape[k])
			return false;
	return true;
}

void verdict_take(struct verdict *d, int rank, const struct verdict_box *box, const float *data)
{
	struct judged *t = judged_named(d, box->name);
	char who[120];
	d->boxes++;
	if (!t || !t->is_here || !lies_within(box, t->whole.part)) {
		find(d, t, rank, "%s differs on %s: one rank has no such rows, from %lld on",
		     t ? "" : box->name, rank_text(d, rank, who, sizeof who), (long long)box->offset[0]);
		return;
	}
	t->owned += box->owned ? box->extent[0] * box->extent[1] : 0;
	judge_elements(d, t, rank, box, data);
	judge_copy(d, t, rank, box, data);
}

static void put_stage(const struct verdict *d, struct buf *b)
{
	const struct judged *worst = &d->tensor[0];
	char when[40];
	size_t differ = 0;
	for (size_t i = 0; i < d->n; i++) {
		const struct judged *t = &d->tensor[i];
		if (!t->is_here)
			continue;
		worst = t->share > worst->share ? t : worst;
		differ += t->differs;
	}
	buf_printf(b, "%s %s: %zu tensors in %lld boxes", stages[d->stage].all,
	           when_text(d, when, sizeof when), d->n_here, (long long)d->boxes);
	if (differ)
		buf_printf(b, ", %zu DIFFER", differ);
	if (worst->share > 0)
		buf_printf(b, "; the farthest %s: %.2g of its largest", worst->whole.part->name,
		           worst->worst);
	if (worst->share > 0 && isfinite(worst->share))
		buf_printf(b, ", %.2g of its bound", worst->share);
	buf_puts(b, worst->share > 0 || differ ? "\n" : ", equal\n");
}

void verdict_end(struct verdict *d, struct buf *b)
{
	for (size_t i = 0; i < d->n; i++) {
		struct judged *t = &d->tensor[i];
		int64_t count = count_of(t->whole.part);
		if (t->is_here && t->owned != count)
			find(d, t, INT_MAX, "has %lld elements, its owners hold %lld", (long long)count,
			     (long long)t->owned);
	}
	put_stage(d, b);
}
