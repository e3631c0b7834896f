#include "comm/boot.h"
#include "base/err.h"
#include "base/log.h"
#include "base/mem.h"
#include "comm/boot_method.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const struct boot_method *const methods[] = {&boot_pmix, &boot_lone};

/* A rank of its own */

static bool lone_applies(void)
{
	return true;
}

/* Slurm started several of us and gave no way to meet: training N times alone would look like success. */
static int lone_join(struct boot *b, struct err *e)
{
	const char *tasks = getenv("SLURM_STEP_NUM_TASKS");
	if (tasks && atoi(tasks) > 1)
		return err_set(e, EXIT_UNAVAILABLE,
		               "Slurm started %s tasks without PMIx, so they cannot meet: start them with "
		               "`srun --mpi=pmix …` "
		               "(`srun --mpi=list` shows what this site has)",
		               tasks);
	b->size = b->local_size = b->num_nodes = 1;
	gethostname(b->host_name, sizeof b->host_name - 1);
	return 0;
}

static int lone_publish(struct boot *b, const char *key, const void *data, size_t bytes, struct err *e)
{
	(void)b, (void)key, (void)data, (void)bytes, (void)e;
	return 0;
}

static int lone_fence(struct boot *b, struct err *e)
{
	(void)b, (void)e;
	return 0;
}

static int lone_fetch(struct boot *b, int rank, const char *key, void **data, size_t *bytes, struct err *e)
{
	(void)b, (void)data, (void)bytes;
	return err_set(e, EXIT_INTERNAL, "a lone rank asked rank %d for %s", rank, key);
}

static void lone_leave(struct boot *b)
{
	(void)b;
}

static void lone_abort(struct boot *b, int code, const char *message)
{
	(void)b, (void)message;
	_exit(code);
}

const struct boot_method boot_lone = {"lone",     lone_applies, lone_join,  lone_publish,
                                      lone_fence, lone_fetch,   lone_leave, lone_abort};

/* Meeting */

int boot_join(struct boot **out, double timeout_s, struct err *e)
{
	struct boot *b = mem_array(1, sizeof *b);
	size_t k = 0;
	while (!methods[k]->applies())
		k++;
	b->methods = methods[k];
	b->method = methods[k]->name;
	b->timeout_s = timeout_s > 0 ? timeout_s : 300;
	b->host = b->host_name;
	boot_watch("joining the other ranks", b->timeout_s);
	int rc = b->methods->join(b, e);
	boot_unwatch();
	if (rc)
		free(b);
	else
		*out = b;
	return rc;
}

struct wire_card { /* what a rank publishes; the address follows */
	char version[48], host[64];
	uint64_t config_hash;
	int32_t pid, node;
	uint32_t address_bytes;
};

static int publish_card(struct boot *b, const struct boot_card *mine, struct err *e)
{
	struct wire_card w = {.config_hash = mine->config_hash,
	                      .pid = getpid(),
	                      .node = b->node,
	                      .address_bytes = (uint32_t)mine->address_bytes};
	if (mine->address_bytes > BOOT_MAX_ADDRESS)
		return err_set(e, EXIT_INTERNAL, "a transport address of %zu bytes; allowed: %d",
		               mine->address_bytes, BOOT_MAX_ADDRESS);
	struct buf card = {0};
	snprintf(w.version, sizeof w.version, "%s", mine->version);
	snprintf(w.host, sizeof w.host, "%s", b->host_name);
	buf_add(&card, &w, sizeof w);
	buf_add(&card, mine->address, mine->address_bytes);
	int rc = b->methods->publish(b, "pentad.card", card.data, card.length, e);
	buf_free(&card);
	return rc;
}

static int read_card(struct boot *b, int rank, struct err *e)
{
	struct wire_card w;
	void *data;
	size_t bytes;
	int rc = b->methods->fetch(b, rank, "pentad.card", &data, &bytes, e);
	if (rc)
		return rc;
	if (bytes >= sizeof w)
		memcpy(&w, data, sizeof w);
	if (bytes < sizeof w || w.address_bytes > BOOT_MAX_ADDRESS || bytes != sizeof w + w.address_bytes) {
		free(data);
		return err_set(e, EXIT_CONFIG, "rank %d is another program, or another version of this one",
		               rank);
	}
	struct boot_peer *p = &b->peer[rank];
	w.version[sizeof w.version - 1] = w.host[sizeof w.host - 1] = 0;
	memcpy(p->version, w.version, sizeof p->version);
	memcpy(p->host, w.host, sizeof p->host);
	p->config_hash = w.config_hash;
	p->pid = w.pid;
	p->node = w.node;
	p->address_bytes = w.address_bytes;
	p->address = memcpy(mem_array(w.address_bytes + 1, 1), (char *)data + sizeof w, w.address_bytes);
	free(data);
	return 0;
}

/* Every rank looks at the same cards, so every rank comes to the same sentence. */
static int compare_cards(const struct boot *b, struct err *e)
{
	const struct boot_peer *first = &b->peer[0];
	for (int r = 1; r < b->size; r++) {
		const struct boot_peer *p = &b->peer[r];
		if (strcmp(p->version, first->version))
			return err_set(e, EXIT_CONFIG,
			               "a mixed job: rank 0 (%s) runs version %s, rank %d (%s) version %s",
			               first->host, first->version, r, p->host, p->version);
		if (p->config_hash != first->config_hash)
			return err_set(
			        e, EXIT_CONFIG,
			        "a mixed job: rank %d (%s) was given another configuration than rank 0 (%s)",
			        r, p->host, first->host);
	}
	return 0;
}

static int compare_nodes(const struct boot *b, struct err *e)
{
	int *count = mem_array((size_t)b->size, sizeof *count), first = -1, rc = 0;
	for (int r = 0; r < b->size; r++)
		if (b->peer[r].node >= 0 && b->peer[r].node < b->size)
			count[b->peer[r].node]++;
	for (int n = 0; n < b->size && !rc; n++) {
		if (!count[n])
			continue;
		first = first < 0 ? n : first;
		if (count[n] != count[first])
			rc = err_set(e, EXIT_USAGE,
			             "node %d holds %d ranks, node %d holds %d: nodes must hold as many "
			             "each; give srun "
			             "--ntasks-per-node=%d",
			             first, count[first], n, count[n], b->size / b->num_nodes);
	}
	free(count);
	return rc;
}

int boot_fence(struct boot *boot, struct err *e)
{
	boot_watch("a fence of all ranks", boot->timeout_s);
	int rc = boot->methods->fence(boot, e);
	boot_unwatch();
	return rc;
}

int boot_exchange(struct boot *boot, const struct boot_card *mine, struct err *e)
{
	if (boot->size == 1)
		return 0;
	int rc = publish_card(boot, mine, e);
	if (!rc)
		rc = boot_fence(boot, e);
	boot->peer = mem_array((size_t)boot->size, sizeof *boot->peer);
	for (int r = 0; r < boot->size && !rc; r++)
		rc = read_card(boot, r, e);
	if (!rc)
		rc = compare_cards(boot, e);
	return rc ? rc : compare_nodes(boot, e);
}

int boot_start(struct boot **out, const struct boot_card *mine, struct err *e)
{
	struct boot *b;
	int rc = boot_join(&b, mine->timeout_s, e);
	if (rc)
		return rc;
	if ((rc = boot_exchange(b, mine, e)))
		boot_finish(b, rc);
	else
		*out = b;
	return rc;
}

/* Leaving */

static void boot_free(struct boot *b)
{
	for (int r = 0; b->peer && r < b->size; r++)
		free((void *)(uintptr_t)b->peer[r].address);
	free(b->peer);
	free(b);
}

static int highest_code(struct boot *b, int mine)
{
	int highest = mine;
	for (int r = 1; r < b->size; r++) {
		void *data;
		size_t bytes;
		int32_t code;
		struct err ignored;
		if (b->methods->fetch(b, r, "pentad.code", &data, &bytes, &ignored))
			continue;
		if (bytes == sizeof code) {
			memcpy(&code, data, sizeof code);
			highest = code > highest ? code : highest;
		}
		free(data);
	}
	return highest;
}

int boot_finish(struct boot *boot, int code)
{
	struct err e = {0};
	int32_t mine = code;
	if (!boot)
		return code;
	if (boot->size > 1) {
		int rc = boot->methods->publish(boot, "pentad.code", &mine, sizeof mine, &e);
		if (!rc)
			rc = boot_fence(boot, &e);
		if (!rc && boot->rank == 0)
			code = highest_code(boot, code);
	}
	boot_watch("leaving the other ranks", boot->timeout_s);
	boot->methods->leave(boot);
	boot_unwatch();
	if (boot->rank)
		code = 0; /* srun reports the highest code; rank 0 carries it, and goes last */
	else if (boot->size > 1)
		usleep(100 * 1000);
	boot_free(boot);
	return code;
}

int boot_failed(struct boot *boot, const struct err *e)
{
	const char *rank = getenv("PMIX_RANK"); /* where boot_start has left already */
	if (boot ? boot->rank == 0 : !rank || atoi(rank) == 0)
		log_error("%s", e->text);
	return boot_finish(boot, e->code);
}

_Noreturn void boot_abort(struct boot *boot, int code, const char *message)
{
	log_error("%s", message);
	if (boot)
		boot->methods->abort(boot, code, message);
	_exit(code);
}
