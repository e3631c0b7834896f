/* Streams and events: what enters a queue, and what its host waits for. */
#include "streams.h"

#include <algorithm>
#include <map>
#include <set>

static constexpr size_t longest_queue = 1024;

static std::vector<CUstream_st *> streams; /* the abandoned and the legacy ones included */
static std::map<int, CUstream_st *> legacy;
static std::set<CUevent_st *> events;
static int streams_made;

const std::vector<CUstream_st *> &all_streams(void)
{
	return streams;
}

/* ---- the objects ---- */

CUstream_st *new_stream(int device, bool blocking)
{
	streams.push_back(new CUstream_st{device, ++streams_made, blocking, false, {}, nullptr, nullptr, {}});
	return streams.back();
}

static CUstream_st *legacy_stream(int device)
{
	CUstream_st *&stream = legacy[device];
	if (!stream) {
		stream = new_stream(device, false);
		stream->number = 0;
	}
	return stream;
}

static bool is_legacy(const CUstream_st *stream)
{
	return stream->number == 0;
}

CUstream_st *find_stream(cudaStream_t handle)
{
	if (!handle || handle == cudaStreamLegacy)
		return legacy_stream(current_device());
	auto found = std::find(streams.begin(), streams.end(), handle);
	return found != streams.end() && !handle->abandoned ? handle : nullptr;
}

static void sweep(void)
{
	auto gone = [](CUstream_st *stream) {
		bool over = stream->abandoned && stream->queue.empty();
		if (over)
			delete stream;
		return over;
	};
	streams.erase(std::remove_if(streams.begin(), streams.end(), gone), streams.end());
}

/* ---- queueing ---- */

MarkPtr push(CUstream_st *stream, Describe describe, Run run, std::vector<MarkPtr> after)
{
	MarkPtr mark = std::make_shared<Mark>();
	stream->queue.push_back({std::move(describe), std::move(run), std::move(after), mark, ~0ul});
	stream->last = mark;
	note_move();
	return mark;
}

/* The legacy stream waits for all blocking streams of its device, and they for it. */
static void add_implicit(const CUstream_st *stream, std::vector<MarkPtr> &after)
{
	for (const CUstream_st *other : streams) {
		bool related =
		        (is_legacy(stream) && other->blocking) || (stream->blocking && is_legacy(other));
		if (related && other->device == stream->device && other->last && !other->last->passed)
			after.push_back(other->last);
	}
}

static std::shared_ptr<Capture> capture_that_legacy_would_join(const CUstream_st *stream)
{
	for (const CUstream_st *other : streams) {
		if (is_legacy(stream) && other->device == stream->device && other->blocking && other->capture)
			return other->capture;
	}
	return nullptr;
}

cudaError_t enqueue(Lock &lock, CUstream_st *stream, Describe describe, Prepare prepare,
                    std::vector<MarkPtr> after, MarkPtr *mark)
{
	if (stream->capture)
		return capture_operation(stream, std::move(describe), std::move(prepare));
	if (auto capture = capture_that_legacy_would_join(stream))
		return refuse(capture, cudaErrorStreamCaptureImplicit);
	sweep();
	add_implicit(stream, after);
	MarkPtr made = push(stream, std::move(describe), prepare(), std::move(after));
	if (mark)
		*mark = made;
	if (stream->queue.size() > longest_queue)
		work_until(lock, stream->device, "a call that found its stream full",
		           [=] { return stream->queue.size() <= longest_queue / 2; });
	return cudaSuccess;
}

cudaError_t enqueue_simple(Lock &lock, CUstream_st *stream, const char *what, std::function<void()> work,
                           MarkPtr *mark)
{
	Run run = [work = std::move(work)] {
		work();
		return true;
	};
	return enqueue(
	        lock, stream, [what] { return std::string(what); }, [run] { return run; }, {}, mark);
}

/* ---- streams ---- */

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *pStream, unsigned int flags)
{
	Lock lock = take_lock();
	if (!pStream || flags > cudaStreamNonBlocking)
		return report(cudaErrorInvalidValue);
	*pStream = new_stream(current_device(), flags != cudaStreamNonBlocking);
	return cudaSuccess;
}

cudaError_t cudaStreamCreate(cudaStream_t *pStream)
{
	return cudaStreamCreateWithFlags(pStream, cudaStreamDefault);
}

/* Priorities change how soon things run, never what may run: nothing to do. */
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *pStream, unsigned int flags, int)
{
	return cudaStreamCreateWithFlags(pStream, flags);
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *leastPriority, int *greatestPriority)
{
	*leastPriority = 0;
	*greatestPriority = -5;
	return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream)
{
	Lock lock = take_lock();
	CUstream_st *s = find_stream(stream);
	if (!s || is_legacy(s))
		return report(cudaErrorInvalidResourceHandle);
	if (s->capture)
		refuse(s->capture, cudaErrorStreamCaptureUnsupported);
	s->capture = nullptr;
	s->abandoned = true;
	return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream)
{
	Lock lock = take_lock();
	CUstream_st *s = find_stream(stream);
	if (!s)
		return report(cudaErrorInvalidResourceHandle);
	if (s->capture)
		return report(refuse(s->capture, cudaErrorStreamCaptureUnsupported));
	cudaError_t error = check_unsafe();
	MarkPtr end = s->last;
	if (!error && is_legacy(s))
		error = enqueue_simple(
		        lock, s, "cudaStreamSynchronize", [] {}, &end);
	if (error)
		return report(error);
	work_until(lock, s->device, "cudaStreamSynchronize", [&] { return !end || end->passed; });
	return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t stream)
{
	Lock lock = take_lock();
	CUstream_st *s = find_stream(stream);
	if (!s)
		return report(cudaErrorInvalidResourceHandle);
	if (s->capture)
		return report(refuse(s->capture, cudaErrorStreamCaptureUnsupported));
	cudaError_t error = check_unsafe();
	if (error)
		return report(error);
	if (!s->queue.empty())
		work_a_little(lock, s->device);
	return report(s->queue.empty() ? cudaSuccess : cudaErrorNotReady);
}

cudaError_t drain_device(Lock &lock, int device, const char *call)
{
	for (CUstream_st *s : streams) {
		if (s->device == device && s->capture)
			return refuse(s->capture, cudaErrorStreamCaptureUnsupported);
	}
	cudaError_t error = check_unsafe();
	if (error)
		return error;
	work_until(lock, device, call, [=] {
		return std::all_of(streams.begin(), streams.end(),
		                   [=](CUstream_st *s) { return s->device != device || s->queue.empty(); });
	});
	return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize(void)
{
	Lock lock = take_lock();
	return report(drain_device(lock, current_device(), "cudaDeviceSynchronize"));
}

/* ---- events ---- */

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned int flags)
{
	Lock lock = take_lock();
	if (!event || flags > (cudaEventBlockingSync | cudaEventDisableTiming))
		return report(cudaErrorInvalidValue);
	*event = new CUevent_st{current_device(), !(flags & cudaEventDisableTiming), nullptr, nullptr, {}};
	events.insert(*event);
	return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *event)
{
	return cudaEventCreateWithFlags(event, cudaEventDefault);
}

cudaError_t cudaEventDestroy(cudaEvent_t event)
{
	Lock lock = take_lock();
	if (!events.erase(event))
		return report(cudaErrorInvalidResourceHandle);
	delete event;
	return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream)
{
	Lock lock = take_lock();
	CUstream_st *s = find_stream(stream);
	if (!s || !events.count(event) || event->device != s->device)
		return report(cudaErrorInvalidResourceHandle);
	if (s->capture) {
		event->capture = s->capture;
		event->frontier = s->frontier;
		return report(capture_active(s->capture) ? cudaSuccess : cudaErrorStreamCaptureInvalidated);
	}
	event->capture = nullptr;
	return report(enqueue_simple(
	        lock, s, "cudaEventRecord", [] {}, &event->mark));
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned int)
{
	Lock lock = take_lock();
	CUstream_st *s = find_stream(stream);
	if (!s || !events.count(event))
		return report(cudaErrorInvalidResourceHandle);
	if (event->capture || s->capture)
		return report(capture_wait(s, event));
	if (!event->mark)
		return cudaSuccess;
	Run nothing = [] { return true; };
	return report(enqueue(
	        lock, s, [] { return std::string("cudaStreamWaitEvent"); }, [nothing] { return nothing; },
	        {event->mark}));
}

static cudaError_t check_event(CUevent_st *event)
{
	if (!events.count(event))
		return cudaErrorInvalidResourceHandle;
	if (event->capture)
		return refuse(event->capture, cudaErrorCapturedEvent);
	return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t event)
{
	Lock lock = take_lock();
	cudaError_t error = check_event(event);
	if (!error)
		error = check_unsafe();
	if (error)
		return report(error);
	MarkPtr mark = event->mark;
	if (mark && !mark->passed)
		work_a_little(lock, event->device);
	return report(!mark || mark->passed ? cudaSuccess : cudaErrorNotReady);
}

cudaError_t cudaEventSynchronize(cudaEvent_t event)
{
	Lock lock = take_lock();
	cudaError_t error = check_event(event);
	if (!error)
		error = check_unsafe();
	if (error)
		return report(error);
	MarkPtr mark = event->mark;
	work_until(lock, event->device, "cudaEventSynchronize", [&] { return !mark || mark->passed; });
	return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t start, cudaEvent_t end)
{
	Lock lock = take_lock();
	for (CUevent_st *event : {start, end}) {
		cudaError_t error = check_event(event);
		if (!error && (!event->timing || !event->mark))
			error = cudaErrorInvalidResourceHandle;
		if (!error && !event->mark->passed)
			error = cudaErrorNotReady;
		if (error)
			return report(error);
	}
	*ms = std::chrono::duration<float, std::milli>(end->mark->when - start->mark->when).count();
	return cudaSuccess;
}
