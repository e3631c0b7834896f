/* Inflating a gzip stream piece by piece, for textfile.c. A build without zlib links the twin that says so.
 * Local. Floor: data. */
#ifndef PENTAD_DATA_TEXTFILE_GZIP_H
#define PENTAD_DATA_TEXTFILE_GZIP_H

#include <stdbool.h>
#include <stddef.h>

struct gzip;

/* What is missing in this build, NULL where nothing is. */
const char *gzip_missing(void);
struct gzip *gzip_new(void);
void gzip_free(struct gzip *g); /* NULL is fine */
/* Inflates in[0..*in_bytes) into out[0..*out_bytes); both become what was used and made. Members follow one
 * another. NULL, or what is wrong with the stream (static storage). */
const char *gzip_inflate(struct gzip *g, const void *in, size_t *in_bytes, void *out, size_t *out_bytes);
/* Whether the stream may end here: a member is complete. */
bool gzip_complete(const struct gzip *g);

#endif
