/* The other side of the bootstrap: a PMIx server for the ranks of one host, so that they meet without Slurm.
 * Starting, stopping and watching processes is the caller's. Floor: comm. */
#ifndef PENTAD_COMM_HOST_H
#define PENTAD_COMM_HOST_H

struct err;
struct host;

/* What a rank has told the server; written whole into a pipe, in order. */
enum host_event_kind { HOST_JOINED, HOST_LEFT, HOST_ABORTED };
struct host_event {
	int kind, rank;
	int code; /* HOST_ABORTED */
};

/* Serves `num_ranks` processes that are yet to be started. Events go to event_fd from another thread; a rank
 * that leaves in order is reported before its process can exit. EXIT_UNAVAILABLE in a build without PMIx. */
int host_start(struct host **out, int num_ranks, int event_fd, struct err *e);
/* The environment of a rank: the caller's own and what PMIx adds; NULL-terminated, strings and list are the
 * caller's to free(). Call before fork. */
int host_environment(struct host *h, int rank, char ***out, struct err *e);
/* Ends the server and removes its folder. NULL is allowed. */
void host_stop(struct host *h);

#endif
