#include "parallel/schedule.h"

#include <inttypes.h>
#include <stdlib.h>

#include "base/mem.h"

static const char *const kind_names[N_SLOT_KINDS] = {
#define SLOT_KIND_NAME(value, name) name,
        SLOT_KINDS(SLOT_KIND_NAME)
#undef SLOT_KIND_NAME
};

/* Sizes that do not fit. */

static int check_one_chunk(const struct schedule_spec *s, struct err *e)
{
	if (s->chunks == 1)
		return 0;
	return err_set(e, EXIT_CONFIG,
	               "pipeline_schedule %s with virtual_pipeline_model_parallel_size %d; allowed: 1, or "
	               "pipeline_schedule interleaved",
	               parallel_schedule_choices[s->kind].name, s->chunks);
}

static int check_groups(const struct schedule_spec *s, struct err *e)
{
	int64_t low = s->micro_batches / s->stages * s->stages, high = low + s->stages;
	if (s->chunks < 2)
		return err_set(e, EXIT_CONFIG,
		               "pipeline_schedule interleaved with virtual_pipeline_model_parallel_size %d; "
		               "allowed: 2 to %d, or pipeline_schedule 1f1b",
		               s->chunks, SCHEDULE_MAX_CHUNKS);
	if (s->micro_batches == low)
		return 0;
	if (!low)
		return err_set(e, EXIT_CONFIG,
		               "micro-batches %" PRId64 " / pipeline_model_parallel_size %d = %.6g, and "
		               "interleaved needs whole groups; nearest: %" PRId64 " micro-batches",
		               s->micro_batches, s->stages, (double)s->micro_batches / s->stages, high);
	return err_set(e, EXIT_CONFIG,
	               "micro-batches %" PRId64 " / pipeline_model_parallel_size %d = %.6g, and interleaved "
	               "needs whole groups; nearest: %" PRId64 " or %" PRId64 " micro-batches",
	               s->micro_batches, s->stages, (double)s->micro_batches / s->stages, low, high);
}

static int check_spec(const struct schedule_spec *s, struct err *e)
{
	static int (*const checks[])(const struct schedule_spec *s,
	                             struct err *e) = {[PARALLEL_1F1B] = check_one_chunk,
	                                               [PARALLEL_INTERLEAVED] = check_groups,
	                                               [PARALLEL_ZERO_BUBBLE] = check_one_chunk};
	const struct {
		const char *key;
		int64_t value, high;
	} given[] = {{"pipeline_model_parallel_size", s->stages, SCHEDULE_MAX_STAGES},
	             {"virtual_pipeline_model_parallel_size", s->chunks, SCHEDULE_MAX_CHUNKS},
	             {"the number of micro-batches", s->micro_batches,
	              SCHEDULE_MAX_WORK / (s->chunks > 0 ? s->chunks : 1)}};
	for (size_t i = 0; i < sizeof given / sizeof *given; i++)
		if (given[i].value < 1 || given[i].value > given[i].high)
			return err_set(e, EXIT_CONFIG, "%s is %" PRId64 "; allowed: 1 to %" PRId64,
			               given[i].key, given[i].value, given[i].high);
	return checks[s->kind](s, e);
}

/* The lists. The k-th forward of a rank, counted over its chunks, is that of micro-batch group k /
 * (p·chunks), p micro-batches of a chunk after the other; backwards go through the chunks from the last. With
 * one chunk k is the micro-batch. */

static enum slot_kind last_kind(const struct schedule_spec *s)
{
	return s->forward_only ? SLOT_FORWARD : s->kind == PARALLEL_ZERO_BUBBLE ? SLOT_WEIGHT : SLOT_BACKWARD;
}

static void put(struct schedule *s, enum slot_kind kind, int64_t k)
{
	int64_t p = s->spec.stages, chunks = s->spec.chunks, group = k / (p * chunks),
	        within = k % (p * chunks);
	int64_t chunk = within / p;
	if (kind != SLOT_FORWARD)
		chunk = chunks - 1 - chunk;
	s->slot[s->n++] = (struct slot){(uint8_t)kind, (uint8_t)chunk, (int32_t)(group * p + within % p)};
}

/* How many forwards come before the first backward, the one beside it not counted. */
static int64_t warm_up(const struct schedule_spec *s, int stage)
{
	int64_t behind = s->stages - stage - 1, total = s->micro_batches * s->chunks, n = behind;
	if (s->kind == PARALLEL_INTERLEAVED)
		n = s->micro_batches == s->stages ? total : 2 * behind + (int64_t)(s->chunks - 1) * s->stages;
	return s->forward_only || n > total ? total : n;
}

/* A weight slot runs `stage` backwards after its own, so that every rank has p micro-batches in flight, as
 * the first rank of 1f1b, and the late ones fill the end. */
static void put_all(struct schedule *s)
{
	int64_t total = s->spec.micro_batches * s->spec.chunks, warm = warm_up(&s->spec, s->stage);
	int64_t late = s->stage;
	enum slot_kind last = last_kind(&s->spec);
	for (int64_t k = 0; k < warm; k++)
		put(s, SLOT_FORWARD, k);
	for (int64_t k = 0; k < total + late && last != SLOT_FORWARD; k++) {
		if (warm + k < total)
			put(s, SLOT_FORWARD, warm + k);
		if (k < total)
			put(s, SLOT_BACKWARD, k);
		if (k >= late && last == SLOT_WEIGHT)
			put(s, SLOT_WEIGHT, k - late);
	}
}

static void measure_in_flight(struct schedule *s)
{
	int32_t now[SCHEDULE_MAX_CHUNKS] = {0};
	enum slot_kind last = last_kind(&s->spec);
	for (size_t i = 0; i < s->n; i++) {
		const struct slot *slot = &s->slot[i];
		int c = slot->chunk;
		now[c] += slot->kind == SLOT_FORWARD;
		if (now[c] > s->in_flight[c])
			s->in_flight[c] = now[c];
		now[c] -= slot->kind == last;
	}
}

static void measure_window(struct schedule *s)
{
	int32_t oldest = 0, newest = 0;
	enum slot_kind last = last_kind(&s->spec);
	uint16_t *done = mem_array((size_t)s->spec.micro_batches, sizeof *done); /* chunks that are */
	for (size_t i = 0; i < s->n; i++) {
		const struct slot *slot = &s->slot[i];
		if (slot->micro_batch > newest)
			newest = slot->micro_batch;
		if (newest - oldest + 1 > s->window)
			s->window = newest - oldest + 1;
		if (slot->kind == last)
			done[slot->micro_batch]++;
		while (oldest < s->spec.micro_batches && done[oldest] == s->spec.chunks)
			oldest++;
	}
	free(done);
}

int schedule_build(struct schedule *s, const struct schedule_spec *spec, int stage, struct err *e)
{
	*s = (struct schedule){0};
	int code = check_spec(spec, e);
	if (code)
		return code;
	ASSERT(stage >= 0 && stage < spec->stages);
	s->spec = *spec;
	s->stage = stage;
	size_t slots = (size_t)(spec->micro_batches * spec->chunks) * ((size_t)last_kind(spec) + 1);
	s->slot = mem_array(slots, sizeof *s->slot);
	s->in_flight = mem_array((size_t)spec->chunks, sizeof *s->in_flight);
	put_all(s);
	ASSERT(s->n == slots);
	measure_in_flight(s);
	measure_window(s);
	return 0;
}

void schedule_free(struct schedule *s)
{
	free(s->slot);
	free(s->in_flight);
	*s = (struct schedule){0};
}

/* Who. */

/* The virtual stage `step` places on from that of a slot, -1 beyond the ends. */
static int virtual_stage(const struct schedule *s, const struct slot *slot, int step)
{
	int v = slot->chunk * s->spec.stages + s->stage + step;
	return v < s->spec.stages * s->spec.chunks ? v : -1;
}

/* Where results go: a step along the virtual stages. */
static const int steps[N_SLOT_KINDS] = {[SLOT_FORWARD] = 1, [SLOT_BACKWARD] = -1};

static int peer(const struct schedule *s, const struct slot *slot, int step)
{
	int v = step ? virtual_stage(s, slot, step) : -1;
	return v < 0 ? -1 : v % s->spec.stages;
}

int schedule_source(const struct schedule *s, const struct slot *slot)
{
	return peer(s, slot, -steps[slot->kind]);
}

int schedule_target(const struct schedule *s, const struct slot *slot)
{
	return peer(s, slot, steps[slot->kind]);
}

/* The play. */

/* The results of one virtual stage in one direction, on their way to the next. Result i stands in place
 * i % places; producer and consumer are never more than `buffers` apart, so buffers + 1 places remember all
 * that is still asked for. */
struct lane {
	int32_t made, received; /* results that are ready; that the receiver has begun to receive */
	double *arrives, *received_at;
};

struct rank {
	size_t at;   /* the slot it runs next */
	bool begun;  /* it receives the input of that slot already */
	double free; /* when the slot before ended */
	double busy;
};

struct play {
	const struct schedule *all;
	const struct schedule_times *time;
	int buffers, places;
	struct lane *lane; /* [kind][virtual stage] of the maker, kind forward and backward */
	int32_t *done;     /* [kind][virtual stage] slots that ended */
	struct rank *rank;
	double *clocks; /* what the lanes point into */
};

static int n_virtual(const struct play *p)
{
	return p->all->spec.stages * p->all->spec.chunks;
}

static void play_open(struct play *p, const struct schedule *all, const struct schedule_times *time,
                      int buffers)
{
	int64_t most = all->spec.micro_batches;
	*p = (struct play){.all = all, .time = time, .buffers = buffers < most ? buffers : (int)most};
	p->places = p->buffers + 1;
	size_t n = (size_t)n_virtual(p), places = (size_t)p->places;
	p->lane = mem_array(2 * n, sizeof *p->lane);
	p->done = mem_array(N_SLOT_KINDS * n, sizeof *p->done);
	p->rank = mem_array((size_t)all->spec.stages, sizeof *p->rank);
	p->clocks = mem_array(4 * n * places, sizeof *p->clocks);
	for (size_t i = 0; i < 2 * n; i++) {
		p->lane[i].arrives = p->clocks + 2 * i * places;
		p->lane[i].received_at = p->lane[i].arrives + places;
	}
}

static void play_close(struct play *p)
{
	free(p->lane);
	free(p->done);
	free(p->rank);
	free(p->clocks);
}

/* What a slot takes and what it gives; NULL where nothing. */
static struct lane *lane_in(struct play *p, int r, const struct slot *slot)
{
	int step = steps[slot->kind], v = step ? virtual_stage(&p->all[r], slot, -step) : -1;
	return v < 0 ? NULL : &p->lane[slot->kind * n_virtual(p) + v];
}

static struct lane *lane_out(struct play *p, int r, const struct slot *slot)
{
	int step = steps[slot->kind], next = step ? virtual_stage(&p->all[r], slot, step) : -1;
	return next < 0 ? NULL : &p->lane[slot->kind * n_virtual(p) + next - step];
}

static int32_t *done(struct play *p, int r, enum slot_kind kind, const struct slot *slot)
{
	return &p->done[(int)kind * n_virtual(p) + virtual_stage(&p->all[r], slot, 0)];
}

static double seconds(const struct play *p, int r, const struct slot *slot)
{
	const struct schedule_times *t = &p->time[virtual_stage(&p->all[r], slot, 0)];
	bool split = p->all->spec.kind == PARALLEL_ZERO_BUBBLE;
	const double all[N_SLOT_KINDS] = {t->forward, t->backward + (split ? 0 : t->weight), t->weight};
	return all[slot->kind];
}

enum wait { WAIT_NONE, WAIT_OWN, WAIT_INPUT, WAIT_PLACE };

static enum wait waits_for(struct play *p, int r, const struct slot *slot)
{
	const struct lane *in = lane_in(p, r, slot), *out = lane_out(p, r, slot);
	int32_t m = slot->micro_batch;
	if (slot->kind != SLOT_FORWARD && *done(p, r, slot->kind - 1u, slot) <= m)
		return WAIT_OWN;
	if (in && in->made <= m)
		return WAIT_INPUT;
	return out && m >= p->buffers && out->received <= m - p->buffers ? WAIT_PLACE : WAIT_NONE;
}

static void begin(struct play *p, int r, const struct slot *slot)
{
	struct lane *in = lane_in(p, r, slot);
	p->rank[r].begun = true;
	if (in)
		in->received_at[in->received++ % p->places] = p->rank[r].free;
}

static double later(double a, double b)
{
	return a > b ? a : b;
}

static void run(struct play *p, int r, const struct slot *slot)
{
	struct lane *in = lane_in(p, r, slot), *out = lane_out(p, r, slot);
	struct rank *rank = &p->rank[r];
	int32_t m = slot->micro_batch;
	double start = rank->free, work = seconds(p, r, slot);
	if (in)
		start = later(start, in->arrives[m % p->places]);
	if (out && m >= p->buffers)
		start = later(start, out->received_at[(m - p->buffers) % p->places]);
	rank->free = start + work;
	rank->busy += work;
	rank->at++;
	rank->begun = false;
	++*done(p, r, slot->kind, slot);
	if (out) {
		double transfer = p->time[virtual_stage(&p->all[r], slot, 0)].transfer;
		out->arrives[out->made++ % p->places] = rank->free + transfer;
	}
}

static int check_slot(struct play *p, int r, const struct slot *slot, struct err *e)
{
	ASSERT(slot->kind <= last_kind(&p->all->spec) && slot->chunk < p->all->spec.chunks);
	int32_t expected = *done(p, r, slot->kind, slot);
	if (slot->micro_batch == expected)
		return 0;
	return err_set(
	        e, EXIT_INTERNAL,
	        "stage %d has micro-batch %d at slot %zu (%s, chunk %d); allowed: %d, the next in order", r,
	        slot->micro_batch, p->rank[r].at, kind_names[slot->kind], slot->chunk, expected);
}

/* Runs rank r until it waits or is done. *moved: something happened. */
static int advance(struct play *p, int r, bool *moved, struct err *e)
{
	struct rank *rank = &p->rank[r];
	while (rank->at < p->all[r].n) {
		const struct slot *slot = &p->all[r].slot[rank->at];
		if (!rank->begun) {
			int code = check_slot(p, r, slot, e);
			if (code)
				return code;
			begin(p, r, slot);
			*moved = true;
		}
		if (waits_for(p, r, slot) != WAIT_NONE)
			break;
		run(p, r, slot);
		*moved = true;
	}
	return 0;
}

static void say_waits(struct play *p, int r, struct err *e)
{
	size_t at = p->rank[r].at;
	const struct slot *slot = &p->all[r].slot[at];
	enum wait wait = waits_for(p, r, slot);
	const char *kind = kind_names[slot->kind];
	int step = steps[slot->kind], m = slot->micro_batch;
	if (wait == WAIT_OWN)
		err_add(e, EXIT_INTERNAL,
		        "stage %d waits at slot %zu (%s, chunk %d, micro-batch %d) for its own %s of it", r,
		        at, kind, slot->chunk, m, kind_names[slot->kind - 1]);
	else if (wait == WAIT_INPUT)
		err_add(e, EXIT_INTERNAL,
		        "stage %d waits at slot %zu (%s, chunk %d, micro-batch %d) for the %s of chunk %d on "
		        "stage %d",
		        r, at, kind, slot->chunk, m, kind,
		        virtual_stage(&p->all[r], slot, -step) / p->all->spec.stages,
		        schedule_source(&p->all[r], slot));
	else
		err_add(e, EXIT_INTERNAL,
		        "stage %d waits at slot %zu (%s, chunk %d, micro-batch %d) for stage %d to receive "
		        "that of micro-batch %d: all %d places are full",
		        r, at, kind, slot->chunk, m, schedule_target(&p->all[r], slot), m - p->buffers,
		        p->buffers);
}

/* Nothing moves any more: all ranks are done, or those that are not wait for each other. */
static int check_finished(struct play *p, struct err *e)
{
	enum { MOST_LINES = 8 };
	int waiting = 0;
	for (int r = 0; r < p->all->spec.stages && waiting < MOST_LINES; r++)
		if (p->rank[r].at < p->all[r].n) {
			if (!waiting++)
				e->code = 0; /* a new error: what e said before goes */
			say_waits(p, r, e);
		}
	return waiting ? EXIT_INTERNAL : 0;
}

int schedule_play_lists(const struct schedule *all, const struct schedule_times *time, int buffers,
                        struct schedule_result *out, struct err *e)
{
	struct play p;
	ASSERT(buffers >= 1);
	play_open(&p, all, time, buffers);
	int code = 0, stages = all->spec.stages;
	for (bool moved = true; moved && !code;) {
		moved = false;
		for (int r = 0; r < stages && !code; r++)
			code = advance(&p, r, &moved, e);
	}
	if (!code)
		code = check_finished(&p, e);
	double busy = 0, makespan = 0;
	for (int r = 0; r < stages; r++) {
		busy += p.rank[r].busy;
		makespan = later(makespan, p.rank[r].free);
	}
	if (!code)
		*out = (struct schedule_result){makespan, makespan > 0 ? 1 - busy / (stages * makespan) : 0};
	play_close(&p);
	return code;
}

int schedule_play(const struct schedule_spec *spec, const struct schedule_times *time, int buffers,
                  struct schedule_result *out, struct err *e)
{
	int code = check_spec(spec, e);
	if (code)
		return code;
	struct schedule *all = mem_array((size_t)spec->stages, sizeof *all);
	for (int r = 0; r < spec->stages && !code; r++)
		code = schedule_build(&all[r], spec, r, e);
	if (!code)
		code = schedule_play_lists(all, time, buffers, out, e);
	for (int r = 0; r < spec->stages; r++)
		schedule_free(&all[r]);
	free(all);
	return code;
}
