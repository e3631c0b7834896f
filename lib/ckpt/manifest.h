/* The manifest of a checkpoint in memory and as text: which bytes of which file are which box of which
 * tensor. Internal to ckpt. Local. Floor: ckpt.
 *
 * The text is one JSON document with one item a line, which is how it is read (line by line, so that a
 * hostile file costs memory in proportion to what it vouches for); its last line is the CRC-32C of all bytes
 *before that line:
 *
 *	{"format": "pentad-checkpoint", "version": 1, "step": 1000, "world_size": 4,
 *	"meta": {…},
 *	"files": [
 *	{"name": "shard-00000.h5", "bytes": 4096, "structure_crc32c": "0123abcd"},
 *	…
 *	],
 *	"tensors": [
 *	{"name": …, "kind": …, "dtype": "f32", "shape": [8, 4], "pieces": [{"file": 0, "at": 2048, "bytes":
 *128, "crc32c": "0123abcd", "offset": [0, 0], "extent": [8, 4]}, …]},          (one line) …
 *	],
 *	"crc32c": "0123abcd"}
 *
 * A record, which a writing rank sends to rank 0, is one line of "files" and lines of "tensors". */
#ifndef PENTAD_CKPT_MANIFEST_H
#define PENTAD_CKPT_MANIFEST_H

#include "base/mem.h"
#include "ckpt/ckpt.h"

#define MANIFEST_FILE "manifest.json"
#define MANIFEST_MAX_BYTES ((size_t)256 << 20)

struct piece {
	uint32_t file, crc;
	uint64_t at, bytes;
	int64_t offset[CKPT_MAX_DIM], extent[CKPT_MAX_DIM];
	bool verified; /* the checksum was compared since the checkpoint was opened */
};

struct shard_file {
	char *name;
	uint64_t bytes;
	uint32_t structure_crc; /* of all bytes that belong to no piece, in the file's order */
};

struct entry {
	struct ckpt_entry show;
	struct piece *pieces;
	size_t cap;
	size_t line; /* of the text, for messages */
};

struct manifest {
	const char *where;  /* what messages call it; the owner's */
	struct arena arena; /* names */
	int64_t step;
	int world_size;
	char *meta;
	struct shard_file *files;
	size_t n_files, cap_files;
	struct entry *entries;
	size_t n_entries, cap_entries;
	uint64_t bytes;
};

void manifest_free(struct manifest *m);
/* Reads and checks all there is to check without the shards. EXIT_BAD_DATA. On error *m is to be freed too.
 */
int manifest_parse(struct manifest *m, const char *text, size_t bytes, struct err *e);
/* Adds the records of ranks to *m, merges pieces of one tensor, checks. EXIT_BAD_DATA. */
int manifest_add_records(struct manifest *m, const char *text, size_t bytes, struct err *e);
void manifest_print(const struct manifest *m, struct buf *b);
/* The two kinds of line of a record. */
void manifest_print_file(const struct shard_file *f, struct buf *b);
void manifest_print_tensor(const struct ckpt_entry *t, const struct piece *pieces, size_t n, struct buf *b);
/* true where s is 1 … longest letters, digits, '.', '_', '-', and does not begin with '.'. */
bool manifest_word_ok(const char *s, size_t longest);
/* One box, "[0:8, 2:4]", for messages; out is returned. */
const char *manifest_box_text(char *out, size_t cap, int nd, const int64_t *offset, const int64_t *extent);
/* Boxes inside of the shape and product of extents · element size, overflow-safe. false where it does not
 * hold. */
bool manifest_box_bytes(int nd, const int64_t *shape, const int64_t *offset, const int64_t *extent,
                        size_t element_bytes, uint64_t *bytes);

/* manifest_check.c. Every box in its shape, every byte range in its file, no two overlap, every tensor
 * covered exactly once. Entries must be sorted. EXIT_BAD_DATA. */
int manifest_check(struct manifest *m, struct err *e);

/* A byte range of a file that a piece fills, for walking what lies between. */
struct byte_range {
	uint64_t at, bytes;
};
/* All pieces of file `file` in the file's order: *n ranges, the caller's to free(). */
struct byte_range *manifest_ranges(const struct manifest *m, uint32_t file, size_t *n);
/* CRC-32C of what lies outside of `ranges` (sorted, disjoint) in fd's first `bytes` bytes. 0, or -1 with
 * errno. */
int manifest_structure_crc(int fd, uint64_t bytes, const struct byte_range *ranges, size_t n, uint32_t *crc);

#endif
