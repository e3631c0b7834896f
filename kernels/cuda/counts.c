/* Host copies of the sizes that dispatch_plan leaves on the device: they are on their way as soon as it is
 * told, so that who needs them on the host waits for them alone, and once. */
#include "kernels/cuda/cuda.h"
#include "base/clock.h"
#include "base/mem.h"

#include <stdlib.h>
#include <string.h>

/* COPIES_MOST: pieces of memory that are known at a time, layers times micro-batches in flight; beyond, the
 * oldest is forgotten. SLAB: pieces of pinned memory that are asked for at once. */
enum { COPIES_MOST = 4096, SLAB = 16, ROOM_ALIGN = 256 };
static const double patience_s = 1; /* for what is not done then somebody may have to be blamed */

struct buffer {
	int32_t *host; /* pinned */
	size_t room_bytes;
	cudaEvent_t arrived;
};

struct copy {
	const char *data; /* on the device */
	size_t bytes;
	struct buffer buffer;
	bool holds; /* until its memory is forgotten; else it is copied each time */
	bool waited;
	uint64_t used;
};

struct cuda_counts {
	struct copy *copy; /* in order of address, none overlaps another */
	size_t n, cap;
	struct buffer *spare;
	size_t n_spare, cap_spare;
	void **slab;
	size_t n_slab, cap_slab;
	uint64_t uses;
};

int cuda_counts_open(struct stream *s, struct err *e)
{
	(void)e;
	s->counts = mem_array(1, sizeof *s->counts);
	return 0;
}

void cuda_counts_close(struct stream *s)
{
	struct cuda_counts *c = s->counts;
	if (!c)
		return;
	for (size_t i = 0; i < c->n; i++)
		cudaEventDestroy(c->copy[i].buffer.arrived);
	for (size_t i = 0; i < c->n_spare; i++)
		cudaEventDestroy(c->spare[i].arrived);
	for (size_t i = 0; i < c->n_slab; i++)
		cudaFreeHost(c->slab[i]);
	free(c->copy);
	free(c->spare);
	free(c->slab);
	free(c);
	s->counts = NULL;
}

static void put_spare(struct cuda_counts *c, struct buffer b)
{
	c->spare = mem_grow(c->spare, c->n_spare, &c->cap_spare, sizeof *c->spare);
	c->spare[c->n_spare++] = b;
}

static int add_slab(struct cuda_counts *c, size_t bytes, struct err *e)
{
	size_t room = (bytes + ROOM_ALIGN - 1) / ROOM_ALIGN * ROOM_ALIGN;
	char *memory = NULL;
	CUDA_TRY(e, cudaMallocHost((void **)&memory, room * SLAB));
	c->slab = mem_grow(c->slab, c->n_slab, &c->cap_slab, sizeof *c->slab);
	c->slab[c->n_slab++] = memory;
	for (size_t i = 0; i < SLAB; i++) {
		struct buffer b = {(int32_t *)(void *)(memory + i * room), room, NULL};
		CUDA_TRY(e, cudaEventCreateWithFlags(&b.arrived, cudaEventDisableTiming));
		put_spare(c, b);
	}
	return 0;
}

static int take_buffer(struct cuda_counts *c, size_t bytes, struct buffer *b, struct err *e)
{
	for (int round = 0; round < 2; round++) {
		for (size_t i = c->n_spare; i-- > 0;)
			if (c->spare[i].room_bytes >= bytes) {
				*b = c->spare[i];
				c->spare[i] = c->spare[--c->n_spare];
				return 0;
			}
		if (add_slab(c, bytes, e))
			return e->code;
	}
	ASSERT(!"a slab has room");
}

/* The first copy that ends behind `data`. */
static size_t first_behind(const struct cuda_counts *c, const char *data)
{
	size_t low = 0, high = c->n;
	while (low < high) {
		size_t middle = (low + high) / 2;
		if (c->copy[middle].data + c->copy[middle].bytes > data)
			high = middle;
		else
			low = middle + 1;
	}
	return low;
}

/* A copy under way into a buffer that is spare again comes before whatever is copied into it next. */
static void drop(struct cuda_counts *c, size_t i)
{
	put_spare(c, c->copy[i].buffer);
	memmove(c->copy + i, c->copy + i + 1, (--c->n - i) * sizeof *c->copy);
}

void cuda_counts_forget(struct stream *s, const void *data, size_t bytes)
{
	struct cuda_counts *c = s->counts;
	size_t i = first_behind(c, data);
	while (i < c->n && c->copy[i].data < (const char *)data + bytes)
		drop(c, i);
}

static void drop_oldest(struct cuda_counts *c)
{
	size_t oldest = 0;
	for (size_t i = 1; i < c->n; i++)
		if (c->copy[i].used < c->copy[oldest].used)
			oldest = i;
	drop(c, oldest);
}

/* NULL where just this memory is not known. */
static struct copy *find(struct cuda_counts *c, const char *data, size_t bytes)
{
	size_t i = first_behind(c, data);
	bool found = i < c->n && c->copy[i].data == data && c->copy[i].bytes == bytes;
	return found ? &c->copy[i] : NULL;
}

static struct copy *add(struct stream *s, const char *data, size_t bytes, struct err *e)
{
	struct cuda_counts *c = s->counts;
	struct copy new = {.data = data, .bytes = bytes};
	cuda_counts_forget(s, data, bytes);
	if (c->n == COPIES_MOST)
		drop_oldest(c);
	if (take_buffer(c, bytes, &new.buffer, e))
		return NULL;
	size_t i = first_behind(c, data);
	c->copy = mem_grow(c->copy, c->n, &c->cap, sizeof *c->copy);
	memmove(c->copy + i + 1, c->copy + i, (c->n++ - i) * sizeof *c->copy);
	c->copy[i] = new;
	return &c->copy[i];
}

/* Begins to copy. NULL with a message in *e. */
static struct copy *begin(struct stream *s, const struct tensor *sizes, bool holds, struct err *e)
{
	size_t bytes = (size_t)tensor_bytes(sizes);
	struct copy *k = find(s->counts, sizes->data, bytes);
	if (!k && !(k = add(s, sizes->data, bytes, e)))
		return NULL;
	cudaError_t rc = cudaMemcpyAsync(k->buffer.host, k->data, bytes, cudaMemcpyDeviceToHost, s->compute);
	if (rc == cudaSuccess)
		rc = cudaEventRecord(k->buffer.arrived, s->compute);
	k->holds = holds && rc == cudaSuccess;
	k->waited = false;
	k->used = ++s->counts->uses;
	if (rc == cudaSuccess)
		return k;
	cuda_failed(e, rc, "a copy of sizes to the host");
	return NULL;
}

static int is_recording(struct stream *s, bool *is, struct err *e)
{
	enum cudaStreamCaptureStatus status;
	CUDA_TRY(e, cudaStreamIsCapturing(s->compute, &status));
	*is = status != cudaStreamCaptureStatusNone;
	return 0;
}

/* What is recorded writes the sizes again and again, and nobody is told. */
int cuda_counts_follow(struct stream *s, const struct tensor *sizes, struct err *e)
{
	bool recording = false;
	if (!tensor_count(sizes))
		return 0;
	if (is_recording(s, &recording, e))
		return e->code;
	if (!recording)
		return begin(s, sizes, true, e) ? 0 : e->code;
	cuda_counts_forget(s, sizes->data, (size_t)tensor_bytes(sizes));
	return 0;
}

/* Where it takes long, cuda_settle knows who else may be the reason. */
static int wait_for(struct stream *s, const struct copy *k, struct err *e)
{
	double until = clock_now_s() + patience_s;
	cudaError_t rc;
	while ((rc = cudaEventQuery(k->buffer.arrived)) == cudaErrorNotReady)
		if (clock_now_s() > until)
			return cuda_settle(s, e);
	return rc == cudaSuccess ? 0 : cuda_failed(e, rc, "a copy of sizes to the host");
}

const int32_t *cuda_counts(struct stream *s, const struct tensor *sizes, struct err *e)
{
	static const int32_t none;
	bool recording = false;
	if (!tensor_count(sizes))
		return &none;
	if (is_recording(s, &recording, e))
		return NULL;
	if (recording) {
		err_set(e, EXIT_INTERNAL,
		        "cuda: sizes are needed on the host while the stream is recorded; only programs "
		        "without counted rows may be");
		return NULL;
	}
	struct copy *k = find(s->counts, sizes->data, (size_t)tensor_bytes(sizes));
	if ((!k || !k->holds) && !(k = begin(s, sizes, false, e)))
		return NULL;
	if (!k->waited && wait_for(s, k, e))
		return NULL;
	k->waited = true;
	k->used = ++s->counts->uses;
	return k->buffer.host;
}
