/* The reading half of prepare: inputs are cut into pieces of text, pieces are gathered in batches.
 * Local. Floor: data. */
#ifndef PENTAD_DATA_PREPARE_CUT_H
#define PENTAD_DATA_PREPARE_CUT_H

#include "base/err.h"
#include "base/mem.h"
#include "data/prepare.h"

struct textfile;

/* A document, or a part of one, and after encoding its tokens. */
struct piece {
	size_t offset, length; /* bytes in the batch's text */
	uint64_t line;         /* where it begins, from 1 */
	size_t n_ids;
	bool ends;    /* the last piece of its document */
	bool dropped; /* a bad line that was skipped */
};

struct batch {
	char name[512]; /* of the input: for messages */
	bool json;      /* pieces are JSON lines */
	struct buf text;
	struct piece *pieces;
	size_t n_pieces, pieces_cap;
	/* Written by the worker: */
	int32_t *ids;
	size_t n_ids, ids_cap;
	uint64_t text_bytes; /* that were encoded */
	char bad_lines[PREPARE_BAD_LINES][300];
	size_t n_bad; /* dropped pieces, the first of them above */
	struct err err;
	bool done;
};

/* Where reading stands. All zero but `spec` is the beginning. */
struct cutter {
	const struct prepare_spec *spec;
	size_t input; /* the next to open */
	struct textfile *file;
	bool json, open_piece, held; /* held: the line last read waits for the next batch */
	const char *line;
	size_t length;
	char last; /* last byte of the line before */
};

/* The next batch, of one input; without pieces at the end of all. Reuses the memory of *b. */
int cutter_fill(struct cutter *c, struct batch *b, struct err *e);
/* Part of the inputs' bytes that has been read, in [0, 1]; negative where that is unknown. */
double cutter_progress(const struct cutter *c);
void cutter_close(struct cutter *c);

#endif
