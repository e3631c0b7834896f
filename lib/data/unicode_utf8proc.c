/* Normal forms by utf8proc. */
#include "base/err.h"
#include "base/mem.h"
#include "data/unicode.h"

#include <stdlib.h>
#include <utf8proc.h>

const char *unicode_forms_missing(void)
{
	return NULL;
}

static void add_lowercase(struct buf *out, const char *text, size_t length_bytes)
{
	for (size_t i = 0, n; i < length_bytes; i += n) {
		uint32_t c = unicode_read((const unsigned char *)text + i, &n);
		if (c == 0x130) /* the one unconditional expansion in SpecialCasing.txt */
			buf_puts(out, "i\xcc\x87");
		else
			unicode_put(out, (uint32_t)utf8proc_tolower((utf8proc_int32_t)c));
	}
}

int unicode_add_form(struct buf *out, enum unicode_form form, const char *text, size_t length_bytes,
                     struct err *e)
{
	static const utf8proc_option_t options[] = {
	        [UNICODE_NFC] = UTF8PROC_STABLE | UTF8PROC_COMPOSE,
	        [UNICODE_NFD] = UTF8PROC_STABLE | UTF8PROC_DECOMPOSE,
	        [UNICODE_NFKC] = UTF8PROC_STABLE | UTF8PROC_COMPOSE | UTF8PROC_COMPAT,
	        [UNICODE_NFKD] = UTF8PROC_STABLE | UTF8PROC_DECOMPOSE | UTF8PROC_COMPAT,
	};
	if (form == UNICODE_LOWERCASE) {
		add_lowercase(out, text, length_bytes);
		return 0;
	}
	utf8proc_uint8_t *s = NULL;
	utf8proc_ssize_t n = utf8proc_map((const utf8proc_uint8_t *)text, (utf8proc_ssize_t)length_bytes, &s,
	                                  options[form]);
	if (n < 0)
		return err_set(e, EXIT_BAD_DATA, "normalizing %zu bytes of text: %s", length_bytes,
		               utf8proc_errmsg(n));
	buf_add(out, s, (size_t)n);
	free(s);
	return 0;
}
