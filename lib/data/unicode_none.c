/* A build without utf8proc: categories work, normal forms do not. */
#include "base/err.h"
#include "data/unicode.h"

const char *unicode_forms_missing(void)
{
	return "utf8proc (build with libutf8proc-dev)";
}

int unicode_add_form(struct buf *out, enum unicode_form form, const char *text, size_t length_bytes,
                     struct err *e)
{
	(void)out, (void)form, (void)text, (void)length_bytes;
	return err_set(e, EXIT_UNAVAILABLE, "normal forms need %s", unicode_forms_missing());
}
