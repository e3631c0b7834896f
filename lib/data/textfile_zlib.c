/* gzip by zlib. */
#include "base/err.h"
#include "base/mem.h"
#include "data/textfile_gzip.h"

#include <limits.h>
#include <stdlib.h>
#include <zlib.h>

struct gzip {
	z_stream stream;
	bool complete;
};

const char *gzip_missing(void)
{
	return NULL;
}

struct gzip *gzip_new(void)
{
	struct gzip *g = mem_array(1, sizeof *g);
	ASSERT(inflateInit2(&g->stream, 15 + 16) == Z_OK); /* 16: a gzip header and nothing else */
	return g;
}

void gzip_free(struct gzip *g)
{
	if (g)
		inflateEnd(&g->stream);
	free(g);
}

const char *gzip_inflate(struct gzip *g, const void *in, size_t *in_bytes, void *out, size_t *out_bytes)
{
	z_stream *z = &g->stream;
	uInt given = *in_bytes < UINT_MAX ? (uInt)*in_bytes : UINT_MAX;
	uInt room = *out_bytes < UINT_MAX ? (uInt)*out_bytes : UINT_MAX;
	if (g->complete && given) {
		inflateReset(z);
		g->complete = false;
	}
	z->next_in = (z_const Bytef *)in;
	z->avail_in = given;
	z->next_out = out;
	z->avail_out = room;
	int rc = inflate(z, Z_NO_FLUSH);
	*in_bytes = given - z->avail_in;
	*out_bytes = room - z->avail_out;
	g->complete |= rc == Z_STREAM_END;
	return rc == Z_OK || rc == Z_STREAM_END || rc == Z_BUF_ERROR ? NULL : z->msg ? z->msg : zError(rc);
}

bool gzip_complete(const struct gzip *g)
{
	return g->complete;
}
