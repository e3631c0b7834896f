#include "train/expert_load.h"
#include "base/mem.h"

#include <stdlib.h>

enum { MANY_EXPERTS = 16 }; /* more do not fit a line */

static double average(const int32_t *load, int experts)
{
	double sum = 0;
	for (int i = 0; i < experts; i++)
		sum += load[i];
	return sum / experts;
}

static int compare(const void *a, const void *b)
{
	int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
	return (x > y) - (x < y);
}

static int32_t *sorted(const int32_t *load, int experts)
{
	int32_t *copy = mem_array((size_t)experts, sizeof *copy);
	for (int i = 0; i < experts; i++)
		copy[i] = load[i];
	qsort(copy, (size_t)experts, sizeof *copy, compare);
	return copy;
}

double expert_load_imbalance(const struct step_experts *x)
{
	double sum = 0;
	for (int l = 0; l < x->layers; l++) {
		const int32_t *load = x->load + (int64_t)l * x->experts;
		int32_t most = 0;
		for (int i = 0; i < x->experts; i++)
			most = load[i] > most ? load[i] : most;
		double mean = average(load, x->experts);
		sum += mean > 0 ? most / mean : 0;
	}
	return x->layers ? sum / x->layers : 0;
}

void expert_load_put_json(const struct step_experts *x, struct buf *b)
{
	for (int l = 0; l < x->layers; l++)
		for (int i = 0; i < x->experts; i++)
			buf_printf(b, "%s%d",
			           i   ? ","
			           : l ? "],["
			               : "[[",
			           x->load[(int64_t)l * x->experts + i]);
	buf_puts(b, x->layers ? "]]" : "[]");
}

static double percent(double load, double mean)
{
	return mean > 0 ? 100 * load / mean : 0;
}

static void put_all(const int32_t *load, int experts, struct buf *b)
{
	double mean = average(load, experts);
	for (int i = 0; i < experts; i++)
		buf_printf(b, " %5.0f", percent(load[i], mean));
}

static void put_spread(const int32_t *load, int experts, struct buf *b)
{
	double mean = average(load, experts);
	int32_t *rank = sorted(load, experts);
	static const double at[] = {0, 0.1, 0.5, 0.9, 1};
	for (size_t i = 0; i < sizeof at / sizeof *at; i++)
		buf_printf(b, " %5.0f", percent(rank[(int)(at[i] * (experts - 1) + 0.5)], mean));
	free(rank);
}

void expert_load_put_table(const struct step_experts *x, struct buf *b)
{
	bool many = x->experts > MANY_EXPERTS;
	buf_puts(b, "expert load, % of the average\nlayer");
	if (many)
		buf_puts(b, "   min   10%   50%   90%   max");
	for (int i = 0; i < x->experts && !many; i++)
		buf_printf(b, " %5d", i);
	buf_puts(b, "\n");
	for (int l = 0; l < x->layers; l++) {
		buf_printf(b, "%5d", x->layer[l]);
		(many ? put_spread : put_all)(x->load + (int64_t)l * x->experts, x->experts, b);
		buf_puts(b, "\n");
	}
}
