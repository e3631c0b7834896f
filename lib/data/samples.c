#include "data/samples.h"
#include "base/err.h"
#include "base/rng.h"
#include "data/indexed.h"
#include "data/permute.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static const char *const split_names[SPLIT_COUNT] = {"train", "validation", "test"};

int samples_parse_split(const char *text, double split[SPLIT_COUNT], struct err *e)
{
	double parsed[SPLIT_COUNT] = {0}, sum = 0;
	const char *p = text;
	for (int k = 0; k < SPLIT_COUNT; k++) {
		char *end;
		parsed[k] = strtod(p, &end);
		if (end == p || !(parsed[k] >= 0) || !isfinite(parsed[k]))
			break;
		sum += parsed[k];
		p = end + strspn(end, " ");
		if (*p != ',')
			break;
		p++;
	}
	if (*p || p == text || p[-1] == ',' || !(sum > 0) || !isfinite(sum))
		return err_set(
		        e, EXIT_CONFIG,
		        "split \"%s\": one to three weights of train, validation and test, none negative, "
		        "not all zero, such as \"98,2,0\"",
		        text);
	memcpy(split, parsed, sizeof parsed);
	return 0;
}

/* The normalised weights are added in Megatron's order, so that the same doubles are rounded. */
void samples_split_bounds(const double split[SPLIT_COUNT], uint64_t n, uint64_t bounds[SPLIT_COUNT + 1])
{
	double sum = 0, reached = 0;
	for (int k = 0; k < SPLIT_COUNT; k++)
		sum += split[k];
	bounds[0] = 0;
	for (int k = 0; k < SPLIT_COUNT; k++) {
		reached += split[k] / sum;
		double bound = fmin(rint(reached * (double)n), (double)n);
		bounds[k + 1] = bound >= 0 ? (uint64_t)bound : 0;
	}
}

int samples_init(struct samples *s, const struct indexed *data, const double split[SPLIT_COUNT],
                 enum samples_split which, int seq_length, uint64_t key, bool shuffle, int64_t vocab_size,
                 struct err *e)
{
	uint64_t bounds[SPLIT_COUNT + 1], documents = indexed_documents(data);
	ASSERT(seq_length > 0);
	samples_split_bounds(split, documents, bounds);
	uint64_t first = indexed_document_first(data, bounds[which]);
	uint64_t tokens = indexed_document_first(data, bounds[which + 1]) - first;
	if (tokens <= (uint64_t)seq_length)
		return err_set(e, EXIT_BAD_DATA,
		               "%s: the %s split (documents %" PRIu64 " to %" PRIu64 " of %" PRIu64
		               ") needs at least seq_length + 1 = %" PRId64
		               " tokens for one sample; it has %" PRIu64,
		               indexed_prefix(data), split_names[which], bounds[which], bounds[which + 1],
		               documents, (int64_t)seq_length + 1, tokens);
	*s = (struct samples){.data = data,
	                      .first_document = bounds[which],
	                      .last_document = bounds[which + 1],
	                      .first_token = first,
	                      .tokens = tokens,
	                      .per_epoch = (tokens - 1) / (uint64_t)seq_length,
	                      .key = key,
	                      .vocab_size = vocab_size,
	                      .seq_length = seq_length,
	                      .shuffle = shuffle};
	return 0;
}

/* Where sample i begins, in tokens of the split. */
static uint64_t start_of(const struct samples *s, uint64_t i)
{
	uint64_t epoch = i / s->per_epoch, j = i % s->per_epoch, length = (uint64_t)s->seq_length;
	if (!s->shuffle)
		return j * length;
	uint64_t key = rng_subkey(s->key, epoch);
	uint64_t offset = epoch ? rng_bits(rng_subkey(key, 1), 0) % length : 0;
	return offset + permute_index(key, s->per_epoch, j) * length; /* at most tokens - 2 */
}

uint64_t samples_first_token(const struct samples *s, uint64_t i)
{
	return s->first_token + start_of(s, i);
}

int samples_get(const struct samples *s, uint64_t i, int32_t *tokens, struct err *e)
{
	uint64_t start = start_of(s, i), n = (uint64_t)s->seq_length + 1;
	uint64_t part = n < s->tokens - start ? n : s->tokens - start;
	int rc = indexed_read(s->data, s->first_token + start, part, s->vocab_size, tokens, e);
	if (!rc && part < n)
		rc = indexed_read(s->data, s->first_token, n - part, s->vocab_size, tokens + part, e);
	return rc;
}
