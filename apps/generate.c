/* pentad generate: text from a checkpoint. */
#include "apps/commands.h"
#include "apps/options.h"
#include "base/err.h"
#include "base/json.h"
#include "base/log.h"
#include "base/sys.h"
#include "base/text.h"
#include "ckpt/ckpt.h"
#include "data/tokenizer.h"
#include "train/generate.h"
#include "train/run.h"
#include "train/state.h"

#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

struct request {
	const char *checkpoint, *tokenizer, *prompt;
	int64_t max_new_tokens;
	int64_t seed;
	struct sampling sampling;
};

struct session {
	struct weights weights;
	struct config config;
	bool configured;
	struct tokenizer *tokenizer;
	struct encoder *encoder;
	const struct backend *backend;
	struct stream *stream;
	struct generator *generator;
};

static bool exists(const char *path)
{
	struct stat st;
	return sys.stat(path, &st) == 0;
}

/* --tokenizer, or what the run was trained with, or tokenizer.json beside the checkpoint. */
static int open_tokenizer(struct session *s, const struct request *q, struct err *e)
{
	char beside[PATH_MAX];
	const struct json *meta = s->weights.ckpt ? ckpt_meta(s->weights.ckpt) : NULL;
	const char *trained = json_get_string(meta, "tokenizer_model", NULL);
	snprintf(beside, sizeof beside, "%s/tokenizer.json", q->checkpoint);
	const char *path = q->tokenizer ? q->tokenizer : trained && exists(trained) ? trained : beside;
	if (!exists(path))
		return err_set(e, EXIT_NO_INPUT, "%s: no tokenizer there; give one with --tokenizer FILE",
		               path);
	int rc = tokenizer_load(path, &s->tokenizer, e);
	if (rc)
		return rc;
	if (tokenizer_vocab_size(s->tokenizer) > s->config.model.vocab_size)
		return err_set(e, EXIT_BAD_DATA, "%s: %d tokens, the model knows %lld", path,
		               tokenizer_vocab_size(s->tokenizer), (long long)s->config.model.vocab_size);
	s->encoder = encoder_new(s->tokenizer);
	return 0;
}

static int open_session(struct session *s, const struct request *q, struct err *e)
{
	int rc = weights_open(q->checkpoint, &s->weights, e);
	if (rc)
		return rc;
	s->configured = true;
	rc = generate_read_config(&s->weights, &s->config, e);
	if (!rc)
		rc = open_tokenizer(s, q, e);
	if (!rc)
		rc = run_open_device(&s->config, (struct rank_on_host){0, 1}, &s->backend, &s->stream, e);
	return rc ? rc : generator_new(&s->config, &s->weights, s->backend, s->stream, &s->generator, e);
}

static void close_session(struct session *s)
{
	generator_free(s->generator);
	if (s->stream)
		s->backend->close(s->stream);
	encoder_free(s->encoder);
	tokenizer_free(s->tokenizer);
	if (s->configured)
		config_free(&s->config);
	weights_close(&s->weights);
}

static int write_piece(const struct session *s, int32_t id, struct err *e)
{
	struct buf piece = {0};
	int rc = tokenizer_decode_bytes(s->tokenizer, id, &piece, e);
	if (!rc && piece.length)
		fwrite(piece.data, 1, piece.length, stdout);
	fflush(stdout);
	buf_free(&piece);
	return rc;
}

static int generate(struct session *s, const struct request *q, struct err *e)
{
	int32_t *ids, vocab = (int32_t)s->config.model.vocab_size, eod = tokenizer_eod(s->tokenizer),
	              begin = eod;
	size_t n;
	const float *logits;
	int rc = encoder_encode(s->encoder, q->prompt, strlen(q->prompt), &ids, &n, e);
	if (rc)
		return rc;
	if (!n && eod < 0)
		return err_set(e, EXIT_USAGE,
		               "--prompt: an empty prompt needs a tokenizer with an end-of-text token");
	fputs(q->prompt, stdout);
	if ((rc = generator_feed(s->generator, n ? ids : &begin, n ? n : 1, &logits, e)))
		return rc;
	for (int64_t i = 0; i < q->max_new_tokens; i++) {
		int32_t id = sample_token(&q->sampling, logits, vocab, (uint64_t)i);
		if (id == eod)
			break;
		if ((rc = write_piece(s, id, e)))
			return rc;
		if (generator_room(s->generator) < 1) {
			log_warn("stopped at the model's %lld positions",
			         (long long)s->config.model.max_position_embeddings);
			break;
		}
		if ((rc = generator_feed(s->generator, &id, 1, &logits, e)))
			return rc;
	}
	putchar('\n');
	return 0;
}

static int judge(const struct request *q, struct err *e)
{
	if (!q->checkpoint || !q->prompt)
		return err_set(e, EXIT_USAGE,
		               "generate: --checkpoint and --prompt are needed (`pentad generate --help`)");
	if (q->max_new_tokens < 0 || q->sampling.temperature < 0 || q->sampling.top_k < 0 ||
	    !(q->sampling.top_p > 0) || q->sampling.top_p > 1)
		return err_set(
		        e, EXIT_USAGE,
		        "generate: allowed are --max-new-tokens >= 0, --temperature >= 0, --top-k >= 0, "
		        "0 < --top-p <= 1");
	return 0;
}

int generate_main(int argc, char **argv)
{
	struct request q = {.max_new_tokens = 100, .seed = 1234, .sampling = {.temperature = 1, .top_p = 1}};
	struct cli_option options[] = {
	        {"checkpoint", CLI_STRING, &q.checkpoint, "PATH",
	         "run folder, or step folder, or what `convert` wrote"},
	        {"prompt", CLI_STRING, &q.prompt, "TEXT", "what the text begins with"},
	        {"max-new-tokens", CLI_INT, &q.max_new_tokens, "N", "tokens to add at most (100)"},
	        {"temperature", CLI_DOUBLE, &q.sampling.temperature, "X",
	         "divides the logits; 0 is greedy (1)"},
	        {"top-k", CLI_INT, &q.sampling.top_k, "N",
	         "draw from the N most likely tokens; 0 from all (0)"},
	        {"top-p", CLI_DOUBLE, &q.sampling.top_p, "X",
	         "draw from the fewest tokens of this total probability (1)"},
	        {"seed", CLI_INT, &q.seed, "N", "the same seed gives the same text (1234)"},
	        {"tokenizer", CLI_STRING, &q.tokenizer, "FILE", "tokenizer.json; default: the run's"},
	};
	struct cli cli = {
	        .usage = "generate --checkpoint PATH --prompt TEXT [--max-new-tokens N] [--temperature X] …",
	        .doc = "Writes the prompt and what the model adds to it to standard output.",
	        .example = "generate --checkpoint runs/quickstart --prompt 'In the beginning' --temperature "
	                   "0.8 --top-k 50",
	        .options = options,
	        .n = sizeof options / sizeof *options};
	int code;
	if (!cli_parse(&cli, argc, argv, &code))
		return code;
	struct session s = {0};
	struct err e = {0};
	q.sampling.seed = (uint64_t)q.seed;
	int rc = judge(&q, &e);
	if (!rc)
		rc = open_session(&s, &q, &e);
	if (!rc)
		rc = generate(&s, &q, &e);
	if (rc)
		log_error("%s", e.text);
	close_session(&s);
	cli_free(&cli);
	return rc;
}
