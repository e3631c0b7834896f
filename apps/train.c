/* pentad train: the command line of a training run. */
#include "apps/commands.h"
#include "apps/options.h"
#include "base/err.h"
#include "base/hash.h"
#include "base/log.h"
#include "base/sys.h"
#include "comm/boot.h"
#include "comm/comm.h"
#include "train/run.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct request {
	struct cli_config layers;
	bool dry_run, help;
	struct config config;
	bool loaded;
};

/* What was asked for, before anything of it is judged: ranks compare it when they meet. */
static uint64_t hash_request(const struct request *q)
{
	uint64_t h = q->dry_run;
	for (size_t i = 0; i < q->layers.files.n; i++) {
		char *text;
		size_t bytes;
		struct err ignored = {0};
		if (sys_read_file(q->layers.files.items[i], 1 << 20, &text, &bytes, &ignored))
			continue;
		h = hash_bytes(text, bytes, h);
		free(text);
	}
	for (size_t i = 0; i < q->layers.sets.n; i++)
		h = hash_bytes(q->layers.sets.items[i], strlen(q->layers.sets.items[i]), h);
	return h;
}

static int read_request(struct request *q, struct cli *cli, int argc, char **argv, struct err *e)
{
	int rc = cli_read(cli, argc, argv, &q->help, e);
	if (rc || q->help)
		return rc;
	if (!q->layers.files.n)
		return err_set(e, EXIT_USAGE,
		               "train: no configuration; give at least one -c FILE (`pentad train --help`)");
	struct config_source source = cli_config_source(&q->layers);
	q->loaded = true;
	rc = config_load(&q->config, &source, e);
	return rc ? rc : run_complete_config(&q->config, e);
}

static const char *transport_of(const struct config *c)
{
	static const char *const names[] = {
	        [TRANSPORT_AUTO] = NULL, [TRANSPORT_SELF] = "self", [TRANSPORT_UCX] = "ucx"};
	return names[c->dist.transport];
}

/* Rank 0 tells what went wrong; the rank where it went wrong tells it too, where rank 0 only knows who. */
static int leave(struct boot *boot, struct comm *world, int code, struct err *e)
{
	struct err first = *e;
	struct err ignored = {0};
	if (code == 0 || code == EXIT_AGAIN) {
		comm_close(world);
		return boot_finish(boot, code);
	}
	if (world->size > 1 &&
	    comm_broadcast(world, first.text, sizeof first.text / 8, DT_i64, 0, &ignored) == 0 &&
	    world->rank && strcmp(first.text, e->text) && strstr(first.text, e->text) == NULL)
		log_error("%s", e->text);
	comm_close(world);
	return boot_failed(boot, e);
}

static int train(struct request *q, int request_code, struct err *e)
{
	struct boot *boot;
	struct comm *world;
	struct err start = {0};
	struct boot_card card = {.version = PENTAD_VERSION, .config_hash = hash_request(q)};
	struct comm_options options = {0};
	if (!request_code) {
		options.transport = transport_of(&q->config);
		options.timeout_s = (double)q->config.dist.timeout_s;
	}
	if (comm_start(&world, &boot, &card, &options, &start))
		return boot_failed(NULL, &start);
	log_set_rank(world->rank, world->size);
	int rc = request_code ? request_code : config_check(&q->config, world->size, e);
	struct run_options how = {.dry_run = q->dry_run, .local_ranks = boot->local_size};
	if (!rc)
		rc = run_train(&q->config, world, &how, e);
	if (rc == EXIT_INTERNAL && world->size > 1)
		boot_abort(boot, rc, e->text);
	return leave(boot, world, rc, e);
}

int train_main(int argc, char **argv)
{
	struct request q = {0};
	struct err e = {0};
	struct cli_option options[] = {
	        CLI_CONFIG(&q.layers),
	        {"dry-run", CLI_FLAG, &q.dry_run, NULL,
	         "build everything, run one step on made-up data, write nothing"},
	};
	struct cli cli = {
	        .usage = "train -c FILE [-c FILE…] [--set a.b=c…] [--dry-run]",
	        .doc = "Trains a model. Where the run folder has a valid checkpoint, it goes on from there.",
	        .example = "train -c configs/tiny.yaml --set run.dir=runs/tiny",
	        .options = options,
	        .n = sizeof options / sizeof *options};
	int rc = read_request(&q, &cli, argc, argv, &e);
	if (q.help) {
		struct buf b = {0};
		cli_help(&cli, &b);
		fputs(b.data, stdout);
		buf_free(&b);
	} else {
		rc = train(&q, rc, &e);
	}
	if (q.loaded)
		config_free(&q.config);
	cli_free(&cli);
	return rc;
}
