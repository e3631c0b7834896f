/* Lanes: streams of communication that run beside a stream's kernels, ordered with them by events. Floor:
 * kernels. */
#ifndef PENTAD_KERNELS_CUDA_LANES_H
#define PENTAD_KERNELS_CUDA_LANES_H

#include "kernels/cuda/cuda.h"

struct lane;

/* The n-th lane of the stream, made where it is new; NULL with a message in *e. */
struct lane *lane_of(struct stream *s, int n, struct err *e);
cudaStream_t lane_stream(const struct lane *l);
/* What the lane is told next comes behind everything that compute has been told. */
int lane_follow(struct lane *l, struct err *e);
/* What the lane has been told until now has a ticket; `what`, `group` and `where` are for the report of a
 * hang (group: static or as long as the lane). */
int lane_mark(struct lane *l, const char *what, const char *group, const char *where, uint64_t *ticket,
              struct err *e);
/* Compute goes on behind it. */
int lanes_join(struct stream *s, uint64_t ticket, struct err *e);
/* Compute goes on behind all that lane 0 was told. */
int lanes_gather(struct stream *s, struct err *e);
/* While compute is recorded: tickets are of the recording, and mean nothing behind its end. */
void lanes_record(struct stream *s, bool on);
/* One line for each lane that is not done: "all_reduce over tp (gpt.c:80)". */
void lanes_report(struct stream *s, struct err *e);
/* cudaSuccess where all lanes are done, cudaErrorNotReady, or what has failed. */
cudaError_t lanes_query(struct stream *s);
/* Marks that were ended since the stream was opened: grows while anything moves. */
uint64_t lanes_progress(struct stream *s);

#endif
