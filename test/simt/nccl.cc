/* What one asks of a communicator: memory, operations and groups of them. */
#include "cliques.h"

#include <set>

static std::set<void *> registered;

/* ---- memory ---- */

/* Whole pages, as the real one gives out whole granules. */
ncclResult_t ncclMemAlloc(void **ptr, size_t size)
{
	return cudaMalloc(ptr, (size + 4095) / 4096 * 4096) ? ncclUnhandledCudaError : ncclSuccess;
}

ncclResult_t ncclMemFree(void *ptr)
{
	return cudaFree(ptr) ? ncclUnhandledCudaError : ncclSuccess;
}

ncclResult_t ncclCommRegister(const ncclComm_t comm, void *buff, size_t size, void **handle)
{
	Lock lock = take_lock();
	ncclResult_t result = check_ready(comm);
	if (result)
		return result;
	if (!on_device(buff, size, comm->device))
		return fail(ncclInvalidArgument, "ncclCommRegister: the buffer is not memory of the device");
	*handle = new char;
	registered.insert(*handle);
	return ncclSuccess;
}

ncclResult_t ncclCommDeregister(const ncclComm_t comm, void *handle)
{
	Lock lock = take_lock();
	if (!known(comm) || !registered.erase(handle))
		return fail(ncclInvalidArgument, "ncclCommDeregister: nothing is registered there");
	delete static_cast<char *>(handle);
	return ncclSuccess;
}

/* ---- operations ---- */

static bool overlap(const void *a, size_t a_bytes, const void *b, size_t b_bytes)
{
	return (const char *)a < (const char *)b + b_bytes && (const char *)b < (const char *)a + a_bytes;
}

/* Buffers may be the same where NCCL says so, and otherwise have nothing in common. */
static bool buffers_fit(const ncclComm *comm, const Task &t)
{
	size_t ranks = (size_t)comm->clique->size, rank = (size_t)comm->rank;
	size_t bytes = t.count * type_size(t.type), whole = bytes * ranks;
	bool gather = t.kind == Kind::all_gather, scatter = t.kind == Kind::reduce_scatter;
	size_t from_bytes = scatter ? whole : bytes, to_bytes = gather ? whole : bytes;
	const char *from = (const char *)t.from, *to = (const char *)t.to;
	bool at_root = comm->rank == t.peer;
	bool sends = t.kind == Kind::broadcast ? at_root : t.kind != Kind::receive;
	bool receives = t.kind == Kind::reduce ? at_root : t.kind != Kind::send;
	if ((sends && !on_device(from, from_bytes, comm->device)) ||
	    (receives && !on_device(to, to_bytes, comm->device)))
		return false;
	if (!sends || !receives || !overlap(from, from_bytes, to, to_bytes))
		return true;
	return gather ? from == to + rank * bytes : scatter ? to == from + rank * bytes : from == to;
}

static ncclResult_t check_task(const ncclComm *comm, const Task &t)
{
	const CUstream_st *stream = t.stream;
	std::string what = describe_task(t);
	if (!type_size(t.type) || t.op < ncclSum || t.op >= ncclNumOps)
		return fail(ncclInvalidArgument, what + ": no such type or operator");
	if (t.peer < 0 || t.peer >= comm->clique->size)
		return fail(ncclInvalidArgument, what + ": no such rank");
	if (!stream || stream->device != comm->device)
		return fail(ncclInvalidArgument, what + ": the stream is not of the communicator's device");
	if (!buffers_fit(comm, t))
		return fail(ncclInvalidArgument,
		            what + ": a buffer is not memory of the device, or they overlap");
	return ncclSuccess;
}

/* A communicator that does not block may put off the launch until it is asked; the first it always does. */
static ncclResult_t submit(Lock &lock, ncclComm *comm, const std::vector<Task> &tasks)
{
	bool put_off = !comm->blocking && (!comm->used || draw_number(comm->device) % 4 == 0);
	comm->used = true;
	if (!put_off)
		return launch_tasks(lock, comm, tasks);
	comm->polls = 1;
	comm->pending = [comm, tasks](Lock &now) {
		comm->result = launch_tasks(now, comm, tasks);
		return true;
	};
	return ncclInProgress;
}

static ncclResult_t add_task(ncclComm_t comm, Task task)
{
	Lock lock = take_lock();
	task.stream = find_stream(task.stream);
	ncclResult_t result = check_ready(comm);
	if (!result)
		result = check_task(comm, task);
	if (result || (!task.count && task.kind != Kind::send && task.kind != Kind::receive))
		return result;
	if (!nccl_group.depth)
		return submit(lock, comm, {task});
	nccl_group.tasks.push_back({comm, task});
	return ncclSuccess;
}

ncclResult_t ncclGroupStart(void)
{
	nccl_group.depth++;
	return ncclSuccess;
}

ncclResult_t ncclGroupEnd(void)
{
	Lock lock = take_lock();
	if (!nccl_group.depth)
		return fail(ncclInvalidUsage, "ncclGroupEnd without ncclGroupStart");
	if (--nccl_group.depth)
		return ncclSuccess;
	Group ended = std::move(nccl_group);
	nccl_group = {};
	for (ncclComm *comm : ended.waits)
		finish_now(lock, comm, "ncclGroupEnd");
	ncclResult_t result = ended.in_progress ? ncclInProgress : ncclSuccess;
	std::set<ncclComm *> submitted;
	for (const auto &first : ended.tasks) {
		std::vector<Task> tasks;
		if (!submitted.insert(first.first).second)
			continue;
		for (const auto &entry : ended.tasks) {
			if (entry.first == first.first)
				tasks.push_back(entry.second);
		}
		ncclResult_t one = submit(lock, first.first, tasks);
		if (!result || result == ncclInProgress)
			result = one ? one : result;
	}
	return result;
}

ncclResult_t ncclAllReduce(const void *sendbuff, void *recvbuff, size_t count, ncclDataType_t datatype,
                           ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream)
{
	return add_task(comm, {Kind::all_reduce, sendbuff, recvbuff, count, datatype, op, 0, stream, false});
}

ncclResult_t ncclReduce(const void *sendbuff, void *recvbuff, size_t count, ncclDataType_t datatype,
                        ncclRedOp_t op, int root, ncclComm_t comm, cudaStream_t stream)
{
	return add_task(comm, {Kind::reduce, sendbuff, recvbuff, count, datatype, op, root, stream, false});
}

ncclResult_t ncclReduceScatter(const void *sendbuff, void *recvbuff, size_t recvcount,
                               ncclDataType_t datatype, ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream)
{
	return add_task(
	        comm, {Kind::reduce_scatter, sendbuff, recvbuff, recvcount, datatype, op, 0, stream, false});
}

ncclResult_t ncclAllGather(const void *sendbuff, void *recvbuff, size_t sendcount, ncclDataType_t datatype,
                           ncclComm_t comm, cudaStream_t stream)
{
	return add_task(
	        comm, {Kind::all_gather, sendbuff, recvbuff, sendcount, datatype, ncclSum, 0, stream, false});
}

ncclResult_t ncclBroadcast(const void *sendbuff, void *recvbuff, size_t count, ncclDataType_t datatype,
                           int root, ncclComm_t comm, cudaStream_t stream)
{
	return add_task(comm,
	                {Kind::broadcast, sendbuff, recvbuff, count, datatype, ncclSum, root, stream, false});
}

ncclResult_t ncclSend(const void *sendbuff, size_t count, ncclDataType_t datatype, int peer, ncclComm_t comm,
                      cudaStream_t stream)
{
	return add_task(comm, {Kind::send, sendbuff, nullptr, count, datatype, ncclSum, peer, stream, false});
}

ncclResult_t ncclRecv(void *recvbuff, size_t count, ncclDataType_t datatype, int peer, ncclComm_t comm,
                      cudaStream_t stream)
{
	return add_task(comm,
	                {Kind::receive, nullptr, recvbuff, count, datatype, ncclSum, peer, stream, false});
}
