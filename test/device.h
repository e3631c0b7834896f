/* What the tests of the CUDA device share: is there one, and calls on one stream. */
#ifndef PENTAD_TEST_DEVICE_H
#define PENTAD_TEST_DEVICE_H

#include <stdbool.h>

#include "backend/backend.h"

/* false, with a line that says why, where a test has nothing to run on. */
bool device_is_here(void);
/* NULL where there is none. */
struct stream *device_stream(void);
/* The same tensor in the device's memory. */
struct tensor device_lend(struct stream *s, const struct tensor *host);
/* Gives the memory up; what it holds goes to host, where that is not NULL. */
void device_take(struct stream *s, struct tensor *t, const struct tensor *host);
/* Tells the stream of an operation, and checks that it was taken. */
void device_run(struct stream *s, enum op op, const union op_arg *arg, const struct tensor *in,
                const struct tensor *out);

#endif
