#include "data/byte_level.h"
#include "data/unicode.h"

bool byte_level_decode(const char *text, size_t length_bytes, char *out, size_t *n)
{
	*n = 0;
	for (size_t i = 0, width; i < length_bytes; i += width) {
		int byte = byte_level_byte(unicode_read((const unsigned char *)text + i, &width));
		if (byte < 0)
			return false;
		out[(*n)++] = (char)byte;
	}
	return true;
}
