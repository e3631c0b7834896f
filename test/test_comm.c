/* Ranks as threads: every collective, what hangs and mismatches say, and the tables of the mesh. */
#include "base/err.h"
#include "base/log.h"
#include "base/mem.h"
#include "comm/queue.h"
#include "test/comm_suite.h"
#include "test/test.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

enum { MAX_RANKS = 16 };

struct rank {
	struct comm *world;
	void (*run)(struct comm *world, struct rank *self);
	struct err e;
	int rc;
	pthread_t thread;
};

static void *rank_main(void *arg)
{
	struct rank *self = arg;
	log_set_rank(self->world->rank, self->world->size);
	self->run(self->world, self);
	comm_close(self->world);
	return NULL;
}

/* Runs `run` on n ranks; what each left stands in r[]. */
static void on_ranks(int n, const struct comm_options *options, struct rank *r,
                     void (*run)(struct comm *, struct rank *))
{
	struct comm *world[MAX_RANKS];
	struct err e = {0};
	MUST(comm_thread_world(n, options, world, &e) == 0);
	for (int i = 0; i < n; i++) {
		r[i] = (struct rank){.world = world[i], .run = run};
		pthread_create(&r[i].thread, NULL, rank_main, &r[i]);
	}
	for (int i = 0; i < n; i++)
		pthread_join(r[i].thread, NULL);
}

static void run_suite(struct comm *world, struct rank *self)
{
	(void)self;
	comm_suite(world);
}

TEST(every_collective_equals_the_serial_loop)
{
	static const int counts[] = {1, 2, 3, 4, 8};
	for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
		struct rank r[MAX_RANKS];
		on_ranks(counts[i], NULL, r, run_suite);
	}
}

TEST(the_checking_wrapper_lets_right_calls_pass)
{
	struct rank r[MAX_RANKS];
	on_ranks(4, &(struct comm_options){.check = true}, r, run_suite);
}

TEST(a_lone_rank_needs_no_transport)
{
	struct err e = {0};
	struct comm *c;
	MUST(comm_self(&c, &e) == 0);
	comm_suite(c);
	comm_close(c);
}

/* ---- the barrier ---- */

static atomic_int arrived;

static void run_barrier(struct comm *world, struct rank *self)
{
	for (int round = 1; round <= 50; round++) {
		if (round % world->size == world->rank)
			nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
		atomic_fetch_add(&arrived, 1);
		self->rc = comm_barrier(world, &self->e);
		if (atomic_load(&arrived) < round * world->size)
			self->rc = EXIT_SELF_CHECK;
		if (self->rc || (self->rc = comm_barrier(world, &self->e)))
			return;
	}
}

TEST(nobody_leaves_a_barrier_before_the_last_has_come)
{
	static const int counts[] = {2, 3, 5, 8, 16};
	for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
		struct rank r[MAX_RANKS];
		atomic_store(&arrived, 0);
		on_ranks(counts[i], NULL, r, run_barrier);
		for (int k = 0; k < counts[i]; k++)
			CHECK_INT(r[k].rc, 0);
	}
}

/* ---- what goes wrong is said ---- */

static void run_absent(struct comm *world, struct rank *self)
{
	float x[4] = {0};
	if (world->rank == 2)
		nanosleep(&(struct timespec){.tv_sec = 1}, NULL); /* past the others' patience */
	else
		self->rc = comm_all_reduce(world, x, 4, DT_f32, REDUCE_SUM, &self->e);
}

TEST(a_hang_says_who_waits_for_whom)
{
	struct rank r[MAX_RANKS];
	on_ranks(3, &(struct comm_options){.timeout_s = 0.2}, r, run_absent);
	CHECK_INT(r[0].rc, EXIT_INTERNAL);
	CHECK_HAS(r[0].e.text, "rank 0");
	CHECK_HAS(r[0].e.text, "all_reduce");
	CHECK_HAS(r[0].e.text, "nothing from rank 2");
	CHECK_HAS(r[0].e.text, "group world");
	CHECK_HAS(r[1].e.text, "nothing from rank 2");
}

static void run_silent_sender(struct comm *world, struct rank *self)
{
	float x[4] = {0};
	if (world->rank == 0)
		self->rc = comm_recv(world, x, 4, DT_f32, 1, 7, &self->e);
}

TEST(a_message_that_never_comes_is_a_hang)
{
	struct rank r[MAX_RANKS];
	on_ranks(2, &(struct comm_options){.timeout_s = 0.2}, r, run_silent_sender);
	CHECK_INT(r[0].rc, EXIT_INTERNAL);
	CHECK_HAS(r[0].e.text, "nothing from rank 1");
}

static void run_sizes_differ(struct comm *world, struct rank *self)
{
	float x[8] = {0};
	if (world->rank == 0)
		self->rc = comm_send(world, x, 8, DT_f32, 1, 7, &self->e);
	else
		self->rc = comm_recv(world, x, 4, DT_f32, 0, 7, &self->e);
}

TEST(a_message_of_another_size_is_refused)
{
	struct rank r[MAX_RANKS];
	on_ranks(2, &(struct comm_options){.timeout_s = 1}, r, run_sizes_differ);
	CHECK_INT(r[1].rc, EXIT_INTERNAL);
	CHECK_HAS(r[1].e.text, "size");
}

static void run_call_differs(struct comm *world, struct rank *self)
{
	float x[32] = {0}, y[32];
	if (world->rank == 2)
		self->rc = comm_all_gather(world, x, y, 8, DT_f32, &self->e);
	else
		self->rc = comm_all_reduce(world, x, 8, DT_f32, REDUCE_SUM, &self->e);
}

static void run_count_differs(struct comm *world, struct rank *self)
{
	float x[8] = {0};
	self->rc = comm_all_reduce(world, x, world->rank == 1 ? 7 : 8, DT_f32, REDUCE_SUM, &self->e);
}

static void run_dtype_differs(struct comm *world, struct rank *self)
{
	float x[8] = {0};
	self->rc = comm_broadcast(world, x, 8, world->rank == 3 ? DT_i32 : DT_f32, 0, &self->e);
}

static void run_op_differs(struct comm *world, struct rank *self)
{
	float x[8] = {0};
	self->rc = comm_all_reduce(world, x, 8, DT_f32, world->rank ? REDUCE_SUM : REDUCE_MAX, &self->e);
}

static void run_pairs_differ(struct comm *world, struct rank *self)
{
	float x[32] = {0}, y[32];
	size_t give[4] = {2, 2, 2, 2}, take[4] = {2, 2, 2, 2};
	if (world->rank == 1)
		take[3] = 3;
	self->rc = comm_all_to_all_v(world, x, give, y, take, DT_f32, &self->e);
}

TEST(the_check_names_the_ranks_that_call_something_else)
{
	static const struct {
		void (*run)(struct comm *, struct rank *);
		int told; /* a rank that is told */
		const char *parts[3];
	} cases[] = {
	        {run_call_differs, 0, {"rank 2 calls all_gather", "all_reduce of 8 f32 sum", "1 of 4"}},
	        {run_count_differs, 0, {"rank 1 calls all_reduce of 7", "of 8 f32", "same calls"}},
	        {run_dtype_differs, 3, {"rank 3 calls broadcast of 8 i32", "of 8 f32", "same calls"}},
	        {run_op_differs, 2, {"rank 0 calls all_reduce of 8 f32 max", "sum", "3 of 4"}},
	        {run_pairs_differ, 1, {"rank 3 sends 2", "rank 1", "expects 3"}},
	};
	for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
		struct rank r[MAX_RANKS];
		on_ranks(4, &(struct comm_options){.check = true, .timeout_s = 1}, r, cases[i].run);
		const struct rank *told = &r[cases[i].told];
		CHECK_INT(told->rc, EXIT_INTERNAL);
		for (int k = 0; k < 3; k++)
			CHECK_HAS(told->e.text, cases[i].parts[k]);
	}
}

/* ---- the mesh ---- */

/* "[0,1][2,3]": all groups of a set of axes, in order of their first rank. */
static void put_groups(struct buf *b, const struct mesh *m, unsigned axes)
{
	int members[MAX_RANKS], n = mesh_group_size(m, axes);
	for (int r = 0; r < m->world; r++) {
		if (mesh_group(m, axes, r, members))
			continue;
		for (int i = 0; i < n; i++)
			buf_printf(b, "%s%d", i ? "," : "[", members[i]);
		buf_puts(b, "]");
	}
}

#define A(name) AXIS_BIT(name)
struct groups {
	unsigned axes;
	const char *name, *text;
};

static void check_groups(int etp, const struct groups *rows, size_t n)
{
	struct mesh m;
	struct err e = {0};
	MUST(mesh_init(&m, 16, &(struct mesh_sizes){.tp = 2, .cp = 2, .pp = 2, .ep = 2, .etp = etp}, &e) ==
	     0);
	for (size_t i = 0; i < n; i++) {
		struct buf b = {0};
		char name[48];
		put_groups(&b, &m, rows[i].axes);
		CHECK_STR(b.data, rows[i].text);
		CHECK_STR(mesh_axes_name(rows[i].axes, name, sizeof name), rows[i].name);
		buf_free(&b);
	}
}

/* Megatron-LM's RankGenerator, order tp-cp-ep-dp-pp. */
static int add_one(const struct comm_job *job, struct err *e)
{
	int32_t *data = job->out;
	(*data)++;
	return comm_all_reduce(job->comm, data, 1, DT_i32, REDUCE_SUM, e);
}

/* x becomes 2 (x + 1) again and again, so one job left out or out of turn shows. */
static void post_many(struct comm *world, struct rank *self)
{
	enum { MANY = 20 };
	struct comm_queue *q = NULL;
	int32_t x = 0, want = 0;
	uint64_t ticket[MANY];
	CHECK(!comm_queue_open(&q, &self->e));
	for (int i = 0; i < MANY; i++) {
		ticket[i] = comm_queue_post(q, &(struct comm_job){.run = add_one, .comm = world, .out = &x},
		                            &self->rc, &self->e);
		want = 2 * (want + 1);
	}
	CHECK(!comm_queue_wait(q, ticket[MANY - 1], &self->e));
	CHECK_INT(x, want);
	CHECK(!comm_queue_wait(q, ticket[0], &self->e));
	comm_queue_post(q, &(struct comm_job){.run = add_one, .comm = world, .out = &x}, &self->rc, &self->e);
	comm_queue_close(q); /* waits for what was posted */
	CHECK_INT(x, 2 * (want + 1));
}

TEST(a_queue_carries_out_what_is_posted_in_order)
{
	struct rank r[2];
	on_ranks(2, NULL, r, post_many);
}

static int fail_here(const struct comm_job *job, struct err *e)
{
	++*(int32_t *)job->out;
	return err_set(e, EXIT_INTERNAL, "the line is cut");
}

TEST(a_queue_stops_at_the_first_error_and_tells_it_again)
{
	struct comm_queue *q = NULL;
	struct err e = {0}, again = {0};
	int32_t ran = 0;
	int rc;
	MUST(!comm_queue_open(&q, &e));
	const struct comm_job job = {.run = fail_here, .out = &ran};
	for (int i = 0; i < 3; i++)
		comm_queue_post(q, &job, &rc, &e);
	CHECK_INT(comm_queue_wait(q, UINT64_MAX, &e), EXIT_INTERNAL);
	CHECK_INT(comm_queue_wait(q, 1, &again), EXIT_INTERNAL);
	CHECK_HAS(again.text, "the line is cut");
	CHECK_INT(ran, 1);
	comm_queue_close(q);
	CHECK_INT(comm_queue_post(NULL, &job, &rc, &e), 0); /* without a queue: at once */
	CHECK_INT(rc, EXIT_INTERNAL);
	CHECK_INT(ran, 2);
}

TEST(mesh_groups_are_those_of_megatron)
{
	static const struct groups folded[] = {
	        {A(tp), "tp", "[0,1][2,3][4,5][6,7][8,9][10,11][12,13][14,15]"},
	        {A(etp), "etp", "[0,1][2,3][4,5][6,7][8,9][10,11][12,13][14,15]"},
	        {A(cp), "cp", "[0,2][1,3][4,6][5,7][8,10][9,11][12,14][13,15]"},
	        {A(dp), "dp", "[0,4][1,5][2,6][3,7][8,12][9,13][10,14][11,15]"},
	        {A(cp) | A(dp), "cp-dp", "[0,2,4,6][1,3,5,7][8,10,12,14][9,11,13,15]"},
	        {A(pp), "pp", "[0,8][1,9][2,10][3,11][4,12][5,13][6,14][7,15]"},
	        {A(tp) | A(pp), "tp-pp", "[0,1,8,9][2,3,10,11][4,5,12,13][6,7,14,15]"},
	        {A(tp) | A(cp), "tp-cp", "[0,1,2,3][4,5,6,7][8,9,10,11][12,13,14,15]"},
	        {A(tp) | A(dp), "tp-dp", "[0,1,4,5][2,3,6,7][8,9,12,13][10,11,14,15]"},
	        {A(tp) | A(cp) | A(dp), "tp-cp-dp", "[0,1,2,3,4,5,6,7][8,9,10,11,12,13,14,15]"},
	        {A(ep), "ep", "[0,2][1,3][4,6][5,7][8,10][9,11][12,14][13,15]"},
	        {A(edp), "edp", "[0,4][1,5][2,6][3,7][8,12][9,13][10,14][11,15]"},
	        {A(etp) | A(ep), "etp-ep", "[0,1,2,3][4,5,6,7][8,9,10,11][12,13,14,15]"},
	        {A(etp) | A(ep) | A(pp), "etp-ep-pp", "[0,1,2,3,8,9,10,11][4,5,6,7,12,13,14,15]"},
	};
	static const struct groups unfolded[] = {
	        {A(ep), "ep", "[0,1][2,3][4,5][6,7][8,9][10,11][12,13][14,15]"},
	        {A(edp), "edp", "[0,2,4,6][1,3,5,7][8,10,12,14][9,11,13,15]"},
	        {A(etp) | A(ep) | A(pp), "etp-ep-pp", "[0,1,8,9][2,3,10,11][4,5,12,13][6,7,14,15]"},
	};
	check_groups(0, folded, sizeof folded / sizeof *folded);
	check_groups(2, folded, sizeof folded / sizeof *folded);
	check_groups(1, unfolded, sizeof unfolded / sizeof *unfolded);
}

TEST(mesh_coordinates_of_rank_11)
{
	struct mesh m;
	struct err e = {0};
	int at[AXIS_COUNT];
	MUST(mesh_init(&m, 16, &(struct mesh_sizes){.tp = 2, .cp = 2, .pp = 2, .ep = 2}, &e) == 0);
	mesh_coords(&m, 11, at);
	const int want[AXIS_COUNT] = {[AXIS_tp] = 1,  [AXIS_cp] = 1, [AXIS_dp] = 0, [AXIS_pp] = 1,
	                              [AXIS_etp] = 1, [AXIS_ep] = 1, [AXIS_edp] = 0};
	for (int i = 0; i < AXIS_COUNT; i++)
		CHECK_INT(at[i], want[i]);
	MUST(mesh_init(&m, 16, &(struct mesh_sizes){.tp = 2, .cp = 2, .pp = 2, .ep = 2, .etp = 1}, &e) == 0);
	mesh_coords(&m, 11, at);
	CHECK_INT(at[AXIS_etp], 0);
	CHECK_INT(at[AXIS_ep], 1);
	CHECK_INT(at[AXIS_edp], 1);
	CHECK_INT(at[AXIS_pp], 1);
}

/* Every layout: groups partition the world, and coordinates lead back to the rank. */
TEST(mesh_is_a_bijection_under_every_layout)
{
	struct err e = {0};
	for (int tp = 1; tp <= 4; tp++)
		for (int cp = 1; cp <= 3; cp++)
			for (int pp = 1; pp <= 2; pp++)
				for (int ep = 1; ep <= 4; ep++) {
					struct mesh m;
					struct mesh_sizes s = {
					        .tp = tp, .cp = cp, .pp = pp, .ep = ep, .etp = 1};
					if (mesh_init(&m, tp * cp * pp * 12, &s, &e))
						continue;
					for (int r = 0; r < m.world; r++) {
						int at[AXIS_COUNT], seen = 0, members[512];
						mesh_coords(&m, r, at);
						CHECK_INT(mesh_rank(&m, GRID_DENSE, at), r);
						CHECK_INT(mesh_rank(&m, GRID_EXPERT, at), r);
						int n = mesh_group_size(&m, A(cp) | A(dp));
						int place = mesh_group(&m, A(cp) | A(dp), r, members);
						CHECK_INT(members[place], r);
						for (int i = 0; i < n; i++)
							seen += mesh_group_index(&m, A(cp) | A(dp),
							                         members[i]) ==
							        mesh_group_index(&m, A(cp) | A(dp), r);
						CHECK_INT(seen, n);
						int next = mesh_neighbour(&m, AXIS_pp, r, 1);
						CHECK_INT(mesh_neighbour(&m, AXIS_pp, next, -1), r);
					}
				}
}

/* Data-parallel ranks are dp · rp; replicas lie dp ranks apart. */
TEST(replicas_of_what_data_parallel_ranks_share)
{
	struct mesh m;
	struct err e = {0};
	int coord[AXIS_COUNT], members[16];
	MUST(mesh_init(&m, 16, &(struct mesh_sizes){.tp = 2, .pp = 2, .rp = 2}, &e) == 0);
	CHECK_INT(m.size[AXIS_dp], 2);
	CHECK_INT(m.size[AXIS_rp], 2);
	CHECK_INT(m.size[AXIS_edp], 4);
	mesh_coords(&m, 6, coord);
	CHECK_INT(coord[AXIS_dp], 1);
	CHECK_INT(coord[AXIS_rp], 1);
	mesh_group(&m, AXES_DATA, 1, members);
	for (int i = 0; i < 4; i++)
		CHECK_INT(members[i], 1 + 2 * i);
	CHECK_INT(mesh_init(&m, 12, &(struct mesh_sizes){.tp = 4, .rp = 2}, &e), EXIT_CONFIG);
	CHECK_HAS(e.text, "num_distributed_optimizer_instances 2");
}

TEST(sizes_that_do_not_divide_are_refused_with_the_equation)
{
	static const struct {
		int world;
		struct mesh_sizes sizes;
		const char *part;
	} cases[] = {
	        {6, {.tp = 4}, "6"},
	        {8, {.tp = 2, .pp = 3}, "8"},
	        {8, {.tp = 1, .ep = 3}, "8"},
	        {4, {.tp = -2}, "-2"},
	        {8, {.tp = 1 << 16, .cp = 1 << 16}, "8"},
	};
	for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
		struct mesh m;
		struct err e = {0};
		CHECK_INT(mesh_init(&m, cases[i].world, &cases[i].sizes, &e), EXIT_CONFIG);
		CHECK_HAS(e.text, cases[i].part);
	}
}

int main(int argc, char **argv)
{
	return test_main(argc, argv);
}
