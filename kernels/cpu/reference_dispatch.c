#include "kernels/cpu/dispatch.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"

struct pair {
	int32_t expert;
	double prob; /* 0 where position alone decides */
	int64_t order, row, choice;
};

/* By expert, then the largest first, then the first; what is not a number is the largest. */
static int compare_pairs(const void *pa, const void *pb)
{
	const struct pair *a = pa, *b = pb;
	bool a_nan = isnan(a->prob), b_nan = isnan(b->prob);
	if (a->expert != b->expert)
		return a->expert < b->expert ? -1 : 1;
	if (a_nan != b_nan)
		return a_nan ? -1 : 1;
	if (!a_nan && a->prob != b->prob)
		return a->prob > b->prob ? -1 : 1;
	return a->order < b->order ? -1 : a->order > b->order;
}

/* The pairs that name an expert, sorted; returns how many. */
static int64_t sort_pairs(const union op_arg *arg, const struct tensor *in, struct pair *pair)
{
	const int32_t *index = in[0].data;
	int64_t rows = in[0].dim[0], choices = tensor_row(&in[0]), count = 0;
	for (int64_t i = 0; i < rows * choices; i++)
		if (index[i] >= 0 && index[i] < arg->capacity.experts)
			pair[count++] =
			        (struct pair){index[i], arg->capacity.by_position ? 0 : cpu_get(&in[1], i),
			                      capacity_order(arg, rows, i / choices) * choices + i % choices,
			                      i / choices, i % choices};
	qsort(pair, (size_t)count, sizeof *pair, compare_pairs);
	return count;
}

int cpu_ref_capacity(struct stream *s, const union op_arg *arg, const struct tensor *in,
                     const struct tensor *out, struct err *e)
{
	(void)s;
	if (capacity_check(arg, in, out, e))
		return e->code;
	int64_t own = out[0].dim[0], choices = tensor_row(&in[0]), first = arg->capacity.rank * own,
	        place = 0;
	struct pair *pair = mem_array((size_t)tensor_count(&in[0]), sizeof *pair);
	int64_t count = sort_pairs(arg, in, pair);
	const int32_t *index = (const int32_t *)in[0].data + first * choices;
	int32_t *kept = out[0].data;
	double dropped = 0;
	for (int64_t i = 0; i < own * choices; i++)
		kept[i] = -1;
	for (int64_t i = 0; i < count; i++) {
		place = i && pair[i].expert == pair[i - 1].expert ? place + 1 : 0;
		int64_t row = pair[i].row - first;
		if (place < arg->capacity.limit && row >= 0 && row < own)
			kept[row * choices + pair[i].choice] = pair[i].expert;
	}
	for (int64_t i = 0; i < own * choices; i++)
		dropped += index[i] >= 0 && kept[i] < 0;
	cpu_accumulate(&out[1], 0, dropped);
	free(pair);
	return 0;
}

/* What ranks send to the experts [first, end), which are on one rank: all, or, where that is too much, equal
 * parts of it, rounded down, and one row more each for the first that have one until the rank is full. */
static void cut_sizes(const struct tensor *counts, int64_t first, int64_t end, int64_t capacity,
                      int32_t *size)
{
	const int32_t *count = counts->data;
	int64_t ranks = counts->dim[0], experts = counts->dim[1], total = 0, left = capacity;
	for (int64_t r = 0; r < ranks; r++)
		for (int64_t i = r * experts + first; i < r * experts + end; i++)
			total += count[i];
	bool fits = !capacity || total <= capacity;
	for (int64_t r = 0; r < ranks; r++)
		for (int64_t i = r * experts + first; i < r * experts + end; i++) {
			size[i] = fits ? count[i] : (int32_t)(count[i] * capacity / total);
			left -= size[i];
		}
	for (int64_t r = 0; r < ranks && !fits; r++)
		for (int64_t i = r * experts + first; i < r * experts + end && left; i++)
			if (size[i] < count[i]) {
				size[i]++;
				left--;
			}
}

static int counts_check(const struct tensor *counts, struct err *e)
{
	int32_t ranks = counts->dim[0], experts = counts->dim[1];
	const int32_t *count = counts->data;
	for (int32_t r = 0; r < ranks; r++)
		for (int32_t i = 0; i < experts; i++)
			if (count[(int64_t)r * experts + i] < 0)
				return err_set(
				        e, EXIT_INTERNAL,
				        "dispatch_plan: rank %d has %d rows for expert %d; 0 or more are "
				        "allowed",
				        r, count[(int64_t)r * experts + i], i);
	return 0;
}

/* Where the counts of this rank are not those of its index: slots would leave their rows. */
static int own_check(const union op_arg *arg, const struct tensor *in, int64_t *found, struct err *e)
{
	const int32_t *index = in[0].data, *count = in[1].data;
	int32_t experts = arg->dispatch.experts, rank = arg->dispatch.rank;
	int64_t choices = tensor_count(&in[0]);
	for (int32_t i = 0; i < experts; i++)
		found[i] = 0;
	for (int64_t i = 0; i < choices; i++)
		if (index[i] >= 0 && index[i] < experts)
			found[index[i]]++;
	for (int32_t i = 0; i < experts; i++)
		if (found[i] != count[(int64_t)rank * experts + i])
			return err_set(e, EXIT_INTERNAL,
			               "dispatch_plan: rank %d counts %d rows for expert %d and has %lld",
			               rank, count[(int64_t)rank * experts + i], i, (long long)found[i]);
	return 0;
}

/* Slots of this rank, whose sizes are `size`; returns how many choices of experts that are dealt with here
 * get none. */
static int64_t give_slots(const union op_arg *arg, const struct tensor *index, const int32_t *size,
                          int32_t *slot, int64_t *next)
{
	const int32_t *expert = index->data;
	int32_t experts = arg->dispatch.experts, begin = arg->dispatch.first,
	        stop = arg->dispatch.count ? begin + arg->dispatch.count : experts;
	int64_t choices = tensor_count(index), cut = 0, *end = next + experts, first = 0;
	for (int32_t i = 0; i < experts; i++) {
		next[i] = first;
		end[i] = first += size[i];
	}
	for (int64_t i = 0; i < choices; i++) {
		bool is_expert = expert[i] >= begin && expert[i] < stop;
		bool fits = is_expert && next[expert[i]] < end[expert[i]];
		slot[i] = fits ? (int32_t)next[expert[i]]++ : -1;
		cut += is_expert && !fits;
	}
	return cut;
}

int dispatch_plan(const union op_arg *arg, const struct tensor *in, const struct tensor *out, int64_t *room,
                  struct err *e)
{
	if (plan_check(arg, &in[1], e) || counts_check(&in[1], e) || own_check(arg, in, room, e))
		return e->code;
	int32_t experts = arg->dispatch.experts, own = arg->dispatch.count, *size = out[1].data,
	        each = own ? own : experts / arg->dispatch.ranks, begin = own ? arg->dispatch.first : 0;
	memset(size, 0, (size_t)tensor_bytes(&out[1]));
	for (int32_t first = begin; first < (own ? begin + own : experts); first += each)
		cut_sizes(&in[1], first, first + each, arg->dispatch.capacity, size);
	int64_t cut =
	        give_slots(arg, &in[0], size + (int64_t)arg->dispatch.rank * experts, out[0].data, room);
	cpu_accumulate(&out[2], 0, arg->dispatch.counts ? (double)cut : 0);
	return 0;
}

int cpu_ref_dispatch_plan(struct stream *s, const union op_arg *arg, const struct tensor *in,
                          const struct tensor *out, struct err *e)
{
	(void)s;
	int64_t *room = mem_array((size_t)tensor_row(&in[1]), 2 * sizeof *room);
	int rc = dispatch_plan(arg, in, out, room, e);
	free(room);
	return rc;
}
