/* pentad train: the command line of a training run. */
#include "apps/commands.h"
#include "apps/join.h"
#include "base/err.h"
#include "base/mem.h"
#include "train/run.h"

#include <stdio.h>

struct request {
	struct cli_config layers;
	bool dry_run, help;
};

static int run(struct joined *j, void *argument, struct err *e)
{
	const struct request *q = argument;
	struct run_options how = {.dry_run = q->dry_run, .host = j->host, .why = j->why};
	return run_train(&j->config, j->world, &how, e);
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
	int rc = cli_read(&cli, argc, argv, &q.help, &e);
	if (q.help) {
		struct buf b = {0};
		cli_help(&cli, &b);
		fputs(b.data, stdout);
		buf_free(&b);
	} else {
		rc = join_and_run(&(struct join){&q.layers, .salt = q.dry_run, .run = run, .q = &q}, rc, &e);
	}
	cli_free(&cli);
	return rc;
}
