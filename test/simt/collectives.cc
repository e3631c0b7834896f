/* The operations of a communicator. Nothing is buffered: an operation is over when all who take part have
 * come to it, and a rank comes to its operations one after the other, in the order of its calls. */
#include "cliques.h"
#include "cuda_fp8.h"

#include <algorithm>
#include <cstring>

/* ---- what there is ---- */

size_t type_size(ncclDataType_t type)
{
	switch (type) {
#define SIZE(name, value, stored, sum) \
	case name:                     \
		return sizeof(stored);
		SIMT_NCCL_TYPES(SIZE)
#undef SIZE
	default:
		return 0;
	}
}

static const char *type_name(ncclDataType_t type)
{
	switch (type) {
#define NAME(name, value, stored, sum) \
	case name:                     \
		return #name;
		SIMT_NCCL_TYPES(NAME)
#undef NAME
	default:
		return "no type";
	}
}

static const char *kind_name(Kind kind)
{
	switch (kind) {
	case Kind::all_reduce:
		return "ncclAllReduce";
	case Kind::all_gather:
		return "ncclAllGather";
	case Kind::reduce_scatter:
		return "ncclReduceScatter";
	case Kind::broadcast:
		return "ncclBroadcast";
	case Kind::reduce:
		return "ncclReduce";
	case Kind::send:
		return "ncclSend";
	case Kind::receive:
		return "ncclRecv";
	}
	return "nothing";
}

static bool reduces(Kind kind)
{
	return kind == Kind::all_reduce || kind == Kind::reduce_scatter || kind == Kind::reduce;
}

static bool between_two(Kind kind)
{
	return kind == Kind::send || kind == Kind::receive;
}

std::string describe_task(const Task &task)
{
	std::string text = kind_name(task.kind) + std::string(" of ") + std::to_string(task.count) + " " +
	                   type_name(task.type);
	if (reduces(task.kind))
		text += " (operator " + std::to_string(task.op) + ")";
	if (task.kind == Kind::broadcast || task.kind == Kind::reduce)
		text += " with root " + std::to_string(task.peer);
	if (between_two(task.kind))
		text += (task.kind == Kind::send ? " to rank " : " from rank ") + std::to_string(task.peer);
	return text;
}

/* ---- arithmetic ---- */

template <typename Sum> static Sum combine(ncclRedOp_t op, Sum a, Sum b)
{
	switch (op) {
	case ncclProd:
		return (Sum)(a * b);
	case ncclMax:
		return std::max(a, b);
	case ncclMin:
		return std::min(a, b);
	default:
		return (Sum)(a + b);
	}
}

/* Every step rounds to the type in memory, as when partial sums travel around a ring. */
template <typename T, typename Sum>
static void fold(const Collective &c, size_t count, std::vector<char> &result)
{
	T *out = reinterpret_cast<T *>(result.data());
	for (size_t i = 0; i < count; i++) {
		Sum sum = (Sum) static_cast<const T *>(c.tasks[0]->from)[i];
		for (size_t rank = 1; rank < c.tasks.size(); rank++) {
			Sum next = (Sum) static_cast<const T *>(c.tasks[rank]->from)[i];
			sum = (Sum)T(combine(c.shape.op, sum, next));
		}
		out[i] = c.shape.op == ncclAvg ? T((Sum)(sum / (Sum)c.tasks.size())) : T(sum);
	}
}

static void fold_any(const Collective &c, size_t count, std::vector<char> &result)
{
	switch (c.shape.type) {
#define FOLD(name, value, stored, sum) \
	case name:                     \
		return fold<stored, sum>(c, count, result);
		SIMT_NCCL_TYPES(FOLD)
#undef FOLD
	default:
		return;
	}
}

/* ---- transfers ---- */

/* How many times `count` the whole is. */
static size_t parts(Kind kind, size_t ranks)
{
	return kind == Kind::all_gather || kind == Kind::reduce_scatter ? ranks : 1;
}

/* The whole is put together aside, for the buffers may be the same. */
static std::vector<char> whole_of(const Collective &c)
{
	size_t ranks = c.tasks.size(), bytes = c.shape.count * type_size(c.shape.type);
	std::vector<char> whole(bytes * parts(c.shape.kind, ranks));
	if (reduces(c.shape.kind))
		fold_any(c, c.shape.count * parts(c.shape.kind, ranks), whole);
	else if (c.shape.kind == Kind::broadcast)
		memcpy(whole.data(), c.tasks[(size_t)c.shape.peer]->from, bytes);
	else
		for (size_t rank = 0; rank < ranks; rank++)
			memcpy(whole.data() + rank * bytes, c.tasks[rank]->from, bytes);
	return whole;
}

void perform(Collective &c)
{
	touch_as(every_device);
	std::vector<char> whole = whole_of(c);
	size_t bytes = c.shape.count * type_size(c.shape.type);
	for (size_t rank = 0; rank < c.tasks.size(); rank++) {
		Task &task = *c.tasks[rank];
		if (c.shape.kind == Kind::reduce_scatter)
			memcpy(task.to, whole.data() + rank * bytes, bytes);
		else if (c.shape.kind != Kind::reduce || c.shape.peer == (int)rank)
			memcpy(task.to, whole.data(), whole.size());
		task.done = true;
	}
}

void perform(Channel &channel, const Clique &clique, std::pair<int, int> ends)
{
	touch_as(every_device);
	while (!channel.sends.empty() && !channel.receives.empty()) {
		Task &send = *channel.sends.front(), &receive = *channel.receives.front();
		if (send.count != receive.count || send.type != receive.type)
			die("communicator %lu: rank %d calls %s, but rank %d calls %s", clique.number,
			    ends.first, describe_task(send).c_str(), ends.second,
			    describe_task(receive).c_str());
		memmove(receive.to, send.from, send.count * type_size(send.type));
		send.done = receive.done = true;
		channel.sends.pop_front();
		channel.receives.pop_front();
	}
}

/* ---- operations ---- */

/* What one call, or one group of calls, asks of one communicator. */
namespace
{
struct Unit {
	ncclComm *comm;
	std::vector<TaskPtr> tasks;
	std::vector<unsigned long> numbers; /* of the tasks that are collectives */
	unsigned long order;
	bool arrived;
};
} // namespace

static bool same_shape(const Task &a, const Task &b)
{
	bool rooted = a.kind == Kind::broadcast || a.kind == Kind::reduce;
	return a.kind == b.kind && a.count == b.count && a.type == b.type && (!rooted || a.peer == b.peer) &&
	       (!reduces(a.kind) || a.op == b.op);
}

/* The next collective of this rank must be what the other ranks call there. */
static unsigned long number_collective(ncclComm *comm, const Task &task)
{
	Clique &clique = *comm->clique;
	unsigned long number = comm->collectives++;
	auto made = clique.collectives.try_emplace(number, Collective{task, comm->rank, {}, 0});
	Collective &c = made.first->second;
	c.tasks.resize((size_t)clique.size);
	if (!same_shape(c.shape, task))
		die("communicator %lu, collective %lu: rank %d calls %s, but rank %d calls %s", clique.number,
		    number, c.first_rank, describe_task(c.shape).c_str(), comm->rank,
		    describe_task(task).c_str());
	return number;
}

static void arrive(Unit &unit)
{
	ncclComm *comm = unit.comm;
	Clique &clique = *comm->clique;
	size_t next = 0;
	unit.arrived = true;
	for (const TaskPtr &task : unit.tasks) {
		if (between_two(task->kind)) {
			bool send = task->kind == Kind::send;
			std::pair<int, int> ends = {send ? comm->rank : task->peer,
			                            send ? task->peer : comm->rank};
			Channel &channel = clique.channels[ends];
			(send ? channel.sends : channel.receives).push_back(task);
			perform(channel, clique, ends);
			continue;
		}
		auto found = clique.collectives.find(unit.numbers[next++]);
		Collective &c = found->second;
		c.tasks[(size_t)comm->rank] = task;
		if (++c.present == clique.size) {
			perform(c);
			clique.collectives.erase(found);
		}
	}
	note_move();
}

void forget(ncclComm *comm)
{
	if (!comm->clique)
		return;
	for (auto &entry : comm->clique->collectives) {
		Collective &c = entry.second;
		if (c.tasks[(size_t)comm->rank])
			c.present--;
		c.tasks[(size_t)comm->rank] = nullptr;
	}
	for (auto &entry : comm->clique->channels) {
		if (entry.first.first == comm->rank)
			entry.second.sends.clear();
		if (entry.first.second == comm->rank)
			entry.second.receives.clear();
	}
}

static bool run_unit(Unit &unit)
{
	ncclComm *comm = unit.comm;
	if (comm->aborted)
		return true;
	if (comm->finished != unit.order)
		return false;
	if (!unit.arrived)
		arrive(unit);
	if (!std::all_of(unit.tasks.begin(), unit.tasks.end(), [](const TaskPtr &t) { return t->done; }))
		return false;
	comm->finished++;
	return true;
}

static Run prepare_unit(ncclComm *comm, const std::vector<Task> &tasks)
{
	auto unit = std::make_shared<Unit>(Unit{comm, {}, {}, comm->launched++, false});
	for (const Task &task : tasks) {
		unit->tasks.push_back(std::make_shared<Task>(task));
		if (!between_two(task.kind))
			unit->numbers.push_back(number_collective(comm, task));
	}
	return [unit] { return run_unit(*unit); };
}

static std::string describe_unit(const ncclComm *comm, const std::vector<Task> &tasks)
{
	std::string text = "rank " + std::to_string(comm->rank) + " of communicator " +
	                   std::to_string(comm->clique->number) + " in";
	for (const Task &task : tasks)
		text += (&task == tasks.data() ? " " : ", ") + describe_task(task);
	return text;
}

/* The operation stands in the stream of the first task; the other streams of the group wait for it and it
 * for them. */
ncclResult_t launch_tasks(Lock &lock, ncclComm *comm, const std::vector<Task> &tasks)
{
	CUstream_st *stream = tasks[0].stream;
	std::vector<CUstream_st *> others;
	std::vector<MarkPtr> after;
	for (const Task &task : tasks) {
		CUstream_st *other = task.stream;
		if (other == stream)
			continue;
		if (other->capture || stream->capture)
			return ncclInvalidUsage;
		others.push_back(other);
		if (other->last)
			after.push_back(other->last);
	}
	MarkPtr end;
	cudaError_t error = enqueue(
	        lock, stream, [=] { return describe_unit(comm, tasks); },
	        [=] { return prepare_unit(comm, tasks); }, std::move(after), &end);
	Run nothing = [] { return true; };
	for (CUstream_st *other : others)
		push(other, [=] { return describe_unit(comm, tasks); }, nothing, {end});
	return error ? ncclUnhandledCudaError : ncclSuccess;
}
