/* Which step to open, and what it says of itself. */
#include "ckpt/read.h"
#include "base/err.h"
#include "base/json.h"
#include "base/log.h"
#include "base/sys.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void ckpt_close(struct ckpt *c)
{
	if (!c)
		return;
	for (int i = 0; i < CKPT_OPEN_FILES; i++)
		if (c->open[i].fd >= 0)
			sys.close(c->open[i].fd);
	manifest_free(&c->m);
	arena_free(&c->arena);
	free(c->window.data);
	free(c);
}

static int parse_meta(struct ckpt *c, struct err *e)
{
	struct json *v;
	if (json_parse(&c->arena, "meta", c->m.meta, strlen(c->m.meta), &v, e))
		return e->code;
	c->meta = v;
	return 0;
}

/* `dir` is a step folder. */
static int open_step(const char *dir, unsigned flags, struct ckpt **out, struct err *e)
{
	struct ckpt *c = mem_array(1, sizeof *c);
	for (int i = 0; i < CKPT_OPEN_FILES; i++)
		c->open[i].fd = -1;
	snprintf(c->path, sizeof c->path, "%s", dir);
	c->m.where = arena_printf(&c->arena, "%s/" MANIFEST_FILE, dir);
	int rc = folder_read_manifest(&c->m, dir, e);
	if (!rc)
		rc = parse_meta(c, e);
	if (!rc && (flags & CKPT_VERIFY))
		rc = ckpt_verify(c, e);
	if (rc)
		ckpt_close(c);
	else
		*out = c;
	return rc;
}

/* From the newest candidate down to the first that holds. */
static int open_newest(const char *dir, const int64_t *steps, size_t n, int64_t newest, unsigned flags,
                       struct ckpt **out, struct err *e)
{
	size_t tried = 0;
	struct err first = {0};
	for (size_t i = n; i-- > 0;) {
		char path[PATH_MAX];
		struct err why = {0};
		if (steps[i] > newest)
			continue;
		if (snprintf(path, sizeof path, "%s/" CKPT_STEP_FORMAT, dir, steps[i]) >= (int)sizeof path)
			return err_set(e, EXIT_NO_INPUT, "%s: path too long", dir);
		int rc = open_step(path, flags, out, &why);
		if (!rc && tried)
			log_warn("going back to the checkpoint of step %" PRId64 ": %s", steps[i], path);
		if (!rc)
			return 0;
		if (!tried++)
			first = why;
		if (rc != EXIT_BAD_DATA || (flags & CKPT_STRICT))
			break;
		log_warn("the checkpoint of step %" PRId64 " is DAMAGED and passed over: %s", steps[i],
		         why.text);
	}
	if (!tried)
		return err_set(e, EXIT_NO_INPUT, "%s: no checkpoint (step-…)%s", dir,
		               n ? " as old as was asked for" : "");
	*e = first;
	return e->code;
}

static bool is_step_folder(const char *path)
{
	char manifest[PATH_MAX];
	struct stat st;
	const char *base = strrchr(path, '/');
	if (snprintf(manifest, sizeof manifest, "%s/" MANIFEST_FILE, path) >= (int)sizeof manifest)
		return false;
	return sys.stat(manifest, &st) == 0 || folder_step(base ? base + 1 : path) >= 0;
}

int ckpt_open(const char *path, int64_t newest_step, unsigned flags, struct ckpt **out, struct err *e)
{
	char dir[PATH_MAX];
	int64_t *steps;
	size_t n = strlen(path);
	if (!n || n >= sizeof dir)
		return err_set(e, EXIT_NO_INPUT, "'%.80s' is no path of a checkpoint", path);
	memcpy(dir, path, n + 1);
	while (n > 1 && dir[n - 1] == '/')
		dir[--n] = 0;
	struct stat st;
	if (sys.stat(dir, &st) != 0)
		return err_errno(e, EXIT_NO_INPUT, "%s", dir);
	if (is_step_folder(dir))
		return open_step(dir, flags, out, e);
	char where[PATH_MAX];
	if (folder_of_steps(dir, where, sizeof where, e) || ckpt_list(where, &steps, &n, e))
		return e->code;
	int rc = open_newest(where, steps, n, newest_step, flags, out, e);
	free(steps);
	return rc;
}

int64_t ckpt_step(const struct ckpt *c)
{
	return c->m.step;
}

int ckpt_world_size(const struct ckpt *c)
{
	return c->m.world_size;
}

const char *ckpt_path(const struct ckpt *c)
{
	return c->path;
}

const struct json *ckpt_meta(const struct ckpt *c)
{
	return c->meta;
}

const char *ckpt_meta_text(const struct ckpt *c)
{
	return c->m.meta;
}

size_t ckpt_count(const struct ckpt *c)
{
	return c->m.n_entries;
}

size_t ckpt_file_count(const struct ckpt *c)
{
	return c->m.n_files;
}

size_t ckpt_bytes(const struct ckpt *c)
{
	return c->m.bytes;
}

const struct ckpt_entry *ckpt_entry(const struct ckpt *c, size_t i)
{
	return &c->m.entries[i].show;
}

const struct ckpt_entry *ckpt_find(const struct ckpt *c, const char *kind, const char *name)
{
	const struct entry *t = ckpt_find_entry(c, kind, name);
	return t ? &t->show : NULL;
}

struct wanted {
	const char *kind, *name;
};

static int compare_wanted(const void *key, const void *item)
{
	const struct wanted *w = key;
	const struct entry *t = item;
	int c = strcmp(w->kind, t->show.kind);
	return c ? c : strcmp(w->name, t->show.name);
}

struct entry *ckpt_find_entry(const struct ckpt *c, const char *kind, const char *name)
{
	struct wanted w = {kind, name};
	if (!c->m.n_entries)
		return NULL;
	return bsearch(&w, c->m.entries, c->m.n_entries, sizeof *c->m.entries, compare_wanted);
}
