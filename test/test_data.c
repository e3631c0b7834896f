/* Token data: Megatron's files, the permutation, samples, blends, batches. */
#include "base/err.h"
#include "base/mem.h"
#include "base/rng.h"
#include "base/sys.h"
#include "data/blend.h"
#include "data/dataset.h"
#include "data/indexed.h"
#include "data/permute.h"
#include "data/samples.h"
#include "test/test.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

/* "DIR/name", four calls deep. */
static const char *scratch(const char *name)
{
	static char path[4][300];
	static int k;
	k = (k + 1) % 4;
	snprintf(path[k], sizeof path[k], "%s/%s", test_dir(), name);
	return path[k];
}

static void put_file(const char *path, const void *data, size_t bytes)
{
	struct err e = {0};
	if (!CHECK(!sys_write_file(path, data, bytes, &e)))
		fprintf(stderr, "%s\n", e.text);
}

/* The worked example: documents of 3, 2 and 4 tokens, u16. */
static const unsigned char example_idx[102] = {
        'M', 'M', 'I', 'D', 'I', 'D', 'X', 0, 0, 1, 0, 0, 0, 0, 0, 0, 0,  8, /* magic … type */
        3,   0,   0,   0,   0,   0,   0,   0, 4, 0, 0, 0, 0, 0, 0, 0,        /* S, D */
        3,   0,   0,   0,   2,   0,   0,   0, 4, 0, 0, 0,                    /* lengths */
        0,   0,   0,   0,   0,   0,   0,   0, 6, 0, 0, 0, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0, 0, 0, /* pointers */
        0,   0,   0,   0,   0,   0,   0,   0, 1, 0, 0, 0, 0, 0, 0, 0, 2,  0, 0, 0, 0, 0, 0, 0,
        3,   0,   0,   0,   0,   0,   0,   0};
static const unsigned char example_bin[18] = {11, 0,  12, 0,  13, 0,  21, 0,   22,
                                              0,  31, 0,  32, 0,  33, 0,  255, 255};
static const int32_t example_ids[9] = {11, 12, 13, 21, 22, 31, 32, 33, 65535};

/* Writes documents of the given lengths with ids 0, 1, 2, … (mod `modulus`) under prefix. */
static void write_counting(const char *prefix, const size_t *lengths, size_t n, int32_t modulus)
{
	struct indexed_writer *w;
	struct err e = {0};
	int32_t next = 0, ids[4096];
	MUST(!indexed_writer_open(prefix, INDEXED_I32, &w, &e));
	for (size_t d = 0; d < n; d++) {
		for (size_t i = 0; i < lengths[d]; i++)
			ids[i] = next++ % modulus;
		CHECK(!indexed_writer_add_document(w, ids, lengths[d], &e));
	}
	CHECK(!indexed_writer_finish(w, &e));
}

TEST(writer_agrees_with_megatron)
{
	struct indexed_writer *w;
	struct err e = {0};
	char *data;
	size_t bytes;
	MUST(!indexed_writer_open(scratch("ex"), INDEXED_U16, &w, &e));
	CHECK(!indexed_writer_add_document(w, example_ids, 3, &e));
	CHECK(!indexed_writer_add_document(w, example_ids + 3, 2, &e));
	CHECK(!indexed_writer_add_document(w, example_ids + 5, 4, &e));
	CHECK_INT(indexed_writer_documents(w), 3);
	CHECK_INT(indexed_writer_tokens(w), 9);
	MUST(!indexed_writer_finish(w, &e));
	MUST(!sys_read_file(scratch("ex.idx"), 1000, &data, &bytes, &e));
	CHECK_INT(bytes, 102);
	CHECK(bytes == 102 && !memcmp(data, example_idx, 102));
	free(data);
	MUST(!sys_read_file(scratch("ex.bin"), 1000, &data, &bytes, &e));
	CHECK(bytes == 18 && !memcmp(data, example_bin, 18));
	free(data);
	CHECK(access(scratch("ex.bin.tmp"), F_OK) && access(scratch("ex.idx.tmp"), F_OK));
}

TEST(reader_agrees_with_megatron)
{
	struct indexed *x;
	struct err e = {0};
	int32_t ids[9];
	put_file(scratch("rd.idx"), example_idx, sizeof example_idx);
	put_file(scratch("rd.bin"), example_bin, sizeof example_bin);
	MUST(!indexed_open(scratch("rd"), &x, &e));
	CHECK_INT(indexed_sequences(x), 3);
	CHECK_INT(indexed_documents(x), 3);
	CHECK_INT(indexed_tokens(x), 9);
	static const int first[] = {0, 3, 5, 9};
	for (uint64_t d = 0; d <= 3; d++)
		CHECK_INT(indexed_document_first(x, d), first[d]);
	for (uint64_t t = 0; t < 9; t++)
		CHECK_INT(indexed_document_of(x, t), t < 3 ? 0 : t < 5 ? 1 : 2);
	CHECK(!indexed_read(x, 0, 9, 0, ids, &e) && !memcmp(ids, example_ids, sizeof ids));
	CHECK(!indexed_read(x, 2, 3, 100, ids, &e) && !memcmp(ids, example_ids + 2, 12));
	CHECK_INT(indexed_read(x, 4, 5, 65535, ids, &e), EXIT_BAD_DATA);
	CHECK_HAS(e.text, "rd.bin: byte offset 16: token id 65535 in document 2, allowed is 0 to 65534");
	indexed_close(x);
}

TEST(type_follows_the_vocabulary)
{
	CHECK_INT(indexed_type_for(65499), INDEXED_U16);
	CHECK_INT(indexed_type_for(65500), INDEXED_I32);
}

/* Every integer type reads back what was written, across the writer's buffer, empty documents too. */
TEST(types_read_back)
{
	static const struct {
		enum indexed_type type;
		int32_t top;
	} rows[] = {{INDEXED_U8, 255},         {INDEXED_I8, 127},         {INDEXED_I16, 32767},
	            {INDEXED_I32, 2147483647}, {INDEXED_I64, 2147483647}, {INDEXED_U16, 65535}};
	enum { N = 300001 };
	int32_t *ids = mem_array(N, sizeof *ids), *back = mem_array(N, sizeof *back);
	for (size_t k = 0; k < sizeof rows / sizeof *rows; k++) {
		struct indexed_writer *w;
		struct indexed *x;
		struct err e = {0};
		for (int i = 0; i < N; i++)
			ids[i] = (int32_t)(rng_bits(k, (uint64_t)i) % ((uint64_t)rows[k].top + 1));
		ids[7] = rows[k].top;
		MUST(!indexed_writer_open(scratch("ty"), rows[k].type, &w, &e));
		CHECK(!indexed_writer_add_document(w, ids, 0, &e));
		CHECK(!indexed_writer_add_document(w, ids, 10, &e));
		CHECK(!indexed_writer_add_document(w, ids + 10, N - 10, &e));
		CHECK(!indexed_writer_add_document(w, ids, 0, &e));
		MUST(!indexed_writer_finish(w, &e));
		MUST(!indexed_open(scratch("ty"), &x, &e));
		CHECK_INT(indexed_documents(x), 4);
		CHECK_INT(indexed_document_of(x, 0), 1);
		CHECK_INT(indexed_document_of(x, N - 1), 2);
		CHECK(!indexed_read(x, 0, N, 0, back, &e) && !memcmp(ids, back, N * sizeof *ids));
		indexed_close(x);
	}
	free(ids);
	free(back);
}

TEST(writer_refuses_ids_that_do_not_fit)
{
	struct indexed_writer *w;
	struct err e = {0};
	static const int32_t big[] = {1, 65536}, negative[] = {-1};
	MUST(!indexed_writer_open(scratch("big"), INDEXED_U16, &w, &e));
	CHECK_INT(indexed_writer_add_document(w, big, 2, &e), EXIT_BAD_DATA);
	CHECK_HAS(e.text, "token id 65536 of document 0 does not fit in 2 bytes");
	CHECK_INT(indexed_writer_add_document(w, negative, 1, &e), EXIT_BAD_DATA);
	indexed_writer_abort(w);
	CHECK(access(scratch("big.bin.tmp"), F_OK) && access(scratch("big.bin"), F_OK));
	CHECK_INT(indexed_writer_open(scratch("no/such/folder"), INDEXED_U16, &w, &e), EXIT_IO);
	CHECK_HAS(e.text, "no/such/folder.bin.tmp: cannot create: No such file");
}

static int write_example(const char *prefix, struct err *e)
{
	struct indexed_writer *w;
	int rc = indexed_writer_open(prefix, INDEXED_U16, &w, e);
	if (rc)
		return rc;
	rc = indexed_writer_add_document(w, example_ids, 9, e);
	if (rc) {
		indexed_writer_abort(w);
		return rc;
	}
	return indexed_writer_finish(w, e);
}

/* Over an older dataset: each failing call leaves the old pair, the new pair, or no index; never a mixture.
 */
TEST(writer_failing_anywhere_leaves_no_half)
{
	static const size_t old[] = {5, 6, 7};
	int failed = 0;
	for (int n = 1; n < 30; n++) {
		struct err e = {0}, e2 = {0};
		struct indexed *x;
		write_counting(scratch("f"), old, 3, 100);
		sys_fail_nth(n, ENOSPC);
		int rc = write_example(scratch("f"), &e);
		sys_fail_nth(0, 0);
		CHECK(access(scratch("f.bin.tmp"), F_OK) && access(scratch("f.idx.tmp"), F_OK));
		if (!access(scratch("f.idx"), F_OK) && CHECK(!indexed_open(scratch("f"), &x, &e2))) {
			uint64_t tokens = indexed_tokens(x);
			CHECK(tokens == 9 || (rc && tokens == 18));
			indexed_close(x);
		}
		failed += rc != 0;
		if (n == 29)
			CHECK_INT(rc, 0);
		if (rc)
			CHECK_HAS(e.text, "No space left");
		CHECK(rc == 0 || rc == EXIT_IO);
	}
	CHECK_INT(failed, 13);
}

TEST(reader_refuses_with_place)
{
	static const struct {
		size_t at, bytes;
		unsigned char value[8];
		const char *part;
	} bad[] = {
	        {0, 1, {'X'}, "bad.idx: byte offset 0: not an index of Megatron's"},
	        {8, 1, {1}, "does not begin with MMIDIDX"},
	        {9, 1, {2}, "byte offset 9: version 2, known is 1"},
	        {17, 1, {0}, "byte offset 17: element type 0, allowed are"},
	        {17, 1, {9}, "element type 9"},
	        {17, 1, {6}, "elements are F64, token ids are integers"},
	        {17, 1, {4}, "is not within the 18 bytes"},
	        {18,
	         1,
	         {2},
	         "byte offset 18: 2 sequences and 4 document borders do not make a file of 102 bytes"},
	        {18, 8, {255, 255, 255, 255, 255, 255, 255, 255}, "do not make a file"},
	        {26, 8, {0, 0, 0, 0, 0, 0, 0, 32}, "do not make a file"},
	        {26, 1, {0}, "do not make a file"},
	        {37, 1, {128}, "byte offset 34: sequence 0 has -2147483645 tokens"},
	        {42, 1, {5}, "byte offset 62: sequence 2, 5 tokens of 2 bytes from byte 10, is not within"},
	        {62, 1, {12}, "byte offset 62: sequence 2"},
	        {62, 1, {4}, "byte offset 62: sequence 2 lies before sequence 1"},
	        {53, 1, {128}, "sequence 0, 3 tokens of 2 bytes from byte -9223372036854775808"},
	        {70, 1, {1}, "byte offset 70: document 0 begins at sequence 1"},
	        {78, 1, {3}, "byte offset 86: document 2 begins at sequence 2, after 3 and of 3"},
	        {86, 1, {4}, "byte offset 86: document 2 begins at sequence 4"},
	        {94, 1, {2}, "byte offset 94: the last document ends at sequence 2 of 3"},
	        {101, 1, {128}, "byte offset 94"},
	};
	put_file(scratch("bad.bin"), example_bin, sizeof example_bin);
	for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
		unsigned char idx[102];
		struct err e = {0};
		struct indexed *x = NULL;
		memcpy(idx, example_idx, sizeof idx);
		memcpy(idx + bad[i].at, bad[i].value, bad[i].bytes);
		put_file(scratch("bad.idx"), idx, sizeof idx);
		CHECK_INT(indexed_open(scratch("bad"), &x, &e), EXIT_BAD_DATA);
		CHECK_HAS(e.text, bad[i].part);
		CHECK(!x);
	}
}

/* 13·S + 8·D + 34 = 2^64 + 102: the counts fit only where a difference is allowed to wrap around. */
TEST(reader_refuses_counts_that_wrap_around)
{
	unsigned char idx[102];
	struct err e = {0};
	struct indexed *x;
	for (uint64_t s = (uint64_t)1 << 60; s < ((uint64_t)1 << 60) + 8; s++) {
		uint64_t d = (68 - 13 * s) / 8;
		memcpy(idx, example_idx, sizeof idx);
		memcpy(idx + 18, &s, 8);
		memcpy(idx + 26, &d, 8);
		put_file(scratch("wrap.idx"), idx, sizeof idx);
		put_file(scratch("wrap.bin"), example_bin, sizeof example_bin);
		CHECK_INT(indexed_open(scratch("wrap"), &x, &e), EXIT_BAD_DATA);
		CHECK_HAS(e.text, "do not make a file");
	}
}

TEST(reader_names_what_is_missing)
{
	struct indexed *x;
	struct err e = {0};
	CHECK_INT(indexed_open(scratch("none"), &x, &e), EXIT_NO_INPUT);
	CHECK_HAS(e.text, "none.idx: No such file");
	put_file(scratch("none.idx"), example_idx, 20);
	CHECK_INT(indexed_open(scratch("none"), &x, &e), EXIT_NO_INPUT);
	CHECK_HAS(e.text, "none.bin: No such file");
	put_file(scratch("none.bin"), "", 0);
	CHECK_INT(indexed_open(scratch("none"), &x, &e), EXIT_BAD_DATA);
	CHECK_HAS(e.text, "none.idx: 20 bytes, the header of an index alone has 34");
}

/* Modes behind the borders, a gap before each sequence, two sequences in one document. */
TEST(reader_takes_gaps_and_modes)
{
	unsigned char idx[97] = "MMIDIDX", bin[40] = {0};
	static const int32_t lengths[3] = {2, 0, 3};
	static const int64_t pointers[3] = {1, 7, 7}, borders[2] = {0, 3};
	struct err e = {0};
	struct indexed *x;
	int32_t ids[5];
	idx[9] = 1;
	idx[17] = 1;
	idx[18] = 3;
	idx[26] = 2;
	memcpy(idx + 34, lengths, 12);
	memcpy(idx + 46, pointers, 24);
	memcpy(idx + 70, borders, 16);
	memcpy(bin, "\x63\x01\x02\x63\x63\x63\x63\x03\x04\x05", 10);
	put_file(scratch("gap.idx"), idx, 34 + 36 + 16 + 3);
	put_file(scratch("gap.bin"), bin, 10);
	MUST(!indexed_open(scratch("gap"), &x, &e));
	CHECK_INT(indexed_documents(x), 1);
	CHECK_INT(indexed_tokens(x), 5);
	CHECK(!indexed_read(x, 0, 5, 6, ids, &e));
	for (int i = 0; i < 5; i++)
		CHECK_INT(ids[i], i + 1);
	CHECK(!indexed_read(x, 1, 3, 6, ids, &e));
	CHECK(ids[0] == 2 && ids[1] == 3 && ids[2] == 4);
	CHECK_INT(indexed_read(x, 3, 2, 4, ids, &e), EXIT_BAD_DATA);
	CHECK_HAS(e.text, "gap.bin: byte offset 8: token id 4 in document 0");
	indexed_close(x);
}

/* Any change of any byte is an error or a dataset that can be read to its end. */
TEST(reader_survives_mutations)
{
	uint64_t key = rng_key(7, "mutations");
	put_file(scratch("mu.bin"), example_bin, sizeof example_bin);
	for (uint64_t i = 0; i < 3000; i++) {
		unsigned char idx[102];
		struct err e = {0};
		struct indexed *x;
		int32_t ids[64];
		memcpy(idx, example_idx, sizeof idx);
		for (uint64_t k = 0; k <= i % 3; k++)
			idx[rng_bits(key, 8 * i + k) % 102] = (unsigned char)rng_bits(key, 8 * i + k + 3);
		size_t bytes = i % 2 ? sizeof idx : rng_bits(key, 8 * i + 7) % 103;
		int fd = open(scratch("mu.idx"), O_CREAT | O_TRUNC | O_WRONLY, 0666);
		CHECK(!sys_write_all(fd, idx, bytes));
		close(fd);
		if (indexed_open(scratch("mu"), &x, &e))
			continue;
		for (uint64_t t = 0, n; t < indexed_tokens(x); t += n) {
			n = indexed_tokens(x) - t < 64 ? indexed_tokens(x) - t : 64;
			indexed_read(x, t, n, 40, ids, &e);
			indexed_document_of(x, t);
		}
		indexed_close(x);
	}
}

TEST(file_cut_short_while_in_use_ends_with_a_sentence)
{
	size_t lengths[40];
	int pipe_fds[2], status;
	char text[600] = "";
	struct err e = {0};
	for (int i = 0; i < 40; i++)
		lengths[i] = 4000;
	write_counting(scratch("cut"), lengths, 40, 100);
	MUST(!pipe(pipe_fds));
	pid_t child = fork();
	if (child == 0) {
		struct indexed *x, *y;
		int32_t ids[4];
		dup2(pipe_fds[1], STDERR_FILENO);
		indexed_guard_install();
		indexed_guard_install();
		if (indexed_open(scratch("cut"), &y, &e) || indexed_open(scratch("cut"), &x, &e))
			_exit(1);
		indexed_close(y);
		if (truncate(scratch("cut.bin"), 4096))
			_exit(2);
		_exit(indexed_read(x, 150000, 4, 0, ids, &e) ? 3 : 4);
	}
	close(pipe_fds[1]);
	for (size_t n = 0, got; n < sizeof text - 1; n += got) {
		ssize_t r = read(pipe_fds[0], text + n, sizeof text - 1 - n);
		if (r <= 0)
			break;
		got = (size_t)r;
	}
	close(pipe_fds[0]);
	MUST(waitpid(child, &status, 0) == child);
	CHECK(WIFEXITED(status));
	CHECK_INT(WEXITSTATUS(status), EXIT_BAD_DATA);
	CHECK_HAS(text, "cut.bin: byte offset 600000 can no longer be read");
}

TEST(permutation_is_a_bijection)
{
	for (uint64_t n = 1; n <= 300; n++)
		for (uint64_t key = 0; key < 3; key++) {
			bool seen[300] = {false};
			for (uint64_t i = 0; i < n; i++) {
				uint64_t to = permute_index(key, n, i);
				if (to >= n || seen[to] || permute_inverse(key, n, to) != i)
					test_failed(__FILE__, __LINE__, "n %d key %d i %d", (int)n, (int)key,
					            (int)i);
				else
					seen[to] = true;
			}
		}
	static const uint64_t large[] = {1000003,    4294967295,      4294967296,
	                                 4294967297, PERMUTE_MAX - 1, PERMUTE_MAX};
	for (size_t k = 0; k < sizeof large / sizeof *large; k++)
		for (uint64_t i = 0; i < 200; i++) {
			uint64_t from = i < 100 ? i : large[k] - 1 - (i - 100),
			         to = permute_index(5, large[k], from);
			CHECK(to < large[k] && permute_inverse(5, large[k], to) == from);
		}
}

/* Chi-square of where each element goes, over keys: 99.99 % of a uniform permutation's are below the bound.
 */
TEST(permutation_is_uniform)
{
	enum { KEYS = 4000 };
	for (uint64_t n = 2; n <= 12; n++) {
		int count[12][12] = {{0}};
		for (uint64_t key = 0; key < KEYS; key++)
			for (uint64_t i = 0; i < n; i++)
				count[i][permute_index(rng_subkey(1, key), n, i)]++;
		double chi = 0, expected = (double)KEYS / (double)n, freedom = (double)((n - 1) * (n - 1));
		for (uint64_t i = 0; i < n; i++)
			for (uint64_t to = 0; to < n; to++)
				chi += pow(count[i][to] - expected, 2) / expected;
		CHECK_NEAR(chi, freedom, 4.5 * sqrt(2 * freedom) + 6);
	}
}

/* All 24 orders of four elements come about equally often; neighbours are not kept together. */
TEST(permutation_has_no_pattern)
{
	enum { KEYS = 24000 };
	int count[256] = {0}, kept = 0, orders = 0;
	double chi = 0;
	for (uint64_t key = 0; key < KEYS; key++) {
		int code = 0;
		for (uint64_t i = 0; i < 4; i++)
			code = code << 2 | (int)permute_index(rng_subkey(2, key), 4, i);
		count[code]++;
	}
	for (int c = 0; c < 256; c++) {
		orders += count[c] > 0;
		chi += count[c] ? pow(count[c] - KEYS / 24.0, 2) / (KEYS / 24.0) : 0;
	}
	CHECK_INT(orders, 24);
	CHECK(chi < 60);
	for (uint64_t i = 0; i < 9999; i++) {
		uint64_t a = permute_index(3, 10000, i), b = permute_index(3, 10000, i + 1);
		kept += a + 1 == b || b + 1 == a;
	}
	CHECK(kept < 15); /* two are expected */
	int same = 0;
	for (uint64_t i = 0; i < 10000; i++)
		same += permute_index(3, 10000, i) == permute_index(4, 10000, i);
	CHECK(same < 10);
}

TEST(splits_round_as_megatron)
{
	static const struct {
		const char *text;
		uint64_t n, bounds[4];
	} rows[] = {
	        /* int(round(fraction · n)) of Python with the weights of numpy */
	        {"98,2,0", 1, {0, 1, 1, 1}},
	        {"98,2,0", 1000, {0, 980, 1000, 1000}},
	        {"969,30,1", 1000, {0, 969, 999, 1000}},
	        {"1,1", 1, {0, 0, 1, 1}},
	        {"1,1,0", 3, {0, 2, 3, 3}},
	        {"1,1,0", 5, {0, 2, 5, 5}},
	        {"0.5, 0.25, 0.25", 10, {0, 5, 8, 10}},
	        {"100", 7, {0, 7, 7, 7}},
	        {"0,0,1", 9, {0, 0, 0, 9}},
	        {"98,2,0", 0, {0, 0, 0, 0}},
	};
	for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
		double split[SPLIT_COUNT];
		uint64_t bounds[SPLIT_COUNT + 1];
		struct err e = {0};
		MUST(!samples_parse_split(rows[i].text, split, &e));
		samples_split_bounds(split, rows[i].n, bounds);
		for (int k = 0; k <= SPLIT_COUNT; k++)
			CHECK_INT(bounds[k], rows[i].bounds[k]);
	}
	static const char *const bad[] = {"",      "a",   "98,", ",1",  "1,2,3,4", "-1,2",
	                                  "0,0,0", "1;2", "nan", "inf", "1 2",     "1e308,1e308"};
	for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
		double split[SPLIT_COUNT];
		struct err e = {0};
		CHECK_INT(samples_parse_split(bad[i], split, &e), EXIT_CONFIG);
		CHECK_HAS(e.text, "such as \"98,2,0\"");
	}
}

static const double all_train[SPLIT_COUNT] = {1, 0, 0};

/* 401 documents, most of them tiny or empty, 16·k + 1 tokens in all (so that with 16 tokens a sample each
 * shifted epoch runs over the end); returns the tokens. */
static uint64_t write_tiny_documents(const char *prefix)
{
	size_t lengths[401];
	uint64_t tokens = 0;
	for (size_t i = 0; i < 400; i++) {
		lengths[i] = i % 7 == 0 ? 0 : (size_t)(rng_bits(9, i) % 5);
		tokens += lengths[i];
	}
	lengths[400] = (size_t)(16 + 17 - tokens % 16);
	tokens += lengths[400];
	write_counting(prefix, lengths, 401, 1 << 20);
	return tokens;
}

TEST(samples_in_order_are_the_stream)
{
	enum { T = 7 };
	struct indexed *x;
	struct samples s;
	struct err e = {0};
	int32_t window[T + 1];
	uint64_t tokens = write_tiny_documents(scratch("so"));
	MUST(!indexed_open(scratch("so"), &x, &e));
	MUST(!samples_init(&s, x, all_train, SPLIT_TRAIN, T, 1, false, 0, &e));
	CHECK_INT(s.per_epoch, (tokens - 1) / T);
	for (uint64_t i = 0; i < 2 * s.per_epoch; i++) {
		MUST(!samples_get(&s, i, window, &e));
		for (int k = 0; k <= T; k++)
			CHECK_INT(window[k], (int64_t)(i % s.per_epoch) * T + k);
	}
	indexed_close(x);
}

/* Each epoch: every sample once, windows of the stream, neighbours overlap by one token; the borders and the
 * order differ from epoch to epoch and from key to key. */
TEST(samples_shuffled_occur_once)
{
	enum { T = 16, EPOCHS = 5 };
	struct indexed *x;
	struct samples s, other;
	struct err e = {0};
	int32_t window[T + 1];
	uint64_t offset[EPOCHS] = {0}, differ = 0, tokens = write_tiny_documents(scratch("ss"));
	MUST(!indexed_open(scratch("ss"), &x, &e));
	MUST(!samples_init(&s, x, all_train, SPLIT_TRAIN, T, 1, true, 0, &e));
	MUST(!samples_init(&other, x, all_train, SPLIT_TRAIN, T, 2, true, 0, &e));
	for (uint64_t epoch = 0; epoch < EPOCHS; epoch++) {
		bool *seen = mem_array(s.per_epoch, sizeof *seen), *input = mem_array(tokens, sizeof *input);
		for (uint64_t i = epoch * s.per_epoch; i < (epoch + 1) * s.per_epoch; i++) {
			uint64_t start = samples_first_token(&s, i);
			differ += start != samples_first_token(&other, i);
			MUST(!samples_get(&s, i, window, &e));
			for (uint64_t k = 0; k <= T; k++)
				CHECK_INT(window[k], (start + k) % tokens);
			for (uint64_t k = 0; k < T; k++) {
				CHECK(!input[(start + k) % tokens]);
				input[(start + k) % tokens] = true;
			}
			uint64_t j = start / T;
			if (CHECK(j < s.per_epoch + 1))
				offset[epoch] = start % T;
		}
		uint64_t read = 0;
		for (uint64_t t = 0; t < tokens; t++)
			read += input[t];
		CHECK_INT(read, s.per_epoch * T);
		free(seen);
		free(input);
	}
	CHECK_INT(offset[0], 0);
	CHECK(offset[1] != offset[2] || offset[2] != offset[3]);
	CHECK(differ > s.per_epoch * EPOCHS * 8 / 10);
	indexed_close(x);
}

TEST(samples_of_splits_do_not_meet)
{
	enum { T = 8 };
	static const double split[SPLIT_COUNT] = {8, 1, 1};
	struct indexed *x;
	struct err e = {0};
	uint64_t tokens = write_tiny_documents(scratch("sp")), end = 0;
	MUST(!indexed_open(scratch("sp"), &x, &e));
	for (enum samples_split k = SPLIT_TRAIN; k < SPLIT_COUNT; k++) {
		struct samples s;
		int32_t window[T + 1];
		MUST(!samples_init(&s, x, split, k, T, 1, true, 0, &e));
		CHECK_INT(s.first_token, end);
		end = s.first_token + s.tokens;
		for (uint64_t i = 0; i < 3 * s.per_epoch; i++) {
			MUST(!samples_get(&s, i, window, &e));
			for (int t = 0; t <= T; t++)
				CHECK((uint64_t)window[t] >= s.first_token && (uint64_t)window[t] < end);
		}
	}
	CHECK_INT(end, tokens);
	indexed_close(x);
}

TEST(samples_need_a_window)
{
	static const size_t lengths[] = {5, 0, 4};
	struct indexed *x;
	struct samples s;
	struct err e = {0};
	int32_t window[9];
	write_counting(scratch("few"), lengths, 3, 100);
	MUST(!indexed_open(scratch("few"), &x, &e));
	CHECK_INT(samples_init(&s, x, all_train, SPLIT_TRAIN, 9, 1, true, 0, &e), EXIT_BAD_DATA);
	CHECK_HAS(e.text,
	          "the train split (documents 0 to 3 of 3) needs at least seq_length + 1 = 10 tokens for one "
	          "sample; it has 9");
	MUST(!samples_init(&s, x, all_train, SPLIT_TRAIN, 8, 1, true, 0, &e));
	CHECK_INT(s.per_epoch, 1);
	MUST(!samples_get(&s, 0, window, &e));
	CHECK_INT(window[0], 0);
	CHECK_INT(window[8], 8);
	CHECK_INT(samples_init(&s, x, all_train, SPLIT_VALID, 1, 1, true, 0, &e), EXIT_BAD_DATA);
	CHECK_HAS(e.text, "validation split");
	indexed_close(x);
}

/* At every prefix: counts sum to i, differ from the exact share by less than the bound of blend.h, and
 * blend_get is their difference. */
static void check_blend(const double *weights, int n, uint64_t samples, double bound)
{
	struct blend *b;
	struct err e = {0};
	uint64_t counts[64] = {0}, now[64];
	double total = 0, worst = 0;
	MUST(!blend_new(weights, n, &b, &e));
	for (int k = 0; k < n; k++)
		total += weights[k];
	for (uint64_t i = 0; i < samples; i++) {
		int k;
		uint64_t index, sum = 0;
		blend_counts(b, i, now);
		for (int m = 0; m < n; m++) {
			worst = fmax(worst, fabs((double)now[m] - weights[m] / total * (double)i));
			sum += now[m];
		}
		CHECK(sum == i && !memcmp(now, counts, (size_t)n * sizeof *now));
		blend_get(b, i, &k, &index);
		MUST(k >= 0 && k < n);
		CHECK_INT(index, counts[k]);
		counts[k]++;
	}
	CHECK(worst < bound);
	blend_free(b);
}

TEST(blend_keeps_proportions_at_every_prefix)
{
	static const double two[] = {0.3, 0.7}, thirds[] = {1, 1, 1}, one[] = {5}, tiny[] = {1, 1e-9, 1e9, 1},
	                    powers[] = {1, 2, 4, 8, 16, 32, 64, 128};
	double mixed[64], equal[64], heavy[64];
	for (int k = 0; k < 64; k++) {
		mixed[k] = pow(rng_uniform(3, (uint64_t)k), 4) + 1e-6;
		equal[k] = 1;
		heavy[k] = k ? 1 : 500;
	}
	check_blend(one, 1, 100, 1e-9);
	check_blend(two, 2, 3000, 0.5 + 1e-9);
	check_blend(thirds, 3, 3000, 1);
	check_blend(tiny, 4, 3000, 1.68);
	check_blend(powers, 8, 3000, 1);
	check_blend(equal, 64, 1000, 1);
	check_blend(heavy, 64, 3000, 1);
	check_blend(mixed, 64, 5000, 1.68);
}

/* Random weights of several kinds: the proved bound holds, far out too. */
TEST(blend_error_stays_below_its_bound)
{
	uint64_t key = rng_key(1, "blend");
	for (uint64_t trial = 0; trial < 60; trial++) {
		int n = 2 + (int)(rng_bits(key, trial) % 60);
		double weights[64], total = 0;
		uint64_t counts[64];
		struct blend *b;
		struct err e = {0};
		for (int k = 0; k < n; k++) {
			double u = rng_uniform(rng_subkey(key, trial), (uint64_t)k);
			weights[k] = trial % 3 == 0   ? 1 + floor(u * 1000)
			             : trial % 3 == 1 ? exp2(-floor(u * 12))
			                              : u + 1e-3;
			total += weights[k];
		}
		MUST(!blend_new(weights, n, &b, &e));
		for (uint64_t i = 0; i < 4000; i++) {
			uint64_t at = i < 2000 ? i : rng_bits(key, i) >> 30;
			blend_counts(b, at, counts);
			for (int k = 0; k < n; k++)
				CHECK_NEAR((double)counts[k], weights[k] / total * (double)at, 1.69);
		}
		blend_free(b);
	}
}

/* Weights that are sample counts use up every dataset at the same moment. */
TEST(blend_by_size_is_exhaustive)
{
	static const double sizes[] = {1234567890123, 1, 99, 5000000, 77};
	struct blend *b;
	struct err e = {0};
	uint64_t counts[5], total = 0;
	MUST(!blend_new(sizes, 5, &b, &e));
	for (int k = 0; k < 5; k++)
		total += (uint64_t)sizes[k];
	blend_counts(b, total, counts);
	for (int k = 0; k < 5; k++)
		CHECK_INT(counts[k], (uint64_t)sizes[k]);
	blend_free(b);
}

TEST(blend_refuses_weights)
{
	static const double bad[][2] = {{1, 0}, {1, -1}, {1, NAN}, {1, INFINITY}};
	struct blend *b;
	for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
		struct err e = {0};
		CHECK_INT(blend_new(bad[i], 2, &b, &e), EXIT_CONFIG);
		CHECK_HAS(e.text, "of dataset 2 of a blend: it must be positive");
	}
}

TEST(data_path_is_read_as_megatron_does)
{
	static const char *const plain[] = {"a"}, *const two[] = {"a", "b"},
	                         *const weighted[] = {"0.3", "a", "7", "b"},
	                         *const negative[] = {"-1", "a", "1", "b"};
	const char *paths[4];
	double weights[4];
	int n;
	bool with;
	struct err e = {0};
	CHECK(!dataset_parse_paths(plain, 1, paths, weights, &n, &with, &e) && n == 1 && !with);
	CHECK(!dataset_parse_paths(two, 2, paths, weights, &n, &with, &e) && n == 2 && !with);
	CHECK_STR(paths[1], "b");
	CHECK(!dataset_parse_paths(weighted, 4, paths, weights, &n, &with, &e) && n == 2 && with);
	CHECK_STR(paths[1], "b");
	CHECK_NEAR(weights[0], 0.3, 0);
	CHECK_NEAR(weights[1], 7, 0);
	CHECK_INT(dataset_parse_paths(negative, 4, paths, weights, &n, &with, &e), EXIT_CONFIG);
	CHECK_HAS(e.text, "weight -1 of dataset a");
	CHECK_INT(dataset_parse_paths(NULL, 0, paths, weights, &n, &with, &e), EXIT_CONFIG);
}

/* Two datasets whose ids tell them apart: [0, 1000) and 1000 and above. */
static struct dataset_spec two_datasets(const char *paths[2])
{
	static const double weights[] = {3, 1};
	static const size_t low[] = {300, 0, 400}, high[] = {4000, 50};
	paths[0] = scratch("ba");
	paths[1] = scratch("bb");
	write_counting(paths[0], low, 3, 1000);
	write_counting(paths[1], high, 2, 1 << 20);
	return (struct dataset_spec){.paths = paths,
	                             .weights = weights,
	                             .n = 2,
	                             .split = {1, 0, 0},
	                             .which = SPLIT_TRAIN,
	                             .seq_length = 10,
	                             .seed = 1234,
	                             .shuffle = true,
	                             .vocab_size = 1 << 20};
}

TEST(batches_do_not_depend_on_their_size)
{
	enum { T = 10, N = 240 };
	const char *paths[2];
	struct dataset_spec spec = two_datasets(paths);
	struct dataset *d;
	struct err e = {0};
	static int32_t tokens[N][T], targets[N][T], one[T], next[T];
	MUST(!dataset_open(&spec, &d, &e));
	CHECK_INT(dataset_count_samples(d), 69 + 404);
	CHECK_INT(dataset_count_tokens(d), 4750);
	CHECK_INT(dataset_part(d, 1).samples, 404);
	CHECK_INT(dataset_part(d, 0).documents, 3);
	CHECK_NEAR(dataset_part(d, 0).weight, 0.75, 0);
	MUST(!dataset_batch(d, 0, N, tokens[0], targets[0], &e));
	for (int i = 0; i < N; i++) {
		CHECK(!memcmp(tokens[i] + 1, targets[i], (T - 1) * sizeof(int32_t)));
		MUST(!dataset_batch(d, (uint64_t)i, 1, one, next, &e));
		CHECK(!memcmp(one, tokens[i], sizeof one) && !memcmp(next, targets[i], sizeof next));
	}
	dataset_close(d);
}

TEST(fingerprint_is_the_order)
{
	const char *paths[2];
	struct dataset_spec spec = two_datasets(paths);
	struct dataset *d;
	struct err e = {0};
	uint64_t first;
	MUST(!dataset_open(&spec, &d, &e));
	first = dataset_fingerprint(d);
	dataset_close(d);
	static const double other_weights[] = {1, 3};
	struct dataset_spec changed[5] = {spec, spec, spec, spec, spec};
	changed[1].seed++;
	changed[2].seq_length++;
	changed[3].shuffle = false;
	changed[4].weights = other_weights;
	for (int i = 0; i < 5; i++) {
		MUST(!dataset_open(&changed[i], &d, &e));
		CHECK((dataset_fingerprint(d) == first) == (i == 0));
		dataset_close(d);
	}
}

TEST(dataset_errors_name_the_file)
{
	const char *paths[2];
	struct dataset_spec spec = two_datasets(paths);
	struct dataset *d;
	struct err e = {0};
	static int32_t tokens[300][10], targets[300][10];
	spec.vocab_size = 900;
	MUST(!dataset_open(&spec, &d, &e));
	CHECK_INT(dataset_batch(d, 0, 300, tokens[0], targets[0], &e), EXIT_BAD_DATA);
	CHECK_HAS(e.text, "bb.bin: byte offset");
	dataset_close(d);
	spec.seq_length = 700;
	CHECK_INT(dataset_open(&spec, &d, &e), EXIT_BAD_DATA);
	CHECK_HAS(e.text, "ba: the train split");
	paths[1] = scratch("nothing");
	spec.seq_length = 10;
	CHECK_INT(dataset_open(&spec, &d, &e), EXIT_NO_INPUT);
	CHECK_HAS(e.text, "nothing.idx");
}

int main(int argc, char **argv)
{
	return test_main(argc, argv);
}
