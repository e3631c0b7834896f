/* Checkpoints: a folder of HDF5 shards and a manifest that vouches for every piece of every tensor.
 *
 * This module is handed rows (name, kind, type, global shape, box) and has never heard of a model, a mesh
 * or a transport. Saving is three local calls which the caller orders with barriers of its own:
 *
 *	rank 0          ckpt_save_begin      makes step-00001000.tmp.ATTEMPT
 *	                -- barrier --
 *	writing ranks   ckpt_save_shard      writes shard-00000.h5 there, returns the record of its pieces
 *	                -- records to rank 0; where any rank failed: rank 0 calls ckpt_save_abort --
 *	rank 0          ckpt_save_commit     manifest.json, model.h5, one rename to step-00001000, `latest`
 *
 * A reader sees the old checkpoints or the new one, never a part. model.h5 shows every tensor as one global
 * dataset for people (h5py, h5dump); nothing here ever reads through it: bytes are read at the offsets the
 * manifest names, and their checksums are compared. Every byte of manifest.json is hostile until checked.
 * Calls are thread-safe for different `ckpt` and `ckpt_shard` objects. Floor: ckpt (stands on op). */
#ifndef PENTAD_CKPT_CKPT_H
#define PENTAD_CKPT_CKPT_H

#include "op/op.h"

#include <limits.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct buf;
struct err;
struct json;

enum {
	CKPT_MAX_DIM = 4,
	CKPT_MAX_NAME = 255, /* bytes of a tensor's name: letters, digits, '.', '_', '-' */
	CKPT_MAX_KIND = 31,  /* bytes of a kind: the same letters */
};

/* One box of one tensor. Boxes of the same (kind, name) in all ranks together must cover the tensor exactly
 * once: where several ranks hold a replica, the caller decides which of them writes it. One rank may hand in
 * several boxes of a tensor. nd = 0 is a scalar; every dimension is 1 or more. */
struct ckpt_tensor {
	const char *name;            /* logical: "decoder.layers.7.attention.query.weight" */
	const char *kind;            /* whose state: "model", "master", "exp_avg", "exp_avg_sq" … */
	enum dtype dtype;            /* of the bytes in `data` and in the file */
	int nd;                      /* 0 … CKPT_MAX_DIM */
	int64_t shape[CKPT_MAX_DIM]; /* of the whole tensor, elements */
	int64_t offset[CKPT_MAX_DIM], extent[CKPT_MAX_DIM]; /* the box */
	const void
	        *data; /* the box, row-major, contiguous; the caller's. May be NULL with ckpt_shard_write */
};

struct ckpt_save {
	const char *dir;     /* "RUN/checkpoints"; ckpt_save_begin makes it */
	const char *attempt; /* tells this try from others, the same on all ranks (job id and restart); NULL =
	                        "0" */
	int64_t step;        /* 0 … 99999999 */
	int rank, world_size;
	const struct ckpt_tensor *tensors; /* this rank's boxes; n_tensors = 0 writes no shard */
	size_t n_tensors;
	const char
	        *meta_json; /* rank 0: a JSON object, stored as it is; NULL = {}. By convention "model" holds
	                     * the resolved group `model` (names of the configuration), which export needs */
};

/* Makes the folder that the shards go to; what a former try of the same attempt left is removed. EXIT_IO.
 * Rank 0 only, before the others' ckpt_save_shard. Local. */
int ckpt_save_begin(const struct ckpt_save *s, struct err *e);
/* Writes this rank's shard, flushed to disk and checksummed, and appends its record (JSON lines) to
 * *record. EXIT_IO: the message names path and cause; the shard is removed. EXIT_INTERNAL for a row
 * that breaks the rules of struct ckpt_tensor. Local. */
int ckpt_save_shard(const struct ckpt_save *s, struct buf *record, struct err *e);
/* Publishes: `records` are those of all ranks, one behind the other in any order. EXIT_INTERNAL where the
 * boxes do not cover every tensor exactly once, EXIT_IO otherwise; after an error the temporary folder is
 * removed and the former checkpoints are untouched. Rank 0 only. Local. */
int ckpt_save_commit(const struct ckpt_save *s, const char *records, size_t records_bytes, struct err *e);
/* Gives up: removes the temporary folder. Rank 0 only. Local. */
void ckpt_save_abort(const struct ckpt_save *s);

/* The same as ckpt_save_shard in steps, so that not all boxes need to be in memory at once: the layout
 * comes from `tensors`, whose `data` is not looked at; then each box is written once, in any order, from one
 * thread; then closed. A shard that misses a box, or failed, is removed by ckpt_shard_close (`record` NULL
 * gives up at once). */
struct ckpt_shard;
int ckpt_shard_create(const struct ckpt_save *s, struct ckpt_shard **out, struct err *e);
int ckpt_shard_write(struct ckpt_shard *w, size_t tensor, const void *data, struct err *e);
int ckpt_shard_close(struct ckpt_shard *w, struct buf *record, struct err *e);

struct ckpt;

/* A tensor of an open checkpoint. */
struct ckpt_entry {
	const char *name, *kind;
	enum dtype dtype;
	int nd;
	int64_t shape[CKPT_MAX_DIM];
	size_t bytes, n_pieces;
};

enum ckpt_flag {
	CKPT_STRICT = 1, /* the newest step or EXIT_BAD_DATA: no falling back to an older one */
	CKPT_VERIFY = 2, /* compare every checksum before a step counts as valid */
};

/* Opens the newest valid step that is not above `newest_step` (CKPT_NEWEST: any). `path` is a run folder, its
 * checkpoints folder, or a step folder, which is then the only candidate. A step is valid where its manifest
 * is whole and every shard has the size it names (and, with CKPT_VERIFY, every checksum is right). A damaged
 * one is passed over with a warning that says what is wrong. EXIT_NO_INPUT where there is none at all,
 * EXIT_BAD_DATA where all are damaged. Every rank of a job must open the same step: rank 0 opens, and the
 * others open its step with newest_step = that step and CKPT_STRICT. Local. */
#define CKPT_NEWEST INT64_MAX
int ckpt_open(const char *path, int64_t newest_step, unsigned flags, struct ckpt **out, struct err *e);
void ckpt_close(struct ckpt *c); /* NULL is allowed */

int64_t ckpt_step(const struct ckpt *c);
int ckpt_world_size(const struct ckpt *c);          /* ranks that wrote it */
const char *ckpt_path(const struct ckpt *c);        /* of the step folder */
const struct json *ckpt_meta(const struct ckpt *c); /* an object, owned by c */
const char *ckpt_meta_text(const struct ckpt *c);   /* the same as text */
size_t ckpt_count(const struct ckpt *c);            /* tensors, sorted by kind and name */
size_t ckpt_file_count(const struct ckpt *c);       /* shards */
size_t ckpt_bytes(const struct ckpt *c);            /* of all pieces */
const struct ckpt_entry *ckpt_entry(const struct ckpt *c, size_t i);
/* NULL where it is not there. */
const struct ckpt_entry *ckpt_find(const struct ckpt *c, const char *kind, const char *name);

/* Copies a box of a tensor, from whatever pieces hold it, to out[extent…] (row-major, contiguous), as
 * `dtype`: that of the file, or one of f32, bf16 and f16 from another (round to nearest even). The checksum
 * of a piece is compared when it is first touched. EXIT_BAD_DATA: no such tensor, box outside of the shape,
 * checksum (names tensor, box, file, byte offset; the content of `out` is then undefined); EXIT_IO. Local. */
int ckpt_read_box(struct ckpt *c, const char *kind, const char *name, const int64_t *offset,
                  const int64_t *extent, enum dtype dtype, void *out, struct err *e);
/* Compares every checksum: all pieces, and all that is between them. EXIT_BAD_DATA names the piece. */
int ckpt_verify(struct ckpt *c, struct err *e);

/* The steps of a run or checkpoints folder in rising order, valid or not; *steps is the caller's to free(). A
 * folder without any gives n = 0. */
int ckpt_list(const char *path, int64_t **steps, size_t *n, struct err *e);
/* The folder of one step of a run or checkpoints folder. EXIT_NO_INPUT. */
int ckpt_step_path(const char *path, int64_t step, char *out, size_t cap, struct err *e);
/* Removes all but the `most_recent_k` newest valid steps (k < 1 keeps all) and what broken saves left;
 * damaged steps older than the newest valid one go too. Never the newest valid one. Rank 0 only, not during a
 * save. Local. */
int ckpt_prune(const char *dir, int most_recent_k, struct err *e);

#endif
