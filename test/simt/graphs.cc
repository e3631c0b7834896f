/* Capturing what enters a stream, and running it again. */
#include "streams.h"

#include <algorithm>
#include <map>
#include <thread>

namespace
{
struct Node {
	Describe describe;
	Prepare prepare;
	std::vector<size_t> after;
	CUstream_st *stream; /* told apart only: it may be gone */
	int device;
};
} // namespace
struct simt::Capture {
	CUstream_st *origin; /* told apart only, like its number in messages */
	int number;
	enum cudaStreamCaptureMode mode;
	std::thread::id thread;
	bool spoilt;
	std::vector<Node> nodes;
};
struct CUgraph_st {
	std::vector<Node> nodes;
};
struct CUgraphExec_st {
	std::vector<Node> nodes;
	MarkPtr last; /* a graph does not run twice at a time */
};

static thread_local enum cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

/* ---- the rules ---- */

static bool running(const Capture *capture)
{
	auto captures = [&](CUstream_st *s) { return s->capture.get() == capture; };
	return std::any_of(all_streams().begin(), all_streams().end(), captures);
}

bool capture_active(const std::shared_ptr<Capture> &capture)
{
	return capture && !capture->spoilt && running(capture.get());
}

cudaError_t refuse(const std::shared_ptr<Capture> &capture, cudaError_t error)
{
	talk("the capture in stream %d is spoilt: %s", capture->number, cudaGetErrorString(error));
	capture->spoilt = true;
	return error;
}

/* Whether this capture forbids unsafe calls in the calling thread. */
static bool forbids(const Capture &capture)
{
	bool own = capture.thread == std::this_thread::get_id();
	if (thread_mode == cudaStreamCaptureModeRelaxed || capture.mode == cudaStreamCaptureModeRelaxed)
		return false;
	return own ||
	       (thread_mode == cudaStreamCaptureModeGlobal && capture.mode == cudaStreamCaptureModeGlobal);
}

cudaError_t check_unsafe(void)
{
	for (CUstream_st *stream : all_streams()) {
		if (stream->capture && forbids(*stream->capture))
			return refuse(stream->capture, cudaErrorStreamCaptureUnsupported);
	}
	return cudaSuccess;
}

/* ---- recording ---- */

cudaError_t capture_operation(CUstream_st *stream, Describe describe, Prepare prepare)
{
	Capture &capture = *stream->capture;
	if (capture.spoilt)
		return cudaErrorStreamCaptureInvalidated;
	capture.nodes.push_back(
	        {std::move(describe), std::move(prepare), stream->frontier, stream, stream->device});
	stream->frontier = {capture.nodes.size() - 1};
	return cudaSuccess;
}

/* A stream that waits for a captured event becomes part of the capture. */
cudaError_t capture_wait(CUstream_st *stream, CUevent_st *event)
{
	if (!event->capture) {
		if (!event->mark)
			return cudaSuccess;
		return refuse(stream->capture, cudaErrorStreamCaptureIsolation);
	}
	if (!running(event->capture.get()))
		return stream->capture ? refuse(stream->capture, cudaErrorStreamCaptureIsolation)
		                       : cudaErrorInvalidValue;
	if (event->capture->spoilt)
		return cudaErrorStreamCaptureInvalidated;
	if (stream->number == 0)
		return refuse(event->capture, cudaErrorStreamCaptureImplicit);
	if (stream->capture && stream->capture != event->capture) {
		refuse(stream->capture, cudaErrorStreamCaptureMerge);
		return refuse(event->capture, cudaErrorStreamCaptureMerge);
	}
	stream->capture = event->capture;
	stream->frontier.insert(stream->frontier.end(), event->frontier.begin(), event->frontier.end());
	return cudaSuccess;
}

/* Whether all that was captured comes before the end of the stream where the capture began. */
static bool all_joined(const Capture &capture, const CUstream_st *origin)
{
	std::vector<bool> reached(capture.nodes.size());
	for (size_t node : origin->frontier)
		reached[node] = true;
	for (size_t node = capture.nodes.size(); node-- > 0;) {
		if (!reached[node])
			return false;
		for (size_t before : capture.nodes[node].after)
			reached[before] = true;
	}
	return true;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode)
{
	Lock lock = take_lock();
	CUstream_st *s = find_stream(stream);
	if (!s)
		return report(cudaErrorInvalidResourceHandle);
	if (s->number == 0)
		return report(cudaErrorStreamCaptureUnsupported);
	if (s->capture)
		return report(cudaErrorIllegalState);
	s->capture =
	        std::make_shared<Capture>(Capture{s, s->number, mode, std::this_thread::get_id(), false, {}});
	s->frontier.clear();
	return cudaSuccess;
}

static cudaError_t check_end(const CUstream_st *stream)
{
	if (!stream || !stream->capture)
		return stream ? cudaErrorIllegalState : cudaErrorInvalidResourceHandle;
	const Capture &capture = *stream->capture;
	if (capture.origin != stream)
		return cudaErrorStreamCaptureUnmatched;
	if (capture.mode != cudaStreamCaptureModeRelaxed && capture.thread != std::this_thread::get_id())
		return cudaErrorStreamCaptureWrongThread;
	return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *pGraph)
{
	Lock lock = take_lock();
	CUstream_st *s = find_stream(stream);
	*pGraph = nullptr;
	cudaError_t error = check_end(s);
	if (error)
		return report(error);
	std::shared_ptr<Capture> capture = s->capture;
	if (capture->spoilt)
		error = cudaErrorStreamCaptureInvalidated;
	else if (!all_joined(*capture, s))
		error = cudaErrorStreamCaptureUnjoined;
	else
		*pGraph = new CUgraph_st{std::move(capture->nodes)};
	for (CUstream_st *member : all_streams()) {
		if (member->capture == capture) {
			member->capture = nullptr;
			member->frontier.clear();
		}
	}
	return report(error);
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *pCaptureStatus)
{
	Lock lock = take_lock();
	CUstream_st *s = find_stream(stream);
	if (!s)
		return report(cudaErrorInvalidResourceHandle);
	*pCaptureStatus = !s->capture          ? cudaStreamCaptureStatusNone
	                  : s->capture->spoilt ? cudaStreamCaptureStatusInvalidated
	                                       : cudaStreamCaptureStatusActive;
	return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode)
{
	std::swap(*mode, thread_mode);
	return cudaSuccess;
}

/* ---- replaying ---- */

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *numNodes)
{
	if (nodes)
		return report(cudaErrorNotSupported);
	*numNodes = graph->nodes.size();
	return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *pGraphExec, cudaGraph_t graph, unsigned long long)
{
	if (!graph)
		return report(cudaErrorInvalidValue);
	*pGraphExec = new CUgraphExec_st{graph->nodes, nullptr};
	return cudaSuccess;
}

cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t)
{
	return cudaSuccess;
}

/* The nodes run in streams of their own, one for each that was captured, between a beginning and an end in
 * the launching stream. */
static std::vector<MarkPtr> launch_nodes(const CUgraphExec_st *graph, const MarkPtr &begun)
{
	std::vector<MarkPtr> ended;
	std::map<CUstream_st *, CUstream_st *> lanes;
	for (const Node &node : graph->nodes) {
		CUstream_st *&lane = lanes[node.stream];
		if (!lane) {
			lane = new_stream(node.device, false);
			lane->abandoned = true;
		}
		std::vector<MarkPtr> after = {begun};
		for (size_t before : node.after)
			after.push_back(ended[before]);
		ended.push_back(push(lane, node.describe, node.prepare(), std::move(after)));
	}
	return ended;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t graphExec, cudaStream_t stream)
{
	Lock lock = take_lock();
	CUstream_st *s = find_stream(stream);
	if (!s || !graphExec)
		return report(s ? cudaErrorInvalidValue : cudaErrorInvalidResourceHandle);
	if (s->capture)
		return report(refuse(s->capture, cudaErrorNotSupported));
	Run nothing = [] { return true; };
	Prepare prepare = [nothing] { return nothing; };
	std::vector<MarkPtr> after;
	if (graphExec->last)
		after.push_back(graphExec->last);
	MarkPtr begun;
	cudaError_t error = enqueue(
	        lock, s, [] { return std::string("the beginning of a graph"); }, prepare, after, &begun);
	if (error)
		return report(error);
	std::vector<MarkPtr> ended = launch_nodes(graphExec, begun);
	return report(enqueue(
	        lock, s, [] { return std::string("the end of a graph"); }, prepare, ended, &graphExec->last));
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graphExec)
{
	delete graphExec;
	return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph)
{
	delete graph;
	return cudaSuccess;
}
