/* The folder of a run's checkpoints: names of steps, which are there, which are whole. Internal to ckpt.
 * Local. Floor: ckpt. */
#ifndef PENTAD_CKPT_FOLDER_H
#define PENTAD_CKPT_FOLDER_H

#include "ckpt/manifest.h"

#define CKPT_LAST_STEP 99999999
#define CKPT_STEP_FORMAT "step-%08" PRId64

/* Every file of the manifest is in `dir` with its size. EXIT_BAD_DATA. */
int folder_check_files(const struct manifest *m, const char *dir, struct err *e);
/* The step that a folder's name says, -1 where it is no name of a step. */
int64_t folder_step(const char *name);
/* Reads and checks dir/manifest.json and the sizes of the shards; m->where must be set. EXIT_BAD_DATA,
 * EXIT_IO. */
int folder_read_manifest(struct manifest *m, const char *dir, struct err *e);
/* Where the steps of `path` (run or checkpoints folder) lie. EXIT_NO_INPUT. */
int folder_of_steps(const char *path, char *out, size_t cap, struct err *e);

#endif
