/* Checkpoints: written under one layout and read under others, with every system call failing in turn, killed
 * at every system call, damaged in every way, and with manifests that lie. */
#include "base/err.h"
#include "base/json.h"
#include "base/mem.h"
#include "base/rng.h"
#include "base/sys.h"
#include "ckpt/ckpt.h"
#include "test/test.h"

#include <errno.h>
#include <fcntl.h>
#include <hdf5.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

enum { RANKS = 4 };

/* The value of every element is a function of tensor and position, so that any box can be checked. */
struct made {
	const char *name, *kind;
	enum dtype dtype;
	int nd;
	int64_t shape[4];
	enum { ROWS, COLUMNS, GRID, WHOLE, UNEVEN } cut;
};

static const struct made model[] = {
        {"embedding.word_embeddings.weight", "model", DT_f32, 2, {37, 24}, UNEVEN},
        {"decoder.layers.0.attention.query.weight", "model", DT_f32, 2, {16, 24}, ROWS},
        {"decoder.layers.0.attention.output.weight", "model", DT_bf16, 2, {24, 16}, COLUMNS},
        {"decoder.layers.0.mlp.fc1.weight", "model", DT_f32, 2, {8, 12}, GRID},
        {"decoder.layers.0.mlp.fc1.weight", "exp_avg", DT_f32, 2, {8, 12}, ROWS},
        {"decoder.layers.0.mlp.fc1.weight", "exp_avg_sq", DT_f64, 2, {8, 12}, COLUMNS},
        {"decoder.final_layernorm.weight", "model", DT_f32, 1, {24}, ROWS},
        {"router.bias", "model", DT_i64, 1, {7}, WHOLE},
        {"experts.weight", "model", DT_f32, 3, {4, 6, 5}, ROWS},
        {"conv.weight", "model", DT_i32, 4, {2, 8, 3, 4}, COLUMNS},
        {"large.weight", "model", DT_f32, 2, {64, 4100}, ROWS}, /* rows longer than the read window take turns
                                                                 */
        {"half.weight", "model", DT_f16, 2, {12, 10}, GRID},
        {"step", "scalar", DT_i64, 0, {0}, WHOLE},
};
enum { N_MADE = sizeof model / sizeof *model };

static double value_of(const struct made *t, int64_t index)
{
	return (double)((index * 7 + (int64_t)strlen(t->name) * 131 + t->kind[3]) % 251) - 100;
}

static void put_value(void *out, enum dtype dtype, size_t i, double x)
{
	switch (dtype) {
	case DT_f32:
		((float *)out)[i] = (float)x;
		break;
	case DT_bf16:
		((uint16_t *)out)[i] = bf16_from_f32((float)x);
		break;
	case DT_f16:
		((uint16_t *)out)[i] = f16_from_f32((float)x);
		break;
	case DT_f64:
		((double *)out)[i] = x;
		break;
	case DT_i32:
		((int32_t *)out)[i] = (int32_t)x;
		break;
	default:
		((int64_t *)out)[i] = (int64_t)x;
	}
}

/* A box with its right values; the caller's to free(). */
static void *fill_box(const struct made *t, enum dtype dtype, const int64_t *offset, const int64_t *extent,
                      size_t *bytes)
{
	int64_t o[4] = {0}, x[4] = {1, 1, 1, 1}, s[4] = {1, 1, 1, 1};
	for (int d = 0; d < t->nd; d++) {
		o[4 - t->nd + d] = offset[d];
		x[4 - t->nd + d] = extent[d];
		s[4 - t->nd + d] = t->shape[d];
	}
	size_t n = (size_t)(x[0] * x[1] * x[2] * x[3]), i = 0;
	void *p = mem_array(n, 8);
	for (int64_t a = 0; a < x[0]; a++)
		for (int64_t b = 0; b < x[1]; b++)
			for (int64_t c = 0; c < x[2]; c++)
				for (int64_t d = 0; d < x[3]; d++)
					put_value(p, dtype, i++,
					          value_of(t, ((((o[0] + a) * s[1] + o[1] + b) * s[2]) +
					                       o[2] + c) * s[3] +
					                              o[3] + d));
	*bytes = n * dtype_rows[dtype].bytes;
	return p;
}

/* The box of a rank; false where it holds none. */
static bool box_of(const struct made *t, int rank, int64_t *offset, int64_t *extent)
{
	static const int64_t uneven[RANKS + 1] = {0, 1, 20, 36, 37};
	memset(offset, 0, 4 * sizeof *offset);
	memcpy(extent, t->shape, 4 * sizeof *extent);
	if (t->cut == WHOLE)
		return rank == 2;
	if (t->cut == UNEVEN) {
		offset[0] = uneven[rank];
		extent[0] = uneven[rank + 1] - uneven[rank];
		return true;
	}
	if (t->cut == GRID) {
		for (int d = 0; d < 2; d++) {
			extent[d] = t->shape[d] / 2;
			offset[d] = extent[d] * (d ? rank & 1 : rank >> 1);
		}
		return true;
	}
	int d = t->cut == COLUMNS;
	extent[d] = t->shape[d] / RANKS;
	offset[d] = extent[d] * rank;
	return true;
}

static int rows_of(int rank, struct ckpt_tensor *rows)
{
	int n = 0;
	for (int i = 0; i < N_MADE; i++) {
		const struct made *t = &model[i];
		struct ckpt_tensor *r = &rows[n];
		size_t bytes;
		*r = (struct ckpt_tensor){.name = t->name, .kind = t->kind, .dtype = t->dtype, .nd = t->nd};
		memcpy(r->shape, t->shape, sizeof r->shape);
		if (!box_of(t, rank, r->offset, r->extent))
			continue;
		r->data = fill_box(t, t->dtype, r->offset, r->extent, &bytes);
		n++;
	}
	return n;
}

static int save(const char *dir, int64_t step, struct err *e)
{
	struct ckpt_save s = {.dir = dir,
	                      .attempt = "17.0",
	                      .step = step,
	                      .world_size = RANKS,
	                      .meta_json = "{\"consumed_samples\": 42,\n \"model\": {\"num_layers\": 1}}"};
	struct buf records = {0};
	int rc = ckpt_save_begin(&s, e);
	for (int rank = RANKS; rank-- > 0 && !rc;) {
		struct ckpt_tensor rows[N_MADE];
		s.rank = rank;
		s.tensors = rows;
		s.n_tensors = (size_t)rows_of(rank, rows);
		rc = ckpt_save_shard(&s, &records, e);
		for (size_t i = 0; i < s.n_tensors; i++)
			free((void *)(uintptr_t)rows[i].data);
	}
	if (rc)
		ckpt_save_abort(&s);
	else
		rc = ckpt_save_commit(&s, records.data, records.length, e);
	buf_free(&records);
	return rc;
}

static bool box_right(struct ckpt *c, const struct made *t, enum dtype dtype, const int64_t *offset,
                      const int64_t *extent)
{
	struct err e = {0};
	size_t bytes;
	char *want = fill_box(t, dtype, offset, extent, &bytes), *got = mem_array(bytes, 1);
	int rc = ckpt_read_box(c, t->kind, t->name, offset, extent, dtype, got, &e);
	bool same = !rc && !memcmp(got, want, bytes);
	if (rc)
		test_failed(__FILE__, __LINE__, "%s", e.text);
	free(want);
	free(got);
	return same;
}

static bool all_right(struct ckpt *c)
{
	static const int64_t zero[4];
	bool ok = true;
	for (int i = 0; i < N_MADE; i++)
		ok &= CHECK(box_right(c, &model[i], model[i].dtype, zero, model[i].shape));
	return ok;
}

/* Lives as long as the program. */
static const char *inside(const char *dir, const char *name)
{
	static struct arena paths;
	return arena_printf(&paths, "%s/%s", dir, name);
}

static const char *scratch(const char *name)
{
	return inside(test_dir(), name);
}

TEST(any_box_of_any_layout)
{
	struct err e = {0};
	struct ckpt *c = NULL;
	const char *run = scratch("boxes"), *dir = inside(run, "checkpoints");
	CHECK_INT(save(dir, 1000, &e), 0);
	CHECK_INT(ckpt_open(run, CKPT_NEWEST, CKPT_VERIFY, &c, &e), 0);
	CHECK_STR(e.text, "");
	MUST(c);
	CHECK_INT(ckpt_step(c), 1000);
	CHECK_INT(ckpt_world_size(c), RANKS);
	CHECK_INT(ckpt_count(c), N_MADE);
	CHECK_INT(ckpt_file_count(c), RANKS);
	CHECK_INT(json_get_integer(ckpt_meta(c), "consumed_samples", 0), 42);
	CHECK(ckpt_find(c, "exp_avg", "decoder.layers.0.mlp.fc1.weight") != NULL);
	CHECK(ckpt_find(c, "exp_avg", "router.bias") == NULL);
	all_right(c);
	uint64_t key = rng_key(5, "boxes"), turn = 0;
	for (int round = 0; round < 600; round++) {
		const struct made *t = &model[round % (N_MADE - 1)];
		int64_t offset[4] = {0}, extent[4] = {0};
		for (int d = 0; d < t->nd; d++) {
			offset[d] = (int64_t)(rng_bits(key, turn++) % (uint64_t)t->shape[d]);
			extent[d] =
			        1 + (int64_t)(rng_bits(key, turn++) % (uint64_t)(t->shape[d] - offset[d]));
		}
		CHECK(box_right(c, t, t->dtype, offset, extent));
	}
	ckpt_close(c);
	char latest[32] = "";
	FILE *f = fopen(inside(dir, "latest"), "r");
	MUST(f);
	CHECK(fgets(latest, sizeof latest, f) != NULL);
	fclose(f);
	CHECK_STR(latest, "step-00001000\n");
}

TEST(types_convert)
{
	static const int64_t zero[4];
	struct err e = {0};
	struct ckpt *c = NULL;
	const char *dir = scratch("types");
	CHECK_INT(save(dir, 0, &e), 0);
	MUST(ckpt_open(dir, CKPT_NEWEST, 0, &c, &e) == 0);
	CHECK(box_right(c, &model[2], DT_f32, zero, model[2].shape)); /* stored as bf16 */
	CHECK(box_right(c, &model[1], DT_bf16, zero, model[1].shape));
	CHECK(box_right(c, &model[1], DT_f16, zero, model[1].shape));
	CHECK(box_right(c, &model[2], DT_f16, zero, model[2].shape));
	CHECK(box_right(c, &model[11], DT_f32, zero, model[11].shape)); /* stored as f16 */
	CHECK(box_right(c, &model[11], DT_bf16, zero, model[11].shape));
	float out[64 * 16];
	CHECK_INT(ckpt_read_box(c, "model", "router.bias", zero, model[7].shape, DT_f32, out, &e),
	          EXIT_BAD_DATA);
	CHECK_HAS(e.text, "is i64 and cannot be read as f32");
	const int64_t large[2] = {38, 1}, minus[2] = {-1, 0};
	CHECK_INT(ckpt_read_box(c, "model", model[0].name, zero, large, DT_f32, out, &e), EXIT_BAD_DATA);
	CHECK_HAS(e.text, "covers [0:37, 0:24]; [0:38, 0:1] was asked for");
	CHECK_INT(ckpt_read_box(c, "model", model[0].name, minus, large, DT_f32, out, &e), EXIT_BAD_DATA);
	CHECK_INT(ckpt_read_box(c, "model", "nobody", zero, large, DT_f32, out, &e), EXIT_BAD_DATA);
	CHECK_HAS(e.text, "no tensor nobody (model)");
	ckpt_close(c);
}

/* The view for people, read by the library that knows nothing of us. */
TEST(view_shows_global_tensors)
{
	static const int64_t zero[4];
	struct err e = {0};
	const char *dir = scratch("view");
	CHECK_INT(save(dir, 3, &e), 0);
	const char *moved = inside(dir, "moved"); /* relative names must survive this */
	CHECK_INT(rename(inside(dir, "step-00000003"), moved), 0);
	hid_t file = H5Fopen(inside(moved, "model.h5"), H5F_ACC_RDONLY, H5P_DEFAULT);
	MUST(file >= 0);
	for (int i = 0; i < N_MADE; i++) {
		const struct made *t = &model[i];
		size_t bytes;
		char name[300];
		bool whole = t->dtype == DT_i32 || t->dtype == DT_i64;
		enum dtype as = whole ? DT_i64 : DT_f64;
		char *want = fill_box(t, as, zero, t->shape, &bytes), *got = mem_array(bytes, 1);
		snprintf(name, sizeof name, "/%s/%s", t->kind, t->name);
		hid_t set = H5Dopen2(file, name, H5P_DEFAULT);
		CHECK(set >= 0);
		CHECK(H5Dread(set, whole ? H5T_NATIVE_INT64 : H5T_NATIVE_DOUBLE, H5S_ALL, H5S_ALL,
		              H5P_DEFAULT, got) >= 0);
		if (memcmp(got, want, bytes))
			test_failed(__FILE__, __LINE__, "%s differs", name);
		H5Dclose(set);
		free(want);
		free(got);
	}
	H5Fclose(file);
}

TEST(one_rank_may_stream)
{
	struct err e = {0};
	struct buf record = {0};
	struct ckpt_shard *w = NULL;
	struct ckpt *c = NULL;
	float a[6] = {1, 2, 3, 4, 5, 6};
	struct ckpt_tensor rows[2] = {
	        {.name = "a", .kind = "model", .dtype = DT_f32, .nd = 2, .shape = {4, 3}, .extent = {2, 3}},
	        {.name = "a",
	         .kind = "model",
	         .dtype = DT_f32,
	         .nd = 2,
	         .shape = {4, 3},
	         .offset = {2, 0},
	         .extent = {2, 3}}};
	struct ckpt_save s = {
	        .dir = scratch("stream"), .step = 5, .world_size = 1, .tensors = rows, .n_tensors = 2};
	CHECK_INT(ckpt_save_begin(&s, &e), 0);
	MUST(ckpt_shard_create(&s, &w, &e) == 0);
	CHECK_INT(ckpt_shard_write(w, 1, a, &e), 0);
	CHECK_INT(ckpt_shard_close(w, &record, &e), EXIT_INTERNAL);
	CHECK_HAS(e.text, "a was never written");
	MUST(ckpt_shard_create(&s, &w, &e) == 0);
	CHECK_INT(ckpt_shard_write(w, 1, a, &e), 0);
	CHECK_INT(ckpt_shard_write(w, 0, a, &e), 0);
	CHECK_INT(ckpt_shard_close(w, &record, &e), 0);
	CHECK_INT(ckpt_save_commit(&s, record.data, record.length, &e), 0);
	MUST(ckpt_open(s.dir, CKPT_NEWEST, 0, &c, &e) == 0);
	float got[6];
	const int64_t offset[2] = {1, 0}, extent[2] = {2, 3};
	CHECK_INT(ckpt_read_box(c, "model", "a", offset, extent, DT_f32, got, &e), 0);
	const float want[6] = {4, 5, 6, 1, 2, 3};
	CHECK(!memcmp(got, want, sizeof want));
	ckpt_close(c);
	buf_free(&record);
}

TEST(rows_that_cannot_be)
{
	float x[16] = {0};
	static const struct {
		struct ckpt_tensor row[2];
		int n;
		const char *says;
	} cases[] = {
	        {{{.name = "../a", .kind = "model", .nd = 1, .shape = {2}, .extent = {2}}}, 1, "cannot hold"},
	        {{{.name = "a/b", .kind = "model", .nd = 1, .shape = {2}, .extent = {2}}}, 1, "cannot hold"},
	        {{{.name = "a", .kind = "", .nd = 1, .shape = {2}, .extent = {2}}}, 1, "cannot hold"},
	        {{{.name = "a", .kind = "m", .nd = 1, .shape = {2}, .extent = {3}}}, 1, "cannot hold"},
	        {{{.name = "a", .kind = "m", .nd = 1, .shape = {2}, .offset = {1}, .extent = {2}}},
	         1,
	         "cannot hold"},
	        {{{.name = "a", .kind = "m", .nd = 1, .shape = {2}, .extent = {0}}}, 1, "cannot hold"},
	        {{{.name = "a", .kind = "m", .nd = 5, .shape = {2}, .extent = {2}}}, 1, "cannot hold"},
	        {{{.name = "a", .kind = "m", .nd = 1, .shape = {2}, .extent = {1}}}, 1, "do not cover"},
	        {{{.name = "a", .kind = "m", .nd = 1, .shape = {3}, .extent = {2}},
	          {.name = "a", .kind = "m", .nd = 1, .shape = {3}, .offset = {1}, .extent = {2}}},
	         2,
	         "overlap"},
	        {{{.name = "a", .kind = "m", .nd = 1, .shape = {4}, .extent = {2}},
	          {.name = "a", .kind = "m", .nd = 1, .shape = {5}, .offset = {2}, .extent = {2}}},
	         2,
	         "disagree"},
	        {{{.name = "a", .kind = "m", .nd = 1, .shape = {4}, .extent = {3}},
	          {.name = "a",
	           .kind = "m",
	           .nd = 1,
	           .shape = {4},
	           .offset = {3},
	           .extent = {1},
	           .dtype = DT_bf16}},
	         2,
	         "disagree"},
	};
	for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
		struct err e = {0};
		struct ckpt_tensor rows[2];
		struct buf record = {0};
		memcpy(rows, cases[i].row, sizeof rows);
		rows[0].data = rows[1].data = x;
		struct ckpt_save s = {.dir = scratch("wrong"),
		                      .step = 1,
		                      .world_size = 1,
		                      .tensors = rows,
		                      .n_tensors = (size_t)cases[i].n};
		CHECK_INT(ckpt_save_begin(&s, &e), 0);
		int rc = ckpt_save_shard(&s, &record, &e);
		if (!rc)
			rc = ckpt_save_commit(&s, record.data, record.length, &e);
		CHECK_INT(rc, EXIT_INTERNAL);
		CHECK_HAS(e.text, cases[i].says);
		buf_free(&record);
	}
}

static int64_t newest_step(const char *dir)
{
	struct err e = {0};
	struct ckpt *c = NULL;
	if (ckpt_open(dir, CKPT_NEWEST, CKPT_VERIFY | CKPT_STRICT, &c, &e)) {
		test_failed(__FILE__, __LINE__, "%s", e.text);
		return -1;
	}
	int64_t step = ckpt_step(c);
	ckpt_close(c);
	return step;
}

static bool exists(const char *path)
{
	struct stat st;
	return stat(path, &st) == 0;
}

/* Every system call of a save fails once: the save says so, and the former checkpoint, or the new one, opens
 * with all its checksums right. */
TEST(every_failing_call)
{
	struct err e = {0};
	const char *dir = scratch("faults");
	CHECK_INT(save(dir, 1, &e), 0);
	int n = 0, rc;
	do {
		struct err why = {0};
		n++;
		sys_fail_nth(n, n & 1 ? ENOSPC : EIO);
		rc = save(dir, 2, &why);
		sys_fail_nth(0, 0);
		int64_t step = newest_step(dir);
		CHECK(step == 2 || (step == 1 && rc));
		if (rc) {
			CHECK_INT(rc, EXIT_IO);
			CHECK(why.text[0] != 0);
			CHECK_INT(sys_remove_tree(inside(dir, "step-00000002"), &e), 0);
		}
	} while (rc && n < 2000);
	CHECK(n > 40 && n < 2000);
	CHECK(!exists(inside(dir, "step-00000002.tmp.17.0")));
	CHECK_INT(newest_step(dir), 2);
}

/* The same step saved once more: the old one stands until the new one is whole. */
TEST(same_step_again)
{
	struct err e = {0};
	const char *dir = scratch("again");
	CHECK_INT(save(dir, 2, &e), 0);
	int n = 0, rc;
	do {
		sys_fail_nth(++n, EIO);
		rc = save(dir, 2, &e);
		sys_fail_nth(0, 0);
		CHECK_INT(newest_step(dir), 2);
	} while (rc && n < 2000);
	CHECK(n > 40 && n < 2000);
}

/* The process dies at the n-th call instead of making it. */
static int calls_to_live;

#define DYING_TWIN(name, result, params, args) \
	static result(*real_##name) params;    \
	static result dying_##name params      \
	{                                      \
		if (--calls_to_live == 0)      \
			_exit(9);              \
		return real_##name args;       \
	}
SYS_CALLS(DYING_TWIN)

static int save_and_die(const char *dir, int n)
{
	pid_t child = fork();
	if (child == 0) {
		struct err e = {0};
		calls_to_live = n;
#define DYING_SET(name, result, params, args) \
	real_##name = sys.name;               \
	sys.name = dying_##name;
		SYS_CALLS(DYING_SET)
		_exit(save(dir, 2, &e));
	}
	int status = 0;
	waitpid(child, &status, 0);
	return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

TEST(killed_at_every_call)
{
	struct err e = {0};
	const char *dir = scratch("killed");
	CHECK_INT(save(dir, 1, &e), 0);
	int n = 0, rc;
	do {
		rc = save_and_die(dir, ++n);
		CHECK(rc == 0 || rc == 9);
		int64_t step = newest_step(dir);
		CHECK(step == 2 || (step == 1 && rc));
		CHECK_INT(ckpt_prune(dir, 0, &e), 0);
		CHECK(!exists(inside(dir, "step-00000002.tmp.17.0")));
		CHECK_INT(sys_remove_tree(inside(dir, "step-00000002"), &e), 0);
	} while (rc && n < 2000);
	CHECK(n > 40 && n < 2000);
}

static void flip_byte(const char *path, off_t at)
{
	int fd = open(path, O_RDWR);
	unsigned char x = 0;
	CHECK(pread(fd, &x, 1, at) == 1);
	x ^= 0x10;
	CHECK(pwrite(fd, &x, 1, at) == 1);
	close(fd);
}

static off_t size_of(const char *path)
{
	struct stat st;
	return stat(path, &st) ? -1 : st.st_size;
}

static void cut_shard(const char *step)
{
	CHECK_INT(truncate(inside(step, "shard-00001.h5"), size_of(inside(step, "shard-00001.h5")) - 1), 0);
}

static void remove_shard(const char *step)
{
	CHECK_INT(unlink(inside(step, "shard-00003.h5")), 0);
}

static void remove_manifest(const char *step)
{
	CHECK_INT(unlink(inside(step, "manifest.json")), 0);
}

static void flip_manifest(const char *step)
{
	flip_byte(inside(step, "manifest.json"), 400);
}

static void flip_end(const char *step)
{
	flip_byte(inside(step, "shard-00002.h5"), size_of(inside(step, "shard-00002.h5")) - 1);
}

static void flip_begin(const char *step)
{
	flip_byte(inside(step, "shard-00000.h5"), 100);
}

static void swap_shards(const char *step)
{
	CHECK_INT(rename(inside(step, "shard-00000.h5"), inside(step, "x")), 0);
	CHECK_INT(rename(inside(step, "shard-00001.h5"), inside(step, "shard-00000.h5")), 0);
	CHECK_INT(rename(inside(step, "x"), inside(step, "shard-00001.h5")), 0);
}

static void folder_for_shard(const char *step)
{
	remove_shard(step);
	CHECK_INT(mkdir(inside(step, "shard-00003.h5"), 0777), 0);
}

/* Each kind of damage: strict refuses and says what; otherwise the step before is taken. */
TEST(damage_falls_back)
{
	static const struct {
		void (*damage)(const char *step);
		const char *says;
	} cases[] = {
	        {cut_shard, "the manifest says"},
	        {remove_shard, "No such file"},
	        {remove_manifest, "manifest.json"},
	        {flip_manifest, "checksum in its last line"},
	        {flip_end, "checksum"},
	        {flip_begin, "what lies between its tensors"},
	        {swap_shards, "shard-0000"},
	        {folder_for_shard, "not a regular file"},
	};
	for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
		struct err e = {0};
		struct ckpt *c = NULL;
		const char *dir = scratch("damage");
		CHECK_INT(sys_remove_tree(dir, &e), 0);
		CHECK_INT(save(dir, 1, &e), 0);
		CHECK_INT(save(dir, 2, &e), 0);
		cases[i].damage(inside(dir, "step-00000002"));
		CHECK_INT(ckpt_open(dir, CKPT_NEWEST, CKPT_VERIFY | CKPT_STRICT, &c, &e), EXIT_BAD_DATA);
		CHECK_HAS(e.text, cases[i].says);
		CHECK_INT(ckpt_open(inside(dir, "step-00000002"), CKPT_NEWEST, CKPT_VERIFY, &c, &e),
		          EXIT_BAD_DATA);
		MUST(ckpt_open(dir, CKPT_NEWEST, CKPT_VERIFY, &c, &e) == 0);
		CHECK_INT(ckpt_step(c), 1);
		all_right(c);
		ckpt_close(c);
	}
}

TEST(checksum_is_compared_on_reading)
{
	struct err e = {0};
	struct ckpt *c = NULL;
	const char *dir = scratch("onread"), *step = inside(dir, "step-00000001");
	CHECK_INT(save(dir, 1, &e), 0);
	flip_end(step);
	MUST(ckpt_open(dir, CKPT_NEWEST, 0, &c, &e) == 0);
	int bad = 0;
	for (int i = 0; i < N_MADE; i++) {
		static const int64_t zero[4];
		size_t bytes;
		void *out = fill_box(&model[i], model[i].dtype, zero, model[i].shape, &bytes);
		int rc = ckpt_read_box(c, model[i].kind, model[i].name, zero, model[i].shape, model[i].dtype,
		                       out, &e);
		bad += rc == EXIT_BAD_DATA;
		free(out);
	}
	CHECK_INT(bad, 1);
	CHECK_HAS(e.text, "shard-00002.h5: tensor ");
	ckpt_close(c);
}

/* Every bit of a shard counts. */
TEST(any_flipped_byte_is_found)
{
	struct err e = {0};
	struct ckpt *c = NULL;
	const char *dir = scratch("flips"), *shard = inside(dir, "step-00000001/shard-00002.h5");
	CHECK_INT(save(dir, 1, &e), 0);
	off_t bytes = size_of(shard);
	for (int i = 0; i < 60; i++) {
		off_t at = (off_t)(rng_bits(rng_key(3, "flips"), (uint64_t)i) % (uint64_t)bytes);
		flip_byte(shard, i < 20 ? at % 4096 : at);
		CHECK_INT(ckpt_open(dir, CKPT_NEWEST, CKPT_VERIFY | CKPT_STRICT, &c, &e), EXIT_BAD_DATA);
		flip_byte(shard, i < 20 ? at % 4096 : at);
	}
	CHECK_INT(newest_step(dir), 1);
}

TEST(paths_and_steps)
{
	struct err e = {0};
	struct ckpt *c = NULL;
	const char *run = scratch("paths"), *dir = inside(run, "checkpoints");
	CHECK_INT(ckpt_open(run, CKPT_NEWEST, 0, &c, &e), EXIT_NO_INPUT);
	CHECK_INT(sys_make_dirs(dir, &e), 0);
	CHECK_INT(ckpt_open(run, CKPT_NEWEST, 0, &c, &e), EXIT_NO_INPUT);
	CHECK_HAS(e.text, "no checkpoint");
	for (int64_t step = 10; step <= 50; step += 10)
		CHECK_INT(save(dir, step, &e), 0);
	CHECK_INT(mkdir(inside(dir, "step-00000090.tmp.4"), 0777), 0);
	CHECK_INT(newest_step(dir), 50);
	MUST(ckpt_open(run, 35, 0, &c, &e) == 0);
	CHECK_INT(ckpt_step(c), 30);
	ckpt_close(c);
	MUST(ckpt_open(inside(dir, "step-00000020/"), CKPT_NEWEST, 0, &c, &e) == 0);
	CHECK_INT(ckpt_step(c), 20);
	ckpt_close(c);
	CHECK_INT(ckpt_open(run, 5, 0, &c, &e), EXIT_NO_INPUT);
	cut_shard(inside(dir, "step-00000050"));
	cut_shard(inside(dir, "step-00000030"));
	CHECK_INT(ckpt_prune(run, 2, &e), 0);
	int64_t *steps = NULL;
	size_t n = 0;
	CHECK_INT(ckpt_list(run, &steps, &n, &e), 0);
	MUST(n == 3);
	CHECK(steps[0] == 20 && steps[1] == 40 &&
	      steps[2] == 50); /* 50 is damaged, and newer than all that hold */
	free(steps);
	CHECK(!exists(inside(dir, "step-00000090.tmp.4")));
	CHECK_INT(rename(inside(dir, "step-00000040"), inside(dir, "step-00000041")), 0);
	CHECK_INT(ckpt_open(inside(dir, "step-00000041"), CKPT_NEWEST, 0, &c, &e), EXIT_BAD_DATA);
	CHECK_HAS(e.text, "is that of step 40");
}

int main(int argc, char **argv)
{
	return test_main(argc, argv);
}
