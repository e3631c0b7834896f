/* Text to an indexed dataset: documents are cut from the inputs, encoded by worker threads, and written in
 * the order of the inputs, so that the output has the same bytes for any number of workers.
 *
 * Memory is bounded by workers × PREPARE_CHUNK however large an input is. Local. Floor: data. */
#ifndef PENTAD_DATA_PREPARE_H
#define PENTAD_DATA_PREPARE_H

#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct err;

/* A whole-file document above this many bytes is encoded in chunks. A chunk ends at a line break with a
 * printable ASCII character on either side, where no byte-level pre-tokenizer in use joins two lines; a
 * tokenizer that marks the beginning of a text marks each chunk. */
#define PREPARE_CHUNK ((size_t)64 << 20)

/* How a plain text input becomes documents: name, words of the command line */
#define PREPARE_SPLITS(X)                                                \
	X(NONE, "none", "each file is one document")                     \
	X(LINES, "lines", "each line that is not blank is one document") \
	X(BLANK_LINES, "blank-lines", "documents are separated by one or more blank lines")
enum prepare_split {
#define PREPARE_ENUM(name, word, doc) PREPARE_SPLIT_##name,
	PREPARE_SPLITS(PREPARE_ENUM)
#undef PREPARE_ENUM
};

struct prepare_spec {
	const char *const
	        *inputs; /* [n_inputs]; ".jsonl", ".json", ".ndjson" (and .gz) are JSON lines, "-" is stdin */
	size_t n_inputs;
	const char *tokenizer; /* tokenizer.json */
	const char *output_prefix;
	const char *json_key; /* the member that holds the text of a JSON line */
	enum prepare_split split;
	int workers;                       /* >= 1 */
	bool jsonl;                        /* every input is JSON lines, whatever its name */
	bool append_eod;                   /* end-of-document token behind each document */
	bool skip_bad_lines;               /* JSON lines that cannot be read are counted, not fatal */
	size_t chunk_bytes;                /* 0: PREPARE_CHUNK */
	const volatile sig_atomic_t *stop; /* not 0: give up between batches; NULL: never */
};

enum { PREPARE_BAD_LINES = 8 };
struct prepare_stats {
	uint64_t documents, tokens, text_bytes;
	uint64_t empty;                        /* documents without tokens, not written */
	uint64_t bad_lines;                    /* skipped */
	char bad_line[PREPARE_BAD_LINES][300]; /* the first of them: "FILE:LINE: why" */
	double seconds;
};

/* Writes output_prefix.bin and .idx. EXIT_NO_INPUT, EXIT_BAD_DATA ("FILE:LINE: …"), EXIT_IO,
 * EXIT_UNAVAILABLE; the first failure in the order of the inputs is reported and nothing is left behind.
 * EXIT_AGAIN where *stop was set. */
int prepare_run(const struct prepare_spec *spec, struct prepare_stats *stats, struct err *e);

#endif
