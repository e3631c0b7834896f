/* Streams as queues of work that nobody has done yet. */
#ifndef SIMT_STREAMS_H
#define SIMT_STREAMS_H

#include "simt.h"

#include <chrono>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace simt
{
using Lock = std::unique_lock<std::mutex>;
} // namespace simt
/* The one lock. Every entry point takes it; work_until lets it go while there is nothing to do. */
Lock take_lock(void);

namespace simt
{
/* The end of an operation, for others to wait for. */
struct Mark {
	bool passed;
	std::chrono::steady_clock::time_point when;
};
using MarkPtr = std::shared_ptr<Mark>;
/* Does the work; false if it cannot be finished before somebody else has moved. */
using Run = std::function<bool()>;
/* Called when the operation enters its stream: at the call, or at each launch of a graph. */
using Prepare = std::function<Run()>;
/* For the list of who waits for whom. */
using Describe = std::function<std::string()>;

struct Operation {
	Describe describe;
	Run run;
	std::vector<MarkPtr> after;
	MarkPtr mark;
	unsigned long tried; /* the count of moves when it last could not finish */
};

struct Capture;
} // namespace simt

struct CUstream_st {
	int device, number; /* number 0 is the legacy stream of its device */
	bool blocking;      /* waits for the legacy stream, and the legacy stream for it */
	bool abandoned;     /* nobody knows it any more: it goes when it is empty */
	std::deque<Operation> queue;
	MarkPtr last;
	std::shared_ptr<Capture> capture;
	std::vector<size_t> frontier; /* the captured nodes that the next one follows */
};
struct CUevent_st {
	int device;
	bool timing;
	MarkPtr mark; /* none before the first record */
	std::shared_ptr<Capture> capture;
	std::vector<size_t> frontier;
};

/* ---- streams.cc ---- */

CUstream_st *find_stream(cudaStream_t handle); /* null: no such stream */
CUstream_st *new_stream(int device, bool blocking);
const std::vector<CUstream_st *> &all_streams(void);
/* Queues, or records in the stream's capture. `mark` is where the operation will end, if it was queued. */
cudaError_t enqueue(Lock &lock, CUstream_st *stream, Describe describe, Prepare prepare,
                    std::vector<MarkPtr> after = {}, MarkPtr *mark = nullptr);
/* The same for work that is always finished in one go. */
cudaError_t enqueue_simple(Lock &lock, CUstream_st *stream, const char *what, std::function<void()> work,
                           MarkPtr *mark = nullptr);
/* Without a look at captures and implicit dependencies. */
MarkPtr push(CUstream_st *stream, Describe describe, Run run, std::vector<MarkPtr> after);

/* ---- schedule.cc ---- */

/* Runs operations, of this device by preference, until `done` holds; waits for other threads when none can
 * go on, and gives up when nobody moves for long. `call` is who waits. */
void work_until(Lock &lock, int device, const char *call, const std::function<bool()> &done);
/* Waits for all streams of the device, unless a capture forbids it. */
cudaError_t drain_device(Lock &lock, int device, const char *call);
/* Perhaps runs a few operations, as time would pass between two queries. */
void work_a_little(Lock &lock, int device);
/* Something has happened that may let a waiting operation go on. */
void note_move(void);
unsigned draw_number(int device);

/* ---- graphs.cc ---- */

cudaError_t capture_operation(CUstream_st *stream, Describe describe, Prepare prepare);
cudaError_t capture_wait(CUstream_st *stream, CUevent_st *event);
/* For calls that would need the captured work to have run: spoils the capture. */
cudaError_t refuse(const std::shared_ptr<Capture> &capture, cudaError_t error);
/* For calls that do not become part of a capture and therefore are forbidden during one. */
cudaError_t check_unsafe(void);
bool capture_active(const std::shared_ptr<Capture> &capture);

#endif
