/* pentad prepare: text to an indexed dataset. */
#include "apps/commands.h"
#include "apps/options.h"
#include "base/err.h"
#include "base/log.h"
#include "base/text.h"
#include "data/prepare.h"

#include <inttypes.h>
#include <signal.h>
#include <string.h>
#include <unistd.h>

static volatile sig_atomic_t stop_signal;

static void on_stop(int number)
{
	stop_signal = number;
}

static void catch_stop(void)
{
	struct sigaction sa = {.sa_handler = on_stop, .sa_flags = SA_RESETHAND};
	sigemptyset(&sa.sa_mask);
	sigaction(SIGINT, &sa, NULL);
	sigaction(SIGTERM, &sa, NULL);
}

static const struct {
	const char *word;
	enum prepare_split split;
} splits[] = {
#define SPLIT_ROW(name, word, doc) {word, PREPARE_SPLIT_##name},
        PREPARE_SPLITS(SPLIT_ROW)
#undef SPLIT_ROW
};

static int find_split(const char *word, enum prepare_split *out)
{
	for (size_t i = 0; i < sizeof splits / sizeof *splits; i++)
		if (!strcmp(splits[i].word, word)) {
			*out = splits[i].split;
			return 0;
		}
	log_error("--split %s: allowed are none, lines, blank-lines", word);
	return EXIT_USAGE;
}

static void say_result(const struct prepare_spec *spec, const struct prepare_stats *s)
{
	char documents[32], tokens[32], text[32], rate[32], speed[32];
	double seconds = s->seconds > 1e-9 ? s->seconds : 1e-9;
	log_info("%s.bin, %s.idx: %" PRIu64 " documents (%s), %" PRIu64
	         " tokens (%s) of %s of text, %.3f bytes a token",
	         spec->output_prefix, spec->output_prefix, s->documents,
	         text_count(documents, sizeof documents, (double)s->documents), s->tokens,
	         text_count(tokens, sizeof tokens, (double)s->tokens),
	         text_bytes(text, sizeof text, (double)s->text_bytes),
	         (double)s->text_bytes / (double)s->tokens);
	log_info("%.1f s, workers: %d, %s/s, %s tokens/s", seconds, spec->workers,
	         text_bytes(rate, sizeof rate, (double)s->text_bytes / seconds),
	         text_count(speed, sizeof speed, (double)s->tokens / seconds));
	if (s->empty)
		log_info("%" PRIu64 " documents without text were not written", s->empty);
	if (s->bad_lines)
		log_warn("%" PRIu64 " bad lines were skipped:", s->bad_lines);
	for (uint64_t i = 0; i < s->bad_lines && i < PREPARE_BAD_LINES; i++)
		log_warn("%s", s->bad_line[i]);
}

/* What cli_parse cannot see. */
static int check(struct prepare_spec *spec, const char *split, int64_t workers)
{
	static const char *const missing = "prepare needs --%s; `pentad prepare --help` shows an example";
	const char *absent = !spec->n_inputs        ? "input"
	                     : !spec->tokenizer     ? "tokenizer"
	                     : !spec->output_prefix ? "output-prefix"
	                                            : NULL;
	if (absent) {
		log_error(missing, absent);
		return EXIT_USAGE;
	}
	if (workers < 1 || workers > 1024) {
		log_error("--workers %" PRId64 ": allowed is 1 to 1024", workers);
		return EXIT_USAGE;
	}
	spec->workers = (int)workers;
	return find_split(split, &spec->split);
}

static int run(struct prepare_spec *spec)
{
	struct prepare_stats stats;
	struct err e = {0};
	catch_stop();
	spec->stop = &stop_signal;
	int rc = prepare_run(spec, &stats, &e);
	if (rc)
		log_error("%s", e.text);
	else
		say_result(spec, &stats);
	if (rc && stop_signal)
		raise(stop_signal); /* as if it had not been caught, so that a shell sees it */
	return rc;
}

int prepare_main(int argc, char **argv)
{
	struct prepare_spec spec = {.json_key = "text"};
	struct cli_list inputs = {0};
	const char *split = "none";
	int64_t workers = sysconf(_SC_NPROCESSORS_ONLN);
	const struct cli_option options[] = {
	        {"input", CLI_MANY, &inputs, "FILE",
	         "text, or JSON lines (.jsonl, .json, .ndjson), plain or gzip; - is standard input"},
	        {"tokenizer", CLI_STRING, &spec.tokenizer, "T.json", "tokenizer.json"},
	        {"output-prefix", CLI_STRING, &spec.output_prefix, "P", "writes P.bin and P.idx"},
	        {"workers", CLI_INT, &workers, "N", "threads that encode; the output does not depend on it"},
	        {"append-eod", CLI_FLAG, &spec.append_eod, NULL,
	         "end-of-document token behind each document"},
	        {"json-key", CLI_STRING, &spec.json_key, "KEY", "member of a JSON line that holds the text"},
	        {"jsonl", CLI_FLAG, &spec.jsonl, NULL, "inputs are JSON lines whatever their names"},
	        {"split", CLI_STRING, &split, "HOW",
	         "documents of a text file: none (each file is one), lines (each line), blank-lines"},
	        {"skip-bad-lines", CLI_FLAG, &spec.skip_bad_lines, NULL,
	         "count JSON lines that cannot be read instead of stopping"},
	};
	struct cli cli = {
	        .usage = "prepare --input FILE… --tokenizer T.json --output-prefix P [--workers N] "
	                 "[--append-eod]",
	        .doc = "Encodes text into an indexed dataset in Megatron's format. A JSON line is one "
	               "document.\n"
	               "A text file above 64 MiB that is one document is encoded in chunks that end at a "
	               "line\n"
	               "break between two printable characters.",
	        .example =
	                "prepare --input corpus.jsonl --tokenizer tokenizer.json --output-prefix data/demo "
	                "--append-eod",
	        .options = options,
	        .n = sizeof options / sizeof *options};
	int code;
	if (!cli_parse(&cli, argc, argv, &code))
		return code;
	spec.inputs = inputs.items;
	spec.n_inputs = inputs.n;
	code = check(&spec, split, workers);
	if (!code)
		code = run(&spec);
	cli_free(&cli);
	return code;
}
