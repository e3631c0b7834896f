/* What a layout costs in seconds: exactly counted work and traffic over assumed rates. Floor: train. */
#include "base/err.h"
#include "parallel/shard.h"
#include "train/auto_links.h"

#include <math.h>
#include <stdlib.h>
#include <unistd.h>

/* Links, by rank, while all ranks of a node use theirs. A GPU: two thirds of NVLink 4's 450 GB/s a direction,
 * which collectives reach, and four fifths of a 400 Gbit/s port of its own; the latency is that of starting
 * kernels of a collective. A rank of host cores: what copies through shared memory leave of 20 GB/s to memory
 * where each byte is written, read and added, and its part of a 100 Gbit/s port. */
static const struct links {
	double within_node_gbs, between_nodes_gbs, latency_us;
} usual[] = {[DEVICE_AUTO] = {4, 1, 20}, [DEVICE_CPU] = {4, 1, 20}, [DEVICE_CUDA] = {300, 40, 20}};

static double said_or(double said, double otherwise)
{
	return isnan(said) ? otherwise : said;
}

struct auto_machine auto_machine_of(const struct config *c, int world, int ranks_per_node)
{
	const struct dist_config *d = &c->dist;
	const struct links *links = &usual[d->device];
	double host = (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE);
	return (struct auto_machine){
	        .world = world,
	        .ranks_per_node = ranks_per_node < world ? ranks_per_node : world,
	        .within_node = 1e9 * said_or(d->link_bandwidth_within_node_gbs, links->within_node_gbs),
	        .between_nodes = 1e9 * said_or(d->link_bandwidth_between_nodes_gbs, links->between_nodes_gbs),
	        .latency_s = 1e-6 * said_or(d->link_latency_us, links->latency_us),
	        .node_bytes = (int64_t)said_or(d->memory_per_node_gib * (1 << 30), host)};
}

/* Links */

static int64_t gcd(int64_t a, int64_t b)
{
	return b ? gcd(b, a % b) : a;
}

struct group group_apart(const struct auto_machine *m, int64_t stride, int64_t ranks)
{
	int64_t node = m->ranks_per_node;
	int64_t on_node = node >= m->world ? ranks : node % stride ? 1 : gcd(ranks, node / stride);
	return (struct group){ranks, on_node};
}

static struct group group_over(const struct auto_machine *m, const struct mesh *mesh, uint32_t axes)
{
	uint32_t grid = axes & (AXIS_BIT(etp) | AXIS_BIT(ep) | AXIS_BIT(edp)) ? AXES_EXPERT : AXES_DENSE;
	struct group g = {1, 1};
	int64_t stride = 1;
	if (axes & AXES_ENDS)
		return group_apart(m, m->world / mesh->size[AXIS_pp], 2);
	for (int a = 0; a < AXIS_COUNT; a++) {
		struct group along = group_apart(m, stride, mesh->size[a]);
		if (axes >> a & 1) {
			g.ranks *= along.ranks;
			g.on_node *= along.on_node;
		}
		stride *= grid >> a & 1 ? mesh->size[a] : 1;
	}
	return g;
}

double group_seconds(const struct auto_machine *m, struct group g, bool pairwise, double bytes, double calls)
{
	double within = bytes / m->within_node, latency = calls * m->latency_s;
	if (g.on_node == g.ranks)
		return latency + within;
	if (!pairwise)
		return latency + fmax(within, bytes / (m->between_nodes * (double)g.on_node));
	double away = (double)(g.ranks - g.on_node) / (double)(g.ranks - 1);
	return latency + fmax(within * (1 - away), away * bytes / m->between_nodes);
}

/* The price of a program */

struct pricing {
	const struct auto_machine *m;
	const struct mesh *mesh;
	const struct estimate *x;
};

/* Work of a segment of a chunk, and what its traffic takes longer than the work beside it. */
static double turn_seconds(const struct pricing *p, const struct estimate_stage *s, enum segment segment,
                           int chunk, double flop)
{
	double sum = flop / p->m->rate;
	for (size_t i = 0; i < s->n_traffic; i++) {
		const struct estimate_traffic *t = &s->traffic[i];
		struct group g = group_over(p->m, p->mesh, t->axes);
		if (t->segment == segment && t->chunk == chunk)
			sum += fmax(0, group_seconds(p->m, g, t->pairwise, t->bytes, t->calls) -
			                       t->flop / p->m->rate);
	}
	return sum;
}

static struct schedule_times chunk_times(const struct pricing *p, const struct estimate_stage *s, int i)
{
	const struct estimate_chunk *k = &s->chunk[i];
	struct group neighbours = group_apart(p->m, p->m->world / p->x->n_stage, 2);
	struct schedule_times t = {.forward = turn_seconds(p, s, SEG_FWD, i, k->flop.forward),
	                           .backward = turn_seconds(p, s, SEG_BWD, i, k->flop.backward),
	                           .weight = turn_seconds(p, s, SEG_WGRAD, i, k->flop.weight)};
	if (p->x->n_stage > 1)
		t.transfer = group_seconds(p->m, neighbours, true, k->edge_bytes, 1);
	return t;
}

static double end_seconds(const struct pricing *p, const struct estimate_stage *s)
{
	double sum = turn_seconds(p, s, SEG_NORM, 0, s->flop_at_end) + turn_seconds(p, s, SEG_STEP, 0, 0);
	for (int i = 0; i < s->n_chunk; i++)
		sum += turn_seconds(p, s, SEG_REDUCE, i, 0);
	return sum;
}

static int play(const struct pricing *p, double *step_s, struct err *e)
{
	const struct estimate *x = p->x;
	int chunks = x->schedule.chunks, stages = x->schedule.stages;
	struct schedule_times *time = mem_array((size_t)(chunks * stages), sizeof *time);
	struct schedule_result played = {0};
	double end = 0;
	for (int s = 0; s < stages; s++) {
		for (int i = 0; i < chunks; i++)
			time[i * stages + s] = chunk_times(p, &x->stage[s], i);
		end = fmax(end, end_seconds(p, &x->stage[s]));
	}
	int rc = schedule_play(&x->schedule, time, x->edge_slots, &played, e);
	*step_s = played.makespan + end;
	free(time);
	return rc;
}

int auto_price(struct auto_cost *cost, const struct auto_machine *m, const struct config *chosen,
               const struct estimate *x, struct err *e)
{
	struct mesh mesh;
	*cost = (struct auto_cost){.bubble = x->bubble,
	                           .rank_bytes = memory_total(&x->stage[x->most_loaded].memory),
	                           .node_bytes = estimate_node_bytes(x, m->world, m->ranks_per_node)};
	int rc = program_mesh(chosen, MODEL_TRAIN, &mesh, e);
	if (!rc)
		rc = play(&(struct pricing){m, &mesh, x}, &cost->step_s, e);
	cost->sample_s = cost->step_s / (double)chosen->train.global_batch_size;
	cost->fits = cost->node_bytes <= m->node_bytes;
	for (int s = 0; s < x->n_stage; s++)
		for (int a = 0; a < AXIS_COUNT; a++)
			cost->wire_bytes[a] = fmax(cost->wire_bytes[a], x->stage[s].wire_bytes[a]);
	return rc;
}
