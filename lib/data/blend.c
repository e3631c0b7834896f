#include "data/blend.h"
#include "base/err.h"
#include "base/mem.h"

#include <math.h>
#include <stdlib.h>

/* Leaves are nodes [0, n) in the order of the datasets, the root is node 2n - 2. */
struct node {
	uint64_t weight;
	int left, right; /* -1 in a leaf */
};

struct blend {
	int n;
	struct node node[];
};

static const double scale = 0x1p52;

static int check_weights(const double *weights, int n, double *sum, bool *whole, struct err *e)
{
	*sum = 0;
	*whole = true;
	if (n < 1)
		return err_set(e, EXIT_CONFIG, "a blend needs at least one dataset");
	for (int k = 0; k < n; k++) {
		if (!(weights[k] > 0) || !isfinite(weights[k]))
			return err_set(e, EXIT_CONFIG,
			               "weight %g of dataset %d of a blend: it must be positive", weights[k],
			               k + 1);
		*sum += weights[k];
		*whole = *whole && weights[k] == floor(weights[k]);
	}
	if (!isfinite(*sum))
		return err_set(e, EXIT_CONFIG, "the weights of a blend have no finite sum");
	*whole = *whole && *sum <= scale;
	return 0;
}

/* The lightest node of [0, count) without a parent; earlier ones win ties. */
static int take_lightest(const struct node *node, int count, bool *taken)
{
	int best = -1;
	for (int k = 0; k < count; k++)
		if (!taken[k] && (best < 0 || node[k].weight < node[best].weight))
			best = k;
	taken[best] = true;
	return best;
}

int blend_new(const double *weights, int n, struct blend **out, struct err *e)
{
	double sum;
	bool whole;
	int rc = check_weights(weights, n, &sum, &whole, e);
	if (rc)
		return rc;
	struct blend *b = mem_array(1, sizeof *b + (2 * (size_t)n - 1) * sizeof *b->node);
	bool *taken = mem_array(2 * (size_t)n, sizeof *taken);
	b->n = n;
	for (int k = 0; k < n; k++) {
		double w = whole ? weights[k] : fmax(1, nearbyint(weights[k] / sum * scale));
		b->node[k] = (struct node){(uint64_t)w, -1, -1};
	}
	for (int k = n; k < 2 * n - 1; k++) {
		int left = take_lightest(b->node, k, taken), right = take_lightest(b->node, k, taken);
		b->node[k] = (struct node){b->node[left].weight + b->node[right].weight, left, right};
	}
	free(taken);
	*out = b;
	return 0;
}

void blend_free(struct blend *b)
{
	free(b);
}

/* Samples of the left child among the first `count` of the node. */
static uint64_t left_of(const struct blend *b, const struct node *x, uint64_t count)
{
	unsigned __int128 product = (unsigned __int128)count * b->node[x->left].weight;
	return (uint64_t)((2 * product + x->weight) / (2 * (unsigned __int128)x->weight));
}

void blend_get(const struct blend *b, uint64_t i, int *k, uint64_t *index)
{
	int at = 2 * b->n - 2;
	while (b->node[at].left >= 0) {
		const struct node *x = &b->node[at];
		uint64_t left = left_of(b, x, i);
		bool goes_left = left_of(b, x, i + 1) > left;
		at = goes_left ? x->left : x->right;
		i = goes_left ? left : i - left;
	}
	*k = at;
	*index = i;
}

static void count_below(const struct blend *b, int at, uint64_t count, uint64_t *counts)
{
	while (b->node[at].left >= 0) {
		uint64_t left = left_of(b, &b->node[at], count);
		count_below(b, b->node[at].left, left, counts);
		count -= left;
		at = b->node[at].right;
	}
	counts[at] = count;
}

void blend_counts(const struct blend *b, uint64_t i, uint64_t *counts)
{
	count_below(b, 2 * b->n - 2, i, counts);
}

double blend_share(const struct blend *b, int k)
{
	return (double)b->node[k].weight / (double)b->node[2 * b->n - 2].weight;
}
