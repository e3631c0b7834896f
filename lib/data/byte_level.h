/* The visible characters that byte-level BPE writes for bytes (Radford et al. 2019): printable Latin-1 stands
 * for itself, the 68 other bytes, in order, for U+0100 and up. Local. Floor: data. */
#ifndef PENTAD_DATA_BYTE_LEVEL_H
#define PENTAD_DATA_BYTE_LEVEL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Characters lie in [BYTE_LEVEL_FIRST, BYTE_LEVEL_END). */
enum { BYTE_LEVEL_FIRST = '!', BYTE_LEVEL_END = 0x144 };

static inline uint32_t byte_level_char(uint8_t byte)
{
	return byte < 33     ? 0x100u + byte
	       : byte < 127  ? byte
	       : byte < 161  ? 0xa2u + byte
	       : byte == 173 ? 0x143
	                     : byte;
}

/* The byte of a character, -1 where it stands for none. */
static inline int byte_level_byte(uint32_t c)
{
	uint32_t byte = c < 0x100 ? c : c < 0x121 ? c - 0x100 : c < 0x143 ? c - 0xa2 : 173;
	return c < BYTE_LEVEL_END && byte_level_char((uint8_t)byte) == c ? (int)byte : -1;
}

/* Writes the bytes of UTF-8 text (at most length_bytes) into out; false where a character stands for none. */
bool byte_level_decode(const char *text, size_t length_bytes, char *out, size_t *n);

#endif
