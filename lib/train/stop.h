/* Why a run should end or save now: signals, files in the run folder, time. Floor: train. */
#ifndef PENTAD_TRAIN_STOP_H
#define PENTAD_TRAIN_STOP_H

#include <stdint.h>

/* The reasons, in rising order of weight; ranks agree on the highest. */
#define STOP_REASONS(X)                                  \
	X(NOTHING, "")                                   \
	X(SAVE, "the file `save`")                       \
	X(INTERVAL, "train.exit_interval")               \
	X(DURATION, "train.exit_duration_in_mins")       \
	X(TIME_LIMIT, "the end of the Slurm allocation") \
	X(FILE, "the file `stop`")                       \
	X(SIGNAL, "a signal")
enum stop_reason {
#define STOP_ROW(name, doc) STOP_##name,
	STOP_REASONS(STOP_ROW)
#undef STOP_ROW
	        STOP_COUNT
};
extern const char *const stop_words[STOP_COUNT];

/* SIGTERM, SIGUSR1, SIGUSR2, SIGINT set a flag; a second SIGTERM or SIGINT ends the process at once. Call it
 * after the transports, some of which take signals too. */
void stop_install_signals(void);
/* Seconds until the Slurm allocation ends, or a negative number where that is not known. */
double stop_seconds_left(void);
/* What this rank knows now. run_dir NULL: no files are looked for (other ranks than 0). A `save` or `stop`
 * file is removed when it was seen. needed_s: what one more step and a save take. */
enum stop_reason stop_look(const char *run_dir, double needed_s);

#endif
