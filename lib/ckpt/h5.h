/* The two things libhdf5 is used for: laying out a shard before its bulk is written past the library, and the
 * view for people, model.h5. Nothing is ever read through it. Internal to ckpt. Local. Floor: ckpt.
 *
 * One lock around every call (not every libhdf5 is thread-safe), no plugin, no exit handler (the library's
 * crashes after a failed close), and after a failed call the file counts as lost. */
#ifndef PENTAD_CKPT_H5_H
#define PENTAD_CKPT_H5_H

#include "ckpt/manifest.h"

/* Creates `path` with one contiguous dataset a row, "/KIND/NAME@OFFSET", its space allocated and not
 * written; at[i] = byte offset of row i's data, *bytes = size the file must have. EXIT_IO. */
int h5_lay_out(const char *path, const struct ckpt_tensor *rows, size_t n, uint64_t *at, uint64_t *bytes,
               struct err *e);
/* Creates `path`, where "/KIND/NAME" of each tensor is a virtual dataset over the shards beside it. EXIT_IO.
 */
int h5_present(const char *path, const struct manifest *m, struct err *e);

#endif
