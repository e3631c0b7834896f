/* Device memory, which the host may not touch, and pinned host memory. Each allocation has pages of its own
 * between pages that nobody may touch. Device pages open when work of the device first touches them and
 * close when the work is done; whoever else touches them gets a sentence and the signal. */
#include "simt.h"

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <vector>

#include <sys/mman.h>
#include <unistd.h>

static constexpr unsigned char poison = 0xcb;
static constexpr size_t poisoned = (size_t)1 << 20;
static constexpr size_t alignment = 256, kept_after_free = 256, first_chunk = 64 << 10;

namespace
{
struct Allocation {
	Region region;
	char *pages; /* region.base lies in them, as near to their end as its alignment lets it */
	size_t length;
	size_t chunk; /* how much the next fault opens */
};
struct Opened {
	Allocation *allocation;
	char *from;
	size_t length;
};
} // namespace

static std::map<char *, Allocation> allocations; /* by the guard page in front */
static std::deque<char *> freed;                 /* kept so that late uses fault */
static std::vector<Opened> opened;
static thread_local int working_for = nobody;

static size_t page_size(void)
{
	static const size_t size = (size_t)sysconf(_SC_PAGESIZE);
	return size;
}

/* The allocation whose pages or guards hold the address. */
static Allocation *find(const void *pointer)
{
	auto after = allocations.upper_bound((char *)pointer);
	if (after == allocations.begin())
		return nullptr;
	Allocation &a = std::prev(after)->second;
	return (char *)pointer < a.pages + a.length + page_size() ? &a : nullptr;
}

Region region_of(const void *pointer)
{
	const Allocation *a = find(pointer);
	if (!a || (char *)pointer < a->region.base || (char *)pointer > a->region.base + a->region.size)
		return {Place::pageable, nullptr, 0, -1, false};
	return a->region;
}

bool on_device(const void *pointer, size_t bytes, int device)
{
	Region r = region_of(pointer);
	return r.place == Place::device && !r.freed && r.device == device &&
	       (char *)pointer + bytes <= r.base + r.size;
}

/* ---- faults ---- */

static const char *offence(const Allocation *a, const char *at)
{
	static char text[160];
	long past = (long)(at - a->region.base);
	if (a->region.freed)
		return "memory that was freed";
	snprintf(text, sizeof text, "byte %ld of an allocation of %zu bytes of %s memory", past,
	         a->region.size, a->region.place == Place::device ? "device" : "pinned");
	return text;
}

static void explain(const Allocation *a, const char *at, bool misaligned)
{
	if (misaligned && working_for != nobody)
		fprintf(stderr,
		        "simt: %s: loads or stores a vector at an address that is not aligned to it\n",
		        running_thread());
	else if (working_for == nobody && a && a->region.place == Place::device)
		fprintf(stderr, "simt: the host touched device memory: %s\n", offence(a, at));
	else if (working_for != nobody && a && a->region.device >= 0 && a->region.device != working_for)
		fprintf(stderr, "simt: %s: device %d touches memory of device %d: %s\n", running_thread(),
		        working_for, a->region.device, offence(a, at));
	else if (a)
		fprintf(stderr, "simt: %s: touches %s\n", running_thread(), offence(a, at));
	else if (working_for != nobody)
		fprintf(stderr,
		        "simt: %s: touches the address %p, which is no memory (or its stack is too small)\n",
		        running_thread(), (const void *)at);
}

/* Ever larger pieces, for changing many pages takes long, and so do many faults. */
static bool open_from(Allocation *a, char *at)
{
	char *from = a->pages + (size_t)(at - a->pages) / a->chunk * a->chunk;
	size_t length = std::min(a->chunk, (size_t)(a->pages + a->length - from));
	if (mprotect(from, length, PROT_READ | PROT_WRITE))
		return false;
	opened.push_back({a, from, length});
	a->chunk *= 2;
	return true;
}

static void on_fault(int number, siginfo_t *info, void *)
{
	char *at = (char *)info->si_addr;
	Allocation *a = find(at);
	bool inside = a && at >= a->pages && at < a->pages + a->length;
	bool ours = inside && a->region.place == Place::device && !a->region.freed &&
	            (working_for == every_device || working_for == a->region.device);
	if (ours && open_from(a, at))
		return;
	explain(a, at, info->si_code == SI_KERNEL);
	signal(number, SIG_DFL);
}

/* The handler needs a stack of its own: the fault may be that there is no more stack. */
namespace
{
struct SignalStack {
	stack_t stack;
	SignalStack()
	{
		stack.ss_sp = malloc(stack.ss_size = 64 << 10);
		stack.ss_flags = 0;
		sigaltstack(&stack, nullptr);
	}
	~SignalStack()
	{
		stack.ss_flags = SS_DISABLE;
		sigaltstack(&stack, nullptr);
		free(stack.ss_sp);
	}
};
} // namespace

static void catch_faults(void)
{
	static bool caught;
	if (caught)
		return;
	caught = true;
	struct sigaction action = {};
	action.sa_sigaction = on_fault;
	action.sa_flags = SA_SIGINFO | SA_ONSTACK;
	sigaction(SIGSEGV, &action, nullptr);
}

void touch_as(int device)
{
	static thread_local SignalStack stack;
	(void)stack;
	if (device == working_for)
		return;
	working_for = device;
	for (const Opened &o : opened) {
		mprotect(o.from, o.length, PROT_NONE);
		o.allocation->chunk = first_chunk;
	}
	opened.clear();
}

/* ---- allocation ---- */

static cudaError_t allocate(Place place, int device, size_t size, void **pointer)
{
	size_t page = page_size(), rounded = (size + alignment - 1) / alignment * alignment;
	size_t length = (rounded + page - 1) / page * page;
	void *at = mmap(nullptr, length + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (at == MAP_FAILED)
		return cudaErrorMemoryAllocation;
	char *pages = (char *)at + page;
	if (mprotect(pages, length, PROT_READ | PROT_WRITE))
		die("no memory for an allocation of %zu bytes", size);
	/* Of what is large the begin and the end: untouched pages cost nothing. */
	memset(pages, poison, std::min(length, poisoned));
	memset(pages + length - page, poison, page);
	if (place == Place::device)
		mprotect(pages, length, PROT_NONE);
	catch_faults();
	char *base = pages + length - rounded;
	allocations[(char *)at] = {{place, base, size, device, false}, pages, length, first_chunk};
	*pointer = base;
	return cudaSuccess;
}

cudaError_t device_allocate(int device, size_t size, void **pointer)
{
	*pointer = nullptr;
	if (!size)
		return cudaSuccess;
	if (size > device_memory_total - device_memory_in_use(device))
		return cudaErrorMemoryAllocation;
	return allocate(Place::device, device, size, pointer);
}

cudaError_t host_allocate(size_t size, void **pointer)
{
	*pointer = nullptr;
	return size ? allocate(Place::pinned, -1, size, pointer) : cudaSuccess;
}

/* What lies between the allocation and its guard pages is as it was, or somebody wrote past the end. */
static void check_slack(const Allocation &a)
{
	mprotect(a.pages, a.length, PROT_READ | PROT_WRITE);
	auto touched = [](char c) { return (unsigned char)c != poison; };
	char *end = a.region.base + a.region.size;
	if (std::any_of(a.pages, a.region.base, touched))
		die("somebody wrote in front of an allocation of %zu bytes", a.region.size);
	if (std::any_of(end, a.pages + a.length, touched))
		die("somebody wrote past the end of an allocation of %zu bytes", a.region.size);
}

static cudaError_t release(Place place, void *pointer)
{
	if (!pointer)
		return cudaSuccess;
	Allocation *a = find(pointer);
	if (!a || a->region.base != pointer || a->region.place != place || a->region.freed)
		return cudaErrorInvalidValue;
	check_slack(*a);
	mprotect(a->pages, a->length, PROT_NONE);
	madvise(a->pages, a->length, MADV_DONTNEED);
	a->region.freed = true;
	freed.push_back(a->pages - page_size());
	if (freed.size() > kept_after_free) {
		munmap(freed.front(), allocations[freed.front()].length + 2 * page_size());
		allocations.erase(freed.front());
		freed.pop_front();
	}
	return cudaSuccess;
}

cudaError_t device_release(void *pointer)
{
	return release(Place::device, pointer);
}

cudaError_t host_release(void *pointer)
{
	return release(Place::pinned, pointer);
}

size_t device_memory_in_use(int device)
{
	size_t sum = 0;
	for (const auto &entry : allocations) {
		if (entry.second.region.device == device && !entry.second.region.freed)
			sum += entry.second.region.size;
	}
	return sum;
}
