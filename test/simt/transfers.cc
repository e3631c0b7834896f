/* Allocation, copies and fills. */
#include "streams.h"

#include <cstring>

/* ---- allocation ---- */

cudaError_t cudaMalloc(void **devPtr, size_t size)
{
	Lock lock = take_lock();
	cudaError_t error = devPtr ? check_unsafe() : cudaErrorInvalidValue;
	return report(error ? error : device_allocate(current_device(), size, devPtr));
}

/* Freeing waits for the device, as the driver does: nothing queued can still need the memory. */
cudaError_t cudaFree(void *devPtr)
{
	Lock lock = take_lock();
	Region region = region_of(devPtr);
	if (!devPtr)
		return cudaSuccess;
	if (region.place != Place::device)
		return report(cudaErrorInvalidValue);
	cudaError_t error = drain_device(lock, region.device, "cudaFree");
	return report(error ? error : device_release(devPtr));
}

cudaError_t cudaMallocHost(void **ptr, size_t size)
{
	Lock lock = take_lock();
	cudaError_t error = ptr ? check_unsafe() : cudaErrorInvalidValue;
	return report(error ? error : host_allocate(size, ptr));
}

cudaError_t cudaHostAlloc(void **pHost, size_t size, unsigned int)
{
	return cudaMallocHost(pHost, size);
}

cudaError_t cudaFreeHost(void *ptr)
{
	Lock lock = take_lock();
	cudaError_t error = ptr ? drain_device(lock, current_device(), "cudaFreeHost") : cudaSuccess;
	return report(error ? error : host_release(ptr));
}

cudaError_t cudaMemGetInfo(size_t *free, size_t *total)
{
	Lock lock = take_lock();
	*total = device_memory_total;
	*free = device_memory_total - device_memory_in_use(current_device());
	return cudaSuccess;
}

/* ---- copies ---- */

namespace
{
struct Copy {
	char *to;
	const char *from;
	size_t count;
	Place to_place, from_place;
};
} // namespace

static bool whole(const void *pointer, size_t count, const Region &region)
{
	return region.place == Place::pageable ||
	       (!region.freed && (char *)pointer + count <= region.base + region.size);
}

static cudaError_t describe_copy(void *dst, const void *src, size_t count, enum cudaMemcpyKind kind,
                                 Copy *copy)
{
	Region to = region_of(dst), from = region_of(src);
	bool to_device = to.place == Place::device, from_device = from.place == Place::device;
	if (kind < cudaMemcpyHostToHost || kind > cudaMemcpyDefault)
		return cudaErrorInvalidMemcpyDirection;
	bool wants_to = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
	bool wants_from = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
	if (!dst || !src || !whole(dst, count, to) || !whole(src, count, from) ||
	    (kind != cudaMemcpyDefault && (to_device != wants_to || from_device != wants_from))) {
		talk("a copy of %zu bytes with kind %d from %s to %s memory does not fit", count, kind,
		     from_device ? "device" : "host", to_device ? "device" : "host");
		return cudaErrorInvalidValue;
	}
	*copy = {(char *)dst, (const char *)src, count, to.place, from.place};
	return cudaSuccess;
}

/* Pageable memory is read at the call, into a buffer of the driver; pinned memory when the copy runs. */
static std::function<void()> body_of(const Copy &copy, bool captured)
{
	if (copy.from_place != Place::pageable || captured)
		return [copy] { memmove(copy.to, copy.from, copy.count); };
	auto staged = std::make_shared<std::string>(copy.from, copy.count);
	return [copy, staged] { memcpy(copy.to, staged->data(), copy.count); };
}

/* Copies that leave the device for pageable memory, or never were there, are over when the call returns. */
static bool waits(const Copy &copy)
{
	return copy.to_place == Place::pageable ||
	       (copy.to_place != Place::device && copy.from_place != Place::device);
}

cudaError_t cudaMemcpyAsync(void *dst, const void *src, size_t count, enum cudaMemcpyKind kind,
                            cudaStream_t stream)
{
	Lock lock = take_lock();
	CUstream_st *s = find_stream(stream);
	Copy copy;
	if (!s)
		return report(cudaErrorInvalidResourceHandle);
	if (!count)
		return cudaSuccess;
	cudaError_t error = describe_copy(dst, src, count, kind, &copy);
	MarkPtr end;
	if (!error)
		error = enqueue_simple(lock, s, "cudaMemcpyAsync", body_of(copy, s->capture != nullptr),
		                       &end);
	if (!error && end && waits(copy))
		work_until(lock, s->device, "cudaMemcpyAsync", [&] { return end->passed; });
	return report(error);
}

/* A copy from pageable memory waits for what came before, but is itself only certain to have left its
 * source; one within the device is not waited for at all. Streams that do not block need an event. */
cudaError_t cudaMemcpy(void *dst, const void *src, size_t count, enum cudaMemcpyKind kind)
{
	Lock lock = take_lock();
	CUstream_st *s = find_stream(nullptr);
	Copy copy;
	if (!count)
		return cudaSuccess;
	cudaError_t error = check_unsafe();
	if (!error)
		error = describe_copy(dst, src, count, kind, &copy);
	MarkPtr before, end;
	if (!error)
		error = enqueue_simple(
		        lock, s, "what comes before cudaMemcpy", [] {}, &before);
	if (!error)
		error = enqueue_simple(lock, s, "cudaMemcpy", body_of(copy, false), &end);
	if (error)
		return report(error);
	bool inside = copy.to_place == Place::device && copy.from_place == Place::device;
	bool staged = copy.to_place == Place::device && copy.from_place == Place::pageable;
	if (!inside)
		work_until(lock, s->device, "cudaMemcpy", [&] { return (staged ? before : end)->passed; });
	return cudaSuccess;
}

/* ---- fills ---- */

static cudaError_t fill(Lock &lock, void *at, int value, size_t count, CUstream_st *s)
{
	if (!s)
		return cudaErrorInvalidResourceHandle;
	if (!count)
		return cudaSuccess;
	Region region = region_of(at);
	if (region.place == Place::pageable || !whole(at, count, region))
		return cudaErrorInvalidValue;
	return enqueue_simple(lock, s, "cudaMemsetAsync", [=] { memset(at, value, count); });
}

cudaError_t cudaMemsetAsync(void *devPtr, int value, size_t count, cudaStream_t stream)
{
	Lock lock = take_lock();
	return report(fill(lock, devPtr, value, count, find_stream(stream)));
}

cudaError_t cudaMemset(void *devPtr, int value, size_t count)
{
	Lock lock = take_lock();
	cudaError_t error = check_unsafe();
	return report(error ? error : fill(lock, devPtr, value, count, find_stream(nullptr)));
}
