/* Unicode for tokenizers: UTF-8, general categories (Unicode 16.0, own table, so that ids do not depend on
 * the machine), and the normal forms, which come from utf8proc. Local. Floor: data. */
#ifndef PENTAD_DATA_UNICODE_H
#define PENTAD_DATA_UNICODE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct buf;
struct err;

/* The order is that of unicode_table.inc. CN: not assigned. */
enum unicode_category {
	UNICODE_LU,
	UNICODE_LL,
	UNICODE_LT,
	UNICODE_LM,
	UNICODE_LO,
	UNICODE_MN,
	UNICODE_MC,
	UNICODE_ME,
	UNICODE_ND,
	UNICODE_NL,
	UNICODE_NO,
	UNICODE_PC,
	UNICODE_PD,
	UNICODE_PS,
	UNICODE_PE,
	UNICODE_PI,
	UNICODE_PF,
	UNICODE_PO,
	UNICODE_SM,
	UNICODE_SC,
	UNICODE_SK,
	UNICODE_SO,
	UNICODE_ZS,
	UNICODE_ZL,
	UNICODE_ZP,
	UNICODE_CC,
	UNICODE_CF,
	UNICODE_CO,
	UNICODE_CN,
};

/* Classes that pre-tokenizers ask for, as bits; several may hold. */
enum {
	UNICODE_LETTER = 1,       /* \p{L} */
	UNICODE_NUMBER = 2,       /* \p{N} */
	UNICODE_SPACE = 4,        /* White_Space: U+0085 is, U+180E is not */
	UNICODE_WORD = 8,         /* \w of UTS #18: Alphabetic, M, Nd, Pc, Join_Control */
	UNICODE_PUNCTUATION = 16, /* \p{P} and the ASCII symbols, as Hugging Face counts them */
	UNICODE_MARK = 32,        /* \p{M} */
};

/* Byte per code point below 0x110000, built once at the first call from any thread; static storage. */
const uint8_t *unicode_classes(void);
enum unicode_category unicode_category(uint32_t c);

/* The code point at p of text known to be UTF-8; *n is its bytes. */
static inline uint32_t unicode_read(const unsigned char *p, size_t *n)
{
	if (p[0] < 0x80)
		return *n = 1, p[0];
	if (p[0] < 0xe0)
		return *n = 2, (p[0] & 31u) << 6 | (p[1] & 63u);
	if (p[0] < 0xf0)
		return *n = 3, (p[0] & 15u) << 12 | (p[1] & 63u) << 6 | (p[2] & 63u);
	return *n = 4, (p[0] & 7u) << 18 | (p[1] & 63u) << 12 | (p[2] & 63u) << 6 | (p[3] & 63u);
}

/* Where the last code point of the UTF-8 text before `end` begins; end > 0. */
static inline size_t unicode_before(const char *text, size_t end)
{
	do
		end--;
	while (end > 0 && ((unsigned char)text[end] & 0xc0) == 0x80);
	return end;
}

/* Bytes of the longest prefix that is UTF-8 (no surrogates, no overlong forms). */
size_t unicode_valid_bytes(const char *text, size_t length_bytes);
/* Appends text with each maximal part of an ill-formed sequence replaced by U+FFFD. */
void unicode_add_lossy(struct buf *out, const char *text, size_t length_bytes);
/* Appends one code point as UTF-8. */
void unicode_put(struct buf *out, uint32_t c);

enum unicode_form { UNICODE_NFC, UNICODE_NFD, UNICODE_NFKC, UNICODE_NFKD, UNICODE_LOWERCASE };
/* What is missing in this build for the forms above, NULL where nothing is. */
const char *unicode_forms_missing(void);
/* Appends the normal form of UTF-8 text (UAX #15), or its lower case by code point (İ becomes i and U+0307).
 */
int unicode_add_form(struct buf *out, enum unicode_form form, const char *text, size_t length_bytes,
                     struct err *e);

#endif
