/* The bootstrap: how a process learns which rank it is, meets the others once, and leaves with them.
 *
 * A table of methods, tried in order: PMIx (srun --mpi=pmix, pentad launch), then a lone rank. A rank cannot
 * tell who started it. The protocol, for every program that may run as several ranks:
 *
 *	if (boot_start(&boot, &card, &e))          every rank comes here before it judges its configuration
 *		return boot_failed(NULL, &e);
 *	if (config_check(…, &e))                   an error that every rank finds alike: rank 0 says it,
 *		return boot_failed(boot, &e);      all leave together with its code
 *	…                                          an error of one rank: boot_abort, or comm_any at the next
 *	                                           point where all meet
 *	return boot_finish(boot, code);            straight out of main
 *
 * What Slurm's PMIx does is taken as it is: every fence collects data (others are no barrier across nodes),
 * nothing waits for PMIx events, a rank that leaves without boot_finish takes the whole step with it, and a
 * watchdog of our own bounds every PMIx call. Floor: comm. */
#ifndef PENTAD_COMM_BOOT_H
#define PENTAD_COMM_BOOT_H

#include <stddef.h>
#include <stdint.h>

struct err;

enum { BOOT_MAX_ADDRESS = 8192 };

/* What a rank tells the others. Borrowed during the call. */
struct boot_card {
	const char *version;  /* of the program, at most 47 bytes; all ranks must agree */
	uint64_t config_hash; /* of configuration files and --set options; all ranks must agree */
	const void *address;  /* of the transport; NULL where there is none */
	size_t address_bytes; /* at most BOOT_MAX_ADDRESS */
	double timeout_s;     /* of each PMIx call; 0 = 300. Not told to the others */
};

/* What a rank knows of another. */
struct boot_peer {
	char version[48];
	uint64_t config_hash;
	char host[64]; /* the node's name */
	int pid, node; /* node: 0 … num_nodes-1 */
	const void *address;
	size_t address_bytes;
};

struct boot {
	int rank, size;
	int local_rank, local_size; /* on this node */
	int node, num_nodes;
	const char *method;     /* "pmix", "lone" */
	const char *host;       /* this node's name */
	struct boot_peer *peer; /* [size] after boot_exchange; NULL before */
	/* The rest is the module's own. */
	const struct boot_method *methods;
	double timeout_s;
	char host_name[64], name_space[256];
};

/* boot_join and boot_exchange in one. EXIT_UNAVAILABLE where Slurm started several tasks without PMIx, the
 * errors of boot_exchange otherwise; *out is set on success alone. Collective over all ranks. */
int boot_start(struct boot **out, const struct boot_card *mine, struct err *e);

/* Attaches to the method: rank and size are known, peers are not. Local. */
int boot_join(struct boot **out, double timeout_s, struct err *e);
/* Publishes the card, one collected fence, reads all cards, compares them. EXIT_CONFIG where versions or
 * configurations are mixed, EXIT_USAGE where nodes hold unequal numbers of ranks; then every rank returns
 * the same code and sentence, and is still joined. Collective over all ranks. */
int boot_exchange(struct boot *boot, const struct boot_card *mine, struct err *e);

/* A fence that collects data: nobody leaves before the last one has come. For the start and the end of a
 * run, not for its loop. EXIT_INTERNAL. Collective over all ranks. */
int boot_fence(struct boot *boot, struct err *e);

/* Leaves: publish the code, collected fence, detach. Returns what main must return: on rank 0 the highest
 * code of all ranks, a moment after the others; 0 on them. Frees boot; NULL returns `code`. Collective. */
int boot_finish(struct boot *boot, int code);
/* For an error that every rank has found alike: rank 0 prints e->text, then as boot_finish. boot may be NULL
 * where boot_start or comm_start failed: they have left already. Returns what main must return. Collective.
 */
int boot_failed(struct boot *boot, const struct err *e);
/* For an error of this rank alone: prints the message, then takes the whole job down with `code`. Local. */
_Noreturn void boot_abort(struct boot *boot, int code, const char *message);

#endif
