/* A build without zlib: plain text only. textfile.c asks gzip_missing before it makes a struct gzip. */
#include "base/err.h"
#include "data/textfile_gzip.h"

const char *gzip_missing(void)
{
	return "zlib (build with zlib1g-dev)";
}

struct gzip *gzip_new(void)
{
	return NULL;
}

void gzip_free(struct gzip *g)
{
	(void)g;
}

const char *gzip_inflate(struct gzip *g, const void *in, size_t *in_bytes, void *out, size_t *out_bytes)
{
	(void)g, (void)in, (void)out;
	*in_bytes = *out_bytes = 0;
	return gzip_missing();
}

bool gzip_complete(const struct gzip *g)
{
	(void)g;
	return true;
}
