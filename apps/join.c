#include "apps/join.h"
#include "base/err.h"
#include "base/hash.h"
#include "base/log.h"
#include "base/sys.h"
#include "comm/boot.h"
#include "comm/comm.h"
#include "train/auto.h"
#include "train/run.h"

#include <stdlib.h>
#include <string.h>

/* What was asked for, before anything of it is judged: ranks compare it when they meet. */
static uint64_t hash_request(const struct cli_config *layers, uint64_t salt)
{
	uint64_t h = salt;
	for (size_t i = 0; i < layers->files.n; i++) {
		char *text;
		size_t bytes;
		struct err ignored = {0};
		if (sys_read_file(layers->files.items[i], 1 << 20, &text, &bytes, &ignored))
			continue;
		h = hash_bytes(text, bytes, h);
		free(text);
	}
	for (size_t i = 0; i < layers->sets.n; i++)
		h = hash_bytes(layers->sets.items[i], strlen(layers->sets.items[i]), h);
	return h;
}

static int read_config(struct config *c, const struct cli_config *layers, struct err *e)
{
	if (!layers->files.n)
		return err_set(e, EXIT_USAGE, "no configuration; give at least one -c FILE (see --help)");
	struct config_source source = cli_config_source(layers);
	int rc = config_load(c, &source, e);
	return rc ? rc : run_complete_config(c, e);
}

static const char *transport_of(const struct config *c)
{
	static const char *const names[] = {
	        [TRANSPORT_AUTO] = NULL, [TRANSPORT_SELF] = "self", [TRANSPORT_UCX] = "ucx"};
	return names[c->dist.transport];
}

bool join_knows_the_cause(const struct err *e)
{
	return e->code && strncmp(e->text, "rank ", 5) != 0;
}

/* Rank 0 tells what went wrong; the rank where it went wrong tells it too, where rank 0 only knows who. */
static int leave(struct boot *boot, struct comm *world, int code, struct err *e)
{
	struct err first = *e, ignored = {0};
	if (code == 0 || code == EXIT_AGAIN) {
		comm_close(world);
		return boot_finish(boot, code);
	}
	bool told = world->size > 1 &&
	            !comm_broadcast(world, first.text, sizeof first.text / 8, DT_i64, 0, &ignored);
	if (told && world->rank && join_knows_the_cause(e) && !strstr(first.text, e->text))
		log_error("%s", e->text);
	comm_close(world);
	return e->code ? boot_failed(boot, e) : boot_finish(boot, code);
}

static int meet(const struct join *how, struct joined *j, int code, struct err *e)
{
	struct boot *boot;
	struct err start = {0};
	struct boot_card card = {.version = PENTAD_VERSION,
	                         .config_hash = hash_request(how->layers, how->salt)};
	struct comm_options options = {0};
	if (!code) {
		options.transport = transport_of(&j->config);
		options.timeout_s = (double)j->config.dist.timeout_s;
	}
	if (comm_start(&j->world, &boot, &card, &options, &start))
		return boot_failed(NULL, &start);
	log_set_rank(j->world->rank, j->world->size);
	j->host = (struct rank_on_host){boot->local_rank, boot->local_size};
	int rc = code || how->unchecked ? code : config_check(&j->config, j->world->size, e);
	if (!rc && !how->unchecked)
		rc = auto_choose(&j->config, j->world, 0, j->host, &j->why, e);
	if (!rc)
		rc = how->run(j, how->q, e);
	if (rc == EXIT_INTERNAL && j->world->size > 1)
		boot_abort(boot, rc, e->text);
	return leave(boot, j->world, rc, e);
}

int join_and_run(const struct join *how, int request_code, struct err *e)
{
	struct joined j = {0};
	int rc = request_code ? request_code : read_config(&j.config, how->layers, e);
	rc = meet(how, &j, rc, e);
	config_free(&j.config);
	return rc;
}
