/* Byte pair encoding of one piece (Sennrich et al. 2016): of all neighbours that merge, the pair that was
 * learned first does, the leftmost of equal ones, until none is left. Local. Floor: data. */
#ifndef PENTAD_DATA_BPE_H
#define PENTAD_DATA_BPE_H

#include "data/pattern.h"
#include "data/string_map.h"

#include <stdbool.h>

struct bpe {
	struct pair_map merges;      /* pair → rank << 32 | id of what it becomes */
	struct string_map whole;     /* bytes of a token → id, where whole pieces skip the merges */
	int32_t byte_ids[2][2][256]; /* [is first][is last]; -1: the vocabulary lacks it */
	int32_t unknown;             /* id for bytes that it lacks, -1: they are left out */
	bool fuse_unknown;           /* a run of them is one token */
};

/* From the object "model", whose vocabulary is already in ids. The maps' keys live in the arena of l; freed
 * with bpe_free (also after an error). EXIT_BAD_DATA. */
int bpe_load(struct bpe *b, struct load *l, const struct json *model, const struct string_map *ids);
void bpe_free(struct bpe *b);

struct id_list {
	int32_t *items;
	size_t n, cap;
};
void id_list_add(struct id_list *l, const int32_t *ids, size_t n);

/* One thread's buffers, and a cache of short pieces. */
struct bpe_scratch;
struct bpe_scratch *bpe_scratch_new(void);
void bpe_scratch_free(struct bpe_scratch *s); /* NULL is fine */
/* Appends the ids of a piece, which is raw bytes. EXIT_BAD_DATA for a piece of 2 GiB or more. */
int bpe_encode(const struct bpe *b, struct bpe_scratch *s, struct span piece, struct id_list *out,
               struct err *e);

#endif
