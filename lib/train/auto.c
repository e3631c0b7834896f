#include "train/auto.h"
#include "base/err.h"
#include "base/log.h"
#include "base/text.h"
#include "comm/comm.h"
#include "train/run.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
	/* Layouts that are built, 1 to 2 ms for each pipeline stage of each. */
	PROMISING = 32, /* guessed to fit */
	IN_DOUBT = 8,   /* guessed to fit not quite */
	ANY = 40,       /* where none of these fits */
	LEAST = 4,      /* where memory alone is asked for */
	TRIED = 1000,   /* refused ones among them */
	RUNNERS_UP = 3,
	FARTHEST = 64 /* ranks to either side where no layout is legal */
};
/* Guessed times have been seen a tenth too long: where this part of one is too long still, it cannot win. */
static const double GUESS_COUNTS = 0.8;
/* Guessed memory has been seen from a quarter too little to a third too much: beyond the second it cannot
 * fit. */
static const double FITS = 1.1, MAY_FIT = 1.6;
/* Nothing that is assumed here is more exact. Of layouts as fast as that the plainest is taken: the fewer
 * ranks share a sample, the less of their waiting for each other is left out. */
static const double AS_FAST = 1.01;

/* Order */

enum fit { GUESS_FITS, GUESS_IN_DOUBT, GUESS_TOO_LARGE };

static enum fit guessed_fit(const struct auto_candidate *k, const struct auto_machine *m)
{
	double filled = k->guessed_bytes * m->ranks_per_node / (double)m->node_bytes;
	return filled <= FITS ? GUESS_FITS : filled <= MAY_FIT ? GUESS_IN_DOUBT : GUESS_TOO_LARGE;
}

static int by(double a, double b)
{
	return (a > b) - (a < b);
}

static int by_index(const struct auto_candidate *a, const struct auto_candidate *b)
{
	return (a->index > b->index) - (a->index < b->index);
}

static int by_promise(const void *x, const void *y)
{
	const struct auto_candidate *a = x, *b = y;
	int order = by(a->fit, b->fit);
	order = order ? order : by(a->guessed_s, b->guessed_s);
	return order ? order : by_index(a, b);
}

static int by_guessed_bytes(const void *x, const void *y)
{
	const struct auto_candidate *a = x, *b = y;
	int order = by(a->guessed_bytes, b->guessed_bytes);
	return order ? order : by_index(a, b);
}

static int by_cost(const void *x, const void *y)
{
	const struct auto_candidate *a = x, *b = y;
	int order = b->cost.fits - a->cost.fits;
	order = order ? order : by(a->cost.sample_s, b->cost.sample_s);
	return order ? order : by_index(a, b);
}

static bool is_plainer(const struct auto_layout *a, const struct auto_layout *b)
{
	int64_t shared = a->tp * a->cp * a->pp, others = b->tp * b->cp * b->pp;
	return shared < others || (shared == others && a->chunks < b->chunks);
}

/* Puts the one to choose first. */
static void prefer_plain(struct auto_candidate *list, size_t n)
{
	size_t best = 0;
	for (size_t i = 1; i < n && list[i].cost.sample_s <= AS_FAST * list[0].cost.sample_s; i++)
		if (is_plainer(&list[i].layout, &list[best].layout))
			best = i;
	struct auto_candidate chosen = list[best];
	memmove(list + 1, list, best * sizeof *list);
	list[0] = chosen;
}

/* Examining */

static int price_copy(struct auto_cost *cost, struct config *copy, const struct auto_layout *l,
                      const struct auto_machine *m, struct err *e)
{
	struct estimate x = {0};
	int rc = auto_apply(copy, l, m->world, e);
	if (!rc)
		rc = estimate_layout(&x, copy, m->ranks_per_node, e);
	if (!rc)
		rc = auto_price(cost, m, copy, &x, e);
	estimate_free(&x);
	return rc;
}

static int price(struct auto_cost *cost, const struct config *c, const struct auto_layout *l,
                 const struct auto_machine *m, struct err *e)
{
	struct config copy;
	config_copy(&copy, c);
	int rc = price_copy(cost, &copy, l, m, e);
	config_free(&copy);
	return rc;
}

/* The rules have the last word: what they refuse is no layout. Neither is what cannot be built, unless
 * nothing else is left: then *e says why. */
static int examine(struct auto_search *s, const struct config *c, const struct auto_candidate *k,
                   struct err *e)
{
	struct err refused = {0};
	struct auto_candidate *to = &s->examined[s->n];
	*to = *k;
	int rc = price(&to->cost, c, &k->layout, &s->machine, &refused);
	if (rc == EXIT_CONFIG || rc == EXIT_INTERNAL) {
		s->legal--;
		if (!e->code)
			*e = refused;
		return 0;
	}
	if (rc) {
		*e = refused;
		return rc;
	}
	s->n++;
	s->fitting += to->cost.fits;
	return 0;
}

static double fastest(const struct auto_search *s)
{
	double best = INFINITY;
	for (size_t i = 0; i < s->n; i++)
		if (s->examined[i].cost.fits)
			best = fmin(best, s->examined[i].cost.sample_s);
	return best;
}

/* Up to `most` more of list[0 … n), in its order, skipping what can no longer win. */
static int examine_list(struct auto_search *s, const struct config *c, struct auto_candidate *list, size_t n,
                        size_t most, struct err *e)
{
	int rc = 0;
	s->examined = mem_resize(s->examined, s->n + most + 1, sizeof *s->examined);
	for (size_t i = 0, end = s->n + most, tried = 0; i < n && s->n < end && tried < TRIED && !rc; i++) {
		if (list[i].tried || GUESS_COUNTS * list[i].guessed_s > fastest(s))
			continue;
		list[i].tried = true;
		rc = examine(s, c, &list[i], e);
		tried++;
	}
	return rc;
}

/* Searching */

static struct auto_candidate *list_candidates(struct auto_search *s, const struct config *c, size_t *n)
{
	struct auto_layout *layouts;
	*n = s->legal = auto_list(c, s->machine.world, &layouts);
	struct auto_candidate *list = mem_array(*n, sizeof *list);
	for (size_t i = 0; i < *n; i++)
		list[i] = (struct auto_candidate){.layout = layouts[i], .index = i};
	free(layouts);
	auto_guess(list, *n, &s->machine, c);
	for (size_t i = 0; i < *n; i++)
		list[i].fit = guessed_fit(&list[i], &s->machine);
	return list;
}

/* Leaves out what cannot fit whatever its activations are; ranks may not fill their nodes evenly, but the
 * fullest holds no less than the average. */
static size_t leave_out_too_large(struct auto_search *s, struct auto_candidate *list, size_t n)
{
	size_t kept = 0;
	for (size_t i = 0; i < n; i++)
		if (list[i].least_bytes * s->machine.ranks_per_node <= (double)s->machine.node_bytes)
			list[kept++] = list[i];
	s->too_large = n - kept;
	return kept;
}

static size_t count_fit(const struct auto_candidate *list, size_t n, enum fit at_most)
{
	size_t i = 0;
	while (i < n && list[i].fit <= (int)at_most)
		i++;
	return i;
}

static int examine_promising(struct auto_search *s, const struct config *c, struct auto_candidate *list,
                             size_t n, struct err *e)
{
	qsort(list, n, sizeof *list, by_promise);
	size_t fitting = count_fit(list, n, GUESS_FITS), in_doubt = count_fit(list, n, GUESS_IN_DOUBT);
	int rc = examine_list(s, c, list, fitting, PROMISING, e);
	if (!rc)
		rc = examine_list(s, c, list + fitting, in_doubt - fitting, IN_DOUBT, e);
	if (rc || s->fitting)
		return rc;
	qsort(list, n, sizeof *list, by_guessed_bytes);
	return examine_list(s, c, list, n, ANY, e);
}

static int examine_least(struct auto_search *s, const struct config *c, struct auto_candidate *list, size_t n,
                         struct err *e)
{
	qsort(list, n, sizeof *list, by_guessed_bytes);
	return examine_list(s, c, list, n, LEAST, e);
}

/* "6 or 8", or "" */
static const char *nearest_worlds(const struct config *c, int world, char out[64])
{
	int low = world - 1, high = world + 1;
	while (low > 0 && low >= world - FARTHEST && !auto_is_possible(c, low))
		low--;
	while (high <= world + FARTHEST && !auto_is_possible(c, high))
		high++;
	bool has_low = low > 0 && low >= world - FARTHEST, has_high = high <= world + FARTHEST;
	out[0] = 0;
	if (has_low && has_high)
		snprintf(out, 64, "%d or %d", low, high);
	else if (has_low || has_high)
		snprintf(out, 64, "%d", has_low ? low : high);
	return out;
}

static int refuse_world(const struct config *c, int world, struct err *e)
{
	struct config copy;
	struct err broken = {0};
	char near[64];
	nearest_worlds(c, world, near);
	config_copy(&copy, c);
	struct auto_layout plain = auto_layout_of(c);
	plain.etp = plain.etp == OPTION_NULL_INT ? plain.tp : plain.etp;
	auto_apply(&copy, &plain, world, &broken);
	config_free(&copy);
	return err_set(
	        e, EXIT_CONFIG,
	        "parallel.layout auto: no layout of %d rank%s is legal%s%s; open sizes at 1 would break:\n%s",
	        world, world > 1 ? "s" : "", *near ? "; nearest numbers of ranks that have one: " : "", near,
	        broken.text);
}

int auto_search(struct auto_search *s, const struct config *c, const struct auto_machine *m, struct err *e)
{
	size_t n;
	struct err refused = {0};
	*s = (struct auto_search){.machine = *m};
	struct auto_candidate *list = list_candidates(s, c, &n);
	if (!n) {
		free(list);
		return refuse_world(c, m->world, e);
	}
	size_t kept = leave_out_too_large(s, list, n);
	int rc = kept ? examine_promising(s, c, list, kept, &refused) : 0;
	if (!rc && !s->n) {
		free(list);
		list = list_candidates(s, c, &n);
		rc = examine_least(s, c, list, n, &refused);
	}
	qsort(s->examined, s->n, sizeof *s->examined, by_cost);
	if (s->fitting)
		prefer_plain(s->examined, s->fitting);
	free(list);
	if (rc || !s->n)
		*e = refused;
	return rc || s->n ? rc : e->code;
}

void auto_free(struct auto_search *s)
{
	free(s->examined);
	*s = (struct auto_search){0};
}

const struct auto_candidate *auto_best(const struct auto_search *s)
{
	const struct auto_candidate *best = s->n ? &s->examined[0] : NULL;
	for (size_t i = 0; i < s->n && !s->fitting; i++)
		if (s->examined[i].cost.node_bytes < best->cost.node_bytes)
			best = &s->examined[i];
	return best;
}

/* Words */

void auto_put_layout(struct buf *b, const struct config *c, const struct auto_layout *l, int world)
{
	buf_printf(b, "tp %lld%s · cp %lld", (long long)l->tp,
	           l->sequence_parallel ? " (sequence parallel)" : "", (long long)l->cp);
	if (l->cp > 1)
		buf_printf(b, " (%s)", parallel_cp_comm_choices[l->exchange].name);
	buf_printf(b, " · pp %lld", (long long)l->pp);
	if (l->pp > 1)
		buf_printf(b, " (%s", parallel_schedule_choices[l->schedule].name);
	if (l->chunks > 1)
		buf_printf(b, ", %lld chunks", (long long)l->chunks);
	buf_puts(b, l->pp > 1 ? ")" : "");
	if (c->model.num_experts != OPTION_NULL_INT)
		buf_printf(b, " · ep %lld · etp %lld", (long long)l->ep, (long long)l->etp);
	buf_printf(b, " · dp %lld", world / (long long)(l->tp * l->cp * l->pp));
}

static void put_memory(struct buf *b, const struct auto_cost *cost, const struct auto_machine *m)
{
	char held[32], limit[32];
	buf_printf(b, "%s a rank of %s", text_bytes(held, sizeof held, (double)cost->rank_bytes),
	           text_bytes(limit, sizeof limit, (double)m->node_bytes / m->ranks_per_node));
}

static void put_runner_up(struct buf *b, const struct auto_search *s, const struct config *c,
                          const struct auto_candidate *k)
{
	double slower = 100 * (k->cost.sample_s / s->examined[0].cost.sample_s - 1);
	buf_printf(b, "\n%s ", k->cost.fits ? "next:" : "does not fit:");
	auto_put_layout(b, c, &k->layout, s->machine.world);
	if (fabs(slower) < 100 * (AS_FAST - 1))
		buf_puts(b, ": as fast, ");
	else
		buf_printf(b, ": %.2g %% %s, ", fabs(slower), slower < 0 ? "faster" : "slower");
	put_memory(b, &k->cost, &s->machine);
}

/* Of those that do not fit the faster ones alone are worth a word. */
static void put_runners_up(struct buf *b, const struct auto_search *s, const struct config *c)
{
	size_t said = 0;
	for (size_t i = s->fitting; i < s->n && said < 1; i++)
		if (s->examined[i].cost.sample_s < s->examined[0].cost.sample_s) {
			put_runner_up(b, s, c, &s->examined[i]);
			said++;
		}
	for (size_t i = 1; i < s->fitting && said < RUNNERS_UP; i++, said++)
		put_runner_up(b, s, c, &s->examined[i]);
}

void auto_put_reason(struct buf *b, const struct auto_search *s, const struct config *c)
{
	const struct auto_candidate *best = &s->examined[0];
	char time[32];
	buf_puts(b, "layout: ");
	auto_put_layout(b, c, &best->layout, s->machine.world);
	buf_printf(b, " (of %zu legal): %s a step, ", s->legal,
	           text_seconds(time, sizeof time, best->cost.step_s));
	put_memory(b, &best->cost, &s->machine);
	put_runners_up(b, s, c);
}

/* What would fit */

#define MAX_SETS 2
static const struct remedy {
	const char *set[MAX_SETS][2]; /* key, value */
} remedies[] = {{{{"recompute.granularity", "full"}}},
                {{{"ddp.zero_stage", "3"}}},
                {{{"train.micro_batch_size", "1"}}},
                {{{"recompute.granularity", "full"}, {"ddp.zero_stage", "3"}}}};

/* The least that a rank of the fullest node needs, over all layouts; 0 where none fits or is legal. */
static int64_t least_rank_bytes(const struct config *c, const struct auto_machine *m)
{
	struct auto_search s = {.machine = *m};
	struct err ignored = {0};
	size_t n;
	struct auto_candidate *list = list_candidates(&s, c, &n);
	if (n)
		examine_least(&s, c, list, n, &ignored);
	const struct auto_candidate *best = auto_best(&s);
	int64_t bytes = s.fitting ? best->cost.rank_bytes : 0;
	free(list);
	auto_free(&s);
	return bytes;
}

static int64_t bytes_with(const struct remedy *r, const struct config *c, const struct auto_machine *m)
{
	struct config copy;
	struct err ignored = {0};
	config_copy(&copy, c);
	int rc = 0;
	for (int i = 0; i < MAX_SETS && r->set[i][0] && !rc; i++)
		rc = config_replace(&copy, r->set[i][0], r->set[i][1], "remedy", &ignored);
	int64_t bytes = rc || config_check(&copy, m->world, &ignored) ? 0 : least_rank_bytes(&copy, m);
	config_free(&copy);
	return bytes;
}

static int64_t bytes_on(int times, const struct config *c, const struct auto_machine *m)
{
	struct auto_machine larger = *m;
	struct config copy;
	struct err ignored = {0};
	larger.world *= times;
	config_copy(&copy, c);
	int64_t bytes = config_check(&copy, larger.world, &ignored) ? 0 : least_rank_bytes(&copy, &larger);
	config_free(&copy);
	return bytes;
}

static void put_remedy(struct buf *b, int *said, const char *what, int64_t bytes)
{
	char text[32];
	buf_printf(b, "%s%s (%s a rank)", (*said)++ ? ", or " : "; would fit: ", what,
	           text_bytes(text, sizeof text, (double)bytes));
}

void auto_put_remedies(struct buf *b, const struct auto_search *s, const struct config *c)
{
	const struct auto_candidate *least = auto_best(s);
	char node[32], text[96];
	int said = 0;
	buf_printf(b,
	           "none of the %zu legal layouts of %d ranks fits a node of %d ranks and %s "
	           "(dist.memory_per_node_gib): ",
	           s->legal, s->machine.world, s->machine.ranks_per_node,
	           text_bytes(node, sizeof node, (double)s->machine.node_bytes));
	auto_put_layout(b, c, &least->layout, s->machine.world);
	buf_printf(b, " needs %s there", text_bytes(node, sizeof node, (double)least->cost.node_bytes));
	for (size_t i = 0; i < sizeof remedies / sizeof *remedies; i++) {
		const struct remedy *r = &remedies[i];
		int64_t bytes = r->set[1][0] && said ? 0 : bytes_with(r, c, &s->machine);
		snprintf(text, sizeof text, "%s: %s%s%s%s%s", r->set[0][0], r->set[0][1],
		         r->set[1][0] ? " with " : "", r->set[1][0] ? r->set[1][0] : "",
		         r->set[1][0] ? ": " : "", r->set[1][0] ? r->set[1][1] : "");
		if (bytes)
			put_remedy(b, &said, text, bytes);
	}
	for (int times = 2; times <= FARTHEST && s->machine.world <= INT32_MAX / FARTHEST; times *= 2) {
		int64_t bytes = bytes_on(times, c, &s->machine);
		snprintf(text, sizeof text, "%d ranks", times * s->machine.world);
		if (bytes) {
			put_remedy(b, &said, text, bytes);
			break;
		}
	}
}

/* Choosing */

static int decide(struct config *c, int world, struct rank_on_host host, struct auto_layout *out,
                  const char **why, struct err *e)
{
	struct auto_machine m = auto_machine_of(c, world, host.ranks);
	struct auto_search s = {0};
	struct buf b = {0};
	int rc = run_measure_device(c, host, &m.rate, e);
	if (!rc)
		rc = auto_search(&s, c, &m, e);
	if (!rc) {
		(s.fitting ? auto_put_reason : auto_put_remedies)(&b, &s, c);
		*out = auto_best(&s)->layout;
		*why = arena_strdup(&c->arena, b.data);
		rc = s.fitting ? 0 : err_set(e, EXIT_CONFIG, "parallel.layout auto: %s", *why);
	}
	buf_free(&b);
	auto_free(&s);
	return rc;
}

int auto_choose(struct config *c, struct comm *world, int world_size, struct rank_on_host host,
                const char **why, struct err *e)
{
	struct auto_layout l = {0};
	int rc = 0, n = world ? world->size : world_size;
	*why = NULL;
	if (!config_layout_is_open(c))
		return 0;
	if (!world || world->rank == 0)
		rc = decide(c, n, host, &l, why, e);
	if (world && !(rc = comm_any(world, rc, e)))
		rc = comm_broadcast(world, &l, sizeof l / sizeof(int64_t), DT_i64, 0, e);
	if (!rc)
		rc = auto_apply(c, &l, n, e);
	return world ? comm_any(world, rc, e) : rc;
}

void auto_say(const char *why)
{
	char *lines = mem_strdup(why ? why : ""), *rest = lines;
	for (char *line; (line = strsep(&rest, "\n"));)
		if (*line)
			log_info("%s", line);
	free(lines);
}
