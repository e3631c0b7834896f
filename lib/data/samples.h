/* Samples of a GPT dataset: windows of seq_length + 1 tokens cut from one split of an indexed dataset, the
 * next one beginning at the last token of the one before. No index files: sample i is a pure function of
 * (dataset, split, seq_length, key, i).
 *
 * The documents of a split lie end to end in file order (samples run across their borders), M tokens in
 * all. An epoch has N = (M - 1) / T samples, T = seq_length. Sample i is number j of epoch i / N and holds
 * the tokens (offset + j·T + [0, T]) mod M. In order (shuffle false) j = i mod N and the offset is 0 in
 * every epoch. Shuffled, j = permute(key of the epoch, N, i mod N), and the offset is 0 in the first epoch
 * and uniform in [0, T) in the others, so that samples of different epochs have different borders; what
 * runs over the end of the split goes on at its beginning, as if the next epoch followed.
 *
 * Splits are over documents with Megatron's rounding: of N documents, split k has those from
 * rint(c_k · N) to rint(c_(k+1) · N), c the cumulative normalised weights, halves to even.
 * Local. Floor: data. */
#ifndef PENTAD_DATA_SAMPLES_H
#define PENTAD_DATA_SAMPLES_H

#include <stdbool.h>
#include <stdint.h>

struct err;
struct indexed;

enum samples_split { SPLIT_TRAIN, SPLIT_VALID, SPLIT_TEST, SPLIT_COUNT };

struct samples {
	const struct indexed *data;             /* the caller's, must live longer */
	uint64_t first_document, last_document; /* of the split: [first, last) */
	uint64_t first_token, tokens;           /* of the split */
	uint64_t per_epoch;                     /* N, at least 1 */
	uint64_t key;
	int64_t vocab_size;
	int seq_length;
	bool shuffle;
};

/* "98,2,0" to weights, missing ones 0. EXIT_CONFIG where it is no list of one to three numbers >= 0 with a
 * positive sum. */
int samples_parse_split(const char *text, double split[SPLIT_COUNT], struct err *e);
/* Document bounds of the splits of n documents: split k is [bounds[k], bounds[k + 1]). */
void samples_split_bounds(const double split[SPLIT_COUNT], uint64_t n, uint64_t bounds[SPLIT_COUNT + 1]);

/* Fills *s. EXIT_BAD_DATA where the split has fewer than seq_length + 1 tokens. vocab_size as indexed_read.
 */
int samples_init(struct samples *s, const struct indexed *data, const double split[SPLIT_COUNT],
                 enum samples_split which, int seq_length, uint64_t key, bool shuffle, int64_t vocab_size,
                 struct err *e);
/* Sample i (any i) into tokens[seq_length + 1]. EXIT_BAD_DATA as indexed_read. */
int samples_get(const struct samples *s, uint64_t i, int32_t *tokens, struct err *e);
/* Where sample i begins: the token of the dataset that is its first. */
uint64_t samples_first_token(const struct samples *s, uint64_t i);

#endif
