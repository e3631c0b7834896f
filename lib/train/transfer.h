/* Activations and gradients between the stages of a pipeline. A send is posted and goes on by itself; its
 * buffer is waited for before it is written again. A receive waits: on a device its stream does. Floor:
 * train. */
#ifndef PENTAD_TRAIN_TRANSFER_H
#define PENTAD_TRAIN_TRANSFER_H

#include "train/groups.h"
#include "train/program.h"

struct comm;
struct comm_queue;
struct transfers;

/* queue: carries the messages out, or NULL; where devices have groups of their own these do, on the stream.
 * Nothing is owned. */
struct transfers *transfers_new(const struct program *t, struct exec *x, const struct groups *groups,
                                struct stream *stream, struct comm_queue *queue);
void transfers_free(struct transfers *f);
/* What slot's segment reads: from its source into this rank's buffer; nothing to do at the ends of the model.
 * Collective over the two stages. */
int transfers_receive(struct transfers *f, const struct slot *slot, enum direction d, struct err *e);
/* Before slot's segment writes: the buffer of the micro-batch that used it before is free. */
int transfers_make_room(struct transfers *f, const struct slot *slot, enum direction d, struct err *e);
/* What slot's segment wrote. */
int transfers_send(struct transfers *f, const struct slot *slot, enum direction d, struct err *e);
/* After an error: the queue leaves the messages alone. */
void transfers_abandon(struct transfers *f);
/* All sends are through. */
int transfers_finish(struct transfers *f, struct err *e);

#endif
