#include "data/unicode.h"
#include "base/mem.h"

#include <pthread.h>

static const uint32_t runs[] = {
#include "data/unicode_table.inc"
};
enum { N_RUNS = sizeof runs / sizeof *runs, N_CODE_POINTS = 0x110000 };

static uint8_t classes[N_CODE_POINTS];
static pthread_once_t classes_once = PTHREAD_ONCE_INIT;

static uint8_t category_classes(enum unicode_category c)
{
	uint8_t bits = 0;
	bits |= c <= UNICODE_LO ? UNICODE_LETTER | UNICODE_WORD : 0;
	bits |= c >= UNICODE_MN && c <= UNICODE_ME ? UNICODE_MARK | UNICODE_WORD : 0;
	bits |= c >= UNICODE_ND && c <= UNICODE_NO ? UNICODE_NUMBER : 0;
	bits |= c == UNICODE_ND || c == UNICODE_NL || c == UNICODE_PC ? UNICODE_WORD : 0;
	bits |= c >= UNICODE_PC && c <= UNICODE_PO ? UNICODE_PUNCTUATION : 0;
	bits |= c >= UNICODE_ZS && c <= UNICODE_ZP ? UNICODE_SPACE : 0;
	return bits;
}

static void classes_add(uint32_t first, uint32_t last, uint8_t bits)
{
	for (uint32_t c = first; c <= last; c++)
		classes[c] |= bits;
}

/* What the general category does not say: White_Space, Other_Alphabetic and Join_Control of PropList.txt. */
static void classes_build(void)
{
	for (size_t i = 0; i < N_RUNS; i++) {
		uint32_t end = i + 1 < N_RUNS ? runs[i + 1] >> 5 : N_CODE_POINTS;
		classes_add(runs[i] >> 5, end - 1, category_classes(runs[i] & 31));
	}
	classes_add('\t', '\r', UNICODE_SPACE);
	classes_add(0x85, 0x85, UNICODE_SPACE);
	classes_add(0x200c, 0x200d, UNICODE_WORD);
	classes_add(0x24b6, 0x24e9, UNICODE_WORD);
	classes_add(0x1f130, 0x1f149, UNICODE_WORD);
	classes_add(0x1f150, 0x1f169, UNICODE_WORD);
	classes_add(0x1f170, 0x1f189, UNICODE_WORD);
	for (const char *p = "$+<=>^`|~"; *p; p++)
		classes_add((uint32_t)*p, (uint32_t)*p, UNICODE_PUNCTUATION);
}

const uint8_t *unicode_classes(void)
{
	pthread_once(&classes_once, classes_build);
	return classes;
}

enum unicode_category unicode_category(uint32_t c)
{
	size_t low = 0, high = N_RUNS;
	while (high - low > 1) {
		size_t middle = (low + high) / 2;
		*(runs[middle] >> 5 <= c ? &low : &high) = middle;
	}
	return c < N_CODE_POINTS ? (enum unicode_category)(runs[low] & 31) : UNICODE_CN;
}

/* Bytes of the sequence at p, *valid; or of the maximal part that U+FFFD stands for. Second bytes: Unicode
 * 16, table 3-7. */
static size_t sequence(const unsigned char *p, const unsigned char *end, bool *valid)
{
	size_t n = p[0] < 0x80   ? 1
	           : p[0] < 0xc2 ? 0
	           : p[0] < 0xe0 ? 2
	           : p[0] < 0xf0 ? 3
	           : p[0] < 0xf5 ? 4
	                         : 0;
	*valid = n == 1;
	if (n < 2)
		return 1;
	unsigned low = p[0] == 0xe0 ? 0xa0 : p[0] == 0xf0 ? 0x90 : 0x80;
	unsigned high = p[0] == 0xed ? 0x9f : p[0] == 0xf4 ? 0x8f : 0xbf;
	for (size_t i = 1; i < n; i++, low = 0x80, high = 0xbf)
		if (p + i == end || p[i] < low || p[i] > high)
			return i;
	*valid = true;
	return n;
}

size_t unicode_valid_bytes(const char *text, size_t length_bytes)
{
	const unsigned char *begin = (const unsigned char *)text, *p = begin, *end = begin + length_bytes;
	while (p < end) {
		uint64_t eight;
		if (end - p >= 8 && (__builtin_memcpy(&eight, p, 8), !(eight & 0x8080808080808080u))) {
			p += 8;
			continue;
		}
		bool valid;
		size_t n = sequence(p, end, &valid);
		if (!valid)
			break;
		p += n;
	}
	return (size_t)(p - begin);
}

void unicode_add_lossy(struct buf *out, const char *text, size_t length_bytes)
{
	while (length_bytes) {
		size_t n = unicode_valid_bytes(text, length_bytes);
		buf_add(out, text, n);
		text += n;
		length_bytes -= n;
		if (!length_bytes)
			break;
		bool valid;
		const unsigned char *p = (const unsigned char *)text;
		n = sequence(p, p + length_bytes, &valid);
		buf_puts(out, "\xef\xbf\xbd");
		text += n;
		length_bytes -= n;
	}
}

void unicode_put(struct buf *out, uint32_t c)
{
	static const unsigned char lead[] = {0, 0, 0xc0, 0xe0, 0xf0};
	int n = c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
	char s[4] = {(char)c};
	if (n > 1)
		s[0] = (char)(lead[n] | c >> 6 * (n - 1));
	for (int i = 1; i < n; i++)
		s[i] = (char)(0x80 | (c >> 6 * (n - 1 - i) & 63));
	buf_add(out, s, (size_t)n);
}
