#include "data/prepare_cut.h"
#include "data/textfile.h"

#include <stdio.h>
#include <string.h>
#include <strings.h>

enum { BATCH_BYTES = 1 << 20, BATCH_PIECES = 4096 };

static bool name_ends(const char *name, size_t n, const char *suffix)
{
	size_t k = strlen(suffix);
	return n >= k && strncasecmp(name + n - k, suffix, k) == 0;
}

static bool is_json_lines(const char *name)
{
	static const char *const suffixes[] = {".jsonl", ".json", ".ndjson"};
	size_t n = strlen(name);
	if (name_ends(name, n, ".gz"))
		n -= 3;
	for (size_t i = 0; i < sizeof suffixes / sizeof *suffixes; i++)
		if (name_ends(name, n, suffixes[i]))
			return true;
	return false;
}

static int open_next(struct cutter *c, struct err *e)
{
	const char *path = c->spec->inputs[c->input];
	if (name_ends(path, strlen(path), ".zst"))
		return err_set(e, EXIT_UNAVAILABLE,
		               "%s: zstd is not read; use `zstd -dc %s | pentad prepare --input - …`", path,
		               path);
	int rc = textfile_open(path, &c->file, e);
	if (rc)
		return rc;
	c->json = c->spec->jsonl || is_json_lines(path);
	c->input++;
	return 0;
}

static struct piece *begin_piece(struct cutter *c, struct batch *b)
{
	b->pieces = mem_grow(b->pieces, b->n_pieces, &b->pieces_cap, sizeof *b->pieces);
	struct piece *p = &b->pieces[b->n_pieces++];
	*p = (struct piece){.offset = b->text.length, .line = textfile_number(c->file)};
	return p;
}

static bool is_blank(const char *line, size_t n)
{
	return strspn(line, " \t\r\f\v") == n;
}

static bool is_full(const struct batch *b)
{
	return b->text.length >= BATCH_BYTES || b->n_pieces >= BATCH_PIECES;
}

/* A document a line; a '\r' before the line break belongs to the break. */
static void take_line(struct cutter *c, struct batch *b)
{
	if (is_blank(c->line, c->length))
		return;
	size_t n = c->length - (c->line[c->length - 1] == '\r');
	struct piece *p = begin_piece(c, b);
	buf_add(&b->text, c->line, n);
	p->length = n;
	p->ends = true;
}

static void end_piece(struct cutter *c, struct batch *b, bool ends)
{
	struct piece *p = &b->pieces[b->n_pieces - 1];
	p->length = b->text.length - p->offset;
	p->ends = ends;
	c->open_piece = false;
}

/* Lines gather in the open piece. True where the line was taken, false where it must begin another batch. */
static bool take_part(struct cutter *c, struct batch *b)
{
	size_t chunk = c->spec->chunk_bytes ? c->spec->chunk_bytes : PREPARE_CHUNK;
	char first = c->length ? *c->line : '\n';
	if (c->open_piece && b->text.length - b->pieces[b->n_pieces - 1].offset >= chunk && c->last > ' ' &&
	    c->last < 127 && first > ' ' && first < 127) {
		end_piece(c, b, false);
		return false;
	}
	if (!c->open_piece)
		begin_piece(c, b);
	c->open_piece = true;
	buf_add(&b->text, c->line, c->length);
	if (textfile_line_ended(c->file))
		buf_add(&b->text, "\n", 1);
	c->last = c->length ? c->line[c->length - 1] : '\n';
	return true;
}

/* The line break before a separator, or at the end of the input, belongs to the separator. */
static void end_paragraph(struct cutter *c, struct batch *b)
{
	if (!c->open_piece)
		return;
	size_t from = b->pieces[b->n_pieces - 1].offset;
	if (b->text.length > from && b->text.data[b->text.length - 1] == '\n')
		b->text.length--;
	if (b->text.length > from && b->text.data[b->text.length - 1] == '\r')
		b->text.length--;
	end_piece(c, b, true);
}

static bool take_paragraph(struct cutter *c, struct batch *b)
{
	if (!is_blank(c->line, c->length))
		return take_part(c, b);
	end_paragraph(c, b);
	return true;
}

static void end_file(struct cutter *c, struct batch *b)
{
	bool paragraphs = !c->json && c->spec->split == PREPARE_SPLIT_BLANK_LINES;
	if (paragraphs)
		end_paragraph(c, b);
	else if (c->open_piece)
		end_piece(c, b, true);
	textfile_close(c->file);
	c->file = NULL;
}

static bool take(struct cutter *c, struct batch *b)
{
	if (c->json || c->spec->split == PREPARE_SPLIT_LINES) {
		take_line(c, b);
		return true;
	}
	return c->spec->split == PREPARE_SPLIT_NONE ? take_part(c, b) : take_paragraph(c, b);
}

/* Lines of the open file until the batch is full or the file ends. */
static int fill_from_file(struct cutter *c, struct batch *b, struct err *e)
{
	snprintf(b->name, sizeof b->name, "%s", textfile_name(c->file));
	b->json = c->json;
	while (c->open_piece || !is_full(b)) {
		int rc = c->held ? 0 : textfile_line(c->file, &c->line, &c->length, e);
		if (rc)
			return rc;
		if (!c->line) {
			end_file(c, b);
			return 0;
		}
		c->held = !take(c, b);
		if (c->held)
			return 0;
	}
	return 0;
}

int cutter_fill(struct cutter *c, struct batch *b, struct err *e)
{
	int rc = 0;
	b->text.length = b->n_pieces = b->n_ids = b->n_bad = b->text_bytes = 0;
	b->err.code = 0;
	while (!rc && !b->n_pieces && (c->file || c->input < c->spec->n_inputs)) {
		rc = c->file ? 0 : open_next(c, e);
		if (!rc)
			rc = fill_from_file(c, b, e);
	}
	return rc;
}

double cutter_progress(const struct cutter *c)
{
	double size = c->file ? (double)textfile_size_bytes(c->file) : 0;
	if (!c->file || size <= 0)
		return c->file ? -1 : (double)c->input / (double)c->spec->n_inputs;
	double part = (double)textfile_offset_bytes(c->file) / size;
	return ((double)c->input - 1 + part) / (double)c->spec->n_inputs;
}

void cutter_close(struct cutter *c)
{
	textfile_close(c->file);
	c->file = NULL;
}
