/* The system-call table: every file call of the program goes through `sys`, so that a test can make
 * the n-th one fail. Helpers for whole files below it. Local. Floor: base. */
#ifndef PENTAD_BASE_SYS_H
#define PENTAD_BASE_SYS_H

#include <stddef.h>
#include <stdint.h>
#include <sys/stat.h>
#include <sys/types.h>

struct err;

/* name, result, parameters, arguments: the table, its default row and its failing twins come from here. */
#define SYS_CALLS(X)                                                                    \
	X(open, int, (const char *path, int flags, mode_t mode), (path, flags, mode))   \
	X(close, int, (int fd), (fd))                                                   \
	X(read, ssize_t, (int fd, void *p, size_t n), (fd, p, n))                       \
	X(pread, ssize_t, (int fd, void *p, size_t n, off_t at), (fd, p, n, at))        \
	X(write, ssize_t, (int fd, const void *p, size_t n), (fd, p, n))                \
	X(pwrite, ssize_t, (int fd, const void *p, size_t n, off_t at), (fd, p, n, at)) \
	X(fsync, int, (int fd), (fd))                                                   \
	X(ftruncate, int, (int fd, off_t n), (fd, n))                                   \
	X(rename, int, (const char *from, const char *to), (from, to))                  \
	X(unlink, int, (const char *path), (path))                                      \
	X(mkdir, int, (const char *path, mode_t mode), (path, mode))                    \
	X(rmdir, int, (const char *path), (path))                                       \
	X(stat, int, (const char *path, struct stat *st), (path, st))                   \
	X(fstat, int, (int fd, struct stat *st), (fd, st))

struct sys {
#define SYS_FIELD(name, result, params, args) result(*name) params;
	SYS_CALLS(SYS_FIELD)
#undef SYS_FIELD
};
extern struct sys sys;

/* Test only: the nth call from now (1 = the next) of any row fails with `error`; 0 switches it off. */
void sys_fail_nth(int nth, int error);

/* Maps a regular file read-only. *data is NULL for an empty file. Caller unmaps with sys_unmap.
 * EXIT_NO_INPUT where it is missing, EXIT_IO otherwise. */
int sys_map(const char *path, const void **data, size_t *bytes, struct err *e);
void sys_unmap(const void *data, size_t bytes);
/* Reads a whole file of at most max_bytes; *data is NUL-terminated and the caller's to free(). */
int sys_read_file(const char *path, size_t max_bytes, char **data, size_t *bytes, struct err *e);
/* Writes path.tmp, flushes it to disk, renames it to path: the old file or the new one, never a part. */
int sys_write_file(const char *path, const void *data, size_t bytes, struct err *e);
/* write()/pwrite() until done, EINTR and short writes handled. 0 or -1 with errno. */
int sys_write_all(int fd, const void *data, size_t bytes);
int sys_pwrite_all(int fd, const void *data, size_t bytes, off_t at);
/* pread() of exactly `bytes`. 0, or -1 with errno (EIO where the file ends early). */
int sys_pread_all(int fd, void *data, size_t bytes, off_t at);
/* mkdir -p. */
int sys_make_dirs(const char *path, struct err *e);
/* fsync of a folder, so that a rename in it is on disk. */
int sys_sync_dir(const char *path, struct err *e);
/* Most memory of this process that was resident at once, and what of its memory now are pages of mapped
 * files: bytes; -1 where the system does not say. */
int64_t sys_peak_resident(void);
int64_t sys_mapped_files(void);
/* Removes a folder and all in it; no error where it is absent. */
int sys_remove_tree(const char *path, struct err *e);

#endif
