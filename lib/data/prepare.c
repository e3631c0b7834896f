#include "data/prepare.h"
#include "base/json.h"
#include "base/log.h"
#include "base/text.h"
#include "data/indexed.h"
#include "data/prepare_cut.h"
#include "data/tokenizer.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* Batches go round a ring: the main thread fills one, a worker encodes it, the main thread writes it. Numbers
 * only grow; batch k is in slot k mod n. written <= taken <= filled <= written + n. */
struct ring {
	const struct prepare_spec *spec;
	const struct tokenizer *tokenizer;
	pthread_mutex_t lock;
	pthread_cond_t changed;
	struct batch *slots;
	uint64_t n, filled, taken, written;
	bool closed; /* no batch will be filled, those not yet taken are not wanted */
};

struct job {
	struct ring ring;
	struct cutter cutter;
	struct tokenizer *tokenizer;
	struct indexed_writer *writer;
	struct prepare_stats *stats;
	int32_t eod;          /* -1: none is added */
	uint64_t open_tokens; /* of the document that is being written */
	struct timespec begin;
	double shown; /* seconds at which progress was last shown */
};

static double seconds_since(const struct timespec *begin)
{
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return (double)(now.tv_sec - begin->tv_sec) + (double)(now.tv_nsec - begin->tv_nsec) * 1e-9;
}

/* The text of a JSON line. json_parse calls the place "NAME:1:COLUMN", ours is FILE:LINE:COLUMN. */
static int text_of_line(const struct ring *r, const struct batch *b, const struct piece *p, struct arena *a,
                        const char **text, size_t *length, struct err *e)
{
	struct json *v;
	struct err inner = {0};
	if (json_parse(a, "", b->text.data + p->offset, p->length, &v, &inner)) {
		const char *rest = strncmp(inner.text, ":1:", 3) ? inner.text : inner.text + 3;
		return err_set(e, EXIT_BAD_DATA, "%s:%" PRIu64 ":%.400s", b->name, p->line, rest);
	}
	const struct json *member = json_get_type(v, r->spec->json_key, JSON_STRING);
	if (!member)
		return err_set(e, EXIT_BAD_DATA, "%s:%" PRIu64 ": no string \"%s\" in %s", b->name, p->line,
		               r->spec->json_key,
		               v->type == JSON_OBJECT ? "this object" : "what is no object");
	*text = member->string;
	*length = member->length;
	return 0;
}

static int encode_piece(const struct ring *r, struct batch *b, struct piece *p, struct encoder *enc,
                        struct err *e)
{
	struct arena arena = {0};
	const char *text = b->text.data + p->offset;
	size_t length = p->length, n;
	int32_t *ids;
	int rc = b->json ? text_of_line(r, b, p, &arena, &text, &length, e) : 0;
	if (!rc) {
		struct err inner = {0};
		rc = encoder_encode(enc, text, length, &ids, &n, &inner);
		if (rc)
			err_set(e, rc, "%s:%" PRIu64 ": %.2000s", b->name, p->line, inner.text);
	}
	if (!rc) {
		if (b->n_ids + n > b->ids_cap) {
			b->ids_cap = 2 * (b->n_ids + n);
			b->ids = mem_resize(b->ids, b->ids_cap, sizeof *b->ids);
		}
		if (n)
			memcpy(b->ids + b->n_ids, ids, n * sizeof *ids);
		b->n_ids += n;
		p->n_ids = n;
		b->text_bytes += length;
	}
	arena_free(&arena);
	return rc;
}

static void encode_batch(const struct ring *r, struct batch *b, struct encoder *enc)
{
	for (size_t i = 0; i < b->n_pieces; i++) {
		struct err e = {0};
		if (!encode_piece(r, b, &b->pieces[i], enc, &e))
			continue;
		if (!b->json || !r->spec->skip_bad_lines) {
			b->err = e;
			return;
		}
		b->pieces[i].dropped = true;
		if (b->n_bad < PREPARE_BAD_LINES)
			snprintf(b->bad_lines[b->n_bad], sizeof b->bad_lines[0], "%.299s", e.text);
		b->n_bad++;
	}
}

static void *work(void *arg)
{
	struct ring *r = arg;
	struct encoder *enc = encoder_new(r->tokenizer);
	pthread_mutex_lock(&r->lock);
	for (;;) {
		while (!r->closed && r->taken == r->filled)
			pthread_cond_wait(&r->changed, &r->lock);
		if (r->closed)
			break;
		struct batch *b = &r->slots[r->taken++ % r->n];
		pthread_mutex_unlock(&r->lock);
		encode_batch(r, b, enc);
		pthread_mutex_lock(&r->lock);
		b->done = true;
		pthread_cond_broadcast(&r->changed);
	}
	pthread_mutex_unlock(&r->lock);
	encoder_free(enc);
	return NULL;
}

static int write_piece(struct job *j, const struct piece *p, const int32_t *ids, struct err *e)
{
	int rc = indexed_writer_append(j->writer, ids, p->n_ids, e);
	j->open_tokens += p->n_ids;
	if (rc || !p->ends)
		return rc;
	if (!j->open_tokens) {
		j->stats->empty += !p->dropped;
		return 0;
	}
	if (j->eod >= 0)
		rc = indexed_writer_append(j->writer, &j->eod, 1, e);
	if (!rc)
		indexed_writer_end_document(j->writer);
	j->open_tokens = 0;
	return rc;
}

static void count_bad_lines(struct prepare_stats *s, const struct batch *b)
{
	for (size_t i = 0; i < b->n_bad && i < PREPARE_BAD_LINES; i++)
		if (s->bad_lines + i < PREPARE_BAD_LINES)
			memcpy(s->bad_line[s->bad_lines + i], b->bad_lines[i], sizeof s->bad_line[0]);
	s->bad_lines += b->n_bad;
}

/* Waits for the oldest batch and writes it. */
static int write_oldest(struct job *j, struct err *e)
{
	struct ring *r = &j->ring;
	struct batch *b = &r->slots[r->written % r->n];
	pthread_mutex_lock(&r->lock);
	while (!b->done)
		pthread_cond_wait(&r->changed, &r->lock);
	pthread_mutex_unlock(&r->lock);
	r->written++;
	if (b->err.code) {
		*e = b->err;
		return e->code;
	}
	int rc = 0;
	const int32_t *ids = b->ids;
	for (size_t i = 0; !rc && i < b->n_pieces; ids += b->pieces[i++].n_ids)
		rc = write_piece(j, &b->pieces[i], ids, e);
	count_bad_lines(j->stats, b);
	j->stats->text_bytes += b->text_bytes;
	return rc;
}

/* On a terminal twice a second, in a log once a minute. */
static void show_progress(struct job *j)
{
	char documents[32], tokens[32], text[32], line[200], part[16] = "";
	double now = seconds_since(&j->begin), done = cutter_progress(&j->cutter);
	bool terminal = isatty(STDERR_FILENO);
	if (now - j->shown < (terminal ? 0.5 : 60))
		return;
	j->shown = now;
	if (done >= 0)
		snprintf(part, sizeof part, "%.0f %%, ", 100 * done);
	snprintf(line, sizeof line, "%s%s documents, %s tokens, %s/s", part,
	         text_count(documents, sizeof documents, (double)indexed_writer_documents(j->writer)),
	         text_count(tokens, sizeof tokens, (double)indexed_writer_tokens(j->writer)),
	         text_bytes(text, sizeof text, (double)j->stats->text_bytes / now));
	if (terminal)
		log_progress("%s", line);
	else
		log_info("%s", line);
}

static int run_batches(struct job *j, struct err *e)
{
	struct ring *r = &j->ring;
	struct err reading = {0};
	int rc = 0;
	for (;;) {
		if (j->ring.spec->stop && *j->ring.spec->stop)
			return err_set(e, EXIT_AGAIN, "interrupted; nothing was written");
		if (r->filled - r->written == r->n && (rc = write_oldest(j, e)))
			return rc;
		struct batch *b = &r->slots[r->filled % r->n];
		if (cutter_fill(&j->cutter, b, &reading) || !b->n_pieces)
			break;
		pthread_mutex_lock(&r->lock);
		b->done = false;
		r->filled++;
		pthread_cond_broadcast(&r->changed);
		pthread_mutex_unlock(&r->lock);
		show_progress(j);
	}
	while (!rc && r->written < r->filled)
		rc = write_oldest(j, e);
	if (!rc && reading.code) {
		*e = reading;
		rc = reading.code;
	}
	return rc;
}

static int run_workers(struct job *j, struct err *e)
{
	struct ring *r = &j->ring;
	int workers = r->spec->workers, started = 0, rc = 0;
	pthread_t *threads = mem_array((size_t)workers, sizeof *threads);
	while (started < workers && !pthread_create(&threads[started], NULL, work, r))
		started++;
	if (!started)
		rc = err_set(e, EXIT_UNAVAILABLE, "cannot start a worker thread");
	if (!rc)
		rc = run_batches(j, e);
	pthread_mutex_lock(&r->lock);
	r->closed = true;
	pthread_cond_broadcast(&r->changed);
	pthread_mutex_unlock(&r->lock);
	while (started)
		pthread_join(threads[--started], NULL);
	free(threads);
	log_progress("%s", "");
	return rc;
}

static void ring_init(struct ring *r, const struct prepare_spec *spec, const struct tokenizer *t)
{
	*r = (struct ring){.spec = spec, .tokenizer = t, .n = (uint64_t)spec->workers + 2};
	r->slots = mem_array(r->n, sizeof *r->slots);
	pthread_mutex_init(&r->lock, NULL);
	pthread_cond_init(&r->changed, NULL);
}

static void ring_free(struct ring *r)
{
	for (uint64_t i = 0; r->slots && i < r->n; i++) {
		buf_free(&r->slots[i].text);
		free(r->slots[i].pieces);
		free(r->slots[i].ids);
	}
	free(r->slots);
}

static int find_eod(struct job *j, struct err *e)
{
	const struct prepare_spec *spec = j->ring.spec;
	j->eod = spec->append_eod ? tokenizer_eod(j->tokenizer) : -1;
	if (spec->append_eod && j->eod < 0)
		return err_set(
		        e, EXIT_BAD_DATA,
		        "%s: no end-of-document token (such as <|endoftext|> or </s>) for --append-eod",
		        spec->tokenizer);
	return 0;
}

static int finish(struct job *j, struct err *e)
{
	struct indexed_writer *w = j->writer;
	j->writer = NULL;
	j->stats->documents = indexed_writer_documents(w);
	j->stats->tokens = indexed_writer_tokens(w);
	if (!j->stats->documents) {
		indexed_writer_abort(w);
		return err_set(e, EXIT_BAD_DATA, "the inputs hold no text: there is no document to write");
	}
	return indexed_writer_finish(w, e);
}

int prepare_run(const struct prepare_spec *spec, struct prepare_stats *stats, struct err *e)
{
	struct job j = {.cutter.spec = spec, .stats = stats};
	clock_gettime(CLOCK_MONOTONIC, &j.begin);
	*stats = (struct prepare_stats){0};
	int rc = tokenizer_load(spec->tokenizer, &j.tokenizer, e);
	if (rc)
		return rc;
	ring_init(&j.ring, spec, j.tokenizer);
	rc = find_eod(&j, e);
	if (!rc)
		rc = indexed_writer_open(spec->output_prefix,
		                         indexed_type_for(tokenizer_vocab_size(j.tokenizer)), &j.writer, e);
	if (!rc)
		rc = run_workers(&j, e);
	if (!rc)
		rc = finish(&j, e);
	indexed_writer_abort(j.writer);
	cutter_close(&j.cutter);
	ring_free(&j.ring);
	tokenizer_free(j.tokenizer);
	stats->seconds = seconds_since(&j.begin);
	return rc;
}
