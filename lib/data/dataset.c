#include "data/dataset.h"
#include "base/err.h"
#include "base/hash.h"
#include "base/mem.h"
#include "base/rng.h"
#include "data/blend.h"
#include "data/indexed.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

struct part {
	struct indexed *data;
	struct samples samples;
};

struct dataset {
	int n, seq_length;
	uint64_t per_epoch, tokens, fingerprint;
	struct blend *blend;
	struct part part[];
};

static bool is_number(const char *word, double *value)
{
	char *end;
	*value = strtod(word, &end);
	return end != word && !*end;
}

int dataset_parse_paths(const char *const *words, int n_words, const char **paths, double *weights, int *n,
                        bool *weighted, struct err *e)
{
	double w;
	*weighted = n_words > 0 && n_words % 2 == 0;
	for (int i = 0; *weighted && i < n_words; i += 2)
		*weighted = is_number(words[i], &w);
	*n = *weighted ? n_words / 2 : n_words;
	for (int i = 0; i < *n; i++) {
		paths[i] = words[*weighted ? 2 * i + 1 : i];
		weights[i] = 1;
		if (!*weighted)
			continue;
		is_number(words[2 * i], &weights[i]);
		if (!(weights[i] > 0) || !isfinite(weights[i]))
			return err_set(e, EXIT_CONFIG,
			               "weight %s of dataset %s: it must be a positive number", words[2 * i],
			               paths[i]);
	}
	if (!*n)
		return err_set(e, EXIT_CONFIG, "no dataset is named");
	return 0;
}

/* The order within a dataset follows its contents, not its place in the blend: a blend that is edited
 * between two runs keeps it. The same dataset named twice gets two orders. */
static uint64_t order_key(const struct dataset *d, int k, uint64_t seed)
{
	uint64_t same = 0, own = indexed_fingerprint(d->part[k].data);
	for (int i = 0; i < k; i++)
		same += indexed_fingerprint(d->part[i].data) == own;
	return rng_subkey(rng_subkey(rng_key(seed, "data.sample_order"), own), same);
}

static int open_part(struct dataset *d, int k, const struct dataset_spec *spec, struct err *e)
{
	struct part *p = &d->part[k];
	int rc = indexed_open(spec->paths[k], &p->data, e);
	if (!rc)
		rc = samples_init(&p->samples, p->data, spec->split, spec->which, spec->seq_length,
		                  order_key(d, k, spec->seed), spec->shuffle, spec->vocab_size, e);
	if (!rc) {
		d->per_epoch += p->samples.per_epoch;
		d->tokens += p->samples.tokens;
	}
	return rc;
}

static int open_blend(struct dataset *d, const struct dataset_spec *spec, struct err *e)
{
	double *weights = mem_array((size_t)d->n, sizeof *weights);
	for (int k = 0; k < d->n; k++)
		weights[k] = spec->weights ? spec->weights[k] : (double)d->part[k].samples.per_epoch;
	int rc = blend_new(weights, d->n, &d->blend, e);
	free(weights);
	return rc;
}

static uint64_t order_fingerprint(const struct dataset *d, const struct dataset_spec *spec)
{
	uint64_t settings[] = {spec->seed, (uint64_t)spec->seq_length, spec->shuffle, (uint64_t)d->n};
	uint64_t h = hash_bytes(settings, sizeof settings, 0);
	for (int k = 0; k < d->n; k++) {
		const struct samples *s = &d->part[k].samples;
		uint64_t own[] = {indexed_fingerprint(s->data), s->first_token, s->tokens};
		double share = blend_share(d->blend, k);
		h = hash_bytes(own, sizeof own, h);
		h = hash_bytes(&share, sizeof share, h);
	}
	return h;
}

int dataset_open(const struct dataset_spec *spec, struct dataset **out, struct err *e)
{
	if (spec->n < 1)
		return err_set(e, EXIT_CONFIG, "no dataset is named");
	struct dataset *d = mem_array(1, sizeof *d + (size_t)spec->n * sizeof *d->part);
	int rc = 0;
	d->n = spec->n;
	d->seq_length = spec->seq_length;
	for (int k = 0; !rc && k < d->n; k++)
		rc = open_part(d, k, spec, e);
	if (!rc)
		rc = open_blend(d, spec, e);
	if (rc) {
		dataset_close(d);
		return rc;
	}
	d->fingerprint = order_fingerprint(d, spec);
	*out = d;
	return 0;
}

void dataset_close(struct dataset *d)
{
	if (!d)
		return;
	for (int k = 0; k < d->n; k++)
		indexed_close(d->part[k].data);
	blend_free(d->blend);
	free(d);
}

uint64_t dataset_count_samples(const struct dataset *d)
{
	return d->per_epoch;
}

uint64_t dataset_count_tokens(const struct dataset *d)
{
	return d->tokens;
}

struct dataset_part dataset_part(const struct dataset *d, int k)
{
	const struct samples *s = &d->part[k].samples;
	return (struct dataset_part){.path = indexed_prefix(d->part[k].data),
	                             .documents = s->last_document - s->first_document,
	                             .tokens = s->tokens,
	                             .samples = s->per_epoch,
	                             .weight = blend_share(d->blend, k)};
}

int dataset_batch(const struct dataset *d, uint64_t first_sample, int n, int32_t *tokens, int32_t *targets,
                  struct err *e)
{
	const size_t length = (size_t)d->seq_length;
	int32_t *window = mem_array(length + 1, sizeof *window);
	int rc = 0;
	for (int i = 0; !rc && i < n; i++) {
		int k;
		uint64_t index;
		blend_get(d->blend, first_sample + (uint64_t)i, &k, &index);
		rc = samples_get(&d->part[k].samples, index, window, e);
		memcpy(tokens + (size_t)i * length, window, length * sizeof *window);
		memcpy(targets + (size_t)i * length, window + 1, length * sizeof *window);
	}
	free(window);
	return rc;
}

uint64_t dataset_fingerprint(const struct dataset *d)
{
	return d->fingerprint;
}
