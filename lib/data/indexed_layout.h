/* Offsets in the header of a .idx, shared by its reader and its writer; the layout is in indexed.h.
 * Floor: data. */
#ifndef PENTAD_DATA_INDEXED_LAYOUT_H
#define PENTAD_DATA_INDEXED_LAYOUT_H

#define INDEXED_MAGIC "MMIDIDX\0" /* and the NUL that ends the literal: nine bytes */

enum {
	INDEXED_AT_VERSION = 9,
	INDEXED_AT_TYPE = 17,
	INDEXED_AT_SEQUENCES = 18,
	INDEXED_AT_BORDERS = 26,
	INDEXED_HEADER = 34,
};

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "indexed datasets are little-endian");

#endif
