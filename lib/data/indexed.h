/* Megatron's indexed datasets: PREFIX.idx says where each sequence of PREFIX.bin lies. Read and written
 * byte for byte as Megatron-LM's core/datasets/indexed_dataset.py does.
 *
 *	offset      bytes  PREFIX.idx, little-endian, no padding (the arrays are therefore unaligned)
 *	0           9      "MMIDIDX\0\0"
 *	9           8      u64 version, 1
 *	17          1      u8 element type of PREFIX.bin, INDEXED_TYPES below
 *	18          8      u64 S, sequences
 *	26          8      u64 D, documents + 1
 *	34          4·S    i32 tokens of each sequence
 *	34 + 4·S    8·S    i64 byte offset of each sequence in PREFIX.bin
 *	34 + 12·S   8·D    i64 first sequence of each document; the last is S
 *	…           S      i8 modes, multimodal files only (nothing in the header says so); not read
 *
 * Both files are mapped and hostile until checked: indexed_open looks at every field before it is used,
 * token ids are checked when they are read. Token t of a dataset is the t-th of all its sequences laid
 * end to end. A `struct indexed` is read-only and may be shared by threads. Local. Floor: data. */
#ifndef PENTAD_DATA_INDEXED_H
#define PENTAD_DATA_INDEXED_H

#include <stddef.h>
#include <stdint.h>

struct err;
struct indexed;
struct indexed_writer;

/* code in the file, name, C type: token ids are integers, the rest is refused by indexed_open */
#define INDEXED_INTEGERS(X) \
	X(1, U8, uint8_t)   \
	X(2, I8, int8_t) X(3, I16, int16_t) X(4, I32, int32_t) X(5, I64, int64_t) X(8, U16, uint16_t)
#define INDEXED_FLOATS(X) X(6, F64, double) X(7, F32, float)
#define INDEXED_TYPES(X) INDEXED_INTEGERS(X) INDEXED_FLOATS(X)

enum indexed_type {
#define INDEXED_ENUM(code, name, ctype) INDEXED_##name = code,
	INDEXED_TYPES(INDEXED_ENUM)
#undef INDEXED_ENUM
};

/* Maps PREFIX.idx and PREFIX.bin and checks them. *out is the caller's, set only on success.
 * EXIT_NO_INPUT where a file is missing, EXIT_BAD_DATA (file and byte offset) where one is malformed. */
int indexed_open(const char *prefix, struct indexed **out, struct err *e);
void indexed_close(struct indexed *x); /* NULL is fine */

const char *indexed_prefix(const struct indexed *x);
uint64_t indexed_sequences(const struct indexed *x);
uint64_t indexed_documents(const struct indexed *x);
uint64_t indexed_tokens(const struct indexed *x);
/* Tokens before document d, for d in [0, documents]: document d is [first(d), first(d + 1)). */
uint64_t indexed_document_first(const struct indexed *x, uint64_t d);
/* The document that holds token t; t < indexed_tokens. O(log documents). */
uint64_t indexed_document_of(const struct indexed *x, uint64_t t);

/* Copies tokens [first, first + n) to out[n] as int32. EXIT_BAD_DATA with file, document and byte offset
 * where an id is negative or not below vocab_size (0: any id that fits in int32). The range must lie
 * within indexed_tokens. */
int indexed_read(const struct indexed *x, uint64_t first, uint64_t n, int64_t vocab_size, int32_t *out,
                 struct err *e);

/* Fingerprint of PREFIX.idx, the size of PREFIX.bin and its first and last 64 KiB; the path is not in it. */
uint64_t indexed_fingerprint(const struct indexed *x);

/* From now on a page fault in a mapped dataset whose file was cut short ends the process with
 * EXIT_BAD_DATA and a sentence that names the file and the byte offset; another SIGBUS takes the way it
 * took before. Call once, before threads start. */
void indexed_guard_install(void);

/* The type Megatron's writer takes: U16 below 65500 ids, else I32. */
enum indexed_type indexed_type_for(int64_t vocab_size);

/* Writes PREFIX.bin.tmp as documents come (one sequence each); memory is 4 bytes a document. *out is the
 * caller's until finish or abort. EXIT_IO where the folder is missing or not writable. */
int indexed_writer_open(const char *prefix, enum indexed_type type, struct indexed_writer **out,
                        struct err *e);
/* Appends ids[n] to the document that is open; n may be 0. EXIT_BAD_DATA where an id does not fit in the type
 * or the document is longer than a sequence may be (2^31 - 1 tokens), EXIT_IO where writing fails. After an
 * error only abort is allowed. */
int indexed_writer_append(struct indexed_writer *w, const int32_t *ids, size_t n, struct err *e);
/* Ends the open document, which may be empty. */
void indexed_writer_end_document(struct indexed_writer *w);
/* Both at once. */
int indexed_writer_add_document(struct indexed_writer *w, const int32_t *ids, size_t n, struct err *e);
/* Documents that have ended, tokens written. */
uint64_t indexed_writer_documents(const struct indexed_writer *w);
uint64_t indexed_writer_tokens(const struct indexed_writer *w);
/* Flushes both files to disk and renames them to PREFIX.bin and PREFIX.idx, frees w. On failure nothing is
 * left under the temporary names, and never a .bin with another's .idx. */
int indexed_writer_finish(struct indexed_writer *w, struct err *e);
/* Removes what was written, frees w. NULL is fine. */
void indexed_writer_abort(struct indexed_writer *w);

#endif
