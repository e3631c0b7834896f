/* Hostile manifests: the checksum of the text is right, what it says is not. */
#include "base/err.h"
#include "base/hash.h"
#include "base/mem.h"
#include "base/rng.h"
#include "base/sys.h"
#include "ckpt/ckpt.h"
#include "test/test.h"

#include <stdlib.h>

enum { LONGEST_PATH = 4096 };

/* Lives as long as the program. */
static const char *inside(const char *dir, const char *name)
{
	static struct arena paths;
	return arena_printf(&paths, "%s/%s", dir, name);
}

static void write_manifest(const char *step, const char *text, size_t bytes)
{
	struct buf b = {0};
	struct err e = {0};
	buf_add(&b, text, bytes);
	buf_printf(&b, "\"crc32c\": \"%08x\"}\n", hash_crc32c(0, b.data, b.length));
	CHECK_INT(sys_write_file(inside(step, "manifest.json"), b.data, b.length, &e), 0);
	buf_free(&b);
}

/* A checkpoint of one small tensor in two pieces; *text is its manifest without the last line. */
static const char *small_checkpoint(const char *name, char **text, size_t *bytes)
{
	static char step[LONGEST_PATH];
	float x[8] = {1, 2, 3, 4, 5, 6, 7, 8};
	struct err e = {0};
	struct buf record = {0};
	struct ckpt_tensor rows[2] = {{"a", "model", DT_f32, 2, {4, 2}, {0, 0}, {2, 2}, x},
	                              {"a", "model", DT_f32, 2, {4, 2}, {2, 0}, {2, 2}, x + 4}};
	struct ckpt_save s = {
	        .dir = inside(test_dir(), name), .step = 7, .world_size = 1, .tensors = rows, .n_tensors = 2};
	CHECK_INT(ckpt_save_begin(&s, &e), 0);
	CHECK_INT(ckpt_save_shard(&s, &record, &e), 0);
	CHECK_INT(ckpt_save_commit(&s, record.data, record.length, &e), 0);
	buf_free(&record);
	snprintf(step, sizeof step, "%s/step-00000007", s.dir);
	CHECK_INT(sys_read_file(inside(step, "manifest.json"), 1 << 20, text, bytes, &e), 0);
	*bytes -= strlen("\"crc32c\": \"00000000\"}\n");
	(*text)[*bytes] = 0;
	return step;
}

TEST(manifests_that_lie)
{
	static const struct {
		const char *from, *to, *says;
	} cases[] = {
	        {"shard-00000.h5", "../../etc/passwd", "\"name\" must be"},
	        {"shard-00000.h5", "a/b", "\"name\" must be"},
	        {"shard-00000.h5", ".hidden", "\"name\" must be"},
	        {"shard-00000.h5", "nul\\u0000", "\"name\" must be"},
	        {"pentad-checkpoint", "other", "\"format\""},
	        {"\"version\": 1", "\"version\": 2", "version 1"},
	        {"\"step\": 7", "\"step\": 8", "of step 8"},
	        {"\"step\": 7", "\"step\": -7", "\"step\" must be"},
	        {"\"step\": 7", "\"step\": 7.5", "\"step\" must be"},
	        {"\"world_size\": 1", "\"world_size\": 99999999999", "\"world_size\" must be"},
	        {"\"meta\": {}", "\"meta\": []", "expected an object"},
	        {"\"meta\": {}", "\"mega\": {}", "expected \"meta\""},
	        {"\"name\": \"a\"", "\"name\": \"\"", "\"name\" must be"},
	        {"\"kind\": \"model\"", "\"kind\": 3", "\"kind\" must be"},
	        {"\"dtype\": \"f32\"", "\"dtype\": \"f33\"", "\"dtype\""},
	        {"\"dtype\": \"f32\"", "\"dtype\": \"f64\"", "\"bytes\""},
	        {"\"shape\": [4, 2]", "\"shape\": [4, 3]", "cover the whole"},
	        {"\"shape\": [4, 2]", "\"shape\": [3, 2]", "out of the shape"},
	        {"\"shape\": [4, 2]", "\"shape\": [4611686018427387904, 4]", "too large"},
	        {"\"shape\": [4, 2]", "\"shape\": [4, 0]", "dimension of 0"},
	        {"\"shape\": [4, 2]", "\"shape\": [4, 2, 1]", "array of 3 integers"},
	        {"\"shape\": [4, 2]", "\"shape\": [1, 1, 1, 4, 2]", "at most 4"},
	        {"\"shape\": [4, 2]", "\"shape\": [4, -2]", "no count"},
	        {"\"shape\": [4, 2]", "\"shape\": 4", "\"shape\""},
	        {"\"offset\": [2, 0]", "\"offset\": [1, 0]", "overlap"},
	        {"\"offset\": [2, 0]", "\"offset\": [0, 0]", "overlap"},
	        {"\"offset\": [2, 0]", "\"offset\": [3, 0]", "out of the shape"},
	        {"\"offset\": [2, 0]", "\"offset\": [9223372036854775807, 0]", "out of the shape"},
	        {"\"extent\": [2, 2]", "\"extent\": [2, 1]", "\"bytes\""},
	        {"\"extent\": [2, 2]", "\"extent\": [0, 2]", "empty"},
	        {"\"extent\": [2, 2]", "\"extent\": [2, 9223372036854775807]", "out of the shape"},
	        {"\"bytes\": 16,", "\"bytes\": 12,", "\"bytes\""},
	        {"\"file\": 0", "\"file\": 1", "number of a file"},
	        {"\"file\": 0", "\"file\": -1", "\"file\" must be"},
	        {"\"at\": ", "\"at\": 9000000", "beyond the end"},
	        {"\"at\": ", "\"at\": 9223372036854000000, \"was\": ", "beyond the end"},
	        {"\"crc32c\": \"", "\"crc32c\": \"zz", "8 hexadecimal"},
	        {"\"pieces\": [", "\"pieces\": [], \"x\": [", "one piece or more"},
	        {"\"pieces\": [", "\"pieces\": [3, ", "\"file\""},
	        {"\"tensors\": [\n", "\"tensors\": [\n[1]\n", "expected an object"},
	        {"\"tensors\": [\n", "\"tensors\": [\n\n", "JSON"},
	        {"\"tensors\": [\n", "\"sensors\": [\n", "expected \"tensors\""},
	        {"],\n\"tensors\"", "\n\"tensors\"", "JSON"},
	};
	char *text;
	size_t bytes;
	const char *step = small_checkpoint("lies", &text, &bytes);
	for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
		struct err e = {0};
		struct ckpt *c = NULL;
		struct buf b = {0};
		char *at = strstr(text, cases[i].from);
		MUST(at);
		buf_add(&b, text, (size_t)(at - text));
		buf_puts(&b, cases[i].to);
		buf_puts(&b, at + strlen(cases[i].from));
		write_manifest(step, b.data, b.length);
		CHECK_INT(ckpt_open(step, CKPT_NEWEST, 0, &c, &e), EXIT_BAD_DATA);
		CHECK_HAS(e.text, cases[i].says);
		buf_free(&b);
	}
	struct err e = {0};
	struct ckpt *c = NULL;
	write_manifest(step, text, bytes);
	MUST(ckpt_open(step, CKPT_NEWEST, CKPT_VERIFY, &c, &e) == 0);
	CHECK_INT(ckpt_step(c), 7);
	ckpt_close(c);
	free(text);
}

/* Repeats whole lines: tensors and files that are there twice. */
TEST(manifests_that_repeat)
{
	static const struct {
		const char *line, *says;
	} cases[] = {{"{\"name\": \"shard", "file shard-00000.h5 is there twice"},
	             {"{\"name\": \"a\"", "is there twice"}};
	char *text;
	size_t bytes;
	const char *step = small_checkpoint("twice", &text, &bytes);
	for (size_t i = 0; i < 2; i++) {
		struct err e = {0};
		struct ckpt *c = NULL;
		struct buf b = {0};
		char *at = strstr(text, cases[i].line);
		MUST(at);
		size_t length = strcspn(at, "\n");
		buf_add(&b, text, (size_t)(at - text));
		buf_add(&b, at, length);
		buf_puts(&b, ",\n");
		buf_puts(&b, at);
		write_manifest(step, b.data, b.length);
		CHECK_INT(ckpt_open(step, CKPT_NEWEST, 0, &c, &e), EXIT_BAD_DATA);
		CHECK_HAS(e.text, cases[i].says);
		buf_free(&b);
	}
	free(text);
}

/* Bytes changed, cut, doubled at random, with and without a right checksum: an error or a checkpoint whose
 * boxes can be asked for, never a crash. */
TEST(mutated_manifests)
{
	static const char pool[] = "0123456789[]{},:\"-e.nulltrue\\u \n";
	char *text;
	size_t bytes;
	const char *step = small_checkpoint("mutants", &text, &bytes);
	uint64_t key = rng_key(11, "mutants"), turn = 0;
	int accepted = 0;
	for (int round = 0; round < 3000; round++) {
		struct err e = {0};
		struct ckpt *c = NULL;
		char *copy = mem_array(bytes + 1, 1);
		size_t n = bytes;
		memcpy(copy, text, bytes);
		for (uint64_t k = 1 + rng_bits(key, turn++) % 4; k--;) {
			size_t at = rng_bits(key, turn++) % bytes;
			copy[at] = pool[rng_bits(key, turn++) % (sizeof pool - 1)];
		}
		if (round % 7 == 0)
			n = rng_bits(key, turn++) % bytes;
		write_manifest(step, copy, n);
		if (!ckpt_open(step, CKPT_NEWEST, 0, &c, &e)) {
			accepted++;
			ckpt_verify(c, &e);
			for (size_t i = 0; i < ckpt_count(c); i++) {
				static const int64_t zero[4];
				const struct ckpt_entry *t = ckpt_entry(c, i);
				void *out = mem_array(t->bytes, 1);
				ckpt_read_box(c, t->kind, t->name, zero, t->shape, t->dtype, out, &e);
				free(out);
			}
			ckpt_close(c);
		} else {
			CHECK_INT(e.code, EXIT_BAD_DATA);
			CHECK(!strchr(e.text, '\n'));
		}
		free(copy);
	}
	CHECK(accepted < 1500);
	free(text);
}

int main(int argc, char **argv)
{
	return test_main(argc, argv);
}
