/* Messages for people: standard error, and the run folder's log once it is open. Line-buffered.
 *
 * Rank 0 speaks. Another rank is heard only through log_error, which names it. The rank is
 * thread-local, so ranks may be threads of one process. Local. Floor: base. */
#ifndef PENTAD_BASE_LOG_H
#define PENTAD_BASE_LOG_H

struct err;

/* Who speaks from this thread; world_size 1 leaves the rank out of error messages. */
void log_set_rank(int rank, int world_size);
/* Copies every message of this process to `path` (appended). Errors into *e. */
int log_open(const char *path, struct err *e);
void log_close(void);

void log_info(const char *fmt, ...) __attribute__((format(printf, 1, 2)));  /* rank 0 only */
void log_warn(const char *fmt, ...) __attribute__((format(printf, 1, 2)));  /* rank 0 only, "warning: " */
void log_error(const char *fmt, ...) __attribute__((format(printf, 1, 2))); /* any rank, "error: " */
/* A line that redraws itself on a terminal; elsewhere nothing. log_progress("") ends it. Rank 0 only. */
void log_progress(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

#endif
