/* capacity and dispatch_plan on whole numbers: time linear in the choices, no memory but the stream's. */
#include "kernels/cpu/dispatch.h"

#include <math.h>
#include <string.h>

/* A choice's key is smaller the better it is, and its own: the weight, then the order. */
struct job {
	const union op_arg *arg;
	const int32_t *index;
	const float *probs;
	int64_t rows, choices;
	int64_t *end;    /* [experts]: behind an expert's keys */
	uint64_t *first; /* [experts]: the best key that an expert drops */
	uint64_t *key;   /* of all choices, in order of expert */
};

/* Descending; what is not a number is the largest, and zeros are equal. */
static uint32_t descending(float x)
{
	union {
		float f;
		uint32_t u;
	} v = {x == 0 ? 0 : x};
	return isnan(x) ? 0 : v.u >> 31 ? v.u : ~v.u & 0x7fffffff;
}

static uint64_t key_of(const struct job *j, int64_t row, int64_t choice)
{
	uint64_t order = (uint64_t)(capacity_order(j->arg, j->rows, row) * j->choices + choice);
	if (j->arg->capacity.by_position)
		return order;
	return (uint64_t)descending(j->probs[row * j->choices + choice]) << 32 | order;
}

/* The key above which there are `rank` smaller ones, of n that differ, by their bytes from the highest on:
 * those that share it so far move to the front. */
static uint64_t key_at(uint64_t *key, int64_t n, int64_t rank)
{
	for (int shift = 56; n > 1; shift -= 8) {
		int64_t count[256] = {0}, kept = 0;
		uint64_t byte = 0;
		for (int64_t i = 0; i < n; i++)
			count[key[i] >> shift & 255]++;
		while (rank >= count[byte])
			rank -= count[byte++];
		for (int64_t i = 0; i < n; i++)
			if ((key[i] >> shift & 255) == byte)
				key[kept++] = key[i];
		n = kept;
	}
	return *key;
}

static bool is_expert(const struct job *j, int32_t index)
{
	return index >= 0 && index < j->arg->capacity.experts;
}

/* Keys in order of expert. */
static void sort_keys(const struct job *j)
{
	int64_t total = 0;
	memset(j->end, 0, (size_t)j->arg->capacity.experts * sizeof *j->end);
	for (int64_t i = 0; i < j->rows * j->choices; i++)
		if (is_expert(j, j->index[i]))
			j->end[j->index[i]]++;
	for (int32_t x = 0; x < j->arg->capacity.experts; x++) {
		int64_t count = j->end[x];
		j->end[x] = total;
		total += count;
	}
	for (int64_t row = 0, i = 0; row < j->rows; row++)
		for (int64_t choice = 0; choice < j->choices; choice++, i++)
			if (is_expert(j, j->index[i]))
				j->key[j->end[j->index[i]]++] = key_of(j, row, choice);
}

static void limit_part(struct stream *s, void *job, int64_t begin, int64_t end, int part)
{
	(void)s, (void)part;
	const struct job *j = job;
	for (int64_t x = begin; x < end; x++) {
		int64_t at = x ? j->end[x - 1] : 0, count = j->end[x] - at, limit = j->arg->capacity.limit;
		j->first[x] = count > limit ? key_at(j->key + at, count, limit) : UINT64_MAX;
	}
}

static size_t capacity_bytes(const union op_arg *arg, const struct tensor *index)
{
	return (size_t)(2 * (int64_t)arg->capacity.experts + tensor_count(index)) * sizeof(uint64_t);
}

struct cpu_space cpu_space_capacity(const struct stream *s, const union op_arg *arg, const struct tensor *in,
                                    const struct tensor *out)
{
	(void)s, (void)out;
	return (struct cpu_space){.shared = capacity_bytes(arg, &in[0])};
}

int cpu_fast_capacity(struct stream *s, const union op_arg *arg, const struct tensor *in,
                      const struct tensor *out, struct err *e)
{
	if (capacity_check(arg, in, out, e))
		return e->code;
	struct job j = {arg, in[0].data, in[1].data, in[0].dim[0], tensor_row(&in[0]), NULL, NULL, NULL};
	j.end = cpu_scratch(s, CPU_SHARED, capacity_bytes(arg, &in[0]));
	j.first = (uint64_t *)j.end + arg->capacity.experts;
	j.key = j.first + arg->capacity.experts;
	sort_keys(&j);
	cpu_parallel(s, arg->capacity.experts, 1, limit_part, &j);
	int64_t own = out[0].dim[0], first = arg->capacity.rank * own, dropped = 0;
	int32_t *kept = out[0].data;
	for (int64_t row = first, i = first * j.choices; row < first + own; row++)
		for (int64_t choice = 0; choice < j.choices; choice++, i++, kept++) {
			int32_t x = j.index[i];
			*kept = is_expert(&j, x) && key_of(&j, row, choice) < j.first[x] ? x : -1;
			dropped += x >= 0 && *kept < 0;
		}
	cpu_accumulate(&out[1], 0, (double)dropped);
	return 0;
}

static size_t plan_bytes(const struct tensor *counts)
{
	return (size_t)tensor_row(counts) * 2 * sizeof(int64_t);
}

struct cpu_space cpu_space_dispatch_plan(const struct stream *s, const union op_arg *arg,
                                         const struct tensor *in, const struct tensor *out)
{
	(void)s, (void)arg, (void)out;
	return (struct cpu_space){.shared = plan_bytes(&in[1])};
}

int cpu_fast_dispatch_plan(struct stream *s, const union op_arg *arg, const struct tensor *in,
                           const struct tensor *out, struct err *e)
{
	return dispatch_plan(arg, in, out, cpu_scratch(s, CPU_SHARED, plan_bytes(&in[1])), e);
}
