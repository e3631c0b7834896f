/* What the files of `pentad plan` share. Floor: apps. */
#ifndef PENTAD_APPS_PLAN_H
#define PENTAD_APPS_PLAN_H

#include "apps/options.h"
#include "train/auto.h"

struct plan_request {
	struct cli_config layers;
	int64_t world_size, ranks_per_node; /* 0: not given */
	double memory_gib, tflops;          /* 0: not given */
	bool explain, json, search;
};

enum { MAX_ALTERNATIVES = 6, MAX_CHANGES = 2 };

/* The same configuration with other values of a few keys. */
struct alternative {
	const char *name;
	const char *set[MAX_CHANGES][2]; /* key, value; NULL: no more */
	bool is_now;
	bool legal;
	double bubble, flop_critical;
	int64_t saved_bytes, total_bytes;
};

struct plan {
	const struct plan_request *q;
	struct config c;
	struct estimate x;
	struct auto_machine machine;
	struct buf why; /* lines of how the layout was chosen; empty where it is given */
	struct alternative schedule[MAX_ALTERNATIVES], recompute[MAX_ALTERNATIVES];
	int n_schedule, n_recompute;
	int64_t nodes, node_bytes;
	double step_s;
	bool fits;
};

/* The configuration of the request, not checked yet, and what it is to run on; rate 0: not given. config_free
 * is due whatever it returns. */
int plan_read(const struct plan_request *q, struct config *c, struct auto_machine *m, struct err *e);
/* Measures the rate on this machine where it is not given. c is checked. */
int plan_measure(const struct config *c, struct auto_machine *m, struct err *e);
/* --search: 0, 1 where no layout fits, or what went wrong. */
int plan_search(const struct plan_request *q, struct err *e);

/* Seconds of all steps; node-hours of them. */
double plan_run_s(const struct plan *p);
double plan_node_hours(const struct plan *p);

void plan_print_json(const struct plan *p);
/* For programs: ", "NAME": X"; an object of bytes by axis; a layout's keys and sizes, without braces. */
void plan_put_number(struct buf *b, const char *name, double x);
void plan_put_wire(struct buf *b, const double *wire_bytes);
void plan_put_layout(struct buf *b, const struct auto_layout *l, int world);

#endif
