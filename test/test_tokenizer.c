/* Tokenizers: ids as Hugging Face gives them, round trips, training, files that are not what they should be.
 */
#include "base/err.h"
#include "base/json.h"
#include "base/mem.h"
#include "base/rng.h"
#include "base/sys.h"
#include "data/bpe_train.h"
#include "data/regex.h"
#include "data/textfile.h"
#include "data/textfile_gzip.h"
#include "data/tokenizer.h"
#include "data/unicode.h"
#include "test/test.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>

/* A whole file, gunzipped where it is gzip; NUL-terminated. */
static int read_all(const char *name, struct buf *out, struct err *e)
{
	struct textfile *f;
	const char *line;
	size_t length;
	if (textfile_open(test_golden(name), &f, e))
		return e->code;
	int rc;
	while (!(rc = textfile_line(f, &line, &length, e)) && line) {
		buf_add(out, line, length);
		buf_add(out, "\n", 1);
	}
	textfile_close(f);
	return rc;
}

static struct tokenizer *load(const char *name)
{
	struct tokenizer *t = NULL;
	struct buf b = {0};
	struct err e = {0};
	if (read_all(name, &b, &e) || tokenizer_parse(name, b.data, b.length, &t, &e))
		test_failed(__FILE__, __LINE__, "%s", e.text);
	buf_free(&b);
	return t;
}

static bool ids_equal(const int32_t *ids, size_t n, const struct json *want)
{
	size_t i = 0;
	if (n != want->count)
		return false;
	JSON_EACH (w, want)
		if (ids[i++] != w->integer)
			return false;
	return true;
}

static bool text_equal(const struct buf *b, const char *text, size_t length_bytes)
{
	return b->length == length_bytes && !memcmp(b->data ? b->data : "", text, length_bytes);
}

/* One {"text", "ids"[, "decoded"]}. */
static void check_case(const struct tokenizer *t, struct encoder *enc, const struct json *c,
                       const char *where)
{
	const struct json *text = json_get(c, "text"), *decoded = json_get(c, "decoded");
	struct err e = {0};
	struct buf b = {0};
	int32_t *ids;
	size_t n;
	if (encoder_encode(enc, text->string, text->length, &ids, &n, &e))
		test_failed(__FILE__, __LINE__, "%s: %s", where, e.text);
	else if (!ids_equal(ids, n, json_get(c, "ids")))
		test_failed(__FILE__, __LINE__, "%s: other ids for '%s'", where, text->string);
	else if (tokenizer_decode(t, ids, n, &b, &e))
		test_failed(__FILE__, __LINE__, "%s: %s", where, e.text);
	else if (decoded && !text_equal(&b, decoded->string, decoded->length))
		test_failed(__FILE__, __LINE__, "%s: '%s' for '%s'", where, b.data, decoded->string);
	buf_free(&b);
}

/* Calls each for every JSON line of a golden file; the number of lines. */
static int each_line(const char *name, void (*each)(void *, const struct json *, int line), void *context)
{
	struct textfile *f;
	struct err e = {0};
	const char *text;
	size_t length;
	int n = 0;
	if (textfile_open(test_golden(name), &f, &e))
		return test_failed(__FILE__, __LINE__, "%s", e.text), 0;
	while (!textfile_line(f, &text, &length, &e) && text) {
		struct arena a = {0};
		struct json *v;
		if (json_parse(&a, name, text, length, &v, &e))
			test_failed(__FILE__, __LINE__, "%s", e.text);
		else
			each(context, v, ++n);
		arena_free(&a);
	}
	textfile_close(f);
	return n;
}

struct golden {
	struct tokenizer *t;
	struct encoder *enc;
	const char *name;
};

static void golden_line(void *context, const struct json *v, int line)
{
	const struct golden *g = context;
	char where[80];
	snprintf(where, sizeof where, "%s:%d", g->name, line);
	check_case(g->t, g->enc, v, where);
}

static void check_golden(const char *file, const char *lines)
{
	struct golden g = {.t = load(file), .name = lines};
	MUST(g.t);
	g.enc = encoder_new(g.t);
	CHECK_INT(each_line(lines, golden_line, &g), 382);
	encoder_free(g.enc);
	tokenizer_free(g.t);
}

TEST(byte_level_equals_hugging_face)
{
	check_golden("tokenizers/byte_level_bpe.json", "tokenizers/byte_level_bpe.jsonl");
}

TEST(llama3_equals_hugging_face)
{
	check_golden("tokenizers/llama3_bpe.json", "tokenizers/llama3_bpe.jsonl");
}

TEST(gpt2_equals_hugging_face)
{
	if (gzip_missing())
		return;
	check_golden("tokenizers/gpt2.json.gz", "tokenizers/gpt2.jsonl");
}

/* Each line has the parts of a file that are not the model, and cases of Hugging Face for it. */
struct variants {
	struct buf model; /* `{…}` */
	int unavailable, cases;
};

static void variant_line(void *context, const struct json *v, int line)
{
	struct variants *all = context;
	struct tokenizer *t;
	struct err e = {0};
	struct buf b = {0};
	char where[40];
	snprintf(where, sizeof where, "variants.jsonl:%d", line);
	buf_printf(&b, "{%s, \"decoder\": {\"type\": \"ByteLevel\"}, \"model\": %s}",
	           json_get_string(v, "parts", ""), all->model.data);
	int rc = tokenizer_parse(where, b.data, b.length, &t, &e);
	buf_free(&b);
	if (rc == EXIT_UNAVAILABLE && (regex_missing() || unicode_forms_missing())) {
		all->unavailable++;
		return;
	}
	if (rc) {
		test_failed(__FILE__, __LINE__, "%s", e.text);
		return;
	}
	struct encoder *enc = encoder_new(t);
	JSON_EACH (c, json_get(v, "cases")) {
		check_case(t, enc, c, where);
		all->cases++;
	}
	encoder_free(enc);
	tokenizer_free(t);
}

TEST(every_part_equals_hugging_face)
{
	struct variants all = {0};
	struct buf file = {0};
	struct arena a = {0};
	struct err e = {0};
	struct json *root;
	MUST(!read_all("tokenizers/byte_level_bpe.json", &file, &e));
	MUST(!json_parse(&a, "t.json", file.data, file.length, &root, &e));
	size_t model = json_get(root, "model")->offset_bytes; /* the last member */
	const char *end = strrchr(file.data, '}');
	buf_add(&all.model, file.data + model, (size_t)(end - file.data) - model);
	CHECK_INT(each_line("tokenizers/variants.jsonl", variant_line, &all), 135);
	CHECK(all.unavailable || all.cases == 664);
	buf_free(&all.model);
	buf_free(&file);
	arena_free(&a);
}

static uint32_t random_code_point(uint64_t key, uint64_t *i)
{
	static const uint32_t ends[] = {0x80, 0x80, 0x80, 0x250, 0x800, 0x3100, 0x10000, 0x110000};
	uint32_t end = ends[rng_bits(key, (*i)++) % 8], c = (uint32_t)(rng_bits(key, (*i)++) % end);
	return c >= 0xd800 && c < 0xe000 ? c - 0x800 : c;
}

static void check_round_trip(const char *name)
{
	struct tokenizer *t = load(name);
	MUST(t);
	struct encoder *enc = encoder_new(t);
	uint64_t key = rng_key(1, name), at = 0;
	for (int k = 0; k < 500; k++) {
		struct buf text = {0}, whole = {0}, pieces = {0};
		struct err e = {0};
		int32_t *ids;
		size_t n;
		for (uint64_t left = rng_bits(key, at++) % 80; left; left--)
			unicode_put(&text, random_code_point(key, &at));
		CHECK(!encoder_encode(enc, text.data ? text.data : "", text.length, &ids, &n, &e));
		CHECK(!tokenizer_decode(t, ids, n, &whole, &e));
		CHECK(text_equal(&text, whole.data ? whole.data : "", whole.length));
		for (size_t i = 0; i < n; i++) {
			CHECK(ids[i] >= 0 && ids[i] < tokenizer_vocab_size(t));
			CHECK(!tokenizer_decode_bytes(t, ids[i], &pieces, &e));
		}
		CHECK(text_equal(&text, pieces.data ? pieces.data : "", pieces.length));
		buf_free(&text);
		buf_free(&whole);
		buf_free(&pieces);
	}
	encoder_free(enc);
	tokenizer_free(t);
}

TEST(any_text_comes_back)
{
	if (!gzip_missing())
		check_round_trip("tokenizers/gpt2.json.gz");
	check_round_trip("tokenizers/byte_level_bpe.json");
	check_round_trip("tokenizers/llama3_bpe.json");
}

#define REPLACED "\xef\xbf\xbd"
TEST(bytes_that_are_no_utf8_are_replaced)
{
	static const struct {
		const char *bytes, *text;
	} cases[] = {
	        {"a\xff"
	         "b",
	         "a" REPLACED "b"},
	        {"\xf1\x80\x80\xe1\x80\xc2\x62\x80\x63\x80\xbf\x64", /* Unicode 16, table 3-11 */
	         REPLACED REPLACED REPLACED "b" REPLACED "c" REPLACED REPLACED "d"},
	        {"\xc0\xaf\xe0\x80\xbf\xf0\x81\x82\x41", /* table 3-8: no shortest form */
	         REPLACED REPLACED REPLACED REPLACED REPLACED REPLACED REPLACED REPLACED "A"},
	        {"\xed\xa0\x80", REPLACED REPLACED REPLACED}, /* a surrogate */
	        {"\xf4\x91\x92\x93", REPLACED REPLACED REPLACED REPLACED},
	        {"\xe2\x82", REPLACED},
	        {"\xf0\x9f\x98", REPLACED},
	};
	struct tokenizer *t = load("tokenizers/byte_level_bpe.json");
	MUST(t);
	struct encoder *enc = encoder_new(t);
	for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
		struct err e = {0};
		struct buf b = {0};
		int32_t *ids;
		size_t n;
		CHECK(!encoder_encode(enc, cases[i].bytes, strlen(cases[i].bytes), &ids, &n, &e));
		CHECK(!tokenizer_decode(t, ids, n, &b, &e));
		CHECK_STR(b.data, cases[i].text);
		buf_free(&b);
	}
	encoder_free(enc);
	tokenizer_free(t);
}

TEST(classes_are_those_of_unicode_16)
{
	const uint8_t *c = unicode_classes();
	CHECK(c[0x85] & UNICODE_SPACE && c[0xa0] & UNICODE_SPACE && c[0x3000] & UNICODE_SPACE);
	CHECK(!(c[0x180e] & UNICODE_SPACE) && !(c[0x200b] & UNICODE_SPACE) && !(c[0x1c] & UNICODE_SPACE));
	CHECK(c[0xaa] & UNICODE_LETTER && c[0x10d4a] & UNICODE_LETTER); /* the latter came with 16.0 */
	CHECK(c[0xbd] & UNICODE_NUMBER && c[0x2167] & UNICODE_NUMBER && !(c[0x4e00] & UNICODE_NUMBER));
	CHECK(!(c[0x301] & UNICODE_LETTER) && c[0x301] & UNICODE_MARK && c[0x301] & UNICODE_WORD);
	CHECK(c['_'] & UNICODE_WORD && c['$'] & UNICODE_PUNCTUATION && !(c['a'] & UNICODE_PUNCTUATION));
	CHECK_INT(unicode_category('A'), UNICODE_LU);
	CHECK_INT(unicode_category(0x10ffff), UNICODE_CN);
	CHECK_INT(unicode_category(0x110000), UNICODE_CN);
	size_t letters = 0;
	for (uint32_t i = 0; i < 0x110000; i++)
		letters += unicode_category(i) <= UNICODE_LO;
	CHECK_INT(letters, 141028);
}

TEST(long_pieces_take_no_square_time)
{
	struct tokenizer *t = load("tokenizers/byte_level_bpe.json");
	MUST(t);
	struct encoder *enc = encoder_new(t);
	enum { N = 1 << 21 };
	char *text = mem_array(N, 1);
	struct err e = {0};
	int32_t *ids;
	size_t n;
	for (size_t i = 0; i < N; i++)
		text[i] = (char)('a' + rng_bits(3, i) % 3);
	CHECK(!encoder_encode(enc, text, N, &ids, &n, &e));
	struct buf b = {0};
	CHECK(!tokenizer_decode(t, ids, n, &b, &e));
	CHECK(text_equal(&b, text, N));
	buf_free(&b);
	free(text);
	encoder_free(enc);
	tokenizer_free(t);
}

TEST(answers_about_tokens)
{
	if (gzip_missing())
		return;
	struct tokenizer *t = load("tokenizers/gpt2.json.gz"), *l = load("tokenizers/llama3_bpe.json");
	MUST(t && l);
	CHECK_INT(tokenizer_vocab_size(t), 50257);
	CHECK_INT(tokenizer_eod(t), 50256);
	CHECK_INT(tokenizer_eod(l), tokenizer_id(l, "<|end_of_text|>"));
	CHECK_INT(tokenizer_id(t, "<|endoftext|>"), 50256);
	CHECK_INT(tokenizer_id(t, "no such token"), -1);
	CHECK_STR(tokenizer_content(t, 995), "\xc4\xa0world");
	CHECK(!tokenizer_content(t, -1) && !tokenizer_content(t, 50257));
	CHECK(tokenizer_hash(t) != tokenizer_hash(l));
	CHECK_STR(tokenizer_path(l), "tokenizers/llama3_bpe.json");
	static const int32_t wrong[] = {50257, -1, INT32_MAX};
	for (size_t i = 0; i < 3; i++) {
		struct buf b = {0};
		struct err e = {0};
		char id[16];
		snprintf(id, sizeof id, "%d", wrong[i]);
		CHECK_INT(tokenizer_decode(t, &wrong[i], 1, &b, &e), EXIT_BAD_DATA);
		CHECK_HAS(e.text, id);
		CHECK_INT(tokenizer_decode_bytes(t, wrong[i], &b, &e), EXIT_BAD_DATA);
		buf_free(&b);
	}
	tokenizer_free(t);
	tokenizer_free(l);
}

struct shared {
	const struct tokenizer *t;
	const struct buf *text;
	uint64_t sum;
};

static void *encode_in_thread(void *context)
{
	struct shared *s = context;
	struct encoder *enc = encoder_new(s->t);
	struct err e = {0};
	int32_t *ids;
	size_t n;
	if (!encoder_encode(enc, s->text->data, s->text->length, &ids, &n, &e))
		for (size_t i = 0; i < n; i++)
			s->sum = s->sum * 31 + (uint64_t)ids[i];
	encoder_free(enc);
	return NULL;
}

TEST(threads_share_a_tokenizer)
{
	struct tokenizer *t = load("tokenizers/byte_level_bpe.json");
	struct buf text = {0};
	struct err e = {0};
	struct shared s[4];
	pthread_t thread[4];
	MUST(t && !read_all("text/genesis.txt", &text, &e));
	for (int i = 0; i < 4; i++) {
		s[i] = (struct shared){t, &text, 0};
		pthread_create(&thread[i], NULL, encode_in_thread, &s[i]);
	}
	for (int i = 0; i < 4; i++)
		pthread_join(thread[i], NULL);
	CHECK(s[0].sum && s[0].sum == s[1].sum && s[0].sum == s[2].sum && s[0].sum == s[3].sum);
	buf_free(&text);
	tokenizer_free(t);
}

/* Trains on the lines of the text, each with its end, as Hugging Face feeds a file. */
static int train(int64_t vocab_size, struct buf *json, struct bpe_train_stats *stats, struct err *e)
{
	static const char *const specials[] = {"<|endoftext|>"};
	struct bpe_train_spec spec = {.vocab_size = vocab_size, .specials = specials, .n_specials = 1};
	struct bpe_trainer *trainer = bpe_trainer_new();
	struct buf text = {0};
	int rc = read_all("text/genesis.txt", &text, e);
	for (char *p = text.data, *end; !rc && p && *p; p = end) {
		end = strchr(p, '\n') + 1;
		rc = bpe_trainer_add(trainer, p, (size_t)(end - p), e);
	}
	if (!rc)
		rc = bpe_trainer_run(trainer, &spec, json, stats, e);
	bpe_trainer_free(trainer);
	buf_free(&text);
	return rc;
}

static void check_merges(const struct json *merges)
{
	struct buf want = {0}, have = {0};
	struct err e = {0};
	MUST(!read_all("tokenizers/genesis_1200.merges", &want, &e));
	JSON_EACH (m, merges)
		if (m->type == JSON_STRING)
			buf_printf(&have, "%s\n", m->string);
		else
			buf_printf(&have, "%s %s\n", m->child->string, m->child->next->string);
	CHECK(text_equal(&have, want.data, want.length));
	buf_free(&want);
	buf_free(&have);
}

TEST(trains_the_merges_of_hugging_face)
{
	struct buf json = {0}, again = {0}, text = {0};
	struct arena a = {0};
	struct err e = {0};
	struct bpe_train_stats stats;
	struct json *root;
	struct tokenizer *t;
	int32_t *ids;
	size_t n;
	MUST(!train(1200, &json, &stats, &e) && !train(1200, &again, &stats, &e));
	CHECK(text_equal(&json, again.data, again.length));
	MUST(!json_parse(&a, "t.json", json.data, json.length, &root, &e));
	check_merges(json_get(json_get(root, "model"), "merges"));
	MUST(!tokenizer_parse("t.json", json.data, json.length, &t, &e));
	CHECK_INT(tokenizer_vocab_size(t), 1200);
	CHECK_INT(tokenizer_eod(t), 0);
	CHECK_INT(tokenizer_id(t, "!"), 1);
	struct encoder *enc = encoder_new(t);
	MUST(!read_all("text/genesis.txt", &text, &e));
	MUST(!encoder_encode(enc, text.data, text.length, &ids, &n, &e));
	CHECK(n > 0 && n < text.length / 2);
	for (size_t i = 0; i < n; i++)
		CHECK(ids[i] > 0 && ids[i] < 1200);
	encoder_free(enc);
	tokenizer_free(t);
	arena_free(&a);
	buf_free(&json);
	buf_free(&again);
	buf_free(&text);
}

TEST(training_wants_room_for_the_bytes)
{
	struct buf json = {0};
	struct bpe_train_stats stats;
	struct err e = {0};
	CHECK_INT(train(256, &json, &stats, &e), EXIT_USAGE);
	CHECK_HAS(e.text, "257");
	CHECK_INT(train((int64_t)1 << 40, &json, &stats, &e), EXIT_USAGE);
	CHECK_INT(json.length, 0);
	CHECK_INT(train(257, &json, &stats, &e), 0);
	CHECK_INT(stats.merges, 0);
	buf_free(&json);
}

#define BYTES "\"pre_tokenizer\": {\"type\": \"ByteLevel\"}, "
#define MODEL \
	"\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 0, \"b\": 1, \"ab\": 2}, \"merges\": [\"a b\"]}"
#define WITH_MODEL(members) "{" BYTES "\"model\": {\"type\": \"BPE\", " members "}}"
#define WITH_ADDED(member) "{" BYTES "\"added_tokens\": [" member "], " MODEL "}"
#define WITH_PRE(spec) "{\"pre_tokenizer\": " spec ", " MODEL "}"
#define SPLIT(rest)                                                                         \
	WITH_PRE("{\"type\": \"Sequence\", \"pretokenizers\": [{\"type\": \"Split\", " rest \
	         "}, {\"type\": \"ByteLevel\"}]}")

static const struct {
	const char *json, *part;
} bad_files[] = {
        {"", "t.json:1:1"},
        {"[]", "object"},
        {"{", "t.json:1:2"},
        {"{}", "model"},
        {"{" BYTES "\"model\": 3}", "model"},
        {"{" BYTES "\"model\": {\"type\": \"WordPiece\", \"vocab\": {}}}", "WordPiece"},
        {"{" BYTES "\"model\": {\"type\": \"Unigram\", \"vocab\": []}}", "Unigram"},
        {"{" BYTES "\"model\": {\"vocab\": {\"a\": 0}}}", "model.type"},
        {"{" MODEL "}", "ByteLevel"},
        {WITH_MODEL("\"merges\": []"), "vocab"},
        {WITH_MODEL("\"vocab\": [], \"merges\": []"), "vocab"},
        {WITH_MODEL("\"vocab\": {\"a\": -1}, \"merges\": []"), "t.json:1:"},
        {WITH_MODEL("\"vocab\": {\"a\": 16777216}, \"merges\": []"), "16777215"},
        {WITH_MODEL("\"vocab\": {\"a\": 1e3}, \"merges\": []"), "t.json:1:"},
        {WITH_MODEL("\"vocab\": {\"a\": 99999999999999999999}, \"merges\": []"), "t.json:1:"},
        {WITH_MODEL("\"vocab\": {\"a\": \"0\"}, \"merges\": []"), "'a'"},
        {WITH_MODEL("\"vocab\": {\"a\": 7, \"b\": 7}, \"merges\": []"), "7"},
        {WITH_MODEL("\"vocab\": {\"a\": 0}, \"merges\": {}"), "merges"},
        {WITH_MODEL("\"vocab\": {\"a\": 0}, \"merges\": [\"a b\"]"), "model.merges"},
        {WITH_MODEL("\"vocab\": {\"a\": 0, \"b\": 1}, \"merges\": [\"a b\"]"), "model.merges"},
        {WITH_MODEL("\"vocab\": {\"a\": 0, \"aa\": 1}, \"merges\": [\"a a\", \"aa\"]"), "model.merges"},
        {WITH_MODEL("\"vocab\": {\"a\": 0}, \"merges\": [\"a a a\"]"), "model.merges"},
        {WITH_MODEL("\"vocab\": {\"a\": 0}, \"merges\": [[\"a\"]]"), "model.merges"},
        {WITH_MODEL("\"vocab\": {\"a\": 0}, \"merges\": [[\"a\", 1]]"), "model.merges"},
        {WITH_MODEL("\"vocab\": {\"a\": 0}, \"merges\": [7]"), "model.merges"},
        {WITH_MODEL("\"vocab\": {\"a\": 0}, \"merges\": [], \"dropout\": 0.5"), "dropout"},
        {WITH_MODEL("\"vocab\": {\"a\": 0}, \"merges\": [], \"unk_token\": \"u\""), "unk_token"},
        {WITH_MODEL("\"vocab\": {\"a\": 0}, \"merges\": [], \"fuse_unk\": 1"), "fuse_unk"},
        {WITH_ADDED("3"), "t.json:1:"},
        {WITH_ADDED("{\"id\": 9}"), "content"},
        {WITH_ADDED("{\"id\": -9, \"content\": \"x\"}"), "t.json:1:"},
        {WITH_ADDED("{\"id\": 1, \"content\": \"x\"}"), "t.json:1:"},
        {WITH_ADDED("{\"id\": 3, \"content\": \"x\", \"lstrip\": 1}"), "lstrip"},
        {WITH_PRE("{\"type\": \"ByteLvel\"}"), "ByteLevel"},
        {WITH_PRE("{\"type\": 7}"), "pre_tokenizer"},
        {WITH_PRE("{\"type\": \"Metaspace\"}"), "pre_tokenizer"},
        {WITH_PRE("{\"type\": \"Sequence\"}"), "pre_tokenizer"},
        {WITH_PRE("{\"type\": \"ByteLevel\", \"use_regex\": \"yes\"}"), "use_regex"},
        {WITH_PRE("{\"type\": \"Sequence\", \"pretokenizers\": [{\"type\": \"ByteLevel\"}, {\"type\": "
                  "\"Digits\"}]}"),
         "last"},
        {SPLIT("\"behavior\": \"Isolated\""), "pattern"},
        {SPLIT("\"behavior\": \"isolated\", \"pattern\": {\"String\": \"x\"}"), "Isolated"},
        {SPLIT("\"behavior\": \"Isolated\", \"pattern\": {\"Regex\": \"(\"}"), ""},
        {"{\"normalizer\": {\"type\": \"NFX\"}, " BYTES MODEL "}", "NFX"},
        {"{\"decoder\": {\"type\": \"WordPiece\"}, " BYTES MODEL "}", "WordPiece"},
        {"{\"normalizer\": {\"type\": \"Replace\"}, " BYTES MODEL "}", "content"},
};

TEST(refuses_what_is_no_tokenizer)
{
	for (size_t i = 0; i < sizeof bad_files / sizeof *bad_files; i++) {
		struct tokenizer *t = NULL;
		struct err e = {0};
		int rc = tokenizer_parse("t.json", bad_files[i].json, strlen(bad_files[i].json), &t, &e);
		if (!rc)
			test_failed(__FILE__, __LINE__, "accepted: %s", bad_files[i].json);
		CHECK(!rc || rc == EXIT_BAD_DATA || (rc == EXIT_UNAVAILABLE && regex_missing()));
		CHECK(!rc || !t);
		tokenizer_free(t);
		CHECK_HAS(e.text, "t.json");
		CHECK_HAS(e.text, bad_files[i].part);
	}
	struct tokenizer *t;
	struct err e = {0};
	CHECK_INT(tokenizer_load("no/such/file.json", &t, &e), EXIT_NO_INPUT);
	CHECK_HAS(e.text, "no/such/file.json");
}

/* The steps of a match are limited: it ends with an error, or is answered at once by PCRE2's own means. */
TEST(a_hostile_pattern_does_not_hang)
{
	static const char json[] = SPLIT(
	        "\"behavior\": \"Isolated\", \"pattern\": {\"Regex\": \"(?:(a|b)+)+(?:a|b)+(?:(b|a)*)*$c\"}");
	struct tokenizer *t;
	struct err e = {0};
	int32_t *ids;
	size_t n;
	if (regex_missing())
		return;
	MUST(!tokenizer_parse("t.json", json, strlen(json), &t, &e));
	struct encoder *enc = encoder_new(t);
	int rc = encoder_encode(enc, "abababababababababababababababababababababababababab!", 53, &ids, &n,
	                        &e);
	CHECK(!rc || rc == EXIT_BAD_DATA);
	encoder_free(enc);
	tokenizer_free(t);
}

static void parse_and_encode(const char *json, size_t length_bytes, uint64_t *accepted)
{
	static const char text[] = "In the beginning <|endoftext|> God  created\r\n\xf0\x9f\x98\x80 123";
	struct tokenizer *t = NULL;
	struct err e = {0};
	int32_t *ids;
	size_t n;
	int rc = tokenizer_parse("t.json", json, length_bytes, &t, &e);
	if (rc) {
		CHECK(!t && e.text[0] && (rc == EXIT_BAD_DATA || rc == EXIT_UNAVAILABLE));
		return;
	}
	struct encoder *enc = encoder_new(t);
	struct buf b = {0};
	if (!encoder_encode(enc, text, sizeof text - 1, &ids, &n, &e))
		CHECK(!tokenizer_decode(t, ids, n, &b, &e));
	++*accepted;
	buf_free(&b);
	encoder_free(enc);
	tokenizer_free(t);
}

TEST(damaged_files_do_no_harm)
{
	struct buf json = {0};
	struct bpe_train_stats stats;
	struct err e = {0};
	uint64_t accepted = 0;
	MUST(!train(280, &json, &stats, &e));
	char *damaged = mem_array(json.length, 1);
	for (uint64_t k = 0; k < 400; k++) {
		memcpy(damaged, json.data, json.length);
		for (uint64_t i = 0; i <= k % 3; i++)
			damaged[rng_bits(k, 2 * i) % json.length] = (char)rng_bits(k, 2 * i + 1);
		parse_and_encode(damaged, json.length, &accepted);
		/* The parts before the vocabulary, where the structure is. */
		memcpy(damaged, json.data, json.length);
		damaged[rng_bits(k, 100) % 1000] = "0123456789{}[]\",:.-truefalsn "[rng_bits(k, 101) % 29];
		parse_and_encode(damaged, json.length, &accepted);
		parse_and_encode(json.data, rng_bits(k, 102) % json.length, &accepted);
	}
	CHECK(accepted > 20);
	free(damaged);
	buf_free(&json);
}

TEST(failed_reads_are_reported)
{
	char path[300];
	struct buf json = {0};
	struct bpe_train_stats stats;
	struct err e = {0};
	snprintf(path, sizeof path, "%s/t.json", test_dir());
	MUST(!train(300, &json, &stats, &e) && !sys_write_file(path, json.data, json.length, &e));
	int failures = 0;
	for (int nth = 1; nth < 12; nth++) {
		struct tokenizer *t = NULL;
		sys_fail_nth(nth, EIO);
		int rc = tokenizer_load(path, &t, &e);
		sys_fail_nth(0, 0);
		failures += rc != 0;
		CHECK(rc == EXIT_IO || rc == EXIT_NO_INPUT || rc == 0);
		CHECK(!rc == !!t);
		tokenizer_free(t);
	}
	CHECK(failures > 0 && failures < 11);
	buf_free(&json);
}

int main(int argc, char **argv)
{
	return test_main(argc, argv);
}
