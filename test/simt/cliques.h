/* Communicators between threads, and the transfers that their ranks have asked for. */
#ifndef SIMT_CLIQUES_H
#define SIMT_CLIQUES_H

#include "streams.h"
#include "nccl.h"

#include <map>

namespace simt
{
enum class Kind { all_reduce, all_gather, reduce_scatter, broadcast, reduce, send, receive };

struct Task {
	Kind kind;
	const void *from;
	void *to;
	size_t count;
	ncclDataType_t type;
	ncclRedOp_t op;
	int peer; /* the root, or the other side */
	cudaStream_t stream;
	bool done;
};
using TaskPtr = std::shared_ptr<Task>;

/* One collective of a communicator: the tasks of the ranks that have come to it. */
struct Collective {
	Task shape; /* as the first rank asked for it */
	int first_rank;
	std::vector<TaskPtr> tasks; /* by rank */
	int present;
};
struct Channel {
	std::deque<TaskPtr> sends, receives;
};
struct Split {
	struct Wish {
		int color, key;
		ncclComm *parent, *child;
	};
	std::vector<Wish> wishes;
	bool complete;
};

/* What the ranks of one communicator share. */
struct Clique {
	unsigned long number;
	int size, joined;
	ncclResult_t result;
	std::vector<ncclComm *> ranks;
	std::map<unsigned long, Collective> collectives;
	std::map<std::pair<int, int>, Channel> channels; /* from, to */
	std::map<unsigned long, std::shared_ptr<Split>> splits;
};
} // namespace simt

struct ncclComm {
	std::shared_ptr<Clique> clique;
	int rank, device;
	bool blocking, aborted, dead, used;
	unsigned long launched, finished; /* operations of this rank, which run one after the other */
	unsigned long collectives, splits;
	/* Of a communicator that does not block: what the last call still has to do, and how often one must
	 * ask before it is done. */
	std::function<bool(Lock &)> pending;
	unsigned polls;
	ncclResult_t result;
};

namespace simt
{
/* The calls between ncclGroupStart and ncclGroupEnd. */
struct Group {
	int depth;
	bool in_progress;
	std::vector<std::pair<ncclComm *, Task>> tasks;
	std::vector<ncclComm *> waits; /* blocking communicators that are being made */
};
} // namespace simt
extern thread_local Group nccl_group;

/* ---- communicators.cc ---- */

ncclResult_t fail(ncclResult_t result, const std::string &why);
/* What is wrong with using the communicator now, if anything. */
ncclResult_t check_ready(ncclComm_t comm);
bool known(ncclComm_t comm);
/* Waits until what the communicator's last call began is over. */
ncclResult_t finish_now(Lock &lock, ncclComm *comm, const char *call);

/* ---- collectives.cc ---- */

size_t type_size(ncclDataType_t type);
/* What the task is, for messages. */
std::string describe_task(const Task &task);
/* Does a collective to which all ranks have come. */
void perform(Collective &collective);
/* Does the transfers of a channel whose two ends have come. */
void perform(Channel &channel, const Clique &clique, std::pair<int, int> ends);
/* Takes back that this rank has come to anything, so that its buffers are free. */
void forget(ncclComm *comm);
/* Queues tasks of one communicator as one operation. */
ncclResult_t launch_tasks(Lock &lock, ncclComm *comm, const std::vector<Task> &tasks);

#endif
