#include "base/sys.h"
#include "base/err.h"
#include "base/mem.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static int plain_open(const char *path, int flags, mode_t mode)
{
	return open(path, flags | O_CLOEXEC, mode);
}

/* open() is variadic, so its row needs a function of its own. */
#define PLAIN_ROWS                                                                                       \
	{                                                                                                \
		.open = plain_open, close, read, pread, write, pwrite, fsync, ftruncate, rename, unlink, \
		mkdir, rmdir, stat, fstat                                                                \
	}
static const struct sys plain = PLAIN_ROWS;
struct sys sys = PLAIN_ROWS;

static atomic_int fail_left;
static int fail_errno;

static int fails_now(void)
{
	if (atomic_load(&fail_left) == 0 || atomic_fetch_sub(&fail_left, 1) != 1)
		return 0;
	errno = fail_errno;
	return 1;
}

#define SYS_TWIN(name, result, params, args)               \
	static result failing_##name params                \
	{                                                  \
		return fails_now() ? -1 : plain.name args; \
	}
SYS_CALLS(SYS_TWIN)

static const struct sys failing = {
#define SYS_ROW(name, result, params, args) failing_##name,
        SYS_CALLS(SYS_ROW)};

void sys_fail_nth(int nth, int error)
{
	fail_errno = error;
	atomic_store(&fail_left, nth);
	sys = nth ? failing : plain;
}

static int open_to_read(const char *path, int *fd, size_t *bytes, struct err *e)
{
	struct stat st;
	*fd = sys.open(path, O_RDONLY, 0);
	if (*fd < 0)
		return err_errno(e, errno == ENOENT || errno == ENOTDIR ? EXIT_NO_INPUT : EXIT_IO, "%s",
		                 path);
	if (sys.fstat(*fd, &st) != 0) {
		err_errno(e, EXIT_IO, "%s", path);
	} else if (!S_ISREG(st.st_mode)) {
		err_set(e, EXIT_NO_INPUT, "%s: not a regular file", path);
	} else {
		*bytes = (size_t)st.st_size;
		return 0;
	}
	sys.close(*fd);
	return e->code;
}

int sys_map(const char *path, const void **data, size_t *bytes, struct err *e)
{
	int fd, rc = open_to_read(path, &fd, bytes, e);
	if (rc)
		return rc;
	void *p = *bytes ? mmap(NULL, *bytes, PROT_READ, MAP_SHARED, fd, 0) : NULL;
	if (p == MAP_FAILED)
		rc = err_errno(e, EXIT_IO, "%s: cannot map %zu bytes", path, *bytes);
	else
		*data = p;
	sys.close(fd);
	return rc;
}

void sys_unmap(const void *data, size_t bytes)
{
	if (data)
		munmap((void *)(uintptr_t)data, bytes);
}

int sys_read_file(const char *path, size_t max_bytes, char **data, size_t *bytes, struct err *e)
{
	int fd, rc = open_to_read(path, &fd, bytes, e);
	if (rc)
		return rc;
	char *p = NULL;
	if (*bytes > max_bytes) {
		rc = err_set(e, EXIT_BAD_DATA, "%s: %zu bytes, more than the %zu that are allowed", path,
		             *bytes, max_bytes);
	} else {
		p = mem_array(*bytes + 1, 1);
		if (sys_pread_all(fd, p, *bytes, 0) != 0)
			rc = err_errno(e, EXIT_IO, "%s: cannot read %zu bytes", path, *bytes);
	}
	sys.close(fd);
	if (rc)
		free(p);
	else
		*data = p;
	return rc;
}

int sys_write_all(int fd, const void *data, size_t bytes)
{
	for (const char *p = data; bytes;) {
		ssize_t n = sys.write(fd, p, bytes);
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return -1;
		p += n;
		bytes -= (size_t)n;
	}
	return 0;
}

int sys_pwrite_all(int fd, const void *data, size_t bytes, off_t at)
{
	for (const char *p = data; bytes;) {
		ssize_t n = sys.pwrite(fd, p, bytes, at);
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return -1;
		p += n;
		at += n;
		bytes -= (size_t)n;
	}
	return 0;
}

int sys_pread_all(int fd, void *data, size_t bytes, off_t at)
{
	for (char *p = data; bytes;) {
		ssize_t n = sys.pread(fd, p, bytes, at);
		if (n < 0 && errno == EINTR)
			continue;
		if (n == 0)
			errno = EIO;
		if (n <= 0)
			return -1;
		p += n;
		at += n;
		bytes -= (size_t)n;
	}
	return 0;
}

int sys_write_file(const char *path, const void *data, size_t bytes, struct err *e)
{
	char tmp[PATH_MAX];
	if (snprintf(tmp, sizeof tmp, "%s.tmp", path) >= (int)sizeof tmp)
		return err_set(e, EXIT_IO, "%s: path too long", path);
	int fd = sys.open(tmp, O_WRONLY | O_CREAT | O_TRUNC, 0666);
	if (fd < 0)
		return err_errno(e, EXIT_IO, "%s: cannot create", tmp);
	int bad = sys_write_all(fd, data, bytes) || sys.fsync(fd);
	int cause = errno;
	bad |= sys.close(fd) != 0;
	if (!bad && sys.rename(tmp, path) == 0)
		return 0;
	errno = bad ? cause : errno;
	err_errno(e, EXIT_IO, "%s: cannot write %zu bytes", path, bytes);
	sys.unlink(tmp);
	return e->code;
}

int sys_make_dirs(const char *path, struct err *e)
{
	char p[PATH_MAX];
	if (snprintf(p, sizeof p, "%s", path) >= (int)sizeof p)
		return err_set(e, EXIT_IO, "%s: path too long", path);
	for (char *s = p + 1;; s++) {
		if (*s && *s != '/')
			continue;
		char kept = *s;
		*s = 0;
		if (sys.mkdir(p, 0777) != 0 && errno != EEXIST)
			return err_errno(e, EXIT_IO, "%s: cannot create folder", p);
		*s = kept;
		if (!kept)
			return 0;
	}
}

int sys_sync_dir(const char *path, struct err *e)
{
	int fd = sys.open(path, O_RDONLY | O_DIRECTORY, 0);
	if (fd < 0)
		return err_errno(e, EXIT_IO, "%s", path);
	int bad = sys.fsync(fd);
	if (bad)
		err_errno(e, EXIT_IO, "%s: fsync", path);
	sys.close(fd);
	return bad ? e->code : 0;
}

/* A field of /proc/self/status, in bytes: "VmHWM:	  731224 kB". */
static int64_t status_field(const char *name)
{
	char text[8192];
	int fd = sys.open("/proc/self/status", O_RDONLY, 0);
	ssize_t n = fd < 0 ? -1 : sys.read(fd, text, sizeof text - 1);
	if (fd >= 0)
		sys.close(fd);
	if (n <= 0)
		return -1;
	text[n] = 0;
	const char *at = strstr(text, name);
	return at ? strtoll(at + strlen(name), NULL, 10) * 1024 : -1;
}

int64_t sys_peak_resident(void)
{
	return status_field("\nVmHWM:");
}

int64_t sys_mapped_files(void)
{
	return status_field("\nRssFile:");
}

int sys_remove_tree(const char *path, struct err *e)
{
	DIR *d = opendir(path);
	if (!d) {
		if (errno == ENOENT || (errno == ENOTDIR && sys.unlink(path) == 0))
			return 0;
		return err_errno(e, EXIT_IO, "%s: cannot remove", path);
	}
	int rc = 0;
	for (struct dirent *x; !rc && (x = readdir(d));) {
		char sub[PATH_MAX];
		struct stat st;
		if (!strcmp(x->d_name, ".") || !strcmp(x->d_name, ".."))
			continue;
		if (snprintf(sub, sizeof sub, "%s/%s", path, x->d_name) >= (int)sizeof sub)
			rc = err_set(e, EXIT_IO, "%s/%s: path too long", path, x->d_name);
		else if (lstat(sub, &st) == 0 && S_ISDIR(st.st_mode))
			rc = sys_remove_tree(sub, e);
		else if (sys.unlink(sub) != 0)
			rc = err_errno(e, EXIT_IO, "%s: cannot remove", sub);
	}
	closedir(d);
	if (!rc && sys.rmdir(path) != 0)
		rc = err_errno(e, EXIT_IO, "%s: cannot remove", path);
	return rc;
}
