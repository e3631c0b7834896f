/* safetensors, the file format of Hugging Face weights: 8 bytes N (little-endian), N bytes of JSON, raw data.
 * Format: https://github.com/huggingface/safetensors. The reader trusts nothing: header of at most 100 MB,
 * every offset in range, tensors side by side without hole or overlap, no name twice, file as long as the
 * header says. Local. Floor: ckpt. */
#ifndef PENTAD_CKPT_SAFETENSORS_H
#define PENTAD_CKPT_SAFETENSORS_H

#include <stddef.h>
#include <stdint.h>

struct err;

enum { ST_MAX_DIM = 8 };

/* name in the file, bytes an element; in the order of the format's own library, which sorts by it. */
#define ST_DTYPES(X)      \
	X(BOOL, 1)        \
	X(U8, 1)          \
	X(I8, 1)          \
	X(F8_E5M2, 1)     \
	X(F8_E4M3, 1)     \
	X(F8_E8M0, 1)     \
	X(F8_E4M3FNUZ, 1) \
	X(F8_E5M2FNUZ, 1) \
	X(I16, 2)         \
	X(U16, 2)         \
	X(F16, 2)         \
	X(BF16, 2)        \
	X(I32, 4)         \
	X(U32, 4)         \
	X(F32, 4)         \
	X(C64, 8)         \
	X(F64, 8)         \
	X(I64, 8)         \
	X(U64, 8)
enum st_dtype {
#define ST_DTYPE_ROW(name, bytes) ST_##name,
	ST_DTYPES(ST_DTYPE_ROW)
#undef ST_DTYPE_ROW
	        ST_DTYPE_COUNT
};
const char *st_dtype_name(enum st_dtype t);
size_t st_dtype_bytes(enum st_dtype t);

struct st_tensor {
	const char *name;
	enum st_dtype dtype;
	int nd;
	int64_t shape[ST_MAX_DIM];
	size_t file;       /* reader: which shard; writer: set by st_write_create */
	size_t at_bytes;   /* in that file, from its beginning */
	size_t size_bytes; /* product of shape and element */
};

struct st_file;

/* Opens FILE.safetensors, or a folder with model.safetensors or model.safetensors.index.json (shards beside
 * it). EXIT_NO_INPUT: nothing there, or only pickles, which are never read. EXIT_BAD_DATA, EXIT_IO. */
int st_open(const char *path, struct st_file **out, struct err *e);
void st_close(struct st_file *f);
size_t st_count(const struct st_file *f);
const struct st_tensor *st_get(const struct st_file *f, size_t i); /* sorted by name */
const struct st_tensor *st_find(const struct st_file *f, const char *name);
/* Bytes [from, from + n) of a tensor. EXIT_INTERNAL where out of range, EXIT_IO. */
int st_read(const struct st_file *f, const struct st_tensor *t, size_t from, size_t n, void *out,
            struct err *e);

struct st_writer;

/* Creates model.safetensors in `dir` — or model-0000i-of-0000n.safetensors and the index where the tensors
 * exceed max_shard_bytes — with header, tensors in the order Hugging Face's own writer uses (wider elements
 * first, then by name), metadata {"format":"pt"}. `tensors` is copied; names unique; only name, dtype, nd,
 * shape are read. */
int st_write_create(const char *dir, const struct st_tensor *tensors, size_t n, size_t max_shard_bytes,
                    struct st_writer **out, struct err *e);
/* Bytes [from, from + n) of tensors[i]; any order; every byte must be written once. */
int st_write(struct st_writer *w, size_t i, size_t from, size_t n, const void *data, struct err *e);
/* Flushes and closes; EXIT_INTERNAL where bytes are missing. The writer is gone afterwards, error or not. */
int st_write_close(struct st_writer *w, struct err *e);

#endif
