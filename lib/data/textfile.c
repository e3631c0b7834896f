#include "data/textfile.h"
#include "base/err.h"
#include "base/mem.h"
#include "base/sys.h"
#include "data/textfile_gzip.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { RAW_BYTES = 1 << 16, FIRST_TEXT_BYTES = 1 << 17 };

/* raw[raw_at..raw_end) is read but not yet text; text[line_at..text_end) is text but not yet returned. */
struct textfile {
	char *name;
	int fd;
	struct gzip *gzip; /* NULL: plain */
	char *raw, *text;
	size_t raw_at, raw_end, line_at, text_end, text_cap;
	uint64_t number, read_bytes, size_bytes;
	bool file_ended, line_ended;
};

/* Reads once, more than nothing except at the end of the file. */
static int read_raw(struct textfile *f, struct err *e)
{
	ssize_t n;
	do
		n = sys.read(f->fd, f->raw + f->raw_end, RAW_BYTES - f->raw_end);
	while (n < 0 && errno == EINTR);
	if (n < 0)
		return err_errno(e, EXIT_IO, "%s: cannot read at byte %" PRIu64, f->name, f->read_bytes);
	f->file_ended = n == 0;
	f->raw_end += (size_t)n;
	f->read_bytes += (uint64_t)n;
	return 0;
}

static int begin(struct textfile *f, struct err *e)
{
	while (!f->file_ended && f->raw_end < 2)
		if (read_raw(f, e))
			return e->code;
	if (f->raw_end < 2 || memcmp(f->raw, "\x1f\x8b", 2))
		return 0;
	if (gzip_missing())
		return err_set(e, EXIT_UNAVAILABLE, "%s: reading gzip needs %s", f->name, gzip_missing());
	f->gzip = gzip_new();
	return 0;
}

int textfile_open(const char *path, struct textfile **out, struct err *e)
{
	struct stat st;
	bool is_stdin = !strcmp(path, "-");
	int fd = is_stdin ? STDIN_FILENO : sys.open(path, O_RDONLY | O_CLOEXEC, 0);
	if (fd < 0)
		return err_errno(e, errno == ENOENT || errno == ENOTDIR ? EXIT_NO_INPUT : EXIT_IO, "%s",
		                 path);
	struct textfile *f = mem_array(1, sizeof *f);
	f->fd = fd;
	f->name = mem_strdup(is_stdin ? "stdin" : path);
	f->raw = mem_array(RAW_BYTES, 1);
	f->text_cap = FIRST_TEXT_BYTES;
	f->text = mem_array(f->text_cap, 1);
	if (sys.fstat(fd, &st) == 0 && S_ISREG(st.st_mode))
		f->size_bytes = (uint64_t)st.st_size;
	if (begin(f, e)) {
		textfile_close(f);
		return e->code;
	}
	*out = f;
	return 0;
}

void textfile_close(struct textfile *f)
{
	if (!f)
		return;
	if (f->fd != STDIN_FILENO)
		sys.close(f->fd);
	gzip_free(f->gzip);
	free(f->name);
	free(f->raw);
	free(f->text);
	free(f);
}

/* Room for at least one byte of text and the NUL behind it. */
static void make_room(struct textfile *f)
{
	if (f->line_at) {
		memmove(f->text, f->text + f->line_at, f->text_end - f->line_at);
		f->text_end -= f->line_at;
		f->line_at = 0;
	}
	if (f->text_end + 1 >= f->text_cap) {
		f->text_cap *= 2;
		f->text = mem_resize(f->text, f->text_cap, 1);
	}
}

/* Turns raw bytes into text. *made is 0 where more raw bytes are needed. */
static int take_raw(struct textfile *f, size_t *made, struct err *e)
{
	size_t used = f->raw_end - f->raw_at, room = f->text_cap - 1 - f->text_end;
	char *to = f->text + f->text_end;
	const char *wrong = NULL;
	if (f->gzip) {
		wrong = gzip_inflate(f->gzip, f->raw + f->raw_at, &used, to, &room);
	} else {
		used = room = used < room ? used : room;
		memcpy(to, f->raw + f->raw_at, used);
	}
	f->raw_at += used;
	f->text_end += room;
	*made = room;
	if (wrong)
		return err_set(e, EXIT_BAD_DATA, "%s: byte %" PRIu64 ": corrupt gzip stream: %s", f->name,
		               textfile_offset_bytes(f), wrong);
	return 0;
}

/* Drops the raw bytes that are text by now and reads more. */
static int next_raw(struct textfile *f, struct err *e)
{
	memmove(f->raw, f->raw + f->raw_at, f->raw_end - f->raw_at);
	f->raw_end -= f->raw_at;
	f->raw_at = 0;
	return f->file_ended ? 0 : read_raw(f, e);
}

/* More text; *ended where there is none. */
static int fill(struct textfile *f, bool *ended, struct err *e)
{
	make_room(f);
	for (size_t made;;) {
		size_t before = f->raw_at;
		if (take_raw(f, &made, e))
			return e->code;
		if (made)
			return 0;
		if (f->raw_at < f->raw_end && f->raw_at > before)
			continue; /* a header, or an empty member */
		if (next_raw(f, e))
			return e->code;
		if (!f->file_ended)
			continue;
		*ended = true;
		if (f->gzip && !gzip_complete(f->gzip))
			return err_set(e, EXIT_BAD_DATA, "%s: byte %" PRIu64 ": the gzip stream is cut off",
			               f->name, f->read_bytes);
		return 0;
	}
}

int textfile_line(struct textfile *f, const char **line, size_t *length_bytes, struct err *e)
{
	char *end = NULL;
	bool ended = false;
	for (size_t seen = 0; !ended;) {
		size_t waiting = f->text_end - f->line_at;
		end = waiting > seen ? memchr(f->text + f->line_at + seen, '\n', waiting - seen) : NULL;
		if (end)
			break;
		if (waiting > TEXTFILE_MAX_LINE)
			return err_set(e, EXIT_BAD_DATA, "%s:%" PRIu64 ": a line of more than %zu bytes",
			               f->name, f->number + 1, TEXTFILE_MAX_LINE);
		seen = waiting;
		if (fill(f, &ended, e))
			return e->code;
	}
	*length_bytes = 0;
	*line = NULL;
	if (!end && f->line_at == f->text_end)
		return 0;
	f->line_ended = end != NULL;
	end = end ? end : f->text + f->text_end;
	*end = 0;
	*line = f->text + f->line_at;
	*length_bytes = (size_t)(end - *line);
	f->line_at += *length_bytes + f->line_ended;
	f->number++;
	return 0;
}

bool textfile_line_ended(const struct textfile *f)
{
	return f->line_ended;
}

uint64_t textfile_number(const struct textfile *f)
{
	return f->number;
}

const char *textfile_name(const struct textfile *f)
{
	return f->name;
}

uint64_t textfile_offset_bytes(const struct textfile *f)
{
	return f->read_bytes - (f->raw_end - f->raw_at);
}

uint64_t textfile_size_bytes(const struct textfile *f)
{
	return f->size_bytes;
}
