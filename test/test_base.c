/* Floor base: JSON, random numbers, checksums, the failing system calls. */
#include "base/err.h"
#include "base/hash.h"
#include "base/json.h"
#include "base/mem.h"
#include "base/rng.h"
#include "base/sys.h"
#include "test/test.h"

#include <errno.h>
#include <stdlib.h>

static int parse(const char *text, struct arena *a, struct json **v, struct err *e)
{
	return json_parse(a, "t.json", text, strlen(text), v, e);
}

TEST(json_reads_every_type)
{
	struct arena a = {0};
	struct err e = {0};
	struct json *v;
	MUST(!parse("{\"a\": [1, -2.5e3, true, null], \"s\": \"x\\u00e9\\ud83d\\ude00\\n\", \"big\": 1e400}",
	            &a, &v, &e));
	const struct json *list = json_get(v, "a");
	MUST(list && list->count == 4);
	CHECK_INT(list->child->integer, 1);
	CHECK_NEAR(list->child->next->number, -2500, 0);
	CHECK(!list->child->next->is_integer);
	CHECK_STR(json_get_string(v, "s", ""), "x\xc3\xa9\xf0\x9f\x98\x80\n");
	CHECK(!json_get(v, "t"));
	arena_free(&a);
}

TEST(json_refuses_with_place)
{
	static const struct {
		const char *text, *part;
	} bad[] = {
	        {"{\"a\": 1,\n \"a\": 2}", "t.json:2:7: JSON: a key that was there before"},
	        {"[1, 2", "expected ',' or ']'"},
	        {"\"abc", "does not end"},
	        {"[01]", "none of JSON's"},
	        {"{\"a\" 1}", "expected ':'"},
	        {"\"\\ud800x\"", "half of a surrogate"},
	        {"\"\xff\"", "not UTF-8"},
	        {"1 2", "after the end"},
	        {"", "ends where a value should be"},
	        {"\"a\\", "does not end"},
	        {"[1.]", "without digits"},
	};
	for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
		struct arena a = {0};
		struct err e = {0};
		struct json *v;
		CHECK_INT(parse(bad[i].text, &a, &v, &e), EXIT_BAD_DATA);
		CHECK_HAS(e.text, bad[i].part);
		arena_free(&a);
	}
	char deep[400];
	memset(deep, '[', sizeof deep);
	deep[399] = 0;
	struct arena a = {0};
	struct err e = {0};
	struct json *v;
	CHECK_INT(parse(deep, &a, &v, &e), EXIT_BAD_DATA);
	CHECK_HAS(e.text, "64 levels");
	arena_free(&a);
}

TEST(json_writes_what_it_reads)
{
	struct buf b = {0};
	json_put_string(&b, "a\"\\\n\x01\xff", 6);
	CHECK_STR(b.data, "\"a\\\"\\\\\\n\\u0001\xef\xbf\xbd\"");
	b.length = 0;
	json_put_number(&b, 0.1);
	CHECK_STR(b.data, "0.1");
	b.length = 0;
	json_put_number(&b, 1.0 / 3);
	CHECK(strtod(b.data, NULL) == 1.0 / 3);
	buf_free(&b);
}

TEST(philox_known_answer)
{
	/* Random123's kat_vectors: philox4x32-10, all ones. */
	uint32_t r[4];
	rng_philox(~0ull, ~0ull, ~0ull, r);
	CHECK(r[0] == 0x408f276d && r[1] == 0x41c83b0e && r[2] == 0xa20bc7c6 && r[3] == 0x6d5451fd);
}

TEST(normal_is_normal_and_sliceable)
{
	float whole[1000], part[7];
	uint64_t key = rng_key(1234, "decoder.layers.0.mlp.fc1.weight");
	rng_normal(key, 0, 1000, 0, 1, whole);
	rng_normal(key, 501, 7, 0, 1, part);
	CHECK(!memcmp(part, whole + 501, sizeof part));
	double s = 0, s2 = 0;
	for (int i = 0; i < 1000; i++) {
		s += whole[i];
		s2 += whole[i] * whole[i];
	}
	CHECK_NEAR(s / 1000, 0, 0.1);
	CHECK_NEAR(s2 / 1000, 1, 0.15);
	CHECK(rng_key(1, "a") != rng_key(1, "b") && rng_key(1, "a") != rng_key(2, "a"));
}

TEST(crc32c_known_answer)
{
	CHECK(hash_crc32c(0, "123456789", 9) == 0xe3069283u);
	CHECK(hash_crc32c(hash_crc32c(0, "1234", 4), "56789", 5) == 0xe3069283u);
}

TEST(a_write_that_fails_leaves_the_old_file)
{
	char path[200];
	struct err e = {0};
	snprintf(path, sizeof path, "%s/f", test_dir());
	MUST(!sys_write_file(path, "old", 3, &e));
	for (int n = 1; n < 20; n++) {
		char *text;
		size_t bytes;
		sys_fail_nth(n, ENOSPC);
		int rc = sys_write_file(path, "newer", 5, &e);
		sys_fail_nth(0, 0);
		MUST(!sys_read_file(path, 100, &text, &bytes, &e));
		CHECK_STR(text, rc ? "old" : "newer");
		free(text);
		if (!rc) {
			CHECK(n > 4);
			return;
		}
		CHECK_INT(rc, EXIT_IO);
		CHECK_HAS(e.text, "No space left");
	}
	test_failed(__FILE__, __LINE__, "never succeeded");
}

int main(int argc, char **argv)
{
	return test_main(argc, argv);
}
