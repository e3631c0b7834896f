/* prepare: documents, order, chunks, failures. The tokenizer is byte-level with id = byte, 256 = end of
 * document and three merges, so that expected ids can be written down. */
#include "base/err.h"
#include "base/mem.h"
#include "base/rng.h"
#include "base/sys.h"
#include "data/indexed.h"
#include "data/prepare.h"
#include "test/test.h"

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

enum { EOD = 256, TH, THE, BREAKS };

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

/* The visible character that byte-level BPE (Radford et al. 2019) writes for a byte. */
static void put_byte(struct buf *b, int byte)
{
	int hidden = 0, code = byte;
	bool visible = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
	for (int i = 0; i < byte; i++)
		hidden += !((i >= 33 && i <= 126) || (i >= 161 && i <= 172) || i >= 174);
	if (!visible)
		code = 256 + hidden;
	if (code < 128)
		buf_printf(b, code == '"' || code == '\\' ? "\\%c" : "%c", code);
	else
		buf_printf(b, "%c%c", 0xc0 | code >> 6, 0x80 | (code & 63));
}

static const char *tokenizer(void)
{
	struct buf b = {0};
	buf_puts(&b,
	         "{\"added_tokens\": [{\"id\": 256, \"content\": \"<|endoftext|>\", \"single_word\": false, "
	         "\"lstrip\": false, \"rstrip\": false, \"normalized\": false, \"special\": true}], "
	         "\"normalizer\": null, \"pre_tokenizer\": {\"type\": \"ByteLevel\", \"add_prefix_space\": "
	         "false, "
	         "\"trim_offsets\": true, \"use_regex\": true}, \"post_processor\": null, "
	         "\"decoder\": {\"type\": \"ByteLevel\"}, \"model\": {\"type\": \"BPE\", \"vocab\": {");
	for (int i = 0; i < 256; i++) {
		buf_puts(&b, "\"");
		put_byte(&b, i);
		buf_printf(&b, "\": %d, ", i);
	}
	buf_puts(&b, "\"<|endoftext|>\": 256, \"th\": 257, \"the\": 258, \"ĊĊ\": 259}, "
	             "\"merges\": [\"t h\", \"th e\", \"Ċ Ċ\"]}}");
	put_file(scratch("tokenizer.json"), b.data, b.length);
	buf_free(&b);
	return scratch("tokenizer.json");
}

static struct prepare_spec one_input(const char **input, const char *name, const char *text)
{
	static char path[300], out[300], model[300];
	snprintf(path, sizeof path, "%s/%s", test_dir(), name);
	snprintf(out, sizeof out, "%s/out", test_dir());
	snprintf(model, sizeof model, "%s", tokenizer());
	unlink(scratch("out.idx"));
	unlink(scratch("out.bin"));
	put_file(path, text, strlen(text));
	*input = path;
	return (struct prepare_spec){.inputs = input,
	                             .n_inputs = 1,
	                             .tokenizer = model,
	                             .output_prefix = out,
	                             .json_key = "text",
	                             .workers = 2};
}

/* The documents of P as text: "<EOD>" is '$', a merged token its bytes in brackets, documents end in '|'. */
static const char *documents(const char *prefix)
{
	static char text[2000];
	static const char *const merged[] = {"$", "[th]", "[the]", "[\n\n]"};
	struct indexed *x;
	struct err e = {0};
	size_t n = 0;
	if (!CHECK(!indexed_open(prefix, &x, &e)))
		return e.text[0] ? "cannot open" : "";
	for (uint64_t d = 0; d < indexed_documents(x); d++) {
		int32_t ids[300];
		uint64_t first = indexed_document_first(x, d),
		         count = indexed_document_first(x, d + 1) - first;
		CHECK(count <= 300 && !indexed_read(x, first, count, 260, ids, &e));
		for (uint64_t i = 0; i < count; i++)
			n += (size_t)(ids[i] < EOD ? sprintf(text + n, "%c", ids[i])
			                           : sprintf(text + n, "%s", merged[ids[i] - EOD]));
		n += (size_t)sprintf(text + n, "|");
	}
	indexed_close(x);
	return text;
}

static bool nothing_left(void)
{
	return access(scratch("out.idx"), F_OK) && access(scratch("out.bin"), F_OK) &&
	       access(scratch("out.idx.tmp"), F_OK) && access(scratch("out.bin.tmp"), F_OK);
}

TEST(inputs_become_documents)
{
	static const struct {
		const char *name, *text;
		enum prepare_split split;
		bool eod;
		const char *expected;
	} rows[] = {
	        {"a.txt", "ab\n\ncd\n", PREPARE_SPLIT_NONE, false, "ab\n\ncd\n|"},
	        {"a.txt", "ab\r\n\n\nthe", PREPARE_SPLIT_NONE, true, "ab\r[\n\n]\n[the]$|"},
	        {"a.txt", "ab\n\n \r\n cd\r\ne", PREPARE_SPLIT_LINES, true, "ab$| cd$|e$|"},
	        {"a.txt", "ab\n\n\n cd\ne\n \nf\n", PREPARE_SPLIT_BLANK_LINES, false, "ab| cd\ne|f|"},
	        {"a.txt", "\n\nab\r\n\r\nc\r\n", PREPARE_SPLIT_BLANK_LINES, true, "ab$|c$|"},
	        {"a.jsonl",
	         "{\"text\": \"ab\\n\", \"x\": 1}\n\n{\"text\": \"th\"}\r\n{\"text\": \"\"}\n{\"text\": "
	         "\"e\"}",
	         PREPARE_SPLIT_NONE, true, "ab\n$|[th]$|e$|"},
	        {"a.json", "{\"text\": \"<|endoftext|>\"}", PREPARE_SPLIT_LINES, false, "$|"},
	};
	for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
		const char *input;
		struct prepare_spec spec = one_input(&input, rows[i].name, rows[i].text);
		struct prepare_stats stats;
		struct err e = {0};
		spec.split = rows[i].split;
		spec.append_eod = rows[i].eod;
		if (!CHECK(!prepare_run(&spec, &stats, &e)))
			fprintf(stderr, "%s\n", e.text);
		CHECK_STR(documents(spec.output_prefix), rows[i].expected);
		CHECK_INT(stats.empty, i == 5);
	}
}

TEST(inputs_are_taken_in_order)
{
	const char *input, *inputs[3];
	struct prepare_spec spec = one_input(&input, "one.txt", "1");
	struct prepare_stats stats;
	struct err e = {0};
	put_file(scratch("two.jsonl"), "{\"body\": \"2\"}", 13);
	put_file(scratch("empty.txt"), "", 0);
	inputs[0] = scratch("two.jsonl");
	inputs[1] = scratch("empty.txt");
	inputs[2] = input;
	spec.inputs = inputs;
	spec.n_inputs = 3;
	spec.json_key = "body";
	MUST(!prepare_run(&spec, &stats, &e));
	CHECK_STR(documents(spec.output_prefix), "2|1|");
	CHECK_INT(stats.documents, 2);
	CHECK_INT(stats.tokens, 2);
	CHECK_INT(stats.text_bytes, 2);
}

static uint64_t put_random_jsonl(const char *path, uint64_t lines)
{
	struct buf b = {0};
	uint64_t key = rng_key(4, "documents");
	for (uint64_t i = 0; i < lines; i++) {
		buf_puts(&b, "{\"text\": \"");
		for (uint64_t k = 0, n = rng_bits(key, 100 * i) % 90; k < n; k++)
			buf_printf(&b, "%c", "the ab.,ht"[rng_bits(key, 100 * i + k + 1) % 10]);
		buf_puts(&b, "\"}\n");
	}
	put_file(path, b.data, b.length);
	uint64_t bytes = b.length;
	buf_free(&b);
	return bytes;
}

TEST(output_does_not_depend_on_workers)
{
	static const int workers[] = {1, 2, 7};
	static const char *const suffix[] = {".idx", ".bin"};
	const char *input;
	char *first[2] = {NULL, NULL};
	size_t first_bytes[2] = {0, 0};
	struct prepare_spec spec = one_input(&input, "many.jsonl", "");
	MUST(put_random_jsonl(input, 30000) > 1 << 20);
	for (int i = 0; i < 3; i++) {
		struct prepare_stats stats;
		struct err e = {0};
		spec.workers = workers[i];
		MUST(!prepare_run(&spec, &stats, &e));
		for (int k = 0; k < 2; k++) {
			char path[310], *data;
			size_t bytes;
			snprintf(path, sizeof path, "%s%s", spec.output_prefix, suffix[k]);
			MUST(!sys_read_file(path, 1 << 26, &data, &bytes, &e));
			if (!first[k]) {
				first[k] = data;
				first_bytes[k] = bytes;
				continue;
			}
			CHECK(bytes == first_bytes[k] && !memcmp(data, first[k], bytes));
			free(data);
		}
	}
	free(first[0]);
	free(first[1]);
}

/* A chunk never changes the tokens: "\n\n" stays one token, and the whole stays one document. */
TEST(chunks_do_not_show)
{
	struct buf b = {0};
	char *whole, *cut;
	size_t whole_bytes, cut_bytes;
	const char *input;
	struct prepare_stats stats;
	struct err e = {0};
	for (uint64_t i = 0; i < 20000; i++)
		buf_printf(
		        &b, "%s",
		        (const char *[]){"the", " ", "\n", "\n", "ab", "\xc3\xa9", "."}[rng_bits(8, i) % 7]);
	struct prepare_spec spec = one_input(&input, "long.txt", b.data);
	buf_free(&b);
	MUST(!prepare_run(&spec, &stats, &e));
	MUST(!sys_read_file(scratch("out.bin"), 1 << 26, &whole, &whole_bytes, &e));
	spec.chunk_bytes = 100;
	MUST(!prepare_run(&spec, &stats, &e));
	CHECK_INT(stats.documents, 1);
	MUST(!sys_read_file(scratch("out.bin"), 1 << 26, &cut, &cut_bytes, &e));
	CHECK(whole_bytes == cut_bytes && !memcmp(whole, cut, cut_bytes));
	free(whole);
	free(cut);
}

TEST(bad_lines_are_named)
{
	static const struct {
		const char *text, *part;
	} bad[] = {
	        {"{\"text\": \"a\"}\n{\"text\": }\n", "bad.jsonl:2:10: JSON: "},
	        {"\n\n{\"text\": \"a\"", "bad.jsonl:3:"},
	        {"{\"text\": \"a\"}\n{\"tex\": \"a\"}\n", "bad.jsonl:2: no string \"text\" in this object"},
	        {"{\"text\": 1}", "bad.jsonl:1: no string \"text\""},
	        {"[1]", "bad.jsonl:1: no string \"text\" in what is no object"},
	        {"{\"text\": \"\"}", "there is no document to write"},
	        {"", "there is no document to write"},
	};
	for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
		const char *input;
		struct prepare_spec spec = one_input(&input, "bad.jsonl", bad[i].text);
		struct prepare_stats stats;
		struct err e = {0};
		CHECK_INT(prepare_run(&spec, &stats, &e), EXIT_BAD_DATA);
		CHECK_HAS(e.text, bad[i].part);
		CHECK(nothing_left());
	}
}

TEST(bad_lines_can_be_skipped)
{
	const char *input;
	struct prepare_spec spec =
	        one_input(&input, "skip.jsonl", "x\n{\"text\": \"a\"}\n{}\n{\"text\": \"b\"}\n");
	struct prepare_stats stats;
	struct err e = {0};
	spec.skip_bad_lines = true;
	MUST(!prepare_run(&spec, &stats, &e));
	CHECK_STR(documents(spec.output_prefix), "a|b|");
	CHECK_INT(stats.bad_lines, 2);
	CHECK_INT(stats.empty, 0);
	CHECK_HAS(stats.bad_line[0], "skip.jsonl:1:1: JSON");
	CHECK_HAS(stats.bad_line[1], "skip.jsonl:3: no string");
}

/* The first failure in the order of the inputs is the one that is reported, whoever finds it first. */
TEST(first_bad_line_wins)
{
	const char *input;
	struct prepare_spec spec = one_input(&input, "first.jsonl", "");
	struct buf b = {0};
	for (int i = 1; i <= 30000; i++)
		buf_puts(&b, i >= 9000 && i % 1000 == 0 ? "{]\n"
		                                        : "{\"text\": \"the the the the the the the\"}\n");
	put_file(input, b.data, b.length);
	buf_free(&b);
	spec.workers = 8;
	for (int i = 0; i < 5; i++) {
		struct prepare_stats stats;
		struct err e = {0};
		CHECK_INT(prepare_run(&spec, &stats, &e), EXIT_BAD_DATA);
		CHECK_HAS(e.text, "first.jsonl:9000:2: ");
		CHECK(nothing_left());
	}
}

TEST(missing_things_are_named)
{
	const char *input, *none = "/nonexistent/a.txt", *packed = "a.jsonl.zst";
	struct prepare_spec good = one_input(&input, "m.txt", "a"), spec = good;
	struct prepare_stats stats;
	struct err e = {0};
	spec.inputs = &none;
	CHECK_INT(prepare_run(&spec, &stats, &e), EXIT_NO_INPUT);
	CHECK_HAS(e.text, "/nonexistent/a.txt");
	CHECK(nothing_left());
	spec.inputs = &packed;
	CHECK_INT(prepare_run(&spec, &stats, &e), EXIT_UNAVAILABLE);
	CHECK_HAS(e.text, "zstd -dc a.jsonl.zst");
	spec = good;
	spec.tokenizer = "/nonexistent/t.json";
	CHECK_INT(prepare_run(&spec, &stats, &e), EXIT_NO_INPUT);
	CHECK_HAS(e.text, "/nonexistent/t.json");
	spec = good;
	spec.output_prefix = "/nonexistent/out";
	CHECK_INT(prepare_run(&spec, &stats, &e), EXIT_IO);
	CHECK_HAS(e.text, "/nonexistent/out.bin.tmp: cannot create: No such file");
}

TEST(a_stop_leaves_nothing)
{
	const char *input;
	volatile sig_atomic_t stop = 1;
	struct prepare_spec spec = one_input(&input, "s.txt", "a");
	struct prepare_stats stats;
	struct err e = {0};
	spec.stop = &stop;
	CHECK_INT(prepare_run(&spec, &stats, &e), EXIT_AGAIN);
	CHECK(nothing_left());
}

TEST(failing_calls_leave_nothing)
{
	const char *input;
	struct prepare_spec spec = one_input(&input, "io.txt", "the text\n");
	int failed = 0, last = 1; /* a failing close() of a file that was read does no harm */
	for (int n = 1; n < 50; n++) {
		struct prepare_stats stats;
		struct err e = {0};
		unlink(scratch("out.idx"));
		unlink(scratch("out.bin"));
		sys_fail_nth(n, EIO);
		int rc = prepare_run(&spec, &stats, &e);
		sys_fail_nth(0, 0);
		CHECK(access(scratch("out.idx.tmp"), F_OK) && access(scratch("out.bin.tmp"), F_OK));
		if (!access(scratch("out.idx"), F_OK)) /* written, and the folder could not be flushed */
			CHECK_STR(documents(spec.output_prefix), "[the] text\n|");
		CHECK(!rc == !e.text[0]);
		failed += rc != 0;
		last = rc;
	}
	CHECK(failed >= 9);
	CHECK_INT(last, 0);
}

int main(int argc, char **argv)
{
	return test_main(argc, argv);
}
