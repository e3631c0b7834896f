#include "comm/boot.h"
#include "comm/boot_method.h"
#include "base/err.h"
#include "base/log.h"
#include "base/mem.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* What goes over the wire, followed by the address. */
struct wire_card {
	char magic[8];
	uint64_t config_hash;
	int32_t pid;
	uint32_t address_bytes;
	char version[48], host[64];
};
static const char wire_magic[8] = "pntcrd1";
static const char card_key[] = "pentad.card", code_key[] = "pentad.code";

/* The rank that speaks for all; known even where boot_start fails. */
static int my_rank;
/* Attached and not yet left: an exit() now would take the step down without a word. */
static struct boot *attached;

/* ---- a lone rank ---- */

static bool lone_present(void)
{
	return true;
}

static int env_int(const char *name, int otherwise)
{
	const char *text = getenv(name);
	return text && *text ? atoi(text) : otherwise;
}

/* Comes after the methods by which several ranks meet: where one of them should have worked, going on alone
 * would train N times and look like success. */
static int lone_join(struct boot *b, struct err *e)
{
	const char *name_space = getenv("PMIX_NAMESPACE");
	int tasks = env_int("SLURM_STEP_NUM_TASKS", name_space ? 0 : 1);
	my_rank = env_int("SLURM_PROCID", env_int("PMIX_RANK", 0));
	if (tasks > 1)
		return err_set(
		        e, EXIT_UNAVAILABLE,
		        "Slurm started %d tasks in this step, but they cannot meet: PMIx does not answer; "
		        "use `srun --mpi=pmix` (`srun --mpi=list` shows whether this site has it)",
		        tasks);
	if (!tasks)
		return err_set(e, EXIT_UNAVAILABLE,
		               "PMIX_NAMESPACE is %s, so this may be one of several ranks, but PMIx does not "
		               "answer; to run one rank alone unset PMIX_NAMESPACE",
		               name_space);
	b->rank = 0;
	b->size = 1;
	return 0;
}

static int lone_publish(struct boot *b, const char *key, const void *data, size_t bytes, struct err *e)
{
	(void)b, (void)key, (void)data, (void)bytes, (void)e;
	return 0;
}

static int lone_fence(struct boot *b, const char *why, struct err *e)
{
	(void)b, (void)why, (void)e;
	return 0;
}

static int lone_lookup(struct boot *b, int rank, const char *key, void **data, size_t *bytes, struct err *e)
{
	(void)b, (void)data, (void)bytes;
	return err_set(e, EXIT_INTERNAL, "a lone rank asks rank %d for %s", rank, key);
}

static void lone_leave(struct boot *b)
{
	(void)b;
}

static void lone_abort(struct boot *b, int code, const char *message)
{
	(void)b, (void)code, (void)message;
}

static const struct boot_method boot_lone = {"lone",     lone_present, lone_join,  lone_publish,
                                             lone_fence, lone_lookup,  lone_leave, lone_abort};

/* ---- joining ---- */

static const struct boot_method *const methods[] = {&boot_pmix, &boot_lone};

static void left_without_a_word(void)
{
	if (!attached)
		return;
	log_error("left without shutting down; the other ranks go with it");
	fflush(NULL);
	_exit(EXIT_INTERNAL);
}

static void attach(struct boot *b)
{
	static bool registered;
	attached = b->size > 1 ? b : NULL;
	if (!registered)
		atexit(left_without_a_word);
	registered = true;
}

int boot_join(struct boot **out, double timeout_s, struct err *e)
{
	struct boot *b = mem_array(1, sizeof *b);
	int rc = EXIT_UNAVAILABLE;
	b->timeout_s = timeout_s > 0 ? timeout_s : 300;
	gethostname(b->host_name, sizeof b->host_name - 1);
	b->host = b->host_name;
	for (size_t i = 0; i < sizeof methods / sizeof *methods && rc; i++) {
		if (!methods[i]->present())
			continue;
		b->methods = methods[i];
		b->method = methods[i]->name;
		rc = methods[i]->join(b, e);
	}
	if (rc) {
		free(b);
		return rc;
	}
	b->local_size = b->num_nodes = 1;
	my_rank = b->rank;
	log_set_rank(b->rank, b->size);
	attach(b);
	*out = b;
	return 0;
}

/* ---- cards ---- */

static void card_write(const struct boot *b, const struct boot_card *mine, struct buf *out)
{
	struct wire_card w = {.config_hash = mine->config_hash,
	                      .pid = (int32_t)getpid(),
	                      .address_bytes = (uint32_t)mine->address_bytes};
	ASSERT(mine->address_bytes <= BOOT_MAX_ADDRESS);
	memcpy(w.magic, wire_magic, sizeof w.magic);
	snprintf(w.version, sizeof w.version, "%s", mine->version);
	memcpy(w.host, b->host_name, sizeof w.host);
	buf_add(out, &w, sizeof w);
	if (mine->address_bytes)
		buf_add(out, mine->address, mine->address_bytes);
}

/* Nothing in a card is believed before it is checked: it may come from another build. */
static int card_read(const void *data, size_t bytes, int rank, struct boot_peer *out, struct err *e)
{
	struct wire_card w = {0};
	memcpy(&w, data, bytes < sizeof w ? bytes : sizeof w);
	if (memcmp(w.magic, wire_magic, sizeof w.magic) || w.address_bytes > BOOT_MAX_ADDRESS ||
	    bytes != sizeof w + w.address_bytes || !memchr(w.version, 0, sizeof w.version) ||
	    !memchr(w.host, 0, sizeof w.host))
		return err_set(
		        e, EXIT_CONFIG,
		        "rank %d runs another version of pentad: its card cannot be read; use one binary "
		        "for all ranks",
		        rank);
	void *address = mem_array(1, w.address_bytes);
	memcpy(address, (const char *)data + sizeof w, w.address_bytes);
	*out = (struct boot_peer){.config_hash = w.config_hash,
	                          .pid = w.pid,
	                          .address = address,
	                          .address_bytes = w.address_bytes};
	memcpy(out->version, w.version, sizeof w.version);
	memcpy(out->host, w.host, sizeof w.host);
	return 0;
}

static int cards_read(struct boot *b, const struct buf *own, struct err *e)
{
	int rc = 0;
	for (int i = 0; i < b->size && !rc; i++) {
		void *data;
		size_t bytes;
		if (i == b->rank) {
			rc = card_read(own->data, own->length, i, &b->peer[i], e);
			continue;
		}
		if (b->methods->lookup(b, i, card_key, &data, &bytes, e))
			boot_abort(b, e->code, e->text);
		rc = card_read(data, bytes, i, &b->peer[i], e);
		free(data);
	}
	return rc;
}

/* Nodes are numbered in the order in which ranks show them. */
static int nodes_number(struct boot *b, int *ranks_on)
{
	int *first = mem_array(b->size, sizeof *first), n = 0;
	for (int i = 0; i < b->size; i++) {
		int node = i ? b->peer[i - 1].node : 0;
		if (n && strcmp(b->peer[i].host, b->peer[first[node]].host))
			for (node = 0; node < n && strcmp(b->peer[i].host, b->peer[first[node]].host);)
				node++;
		if (node == n || !n)
			first[n++] = i;
		b->peer[i].node = node;
		if (i == b->rank)
			b->local_rank = ranks_on[node];
		ranks_on[node]++;
	}
	free(first);
	return n;
}

static int nodes_find(struct boot *b, struct err *e)
{
	int *ranks_on = mem_array(b->size, sizeof *ranks_on), rc = 0;
	b->num_nodes = nodes_number(b, ranks_on);
	b->node = b->peer[b->rank].node;
	b->local_size = ranks_on[b->node];
	for (int i = 0; i < b->size && !rc; i++) {
		int node = b->peer[i].node;
		if (ranks_on[node] != ranks_on[0])
			rc = err_set(
			        e, EXIT_USAGE,
			        "node %s holds %d ranks, node %s holds %d: they must be equal; give srun "
			        "--ntasks-per-node=N (here %d ranks on %d nodes)",
			        b->peer[0].host, ranks_on[0], b->peer[i].host, ranks_on[node], b->size,
			        b->num_nodes);
	}
	free(ranks_on);
	return rc;
}

static int cards_compare(const struct boot *b, struct err *e)
{
	const struct boot_peer *first = &b->peer[0];
	for (int i = 1; i < b->size; i++) {
		const struct boot_peer *p = &b->peer[i];
		if (strcmp(p->version, first->version))
			return err_set(
			        e, EXIT_CONFIG,
			        "mixed versions: rank 0 (%s) runs pentad %s, rank %d (%s) runs %s; use one "
			        "binary for all ranks",
			        first->host, first->version, i, p->host, p->version);
		if (p->config_hash != first->config_hash)
			return err_set(e, EXIT_CONFIG,
			               "mixed configurations: rank 0 (%s) has read %016llx, rank %d (%s) "
			               "%016llx; all "
			               "ranks must see the same files and options",
			               first->host, (unsigned long long)first->config_hash, i, p->host,
			               (unsigned long long)p->config_hash);
	}
	return 0;
}

int boot_exchange(struct boot *b, const struct boot_card *mine, struct err *e)
{
	struct buf card = {0};
	card_write(b, mine, &card);
	int rc = b->methods->publish(b, card_key, card.data, card.length, e);
	if (rc || (rc = b->methods->fence(b, "the first meeting of all ranks", e)))
		boot_abort(b, rc, e->text); /* the others do not know of it */
	b->peer = mem_array(b->size, sizeof *b->peer);
	rc = cards_read(b, &card, e);
	buf_free(&card);
	rc = rc ? rc : cards_compare(b, e);
	return rc ? rc : nodes_find(b, e);
}

int boot_start(struct boot **out, const struct boot_card *mine, struct err *e)
{
	struct boot *b;
	int rc = boot_join(&b, mine->timeout_s, e);
	if (rc)
		return rc;
	rc = boot_exchange(b, mine, e);
	if (rc) {
		boot_finish(b, rc);
		return rc;
	}
	*out = b;
	return 0;
}

int boot_fence(struct boot *b, struct err *e)
{
	return b->methods->fence(b, "a fence", e);
}

/* ---- leaving ---- */

static int highest_code(struct boot *b, int code)
{
	struct err e;
	for (int i = 1; i < b->size; i++) {
		void *data;
		size_t bytes;
		if (b->methods->lookup(b, i, code_key, &data, &bytes, &e))
			continue;
		int32_t theirs = 0;
		if (bytes == sizeof theirs)
			memcpy(&theirs, data, sizeof theirs);
		free(data);
		code = theirs > code ? theirs : code;
	}
	return code;
}

static void boot_free(struct boot *b)
{
	for (int i = 0; b->peer && i < b->size; i++)
		free((void *)(uintptr_t)b->peer[i].address);
	free(b->peer);
	free(b);
}

/* A task that exits with a code may have its fellows killed: they shall be gone by then. */
static void let_others_go(int code, int size)
{
	if (code && size > 1)
		nanosleep(&(struct timespec){.tv_nsec = 200 * 1000 * 1000}, NULL);
}

int boot_finish(struct boot *b, int code)
{
	struct err e;
	if (!b)
		return code;
	int32_t mine = code;
	fflush(NULL);
	if (b->methods->publish(b, code_key, &mine, sizeof mine, &e) ||
	    b->methods->fence(b, "the last meeting of all ranks", &e))
		boot_abort(b, code ? code : e.code, e.text);
	code = b->rank ? 0 : highest_code(b, code);
	b->methods->leave(b);
	attached = NULL;
	let_others_go(code, b->size);
	boot_free(b);
	return code;
}

int boot_failed(struct boot *b, const struct err *e)
{
	if (!my_rank)
		log_error("%s", e->text);
	if (b)
		return boot_finish(b, e->code);
	/* boot_start has left already, or tasks of Slurm could not meet. */
	int code = my_rank ? 0 : e->code;
	let_others_go(code, env_int("SLURM_STEP_NUM_TASKS", 1));
	return code;
}

_Noreturn void boot_abort(struct boot *b, int code, const char *message)
{
	log_error("%s", message);
	fflush(NULL);
	if (b) {
		attached = NULL;
		b->methods->abort(b, code, message);
	}
	_exit(code);
}
