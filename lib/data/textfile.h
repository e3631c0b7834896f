/* Lines of a text file, plain or gzip, with their numbers: what `prepare`, `tokenizer` and `train` read.
 *
 * gzip is recognised by its first two bytes, never by the name, and several members one behind the
 * other are one text. A build without zlib reads plain files and says what it misses. `path` "-" is
 * standard input. Local. Floor: data. */
#ifndef PENTAD_DATA_TEXTFILE_H
#define PENTAD_DATA_TEXTFILE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct err;
struct textfile;

/* Longest line, in bytes. A longer one is EXIT_BAD_DATA. */
#define TEXTFILE_MAX_LINE ((size_t)1 << 30)

/* EXIT_NO_INPUT where the file is missing, EXIT_IO where it cannot be read. *out is the caller's. */
int textfile_open(const char *path, struct textfile **out, struct err *e);
void textfile_close(struct textfile *f); /* NULL is fine */

/* The next line without its '\n' (a '\r' before it stays; a last line without '\n' counts); *line is
 * NUL-terminated behind *length_bytes, may hold NULs, and is valid until the next call. At the end
 * returns 0 with *line = NULL. EXIT_BAD_DATA for a cut or corrupt gzip stream (file and byte offset)
 * and for a line above the limit; EXIT_IO for a failed read. */
int textfile_line(struct textfile *f, const char **line, size_t *length_bytes, struct err *e);

/* Whether the line last returned ended in '\n': false only for a last line without one. */
bool textfile_line_ended(const struct textfile *f);
/* Number of the line last returned, from 1; 0 before the first. */
uint64_t textfile_number(const struct textfile *f);
/* "stdin" for "-", else the path: what a message says before ":LINE: ". */
const char *textfile_name(const struct textfile *f);
/* Bytes of the file itself (compressed ones of a gzip file) read so far, and its size (0 where the
 * size is unknown, as of a pipe): for progress lines. */
uint64_t textfile_offset_bytes(const struct textfile *f);
uint64_t textfile_size_bytes(const struct textfile *f);

#endif
