/* Tokenizers: text to token ids and back, from a Hugging Face `tokenizer.json`.
 *
 * A tokenizer is a chain of rows taken from tables: added tokens are cut out of the text, each rest is
 * normalized, split into pieces, and each piece is given to the model. What the chain is made of is in
 * tokenizer_chain.h; today's model is byte-level BPE (GPT-2, Llama 3, Qwen 2 …). Ids are those of
 * Hugging Face `tokenizers` with add_special_tokens=False: post_processor, truncation and padding are not
 * applied, but special and added tokens that stand in the text are recognised.
 *
 * Text that is not UTF-8 is read as Rust's String::from_utf8_lossy reads it: each maximal part of an
 * ill-formed sequence becomes one U+FFFD (Unicode 15, section 3.9, table 3-8).
 *
 * A `struct tokenizer` is read-only after tokenizer_load and may be shared by threads; each thread that
 * encodes has a `struct encoder` of its own. Local. Floor: data. */
#ifndef PENTAD_DATA_TOKENIZER_H
#define PENTAD_DATA_TOKENIZER_H

#include <stddef.h>
#include <stdint.h>

struct buf;
struct err;
struct tokenizer;
struct encoder;

/* Largest file and largest id that are accepted. */
#define TOKENIZER_MAX_FILE ((size_t)256 << 20)
#define TOKENIZER_MAX_ID ((int64_t)(1 << 24) - 1)

/* Reads a tokenizer.json; *out is the caller's, set only on success. EXIT_NO_INPUT where the file is
 * missing, EXIT_BAD_DATA where it is malformed or of a kind that is not read (one sentence that names the
 * file and the dotted key), EXIT_UNAVAILABLE where it needs a library this build lacks. */
int tokenizer_load(const char *path, struct tokenizer **out, struct err *e);
/* The same from memory; `name` is what messages and tokenizer_path say. json is not kept. */
int tokenizer_parse(const char *name, const char *json, size_t length_bytes, struct tokenizer **out,
                    struct err *e);
void tokenizer_free(struct tokenizer *t); /* NULL is fine */

/* Largest id + 1, added tokens included: rows an embedding needs before padding. */
int32_t tokenizer_vocab_size(const struct tokenizer *t);
/* The id of a token by its content as the file writes it ("<|endoftext|>", "Ġthe"), -1 where none. */
int32_t tokenizer_id(const struct tokenizer *t, const char *content);
/* The token's content as the file writes it, NULL where no token has this id. Valid as long as t. */
const char *tokenizer_content(const struct tokenizer *t, int32_t id);
/* The end-of-document token: the first of "<|endoftext|>", "<|end_of_text|>", "</s>", "<|eot_id|>",
 * "<eos>", "<|im_end|>", "<｜end▁of▁sentence｜>", "[SEP]" that exists, else -1. */
int32_t tokenizer_eod(const struct tokenizer *t);
/* Where it came from, and a 64-bit fingerprint of the file's bytes for a run's metadata. */
const char *tokenizer_path(const struct tokenizer *t);
uint64_t tokenizer_hash(const struct tokenizer *t);

/* Scratch of one thread: buffers and a bounded cache of pieces seen before. Lives no longer than t. */
struct encoder *encoder_new(const struct tokenizer *t);
void encoder_free(struct encoder *enc); /* NULL is fine */
/* Ids of one text; any bytes, NULs included. *ids belongs to enc and is valid until its next call; no text
 * is an error by itself except where a regular expression of the file exceeds its step limit, or where a
 * piece needs a byte the vocabulary lacks and the file has no unknown token: then it is skipped, as
 * Hugging Face does. EXIT_BAD_DATA. */
int encoder_encode(struct encoder *enc, const char *text, size_t length_bytes, int32_t **ids, size_t *n,
                   struct err *e);

/* Appends the text of n ids to *out, special tokens included. Bytes that are not UTF-8 when put together
 * become U+FFFD as in encoding, so *out is always UTF-8. EXIT_BAD_DATA names an id without a token. */
int tokenizer_decode(const struct tokenizer *t, const int32_t *ids, size_t n, struct buf *out, struct err *e);
/* Appends the raw bytes of one id, for streaming generation: a character may be split over several ids,
 * so hold back an unfinished UTF-8 tail. EXIT_BAD_DATA as above. */
int tokenizer_decode_bytes(const struct tokenizer *t, int32_t id, struct buf *out, struct err *e);

#endif
