/* Mapped files that another process may cut short: which address belongs to which file, for the handler
 * that indexed_guard_install (data/indexed.h) puts in place. Local. Floor: data. */
#ifndef PENTAD_DATA_GUARD_H
#define PENTAD_DATA_GUARD_H

#include <stddef.h>

/* Notes that [data, data + bytes) is the file at `path`. data may be NULL (an empty file). */
void guard_add(const char *path, const void *data, size_t bytes);
/* Forgets it; call before unmapping. */
void guard_remove(const void *data);

#endif
