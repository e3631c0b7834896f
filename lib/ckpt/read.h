/* What an open checkpoint is made of. Internal to ckpt. Local. Floor: ckpt. */
#ifndef PENTAD_CKPT_READ_H
#define PENTAD_CKPT_READ_H

#include "ckpt/folder.h"

enum { CKPT_OPEN_FILES = 32, CKPT_WINDOW_BYTES = 1 << 20 };

/* A stretch of a file in memory; runs of a box come in rising order, so most are served from here. */
struct window {
	char *data;
	uint32_t file;
	uint64_t at, bytes; /* bytes = 0: empty */
};

struct ckpt {
	char path[PATH_MAX];
	struct manifest m;
	struct arena arena;
	const struct json *meta;
	struct {
		uint32_t file;
		int fd;
	} open[CKPT_OPEN_FILES]; /* file i stands in slot i mod CKPT_OPEN_FILES */
	struct window window;
};

struct entry *ckpt_find_entry(const struct ckpt *c, const char *kind, const char *name);

#endif
