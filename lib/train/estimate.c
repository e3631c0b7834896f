#include "train/estimate.h"
#include "comm/comm.h"
#include "graph/exec.h"
#include "graph/rule.h"
#include "kernels/kernels.h"
#include "train/pieces.h"
#include "train/run.h"
#include "train/step.h"

#include <stdlib.h>

/* What an evaluation uses of its training step. */
enum { SHARED_REGIONS = 1 << R_PARAM | 1 << R_CONST };
/* Sets of axes about which groups_open asks all ranks. */
enum { GROUP_SETS = 1 << (AXIS_COUNT + 1) };

/* Measured with all libraries: 31 MiB alone, 38 under UCX, and up to 15 more that oneDNN and the heap keep.
 */
enum { PROCESS_BYTES = 32 << 20 };

const struct memory_row memory_rows[MEMORY_COUNT] = {
#define REGION_MEMORY(id, name, doc) [R_##id] = {name, doc},
        REGIONS(REGION_MEMORY)
#undef REGION_MEMORY
#define EXTRA_MEMORY(name, doc) [MEMORY_##name] = {#name, doc},
                MEMORY_EXTRAS(EXTRA_MEMORY)
#undef EXTRA_MEMORY
};

int64_t memory_total(const struct memory *m)
{
	int64_t sum = 0;
	for (int i = 0; i < MEMORY_COUNT; i++)
		sum += m->bytes[i];
	return sum;
}

/* Communication */

static int group_size(const struct prog *p, uint32_t axes)
{
	return prog_ranks(p, axes) * (axes & AXES_ENDS ? 2 : 1);
}

static size_t reduction_bytes(const struct prog *p, const struct node *n)
{
	const struct value *v = &p->value[n->in[0]];
	int ranks = group_size(p, n->arg.comm.axes);
	if (n->op == OP_all_reduce)
		return comm_all_reduce_bytes(ranks, (size_t)value_count(v), (enum dtype)v->dtype);
	return n->op == OP_reduce_scatter ? comm_reduce_scatter_bytes(ranks, (enum dtype)v->dtype) : 0;
}

/* The largest of a program's reductions; groups_open's over the whole world comes before any. */
static void add_communication(struct memory *m, const struct program *t)
{
	size_t most = comm_all_reduce_bytes(t->mesh.world, GROUP_SETS, DT_i32);
	for (size_t i = 0; i < t->prog.n_node; i++) {
		size_t need = reduction_bytes(&t->prog, &t->prog.node[i]);
		most = need > most ? need : most;
	}
	if ((int64_t)most > m->bytes[MEMORY_communication])
		m->bytes[MEMORY_communication] = (int64_t)most;
}

/* Memory */

/* A device's memory is taken as it is asked for, a host's in huge pages. */
static void add_rounding(struct memory *m, const struct prog *p, uint32_t shared, int64_t bytes)
{
	int64_t asked = exec_allocation(p, shared);
	m->bytes[MEMORY_rounding] += (m->on_device ? asked : (int64_t)mem_reserved((size_t)asked)) - bytes;
}

static void add_training(struct memory *m, const struct program *t)
{
	for (int r = 0; r < R_COUNT; r++)
		m->bytes[r] = t->prog.bytes[r];
	add_rounding(m, &t->prog, 0, program_bytes(t));
}

static void add_validation(struct memory *m, const struct program *t)
{
	int64_t sum = 0;
	for (int r = 0; r < R_COUNT; r++)
		sum += SHARED_REGIONS >> r & 1 ? 0 : t->prog.bytes[r];
	m->bytes[MEMORY_validation] += sum;
	add_rounding(m, &t->prog, SHARED_REGIONS, sum);
}

/* Of a part of parameter k, in the state that takes most. */
static int64_t part_bytes(const struct program *t, size_t k, const struct part *part)
{
	const struct bucket *b = &t->sharding.bucket[t->sharding.bucket_of[k]];
	int64_t count = part->extent[0] * (part->nd > 1 ? part->extent[1] : 1), most = 0;
	for (int s = 0; s < SHARD_STATE_COUNT; s++) {
		const struct shard_slice *slice = &b->state[s];
		if (s == SHARD_GRAD || slice->value == NONE)
			continue;
		int64_t n = slice->count < count ? slice->count : count;
		int64_t bytes = n * dtype_rows[t->prog.value[slice->value].dtype].bytes;
		most = bytes > most ? bytes : most;
	}
	return most;
}

/* Tensors go one at a time. Which piece of one a data-parallel rank holds differs, how much at most does not.
 */
static int64_t staging_bytes(const struct program *t)
{
	int64_t most = 0;
	for (size_t k = 0; k < t->model.n_param; k++)
		for (int32_t i = 0; i < t->model.param[k].n_parts; i++) {
			int64_t bytes = part_bytes(t, k, &t->model.part[t->model.param[k].first_part + i]);
			most = bytes > most ? bytes : most;
		}
	return most;
}

static bool stages_tensors(const struct config *c)
{
	return c->checkpoint.save || c->checkpoint.load || c->checkpoint.pretrained_checkpoint;
}

/* A device whose stream is told of what will run: its kernels' working memory is known, none is taken. */
struct rehearsal {
	const struct backend *backend;
	struct stream *stream;
};

static void rehearse(struct memory *m, const struct rehearsal *r, const struct program *t)
{
	m->bytes[MEMORY_workspace] = exec_workspace(&t->prog, r->backend, r->stream).expected;
}

static int rehearse_validation(struct memory *m, const struct config *c, int rank, const struct rehearsal *r,
                               struct err *e)
{
	struct program t;
	int rc = program_build(&t, c, MODEL_EVALUATE, 0, rank, e);
	if (!rc) {
		add_validation(m, &t);
		if (!m->on_device)
			add_communication(m, &t);
		rehearse(m, r, &t);
	}
	program_free(&t);
	return rc;
}

/* Where the program is on a device of its own, only that one's memory counts. */
static void add_host(struct memory *m, const struct config *c, const struct program *t, bool dry_run)
{
	if (m->on_device)
		return;
	m->bytes[MEMORY_process] = PROCESS_BYTES + cuda_backend.host_bytes;
	add_communication(m, t);
	if (stages_tensors(c) && !dry_run)
		m->bytes[MEMORY_staging] = staging_bytes(t);
}

/* t: the rank's training program; *m is zero. */
static int memory_of(struct memory *m, const struct config *c, const struct program *t,
                     struct rank_on_host host, bool dry_run, struct err *e)
{
	struct rehearsal r;
	int rc = run_open_device(c, host, &r.backend, &r.stream, e);
	if (rc)
		return rc;
	m->on_device = r.backend->memory != NULL;
	add_training(m, t);
	add_host(m, c, t, dry_run);
	rehearse(m, &r, t);
	if (c->validation.eval_interval > 0 && !dry_run)
		rc = rehearse_validation(m, c, t->rank, &r, e);
	r.backend->close(r.stream);
	return rc;
}

int estimate_memory(struct memory *m, const struct config *c, int rank, struct rank_on_host host,
                    bool dry_run, struct err *e)
{
	struct program t;
	*m = (struct memory){0};
	int rc = program_build(&t, c, MODEL_TRAIN, 0, rank, e);
	if (!rc)
		rc = memory_of(m, c, &t, host, dry_run, e);
	program_free(&t);
	return rc;
}

int memory_check(const struct memory *planned, const struct step *training, const struct step *evaluation,
                 struct err *e)
{
	const struct place_of_rank *at = &training->at;
	int64_t regions = 0;
	for (int r = 0; r < R_COUNT; r++)
		regions += planned->bytes[r];
	const struct {
		const char *what;
		int64_t held, planned;
	} rows[] = {{"the training program", exec_bytes(training->exec), regions},
	            {memory_rows[MEMORY_validation].name, evaluation->exec ? exec_bytes(evaluation->exec) : 0,
	             planned->bytes[MEMORY_validation]},
	            {memory_rows[MEMORY_workspace].name, at->backend->workspace(at->stream, NULL).held,
	             planned->bytes[MEMORY_workspace]},
	            {memory_rows[MEMORY_communication].name,
	             at->world && !planned->on_device ? (int64_t)comm_scratch_bytes(at->world) : 0,
	             planned->bytes[MEMORY_communication]}};
	for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
		if (rows[i].held != rows[i].planned)
			return err_set(e, EXIT_INTERNAL,
			               "memory of rank %d: %s holds %lld bytes, and %lld were planned",
			               training->program.rank, rows[i].what, (long long)rows[i].held,
			               (long long)rows[i].planned);
	return 0;
}

/* Work and traffic */

static bool same_traffic(const struct estimate_traffic *a, const struct estimate_traffic *b)
{
	return a->axes == b->axes && a->segment == b->segment && a->chunk == b->chunk &&
	       a->pairwise == b->pairwise && a->beside == b->beside;
}

static bool is_beside(const struct node *call, const struct node *n)
{
	bool ends = call->segment == SEG_REDUCE && (n->segment == SEG_BWD || n->segment == SEG_WGRAD);
	return n->chunk == call->chunk && (n->segment == call->segment || ends);
}

/* What is done between the begin of collective i and its end, or the begin of the next: they go one by one.
 */
static double work_beside(const struct prog *p, size_t i)
{
	const struct node *call = &p->node[i];
	double flop = 0;
	for (size_t k = i + 1; k < p->n_node && call->arg.comm.begins; k++) {
		const struct node *n = &p->node[k];
		if (!is_beside(call, n))
			continue;
		bool comm = op_rows[n->op].flags & COMM;
		if ((n->op == OP_wait && n->in[0] == call->out[0]) || (comm && n->arg.comm.begins))
			break;
		flop += rules[n->op]->cost(p, n).flop;
	}
	return flop;
}

static void count_call(struct estimate_stage *x, const struct prog *p, size_t node, double bytes)
{
	const struct node *n = &p->node[node];
	struct estimate_traffic call = {.axes = n->arg.comm.axes,
	                                .segment = n->segment,
	                                .chunk = n->chunk,
	                                .pairwise = n->op == OP_all_to_all || n->op == OP_shift,
	                                .beside = n->arg.comm.begins};
	size_t i = 0;
	while (i < x->n_traffic && !same_traffic(&x->traffic[i], &call))
		i++;
	if (i == x->n_traffic) {
		x->traffic = mem_grow(x->traffic, x->n_traffic, &x->cap_traffic, sizeof *x->traffic);
		x->traffic[x->n_traffic++] = call;
	}
	x->traffic[i].bytes += bytes;
	x->traffic[i].calls++;
	x->traffic[i].flop += work_beside(p, node);
}

static void count_node(struct estimate_stage *x, const struct program *t, size_t i)
{
	const struct prog *p = &t->prog;
	const struct node *n = &p->node[i];
	struct schedule_times *flop = &x->chunk[n->chunk].flop;
	double *const often[SEG_COUNT] = {
	        [SEG_FWD] = &flop->forward, [SEG_BWD] = &flop->backward, [SEG_WGRAD] = &flop->weight};
	double times = often[n->segment] ? (double)t->schedule.spec.micro_batches : 1;
	struct cost cost = rules[n->op]->cost(p, n);
	*(often[n->segment] ? often[n->segment] : &x->flop_at_end) += cost.flop;
	x->flop += times * cost.flop;
	if (op_rows[n->op].flags & COMM && n->arg.comm.axes & AXES_ENDS) /* each sends the other its half */
		cost.wire_bytes[AXIS_pp] += (double)value_bytes(&p->value[n->in[0]]);
	double sent = 0;
	for (int a = 0; a < AXIS_COUNT; a++) {
		x->wire_bytes[a] += times * cost.wire_bytes[a];
		sent += cost.wire_bytes[a];
	}
	if (sent > 0)
		count_call(x, p, i, sent);
}

/* Activations to the next stage, their gradients to the one before. */
static double edge_bytes(const struct program *t, int chunk)
{
	const struct model_edge *edge = &t->model.edge[chunk];
	int64_t bytes = edge->out == NONE ? 0 : value_bytes(&t->prog.value[edge->out]);
	return (double)(bytes + (edge->in == NONE ? 0 : value_bytes(&t->prog.value[edge->in])));
}

static void count_work(struct estimate_stage *x, const struct program *t)
{
	for (size_t i = 0; i < t->prog.n_node; i++)
		count_node(x, t, i);
	for (int i = 0; i < x->n_chunk && t->mesh.size[AXIS_pp] > 1; i++) {
		const struct model_edge *edge = &t->model.edge[i];
		int32_t out = edge->out == NONE ? edge->in : edge->out;
		x->chunk[i].edge_bytes = (double)value_bytes(&t->prog.value[out]);
		x->wire_bytes[AXIS_pp] += (double)t->schedule.spec.micro_batches * edge_bytes(t, i);
	}
}

static int64_t parameters_of(const struct program *t)
{
	struct piece *piece;
	size_t n = pieces_list(t, SHARD_PARAM, &piece);
	int64_t sum = 0;
	for (size_t i = 0; i < n; i++)
		sum += piece_count(&piece[i]);
	free(piece);
	return sum;
}

static void describe(struct estimate_stage *x, const struct program *t)
{
	x->rank = t->rank;
	x->n_chunk = t->model.spec.n_chunk;
	x->operations = t->prog.n_node;
	x->parameters = parameters_of(t);
	for (int i = 0; i < x->n_chunk; i++) {
		x->layers += t->chunk[i].n_layers;
		x->chunk[i].saved_bytes = t->prog.saved_stride[i];
		x->chunk[i].in_flight = t->schedule.in_flight[i];
	}
}

/* The layout */

static int estimate_one(struct estimate *x, const struct config *c, int stage, int rank, int local_ranks,
                        struct err *e)
{
	struct program t;
	int rc = program_build(&t, c, MODEL_TRAIN, 0, rank, e);
	if (!rc)
		rc = memory_of(&x->stage[stage].memory, c, &t, (struct rank_on_host){0, local_ranks}, false,
		               e);
	if (!rc) {
		describe(&x->stage[stage], &t);
		count_work(&x->stage[stage], &t);
		x->schedule = t.schedule.spec;
		x->edge_slots = t.prog.edge_slots;
	}
	program_free(&t);
	return rc;
}

static int play(struct estimate *x, struct err *e)
{
	int chunks = x->schedule.chunks, stages = x->schedule.stages;
	struct schedule_times *time = mem_array((size_t)(chunks * stages), sizeof *time);
	struct schedule_result result = {0};
	double end = 0;
	for (int s = 0; s < stages; s++) {
		for (int i = 0; i < chunks; i++)
			time[i * stages + s] = x->stage[s].chunk[i].flop;
		end = x->stage[s].flop_at_end > end ? x->stage[s].flop_at_end : end;
	}
	int rc = schedule_play(&x->schedule, time, x->edge_slots, &result, e);
	x->bubble = result.bubble;
	x->flop_critical = result.makespan + end;
	free(time);
	return rc;
}

/* Weights, both moments, and the master where weights are rounded. */
static int64_t state_bytes(const struct config *c)
{
	bool rounded = c->mixed_precision.precision != PRECISION_FP32;
	return (rounded ? 2 + 4 : 4) + 2 * 4;
}

int estimate_layout(struct estimate *x, const struct config *c, int local_ranks, struct err *e)
{
	struct mesh mesh;
	double tokens = (double)c->train.global_batch_size * (double)c->model.seq_length;
	*x = (struct estimate){.parameters = model_count_parameters(&c->model, c->derived.padded_vocab_size),
	                       .flop_per_step = model_flops(&c->model, c->derived.padded_vocab_size, tokens)};
	x->checkpoint_bytes = x->parameters * state_bytes(c);
	int rc = program_mesh(c, MODEL_TRAIN, &mesh, e);
	if (rc)
		return rc;
	x->n_stage = mesh.size[AXIS_pp];
	x->stage = mem_array((size_t)x->n_stage, sizeof *x->stage);
	for (int s = 0; s < x->n_stage && !rc; s++) {
		int coord[AXIS_COUNT] = {[AXIS_pp] = s};
		rc = estimate_one(x, c, s, mesh_rank(&mesh, GRID_DENSE, coord), local_ranks, e);
		if (memory_total(&x->stage[s].memory) > memory_total(&x->stage[x->most_loaded].memory))
			x->most_loaded = s;
	}
	return rc ? rc : play(x, e);
}

void estimate_free(struct estimate *x)
{
	for (int s = 0; s < x->n_stage && x->stage; s++)
		free(x->stage[s].traffic);
	free(x->stage);
	*x = (struct estimate){0};
}

int64_t estimate_node_bytes(const struct estimate *x, int64_t world_size, int64_t ranks)
{
	int64_t of_stage = world_size / x->n_stage, most = 0, sum = 0;
	for (int64_t rank = 0; rank < world_size; rank++) {
		sum = (rank % ranks ? sum : 0) + memory_total(&x->stage[rank / of_stage].memory);
		most = sum > most ? sum : most;
	}
	return most;
}

int64_t estimate_saved_bytes(const struct estimate *x)
{
	int64_t most = 0;
	for (int s = 0; s < x->n_stage; s++) {
		int64_t saved = x->stage[s].memory.bytes[R_SAVED];
		most = saved > most ? saved : most;
	}
	return most;
}
