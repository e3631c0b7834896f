/* Communicators: how they come to be, split and end. One that does not block answers ncclInProgress and does
 * nothing before it is asked, as often as a careful program must be ready for. */
#include "cliques.h"

#include <algorithm>
#include <cstring>

static std::vector<std::unique_ptr<ncclComm>> comms; /* the dead too: operations may still name them */
static std::map<unsigned long, std::shared_ptr<Clique>> founded; /* by the number in the unique id */
static unsigned long cliques_made, ids_made;
static thread_local char last_error[256] = "";
thread_local Group nccl_group;

ncclResult_t fail(ncclResult_t result, const std::string &why)
{
	snprintf(last_error, sizeof last_error, "%s", why.c_str());
	talk("NCCL: %s", why.c_str());
	return result;
}

const char *ncclGetErrorString(ncclResult_t result)
{
	switch (result) {
#define TEXT(name, value, text) \
	case name:              \
		return text;
		SIMT_NCCL_RESULTS(TEXT)
#undef TEXT
	default:
		return "unknown result code";
	}
}

const char *ncclGetLastError(ncclComm_t)
{
	return last_error;
}

ncclResult_t ncclGetVersion(int *version)
{
	*version = NCCL_VERSION_CODE;
	return ncclSuccess;
}

ncclResult_t ncclGetUniqueId(ncclUniqueId *uniqueId)
{
	Lock lock = take_lock();
	memset(uniqueId, 0, sizeof *uniqueId);
	snprintf(uniqueId->internal, sizeof uniqueId->internal, "simt %lu", ++ids_made);
	return ncclSuccess;
}

/* ---- calls that take their time ---- */

bool known(ncclComm_t comm)
{
	return std::any_of(comms.begin(), comms.end(),
	                   [=](const std::unique_ptr<ncclComm> &c) { return c.get() == comm && !c->dead; });
}

ncclResult_t check_ready(ncclComm_t comm)
{
	if (!known(comm))
		return fail(ncclInvalidArgument, "no such communicator");
	if (comm->pending)
		return fail(ncclInvalidArgument,
		            "the communicator is used although its last call is in progress");
	return comm->result;
}

ncclResult_t finish_now(Lock &lock, ncclComm *comm, const char *call)
{
	work_until(lock, comm->device, call, [&] { return comm->aborted || comm->pending(lock); });
	comm->pending = nullptr;
	return comm->result;
}

/* Starts something on this communicator that is over when `pending` says so. */
static ncclResult_t begin(Lock &lock, ncclComm *comm, const char *call, std::function<bool(Lock &)> pending)
{
	comm->pending = std::move(pending);
	comm->polls = 1 + draw_number(comm->device) % 3;
	note_move();
	if (!comm->blocking) {
		nccl_group.in_progress = nccl_group.depth;
		return ncclInProgress;
	}
	if (!nccl_group.depth)
		return finish_now(lock, comm, call);
	nccl_group.waits.push_back(comm);
	return ncclSuccess;
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *asyncError)
{
	Lock lock = take_lock();
	if (!known(comm))
		return fail(ncclInvalidArgument, "no such communicator");
	if (comm->pending && comm->polls)
		comm->polls--;
	else if (comm->pending && comm->pending(lock))
		comm->pending = nullptr;
	if (comm->pending)
		work_a_little(lock, comm->device);
	*asyncError = comm->pending ? ncclInProgress : comm->result;
	return ncclSuccess;
}

/* ---- making communicators ---- */

static ncclComm *new_comm(int device, bool blocking)
{
	comms.push_back(std::make_unique<ncclComm>());
	ncclComm *comm = comms.back().get();
	comm->device = device;
	comm->blocking = blocking;
	comm->result = ncclSuccess;
	return comm;
}

static std::shared_ptr<Clique> new_clique(int size)
{
	auto clique = std::make_shared<Clique>();
	clique->number = ++cliques_made;
	clique->size = size;
	clique->result = ncclSuccess;
	clique->ranks.resize((size_t)size);
	return clique;
}

static bool join(const std::shared_ptr<Clique> &clique, ncclComm *comm, int rank)
{
	if (clique->ranks[(size_t)rank])
		return false;
	for (const ncclComm *other : clique->ranks) {
		if (other && other->device == comm->device)
			clique->result = fail(ncclInvalidUsage, "two ranks of a communicator use one device");
	}
	clique->ranks[(size_t)rank] = comm;
	clique->joined++;
	comm->clique = clique;
	comm->rank = rank;
	return true;
}

/* A communicator has a result as soon as all its ranks are there. */
static bool settled(ncclComm *comm)
{
	if (!comm->clique || comm->clique->joined < comm->clique->size)
		return false;
	comm->result = comm->clique->result;
	return true;
}

static ncclResult_t read_config(const ncclConfig_t *config, bool *blocking)
{
	if (!config)
		return ncclSuccess;
	ncclConfig_t fresh = NCCL_CONFIG_INITIALIZER;
	if (config->size != fresh.size || config->magic != fresh.magic)
		return fail(ncclInvalidArgument, "the configuration was not made by NCCL_CONFIG_INITIALIZER");
	if (config->blocking != NCCL_CONFIG_UNDEF_INT)
		*blocking = config->blocking != 0;
	return ncclSuccess;
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t *comm, int nranks, ncclUniqueId commId, int rank,
                                    ncclConfig_t *config)
{
	Lock lock = take_lock();
	unsigned long id = 0;
	bool blocking = true;
	if (!comm || nranks < 1 || rank < 0 || rank >= nranks ||
	    sscanf(commId.internal, "simt %lu", &id) != 1)
		return fail(ncclInvalidArgument, "ncclCommInitRankConfig: wrong rank, count or unique id");
	ncclResult_t result = read_config(config, &blocking);
	if (!result && check_unsafe())
		result = ncclUnhandledCudaError;
	if (result)
		return result;
	std::shared_ptr<Clique> &clique = founded[id];
	if (!clique)
		clique = new_clique(nranks);
	ncclComm *made = new_comm(current_device(), blocking);
	if (clique->size != nranks || !join(clique, made, rank))
		return fail(ncclInvalidArgument,
		            "ncclCommInitRankConfig: the ranks do not agree on who they are");
	*comm = made;
	return begin(lock, made, "ncclCommInitRankConfig", [made](Lock &) { return settled(made); });
}

ncclResult_t ncclCommInitRank(ncclComm_t *comm, int nranks, ncclUniqueId commId, int rank)
{
	return ncclCommInitRankConfig(comm, nranks, commId, rank, nullptr);
}

/* All ranks have said what they want: each color becomes a clique, ordered by key, then by old rank. */
static void complete(Split &split)
{
	std::stable_sort(split.wishes.begin(), split.wishes.end(), [](const auto &a, const auto &b) {
		return std::tie(a.color, a.key, a.parent->rank) < std::tie(b.color, b.key, b.parent->rank);
	});
	split.complete = true;
	for (size_t first = 0, end; first < split.wishes.size(); first = end) {
		int color = split.wishes[first].color;
		for (end = first; end < split.wishes.size() && split.wishes[end].color == color;)
			end++;
		if (color == NCCL_SPLIT_NOCOLOR)
			continue;
		auto clique = new_clique((int)(end - first));
		for (size_t i = first; i < end; i++)
			join(clique, split.wishes[i].child, (int)(i - first));
	}
	note_move();
}

ncclResult_t ncclCommSplit(ncclComm_t comm, int color, int key, ncclComm_t *newcomm, ncclConfig_t *config)
{
	Lock lock = take_lock();
	ncclResult_t result = check_ready(comm);
	bool blocking = !result && comm->blocking;
	if (!result)
		result = read_config(config, &blocking);
	if (!result && (!newcomm || (color < 0 && color != NCCL_SPLIT_NOCOLOR)))
		result = fail(ncclInvalidArgument, "ncclCommSplit: a color is not negative");
	if (!result && check_unsafe())
		result = ncclUnhandledCudaError;
	if (result)
		return result;
	std::shared_ptr<Split> &slot = comm->clique->splits[comm->splits++];
	if (!slot)
		slot = std::make_shared<Split>();
	std::shared_ptr<Split> split = slot;
	ncclComm *child = color == NCCL_SPLIT_NOCOLOR ? nullptr : new_comm(comm->device, blocking);
	split->wishes.push_back({color, key, comm, child});
	*newcomm = child;
	if ((int)split->wishes.size() == comm->clique->size)
		complete(*split);
	/* Both the old and the new communicator are in progress until all ranks have come. */
	if (child) {
		ncclResult_t begun =
		        begin(lock, child, "ncclCommSplit", [child](Lock &) { return settled(child); });
		if (comm->blocking)
			return begun;
	}
	return begin(lock, comm, "ncclCommSplit", [split](Lock &) { return split->complete; });
}

/* ---- ending communicators ---- */

static bool drained(const ncclComm *comm)
{
	return comm->aborted || comm->finished == comm->launched;
}

ncclResult_t ncclCommFinalize(ncclComm_t comm)
{
	Lock lock = take_lock();
	ncclResult_t result = check_ready(comm);
	return result ? result
	              : begin(lock, comm, "ncclCommFinalize", [comm](Lock &) { return drained(comm); });
}

ncclResult_t ncclCommDestroy(ncclComm_t comm)
{
	Lock lock = take_lock();
	if (!comm)
		return ncclSuccess;
	if (!known(comm))
		return fail(ncclInvalidArgument, "no such communicator");
	if (comm->pending)
		finish_now(lock, comm, "ncclCommDestroy");
	work_until(lock, comm->device, "ncclCommDestroy", [=] { return drained(comm); });
	comm->dead = true;
	return ncclSuccess;
}

/* What this rank has queued falls away; the others keep waiting, until they abort as well. */
ncclResult_t ncclCommAbort(ncclComm_t comm)
{
	Lock lock = take_lock();
	if (!comm)
		return ncclSuccess;
	if (!known(comm))
		return fail(ncclInvalidArgument, "no such communicator");
	comm->aborted = comm->dead = true;
	forget(comm);
	note_move();
	return ncclSuccess;
}

ncclResult_t ncclCommCount(const ncclComm_t comm, int *count)
{
	Lock lock = take_lock();
	ncclResult_t result = check_ready(comm);
	if (!result)
		*count = comm->clique->size;
	return result;
}

ncclResult_t ncclCommCuDevice(const ncclComm_t comm, int *device)
{
	Lock lock = take_lock();
	ncclResult_t result = check_ready(comm);
	if (!result)
		*device = comm->device;
	return result;
}

ncclResult_t ncclCommUserRank(const ncclComm_t comm, int *rank)
{
	Lock lock = take_lock();
	ncclResult_t result = check_ready(comm);
	if (!result)
		*rank = comm->rank;
	return result;
}
