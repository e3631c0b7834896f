#include "kernels/cpu/cpu.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "kernels/cpu/mask.h"

/* One query head of one sample, as offsets into qkv rows. */
struct head {
	const union op_arg *arg;
	const struct tensor *qkv, *keys;
	int64_t row, first;        /* elements in a row of qkv; first row of the sample */
	int64_t sample, index;     /* of the sample, of the query head */
	int64_t query, key, value; /* columns where the head's query, key and value begin */
};

static struct head head_at(const union op_arg *arg, const struct tensor *qkv, const struct tensor *keys,
                           int64_t sample, int64_t index)
{
	int64_t heads = arg->attention.heads, groups = arg->attention.groups, size = arg->attention.head_dim;
	int64_t group = index / (heads / groups);
	return (struct head){.arg = arg,
	                     .qkv = qkv,
	                     .keys = keys,
	                     .row = (heads + 2 * groups) * size,
	                     .first = sample * arg->attention.seq_length,
	                     .sample = sample,
	                     .index = index,
	                     .query = index * size,
	                     .key = (heads + group) * size,
	                     .value = (heads + groups + group) * size};
}

static int64_t window_begin(const union op_arg *arg, int64_t t)
{
	int64_t window = arg->attention.window;
	return window > 0 && t >= window ? t - window + 1 : 0;
}

static double score(const struct head *h, int64_t t, int64_t j)
{
	double sum = 0;
	for (int64_t d = 0; d < h->arg->attention.head_dim; d++)
		sum += cpu_get(h->qkv, (h->first + t) * h->row + h->query + d) *
		       cpu_get(h->qkv, (h->first + j) * h->row + h->key + d);
	return sum * h->arg->attention.scale;
}

/* What probability (t, j) is multiplied by: 1 without dropout, else 0 or 1/(1-p). */
static double survival(const struct head *h, int64_t t, int64_t j)
{
	float p = h->arg->attention.dropout;
	if (!(p > 0) || !h->keys->data)
		return 1;
	int64_t length = h->arg->attention.seq_length;
	uint64_t key = (uint64_t)((const int64_t *)h->keys->data)[h->sample];
	int64_t head = h->arg->attention.first_head + h->index;
	uint64_t i = (uint64_t)((head * length + t) * length + j);
	return mask_survives(key, h->arg->attention.salt, i, mask_threshold(p)) ? mask_scale(p) : 0;
}

/* o of query t into sum[D]; weight[T] is working space. Returns log-sum-exp. */
static double attend(const struct head *h, int64_t t, double *weight, double *sum)
{
	int64_t begin = window_begin(h->arg, t), size = h->arg->attention.head_dim;
	double top = -INFINITY, total = 0;
	for (int64_t j = begin; j <= t; j++) {
		weight[j] = score(h, t, j);
		top = fmax(top, weight[j]);
	}
	for (int64_t j = begin; j <= t; j++)
		total += exp(weight[j] - top);
	memset(sum, 0, (size_t)size * sizeof *sum);
	for (int64_t j = begin; j <= t; j++) {
		double p = exp(weight[j] - top) / total * survival(h, t, j);
		for (int64_t d = 0; d < size; d++)
			sum[d] += p * cpu_get(h->qkv, (h->first + j) * h->row + h->value + d);
	}
	return top + log(total);
}

int cpu_ref_attention(struct stream *s, const union op_arg *arg, const struct tensor *in,
                      const struct tensor *out, struct err *e)
{
	(void)s, (void)e;
	int64_t length = arg->attention.seq_length, heads = arg->attention.heads,
	        size = arg->attention.head_dim;
	double *weight = mem_array((size_t)length, sizeof *weight),
	       *sum = mem_array((size_t)size, sizeof *sum);
	for (int64_t b = 0; b < in[0].dim[0] / length; b++)
		for (int64_t i = 0; i < heads; i++) {
			struct head h = head_at(arg, &in[0], &in[1], b, i);
			for (int64_t t = 0; t < length; t++) {
				int64_t at = (h.first + t) * heads + i;
				cpu_set(&out[1], at, attend(&h, t, weight, sum));
				for (int64_t d = 0; d < size; d++)
					cpu_set(&out[0], at * size + d, sum[d]);
			}
		}
	free(weight);
	free(sum);
	return 0;
}

/* Adds what query t contributes to dqkv (double, shaped like qkv): with P = exp(S - lse) and dropout mask Z,
 * dV += P Z do; dS = P (Z do·v - do·o). Dao et al. 2022, algorithm 4. */
static void attend_backward(const struct head *h, const struct tensor *in, int64_t t, double *dqkv)
{
	int64_t size = h->arg->attention.head_dim, heads = h->arg->attention.heads;
	int64_t o_at = ((h->first + t) * heads + h->index) * size, query = (h->first + t) * h->row + h->query;
	double delta = 0, lse = cpu_get(&in[3], (h->first + t) * heads + h->index);
	for (int64_t d = 0; d < size; d++)
		delta += cpu_get(&in[0], o_at + d) * cpu_get(&in[2], o_at + d);
	for (int64_t j = window_begin(h->arg, t); j <= t; j++) {
		int64_t key = (h->first + j) * h->row + h->key, value = (h->first + j) * h->row + h->value;
		double p = exp(score(h, t, j) - lse), z = survival(h, t, j), dp = 0;
		for (int64_t d = 0; d < size; d++) {
			dp += cpu_get(&in[0], o_at + d) * cpu_get(h->qkv, value + d);
			dqkv[value + d] += p * z * cpu_get(&in[0], o_at + d);
		}
		double ds = p * (z * dp - delta) * h->arg->attention.scale;
		for (int64_t d = 0; d < size; d++) {
			dqkv[query + d] += ds * cpu_get(h->qkv, key + d);
			dqkv[key + d] += ds * cpu_get(h->qkv, query + d);
		}
	}
}

int cpu_ref_attention_bwd(struct stream *s, const union op_arg *arg, const struct tensor *in,
                          const struct tensor *out, struct err *e)
{
	(void)s, (void)e;
	int64_t length = arg->attention.seq_length, count = tensor_count(&in[1]);
	double *dqkv = mem_array((size_t)count, sizeof *dqkv);
	for (int64_t b = 0; b < in[1].dim[0] / length; b++)
		for (int64_t i = 0; i < arg->attention.heads; i++) {
			struct head h = head_at(arg, &in[1], &in[4], b, i);
			for (int64_t t = 0; t < length; t++)
				attend_backward(&h, in, t, dqkv);
		}
	for (int64_t i = 0; i < count; i++)
		cpu_set(&out[0], i, dqkv[i]);
	free(dqkv);
	return 0;
}

/* The rows' keys and values go to their places in the caches before anything is read. */
static int cache_store(const union op_arg *arg, const struct tensor *in, struct err *e)
{
	int64_t width = (int64_t)arg->attention.groups * arg->attention.head_dim;
	int64_t key = (int64_t)arg->attention.heads * arg->attention.head_dim, row = key + 2 * width;
	const int32_t *position = in[3].data;
	for (int64_t n = 0; n < in[0].dim[0]; n++) {
		if (position[n] < 0 || position[n] >= in[1].dim[0])
			return err_set(e, EXIT_INTERNAL,
			               "attention_cache: position %d of row %lld is outside the cache of %d",
			               position[n], (long long)n, in[1].dim[0]);
		for (int64_t c = 0; c < width; c++) {
			cpu_set(&in[1], position[n] * width + c, cpu_get(&in[0], n * row + key + c));
			cpu_set(&in[2], position[n] * width + c, cpu_get(&in[0], n * row + key + width + c));
		}
	}
	return 0;
}

/* o of one query head of row n into out; weight[P] is working space. */
static void cache_attend(const union op_arg *arg, const struct tensor *in, const struct tensor *o, int64_t n,
                         int64_t head, double *weight)
{
	int64_t heads = arg->attention.heads, groups = arg->attention.groups, size = arg->attention.head_dim;
	int64_t width = groups * size, column = head / (heads / groups) * size,
	        row = (heads + 2 * groups) * size;
	int64_t last = ((const int32_t *)in[3].data)[n], begin = window_begin(arg, last);
	double top = -INFINITY, total = 0;
	for (int64_t j = begin; j <= last; j++) {
		weight[j] = 0;
		for (int64_t d = 0; d < size; d++)
			weight[j] += cpu_get(&in[0], n * row + head * size + d) *
			             cpu_get(&in[1], j * width + column + d) * arg->attention.scale;
		top = fmax(top, weight[j]);
	}
	for (int64_t j = begin; j <= last; j++)
		total += weight[j] = exp(weight[j] - top);
	for (int64_t d = 0; d < size; d++) {
		double sum = 0;
		for (int64_t j = begin; j <= last; j++)
			sum += weight[j] / total * cpu_get(&in[2], j * width + column + d);
		cpu_set(o, (n * heads + head) * size + d, sum);
	}
}

int cpu_ref_attention_cache(struct stream *s, const union op_arg *arg, const struct tensor *in,
                            const struct tensor *out, struct err *e)
{
	(void)s;
	if (cache_store(arg, in, e))
		return e->code;
	double *weight = mem_array((size_t)in[1].dim[0], sizeof *weight);
	for (int64_t n = 0; n < in[0].dim[0]; n++)
		for (int64_t h = 0; h < arg->attention.heads; h++)
			cache_attend(arg, in, &out[0], n, h, weight);
	free(weight);
	return 0;
}
