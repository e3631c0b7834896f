/* Training a byte-level BPE tokenizer (Sennrich et al. 2016; Radford et al. 2019): the pair of neighbours
 * that occurs most often becomes a token, until the vocabulary is full. Ids are those of Hugging Face's
 * BpeTrainer with the alphabet of ByteLevel: special tokens, the 256 bytes in the order of their characters,
 * merges; of pairs that occur equally often the one with the smaller ids merges first. Local. Floor: data. */
#ifndef PENTAD_DATA_BPE_TRAIN_H
#define PENTAD_DATA_BPE_TRAIN_H

#include <stddef.h>
#include <stdint.h>

struct buf;
struct err;
struct bpe_trainer;

struct bpe_train_spec {
	int64_t vocab_size;          /* tokens in all; fewer where the text has no more pairs */
	int64_t min_frequency;       /* a pair that occurs less often is not merged */
	const char *const *specials; /* ids 0, 1, …; repeats are left out */
	size_t n_specials;
};
struct bpe_train_stats {
	uint64_t text_bytes, words; /* different words */
	int32_t vocab_size;
	size_t merges;
};

/* EXIT_USAGE where vocab_size is no room for the special tokens and the bytes, or above what tokenizer.h
 * reads. */
int bpe_train_check(const struct bpe_train_spec *spec, struct err *e);

struct bpe_trainer *bpe_trainer_new(void);
void bpe_trainer_free(struct bpe_trainer *t); /* NULL is fine */
/* Counts the words of one text, cut as GPT-2 does; no word goes over its ends. Any bytes, see tokenizer.h.
 * EXIT_BAD_DATA for a word of 2 GiB. */
int bpe_trainer_add(struct bpe_trainer *t, const char *text, size_t length_bytes, struct err *e);
/* Appends a tokenizer.json to *json. Once only. Errors are those of bpe_train_check. */
int bpe_trainer_run(struct bpe_trainer *t, const struct bpe_train_spec *spec, struct buf *json,
                    struct bpe_train_stats *stats, struct err *e);

#endif
