/* What the rules of a configuration share; lib/train/check*.c alone include it. Local. Floor: train. */
#ifndef PENTAD_TRAIN_CHECK_H
#define PENTAD_TRAIN_CHECK_H

#include "train/config.h"

enum { CHECK_MAX_LINES = 128 }; /* more than there are rules that write one */

struct check_lines {
	const char *items[CHECK_MAX_LINES];
	size_t n;
};

struct check { /* one config_check on its way; texts live in c->arena */
	struct config *c;
	struct err *e;
	struct check_lines equations, notes;
	int code;
};

/* Adds a line to what becomes c->derived.equations, c->derived.notes. */
void check_equation(struct check *k, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
void check_note(struct check *k, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* Notes that `key` has no effect with `because`, where it is not used although the user wrote something other
 * than the default down: no error, a base file may hold it. */
void check_unused(struct check *k, const char *key, bool used, const char *because);
/* One violation, blamed on the place where `key` was set. */
void check_broken(struct check *k, const char *key, const char *fmt, ...)
        __attribute__((format(printf, 3, 4)));

/* "model.num_layers 4 (a.yaml:3:5)" */
const char *check_named(struct check *k, const char *key);
void check_mark_derived(struct check *k, const char *key);
/* Fills *field, the value of `key`, where it is null and `value` is not. true where it did. */
bool check_derive(struct check *k, const char *key, int64_t *field, int64_t value);

/* "24 or 32": the positive multiples of `step` next to x, which is none, that divide `of` too; of = 0 asks
 * for multiples alone. NULL where there is none. */
const char *check_near(struct check *k, int64_t step, int64_t of, int64_t x);

/* check_model.c: sizes, positions, latent attention, experts. */
void check_model(struct check *k);
/* check_layout.c: world, model and batch over tensor, context, expert, sequence, pipeline and data
 * parallelism. After the rules of the model. */
void check_layout(struct check *k);

#endif
