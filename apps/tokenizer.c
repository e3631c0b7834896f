/* pentad tokenizer: trains a byte-level BPE, encodes, decodes. */
#include "apps/commands.h"
#include "apps/options.h"
#include "base/err.h"
#include "base/json.h"
#include "base/log.h"
#include "base/mem.h"
#include "base/sys.h"
#include "base/text.h"
#include "data/bpe_train.h"
#include "data/textfile.h"
#include "data/tokenizer.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

static int needs(const char *verb, const char *option)
{
	log_error("tokenizer %s needs --%s; `pentad tokenizer %s --help` shows an example", verb, option,
	          verb);
	return EXIT_USAGE;
}

/* Reads a JSON line. json_parse calls the place ":1:COLUMN: …", which becomes "FILE:LINE: column COLUMN: …".
 */
static int read_json(const struct textfile *f, const char *line, size_t length, struct arena *a,
                     struct json **out, struct err *e)
{
	struct err inner = {0};
	if (!json_parse(a, "", line, length, out, &inner))
		return 0;
	const char *place = strncmp(inner.text, ":1:", 3) ? NULL : inner.text + 3;
	return err_set(e, inner.code, "%s:%" PRIu64 ": %s%.400s", textfile_name(f), textfile_number(f),
	               place ? "column " : "", place ? place : inner.text);
}

static int text_of_line(const struct textfile *f, const struct json *object, const struct json **text,
                        struct err *e)
{
	*text = json_get_type(object, "text", JSON_STRING);
	if (*text)
		return 0;
	return err_set(e, EXIT_BAD_DATA, "%s:%" PRIu64 ": a line is {\"text\": \"…\"}", textfile_name(f),
	               textfile_number(f));
}

/* What is left of the file as one text. */
static int read_rest(struct textfile *f, struct buf *out, struct err *e)
{
	const char *line;
	size_t length;
	for (;;) {
		if (textfile_line(f, &line, &length, e))
			return e->code;
		if (!line)
			return 0;
		buf_add(out, line, length);
		if (textfile_line_ended(f))
			buf_add(out, "\n", 1);
	}
}

/* At once, so that a program at the other end of two pipes gets its answer. */
static int write_out(const struct buf *b, struct err *e)
{
	if (b->length && fwrite(b->data, 1, b->length, stdout) != b->length)
		return err_errno(e, EXIT_IO, "standard output");
	return fflush(stdout) ? err_errno(e, EXIT_IO, "standard output") : 0;
}

/* One encode or decode run. */
struct job {
	struct tokenizer *tokenizer;
	struct encoder *encoder;
	struct textfile *in;
	struct buf out, text;
	int32_t *ids;
	size_t n_ids, ids_cap;
};

static void put_ids(struct buf *out, const int32_t *ids, size_t n, const char *separator)
{
	char number[16];
	for (size_t i = 0; i < n; i++) {
		buf_puts(out, i ? separator : "");
		buf_add(out, number, (size_t)snprintf(number, sizeof number, "%" PRId32, ids[i]));
	}
}

static int encode_line(struct job *j, const struct json *object, struct err *e)
{
	const struct json *text;
	int32_t *ids;
	size_t n;
	if (text_of_line(j->in, object, &text, e))
		return e->code;
	if (encoder_encode(j->encoder, text->string, text->length, &ids, &n, e))
		return e->code;
	buf_puts(&j->out, "{\"ids\": [");
	put_ids(&j->out, ids, n, ", ");
	buf_puts(&j->out, "]}\n");
	return 0;
}

static int encode_text(struct job *j, struct err *e)
{
	int32_t *ids;
	size_t n;
	if (read_rest(j->in, &j->text, e) ||
	    encoder_encode(j->encoder, j->text.data ? j->text.data : "", j->text.length, &ids, &n, e))
		return e->code;
	put_ids(&j->out, ids, n, " ");
	buf_puts(&j->out, "\n");
	return write_out(&j->out, e);
}

static void add_id(struct job *j, int32_t id)
{
	j->ids = mem_grow(j->ids, j->n_ids, &j->ids_cap, sizeof *j->ids);
	j->ids[j->n_ids++] = id;
}

static int decode_line(struct job *j, const struct json *object, struct err *e)
{
	struct err inner = {0};
	const char *name = textfile_name(j->in);
	uint64_t line = textfile_number(j->in);
	const struct json *ids = json_get_type(object, "ids", JSON_ARRAY);
	if (!ids)
		return err_set(e, EXIT_BAD_DATA, "%s:%" PRIu64 ": a line is {\"ids\": [1, 2, …]}", name,
		               line);
	j->n_ids = 0;
	JSON_EACH (id, ids) {
		if (!id->is_integer || id->integer < 0 || id->integer > INT32_MAX)
			return err_set(e, EXIT_BAD_DATA, "%s:%" PRIu64 ": ids[%zu] is not an id", name, line,
			               j->n_ids);
		add_id(j, (int32_t)id->integer);
	}
	j->text.length = 0;
	if (tokenizer_decode(j->tokenizer, j->ids, j->n_ids, &j->text, &inner))
		return err_set(e, inner.code, "%s:%" PRIu64 ": %.400s", name, line, inner.text);
	buf_puts(&j->out, "{\"text\": ");
	json_put_string(&j->out, j->text.data ? j->text.data : "", j->text.length);
	buf_puts(&j->out, "}\n");
	return 0;
}

static int read_ids(struct job *j, const char *line, struct err *e)
{
	static const char space[] = " \t\r\f\v";
	for (line += strspn(line, space); *line; line += strspn(line, space)) {
		char *end;
		errno = 0;
		long long id = strtoll(line, &end, 10);
		if (end == line || errno || id < 0 || id > INT32_MAX || (*end && !strchr(space, *end)))
			return err_set(e, EXIT_BAD_DATA, "%s:%" PRIu64 ": '%.20s' is not an id",
			               textfile_name(j->in), textfile_number(j->in), line);
		add_id(j, (int32_t)id);
		line = end;
	}
	return 0;
}

static int decode_text(struct job *j, struct err *e)
{
	const char *line;
	size_t length;
	for (;;) {
		if (textfile_line(j->in, &line, &length, e))
			return e->code;
		if (!line)
			break;
		if (memchr(line, 0, length))
			return err_set(e, EXIT_BAD_DATA, "%s:%" PRIu64 ": a NUL among ids",
			               textfile_name(j->in), textfile_number(j->in));
		if (read_ids(j, line, e))
			return e->code;
	}
	if (tokenizer_decode(j->tokenizer, j->ids, j->n_ids, &j->out, e))
		return e->code;
	return write_out(&j->out, e);
}

static int each_line(struct job *j, int (*convert)(struct job *, const struct json *, struct err *),
                     struct err *e)
{
	const char *line;
	size_t length;
	for (int rc = 0; !rc;) {
		struct arena a = {0};
		struct json *object;
		if (textfile_line(j->in, &line, &length, e))
			return e->code;
		if (!line)
			break;
		j->out.length = 0;
		rc = read_json(j->in, line, length, &a, &object, e);
		if (!rc)
			rc = convert(j, object, e);
		if (!rc)
			rc = write_out(&j->out, e);
		arena_free(&a);
	}
	return e->code;
}

static int convert(const char *tokenizer, bool jsonl, bool encodes)
{
	struct job j = {0};
	struct err e = {0};
	int rc = tokenizer_load(tokenizer, &j.tokenizer, &e);
	if (!rc) {
		j.encoder = encoder_new(j.tokenizer);
		rc = textfile_open("-", &j.in, &e);
	}
	if (!rc && jsonl)
		rc = each_line(&j, encodes ? encode_line : decode_line, &e);
	else if (!rc)
		rc = encodes ? encode_text(&j, &e) : decode_text(&j, &e);
	if (rc)
		log_error("%s", e.text);
	encoder_free(j.encoder);
	tokenizer_free(j.tokenizer);
	textfile_close(j.in);
	buf_free(&j.out);
	buf_free(&j.text);
	free(j.ids);
	return rc;
}

static int run_convert(int argc, char **argv, bool encodes, const char *usage, const char *doc,
                       const char *example)
{
	const char *tokenizer = NULL;
	bool jsonl = false;
	int code;
	const struct cli_option options[] = {
	        {"tokenizer", CLI_STRING, &tokenizer, "T.json", "tokenizer.json"},
	        {"jsonl", CLI_FLAG, &jsonl, NULL, "a JSON object a line, both ways"},
	};
	struct cli cli = {.usage = usage,
	                  .doc = doc,
	                  .example = example,
	                  .options = options,
	                  .n = sizeof options / sizeof *options};
	if (!cli_parse(&cli, argc, argv, &code))
		return code;
	cli_free(&cli);
	return tokenizer ? convert(tokenizer, jsonl, encodes) : needs(argv[0], "tokenizer");
}

static int run_encode(int argc, char **argv)
{
	return run_convert(
	        argc, argv, true, "tokenizer encode --tokenizer T.json [--jsonl] < TEXT",
	        "Standard input is one text, its ids come on one line. With --jsonl each line\n"
	        "{\"text\": \"…\"} gives a line {\"ids\": […]}. Special tokens that stand in the text are\n"
	        "recognised, none are added.",
	        "tokenizer encode --tokenizer tokenizer.json --jsonl < texts.jsonl");
}

static int run_decode(int argc, char **argv)
{
	return run_convert(
	        argc, argv, false, "tokenizer decode --tokenizer T.json [--jsonl] < IDS",
	        "Standard input is ids with white space between them, their text comes out. With --jsonl\n"
	        "each line {\"ids\": […]} gives a line {\"text\": \"…\"}.",
	        "tokenizer decode --tokenizer tokenizer.json --jsonl < ids.jsonl");
}

static bool is_json_lines(const char *name)
{
	static const char *const suffixes[] = {".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz"};
	size_t n = strlen(name);
	for (size_t i = 0; i < sizeof suffixes / sizeof *suffixes; i++) {
		size_t k = strlen(suffixes[i]);
		if (n >= k && !strcasecmp(name + n - k, suffixes[i]))
			return true;
	}
	return false;
}

static int train_line(struct bpe_trainer *t, const struct textfile *f, const char *line, size_t length,
                      struct err *e)
{
	struct arena a = {0};
	struct json *object;
	const struct json *text;
	int rc = read_json(f, line, length, &a, &object, e);
	if (!rc)
		rc = text_of_line(f, object, &text, e);
	if (!rc)
		rc = bpe_trainer_add(t, text->string, text->length, e);
	arena_free(&a);
	return rc;
}

/* A text file is cut at its lines, which keep their ends. */
static int train_file(struct bpe_trainer *t, const char *path, bool jsonl, struct err *e)
{
	struct textfile *f;
	struct buf whole = {0};
	const char *line;
	size_t length;
	int rc = textfile_open(path, &f, e);
	if (rc)
		return rc;
	while (!(rc = textfile_line(f, &line, &length, e)) && line) {
		if (jsonl) {
			rc = train_line(t, f, line, length, e);
		} else {
			whole.length = 0;
			buf_add(&whole, line, length);
			buf_puts(&whole, textfile_line_ended(f) ? "\n" : "");
			rc = bpe_trainer_add(t, whole.data, whole.length, e);
		}
		if (rc)
			break;
	}
	buf_free(&whole);
	textfile_close(f);
	return rc;
}

static int train(const struct cli_list *inputs, bool jsonl, const struct bpe_train_spec *spec,
                 const char *output)
{
	struct bpe_trainer *t = bpe_trainer_new();
	struct bpe_train_stats stats;
	struct buf json = {0};
	struct err e = {0};
	char text[32], words[32];
	int rc = bpe_train_check(spec, &e);
	for (size_t i = 0; !rc && i < inputs->n; i++)
		rc = train_file(t, inputs->items[i], jsonl || is_json_lines(inputs->items[i]), &e);
	if (!rc)
		rc = bpe_trainer_run(t, spec, &json, &stats, &e);
	if (!rc)
		rc = sys_write_file(output, json.data, json.length, &e);
	if (rc)
		log_error("%s", e.text);
	else
		log_info("%s: %" PRId32 " tokens, %zu merges, from %s of text with %s different words",
		         output, stats.vocab_size, stats.merges,
		         text_bytes(text, sizeof text, (double)stats.text_bytes),
		         text_count(words, sizeof words, (double)stats.words));
	if (!rc && stats.vocab_size < spec->vocab_size)
		log_warn("the text has no more pairs to merge: %" PRId32 " tokens instead of %" PRId64,
		         stats.vocab_size, spec->vocab_size);
	buf_free(&json);
	bpe_trainer_free(t);
	return rc;
}

static int run_train(int argc, char **argv)
{
	static const char *const default_specials[] = {"<|endoftext|>"};
	struct bpe_train_spec spec = {.specials = default_specials, .n_specials = 1, .min_frequency = 1};
	struct cli_list inputs = {0}, specials = {0};
	const char *output = NULL;
	bool jsonl = false;
	int code;
	const struct cli_option options[] = {
	        {"input", CLI_MANY, &inputs, "FILE",
	         "text, or JSON lines with \"text\" (.jsonl), plain or gzip; - is standard input"},
	        {"vocab-size", CLI_INT, &spec.vocab_size, "N",
	         "tokens in all, at least 256 + special tokens"},
	        {"output", CLI_STRING, &output, "FILE", "tokenizer.json to write"},
	        {"special", CLI_MANY, &specials, "TOKEN",
	         "special tokens, ids from 0; default: <|endoftext|>"},
	        {"min-frequency", CLI_INT, &spec.min_frequency, "N",
	         "pairs that occur less often stay apart"},
	        {"jsonl", CLI_FLAG, &jsonl, NULL, "inputs are JSON lines whatever their names"},
	};
	struct cli cli = {
	        .usage = "tokenizer train --input FILE… --vocab-size N --output tokenizer.json [--special "
	                 "TOKEN…]",
	        .doc = "Learns a byte-level BPE with GPT-2's way of cutting text into words.",
	        .example = "tokenizer train --input corpus.txt --vocab-size 4096 --output tokenizer.json",
	        .options = options,
	        .n = sizeof options / sizeof *options};
	if (!cli_parse(&cli, argc, argv, &code))
		return code;
	if (specials.n) {
		spec.specials = specials.items;
		spec.n_specials = specials.n;
	}
	const char *missing = !inputs.n          ? "input"
	                      : !spec.vocab_size ? "vocab-size"
	                      : !output          ? "output"
	                                         : NULL;
	code = missing ? needs(argv[0], missing) : train(&inputs, jsonl, &spec, output);
	cli_free(&cli);
	return code;
}

static const struct verb {
	const char *name;
	int (*run)(int argc, char **argv);
	const char *doc;
} verbs[] = {
        {"train", run_train, "learns a byte-level BPE from text"},
        {"encode", run_encode, "text to ids"},
        {"decode", run_decode, "ids to text"},
};
enum { N_VERBS = sizeof verbs / sizeof *verbs };

static void help(void)
{
	printf("usage: pentad tokenizer train|encode|decode …\n\n");
	for (int i = 0; i < N_VERBS; i++)
		printf("  %-8s %s; see pentad tokenizer %s --help\n", verbs[i].name, verbs[i].doc,
		       verbs[i].name);
	printf("\nexample: pentad tokenizer encode --tokenizer tokenizer.json --jsonl < texts.jsonl\n");
}

int tokenizer_main(int argc, char **argv)
{
	const char *word = argc > 1 ? argv[1] : "";
	for (int i = 0; i < N_VERBS; i++)
		if (!strcmp(word, verbs[i].name))
			return verbs[i].run(argc - 1, argv + 1);
	if (!strcmp(word, "--help") || !strcmp(word, "-h")) {
		help();
		return 0;
	}
	const char *near = text_nearest(word, &verbs[0].name, N_VERBS, sizeof *verbs);
	log_error("tokenizer: '%s' is none of train, encode, decode%s%s%s", word,
	          near ? "; did you mean " : "", near ? near : "", near ? "?" : "");
	return EXIT_USAGE;
}
