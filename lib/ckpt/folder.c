#include "ckpt/folder.h"
#include "base/err.h"
#include "base/sys.h"

#include <dirent.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int64_t folder_step(const char *name)
{
	if (strncmp(name, "step-", 5) || strlen(name) != 13 || strspn(name + 5, "0123456789") != 8)
		return -1;
	return strtoll(name + 5, NULL, 10);
}

int folder_check_files(const struct manifest *m, const char *dir, struct err *e)
{
	for (size_t i = 0; i < m->n_files; i++) {
		const struct shard_file *f = &m->files[i];
		char path[PATH_MAX];
		struct stat st;
		if (snprintf(path, sizeof path, "%s/%s", dir, f->name) >= (int)sizeof path)
			return err_set(e, EXIT_BAD_DATA, "%s: path too long", dir);
		if (sys.stat(path, &st) != 0)
			return err_errno(e, errno == ENOENT ? EXIT_BAD_DATA : EXIT_IO, "%s", path);
		if (!S_ISREG(st.st_mode))
			return err_set(e, EXIT_BAD_DATA, "%s: not a regular file", path);
		if ((uint64_t)st.st_size != f->bytes)
			return err_set(e, EXIT_BAD_DATA, "%s: %lld bytes, the manifest says %" PRIu64, path,
			               (long long)st.st_size, f->bytes);
	}
	return 0;
}

int folder_read_manifest(struct manifest *m, const char *dir, struct err *e)
{
	char path[PATH_MAX];
	char *text = NULL;
	size_t bytes = 0;
	if (snprintf(path, sizeof path, "%s/" MANIFEST_FILE, dir) >= (int)sizeof path)
		return err_set(e, EXIT_BAD_DATA, "%s: path too long", dir);
	int rc = sys_read_file(path, MANIFEST_MAX_BYTES, &text, &bytes, e);
	if (rc == EXIT_NO_INPUT)
		rc = e->code = EXIT_BAD_DATA; /* the step is there, its manifest is not */
	if (!rc)
		rc = manifest_parse(m, text, bytes, e);
	free(text);
	const char *base = strrchr(dir, '/');
	int64_t named = folder_step(base ? base + 1 : dir);
	if (!rc && named >= 0 && named != m->step)
		rc = err_set(e, EXIT_BAD_DATA, "%s: the manifest is that of step %" PRId64, path, m->step);
	return rc ? rc : folder_check_files(m, dir, e);
}

static bool is_folder(const char *path)
{
	struct stat st;
	return sys.stat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

int folder_of_steps(const char *path, char *out, size_t cap, struct err *e)
{
	if (snprintf(out, cap, "%s/checkpoints", path) >= (int)cap)
		return err_set(e, EXIT_NO_INPUT, "%s: path too long", path);
	if (is_folder(out))
		return 0;
	snprintf(out, cap, "%s", path);
	if (is_folder(path))
		return 0;
	return err_set(e, EXIT_NO_INPUT,
	               "%s: no such folder; expected a run, its checkpoints, or one step-… of them", path);
}

static int compare_steps(const void *a, const void *b)
{
	const int64_t *x = a, *y = b;
	return (*x > *y) - (*x < *y);
}

int ckpt_list(const char *path, int64_t **steps, size_t *n, struct err *e)
{
	char dir[PATH_MAX];
	if (folder_of_steps(path, dir, sizeof dir, e))
		return e->code;
	DIR *d = opendir(dir);
	if (!d)
		return err_errno(e, EXIT_IO, "%s", dir);
	int64_t *all = NULL;
	size_t count = 0, cap = 0;
	for (struct dirent *x; (x = readdir(d));) {
		int64_t step = folder_step(x->d_name);
		if (step < 0)
			continue;
		all = mem_grow(all, count, &cap, sizeof *all);
		all[count++] = step;
	}
	closedir(d);
	if (count)
		qsort(all, count, sizeof *all, compare_steps);
	*steps = all;
	*n = count;
	return 0;
}

int ckpt_step_path(const char *path, int64_t step, char *out, size_t cap, struct err *e)
{
	char dir[PATH_MAX];
	if (folder_of_steps(path, dir, sizeof dir, e))
		return e->code;
	if (snprintf(out, cap, "%s/" CKPT_STEP_FORMAT, dir, step) >= (int)cap)
		return err_set(e, EXIT_NO_INPUT, "%s: path too long", dir);
	return 0;
}

static bool step_valid(const char *dir, int64_t step)
{
	char path[PATH_MAX];
	struct manifest m = {.where = path};
	struct err e = {0};
	if (snprintf(path, sizeof path, "%s/" CKPT_STEP_FORMAT, dir, step) >= (int)sizeof path)
		return false;
	int rc = folder_read_manifest(&m, path, &e);
	manifest_free(&m);
	return rc == 0;
}

/* Renamed first, so that what a crash leaves of it is no step any more. */
static int remove_step(const char *dir, int64_t step, struct err *e)
{
	char path[PATH_MAX], gone[PATH_MAX];
	if (snprintf(path, sizeof path, "%s/" CKPT_STEP_FORMAT, dir, step) >= (int)sizeof path ||
	    snprintf(gone, sizeof gone, "%s/" CKPT_STEP_FORMAT ".tmp.pruned", dir, step) >= (int)sizeof gone)
		return err_set(e, EXIT_IO, "%s: path too long", dir);
	if (sys_remove_tree(gone, e))
		return e->code;
	if (sys.rename(path, gone) != 0)
		return err_errno(e, EXIT_IO, "%s: cannot be removed", path);
	return sys_remove_tree(gone, e);
}

static bool is_leftover(const char *name)
{
	char head[14] = "";
	memcpy(head, name, strnlen(name, sizeof head - 1));
	return folder_step(head) >= 0 && !strncmp(name + 13, ".tmp.", 5);
}

static int remove_leftovers(const char *dir, struct err *e)
{
	DIR *d = opendir(dir);
	int rc = 0;
	if (!d)
		return err_errno(e, EXIT_IO, "%s", dir);
	for (struct dirent *x; !rc && (x = readdir(d));) {
		char path[PATH_MAX];
		if (is_leftover(x->d_name) &&
		    snprintf(path, sizeof path, "%s/%s", dir, x->d_name) < (int)sizeof path)
			rc = sys_remove_tree(path, e);
	}
	closedir(d);
	return rc;
}

int ckpt_prune(const char *dir, int most_recent_k, struct err *e)
{
	int64_t *steps;
	size_t n;
	char where[PATH_MAX];
	if (folder_of_steps(dir, where, sizeof where, e) || ckpt_list(where, &steps, &n, e))
		return e->code;
	int kept = 0, rc = remove_leftovers(where, e);
	for (size_t i = n; i-- > 0 && !rc && most_recent_k > 0;) {
		bool keep = kept < most_recent_k && step_valid(where, steps[i]);
		kept += keep;
		if (!keep && kept > 0)
			rc = remove_step(where, steps[i], e);
	}
	free(steps);
	return rc;
}
