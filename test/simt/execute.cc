/* Running a kernel: blocks one after the other, the threads of a block as contexts that change places only
 * where they wait. A thread that never waits is an ordinary call on a context that goes on to the next. */

/* The checked longjmp refuses to jump to another stack, which is the whole point here. */
#undef _FORTIFY_SOURCE
#include "simt.h"

#include <algorithm>
#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <vector>

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

static constexpr unsigned most_threads = 1024;
static constexpr size_t stack_bytes = 128 << 10;
static constexpr size_t most_shared = 227 << 10;

namespace
{
struct Context {
	jmp_buf here;
	ucontext_t start;
	bool started;
};

enum class State { unstarted, running, ready, at_barrier, at_exchange, finished };

struct Thread {
	State state;
	Context *context;
	simt_place place;
	bool predicate;
	unsigned mask;
	int source;
	const void *in;
	void *out;
	size_t size;
};
} // namespace

static const Grid *grid;
static unsigned thread_count, finished_count, next_start, current;
static Thread threads[most_threads];
static unsigned order[most_threads];
static std::vector<unsigned> waiting_at_barrier, ready;
static int barrier_result;
static Context *on; /* the context that runs */
static std::vector<Context *> idle;
static jmp_buf scheduler;
static char *shared_end;
static std::minstd_rand draw;
static bool running;

/* ---- where we are, for messages ---- */

static std::string thread_name(unsigned t)
{
	unsigned x = t % blockDim.x, y = t / blockDim.x % blockDim.y, z = t / blockDim.x / blockDim.y;
	char text[64];
	snprintf(text, sizeof text, "thread (%u,%u,%u)", x, y, z);
	return text;
}

const char *running_thread(void)
{
	static char text[512];
	if (!running)
		return "no kernel";
	snprintf(text, sizeof text, "kernel %s, block (%u,%u,%u), %s", function_name(grid->kernel).c_str(),
	         blockIdx.x, blockIdx.y, blockIdx.z, thread_name(current).c_str());
	return text;
}

void simt_kernel_fault(const char *sentence)
{
	die("%s: %s", running_thread(), sentence);
}

static std::string whereabouts(unsigned t)
{
	const Thread &thread = threads[t];
	std::string text = thread_name(t);
	if (thread.state == State::finished)
		return text + " has finished";
	const char *slash = strrchr(thread.place.file, '/');
	return text + " waits in " + thread.place.what + " at " + (slash ? slash + 1 : thread.place.file) +
	       ":" + std::to_string(thread.place.line);
}

[[noreturn]] static void never_meet(unsigned waiting, const char *why, unsigned other)
{
	current = waiting;
	die("%s: %s, %s %s", running_thread(), whereabouts(waiting).c_str(), why,
	    other < thread_count ? whereabouts(other).c_str() : "which this block does not have");
}

/* ---- contexts ---- */

static void run_threads(void);

static Context *new_context(void)
{
	size_t page = (size_t)sysconf(_SC_PAGESIZE);
	void *stack = mmap(nullptr, stack_bytes + page, PROT_NONE,
	                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	Context *context = new Context{};
	if (stack == MAP_FAILED || mprotect((char *)stack + page, stack_bytes, PROT_READ | PROT_WRITE))
		die("no memory for the stack of a kernel's thread");
	getcontext(&context->start);
	context->start.uc_stack.ss_sp = (char *)stack + page;
	context->start.uc_stack.ss_size = stack_bytes;
	makecontext(&context->start, run_threads, 0);
	return context;
}

[[noreturn]] static void jump(Context *to)
{
	on = to;
	if (to->started)
		_longjmp(to->here, 1);
	to->started = true;
	setcontext(&to->start);
	die("a context could not be started");
}

static Context *idle_context(void)
{
	if (idle.empty())
		return new_context();
	Context *context = idle.back();
	idle.pop_back();
	return context;
}

static void stand_at(unsigned t)
{
	current = t;
	threadIdx = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
}

static bool same(const char *a, const char *b)
{
	return a == b || !strcmp(a, b);
}

/* Whether `other`, whom t waits for, stands where they would meet. */
static bool would_meet(unsigned t, unsigned other)
{
	const Thread &a = threads[t], &b = threads[other];
	return a.state == b.state && a.mask == b.mask && a.place.line == b.place.line &&
	       same(a.place.file, b.place.file) && same(a.place.what, b.place.what);
}

/* Somebody whom the waiting thread t cannot meet; with `only_gone`, one that will never come at all. */
static void look_for_absent(unsigned t, bool only_gone)
{
	bool block = threads[t].state == State::at_barrier;
	unsigned first = block ? 0 : t & ~31u, count = block ? thread_count : 32;
	for (unsigned i = 0; i < count; i++) {
		unsigned other = first + i;
		if (!block && !(threads[t].mask >> i & 1))
			continue;
		bool gone = other >= thread_count || threads[other].state == State::finished;
		if (gone || (!only_gone && !would_meet(t, other)))
			never_meet(t,
			           block ? "but"
			                 : ("but of its mask lane " + std::to_string(i) + ",").c_str(),
			           other);
	}
}

/* Nobody can go on although somebody has not finished: says of the first one why. */
[[noreturn]] static void stuck(void)
{
	for (bool only_gone : {true, false}) {
		for (unsigned t = 0; t < thread_count; t++) {
			if (threads[t].state != State::finished)
				look_for_absent(t, only_gone);
		}
	}
	die("%s: the threads of a block wait for each other", running_thread());
}

[[noreturn]] static void run_another(void)
{
	if (next_start < thread_count)
		jump(idle_context());
	if (ready.empty())
		stuck();
	std::swap(ready[draw() % ready.size()], ready.back());
	unsigned t = ready.back();
	ready.pop_back();
	jump(threads[t].context);
}

/* Back when somebody has made the calling thread ready. */
static void wait(void)
{
	const unsigned t = current;
	if (!_setjmp(threads[t].context->here))
		run_another();
	stand_at(t);
	threads[t].state = State::running;
}

/* The life of a context: threads that have not started, one after the other. */
static void run_threads(void)
{
	for (;;) {
		while (next_start < thread_count) {
			unsigned t = order[next_start++];
			stand_at(t);
			threads[t].state = State::running;
			threads[t].context = on;
			grid->body();
			threads[t].state = State::finished;
			finished_count++;
		}
		idle.push_back(on);
		if (_setjmp(on->here))
			continue;
		if (finished_count == thread_count)
			_longjmp(scheduler, 1);
		run_another();
	}
}

/* ---- meeting ---- */

int simt_block_barrier(simt_place place, bool predicate)
{
	const unsigned t = current;
	Thread &thread = threads[t];
	thread.state = State::at_barrier;
	thread.place = place;
	thread.mask = 0;
	thread.predicate = predicate;
	waiting_at_barrier.push_back(t);
	if (!would_meet(t, waiting_at_barrier[0]))
		never_meet(waiting_at_barrier[0], "but", t);
	if (waiting_at_barrier.size() < thread_count) {
		wait();
		return barrier_result;
	}
	barrier_result = 0;
	for (unsigned other : waiting_at_barrier) {
		barrier_result += threads[other].predicate;
		threads[other].state = State::ready;
		if (other != t)
			ready.push_back(other);
	}
	waiting_at_barrier.clear();
	thread.state = State::running;
	return barrier_result;
}

int simt_lane(void)
{
	return (int)(current % 32);
}

/* All lanes of the mask are here: hands each what it asked for and lets it go on. */
static void exchange(unsigned t)
{
	unsigned mask = threads[t].mask, first = t & ~31u;
	for (unsigned lane = 0; lane < 32; lane++) {
		if (!(mask >> lane & 1))
			continue;
		Thread &to = threads[first + lane];
		if (to.source >= 0)
			memcpy(to.out, threads[first + (unsigned)to.source].in, to.size);
		for (unsigned from = 0; from < 32 && to.source < 0; from++) {
			if (mask >> from & 1)
				memcpy((char *)to.out + 16 * from, threads[first + from].in, to.size);
		}
		to.state = State::ready;
		if (first + lane != t)
			ready.push_back(first + lane);
	}
}

void simt_warp_exchange(simt_place place, unsigned mask, int source, const void *in, size_t size, void *out)
{
	const unsigned t = current, first = t & ~31u;
	Thread &thread = threads[t];
	thread = {State::at_exchange, thread.context, place, false, mask, source, in, out, size};
	if (!(mask >> (t & 31) & 1))
		die("%s: calls %s (line %d) with the mask %08x, in which it is not", running_thread(),
		    place.what, place.line, mask);
	if (source >= 0 && !(mask >> source & 1))
		die("%s: calls %s (line %d) for lane %d, which is not in the mask %08x", running_thread(),
		    place.what, place.line, source, mask);
	for (unsigned lane = 0; lane < 32; lane++) {
		unsigned other = first + lane;
		if (mask >> lane & 1 && (other >= thread_count || !would_meet(t, other))) {
			wait();
			return;
		}
	}
	exchange(t);
	thread.state = State::running;
}

/* ---- blocks ---- */

void *simt_dynamic_shared(void)
{
	return shared_end - (grid->shared_bytes + 127) / 128 * 128;
}

/* The memory ends where its pages end, so that running past it faults. */
static void prepare_shared(void)
{
	if (!shared_end) {
		size_t page = (size_t)sysconf(_SC_PAGESIZE), size = (most_shared + page - 1) / page * page;
		void *at = mmap(nullptr, size + page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (at == MAP_FAILED || mprotect(at, size, PROT_READ | PROT_WRITE))
			die("no memory for what a block shares");
		shared_end = (char *)at + size;
	}
	char *from = (char *)simt_dynamic_shared();
	memset(from, 0xcb, (size_t)(shared_end - from));
}

/* The i-th of n in one of the orders that need no list: from somewhere on in steps prime to n. */
namespace
{
struct Order {
	size_t first, step, count;
	explicit Order(size_t n) : first(draw() % n), step(1 + draw() % n), count(n)
	{
		while (std::gcd(step, n) != 1)
			step = step % n + 1;
	}
	size_t operator[](size_t i) const
	{
		return (first + i * step) % count;
	}
};
} // namespace

static void run_block(size_t block)
{
	size_t plane = (size_t)gridDim.x * gridDim.y;
	blockIdx = {(unsigned)(block % gridDim.x), (unsigned)(block % plane / gridDim.x),
	            (unsigned)(block / plane)};
	for (unsigned t = 0; t < thread_count; t++)
		threads[t].state = State::unstarted;
	next_start = finished_count = 0;
	if (grid->shared_bytes)
		prepare_shared();
	if (!_setjmp(scheduler))
		jump(idle_context());
}

void run_grid(const Grid &g, unsigned seed)
{
	grid = &g;
	gridDim = g.blocks;
	blockDim = g.threads;
	thread_count = blockDim.x * blockDim.y * blockDim.z;
	size_t blocks = (size_t)gridDim.x * gridDim.y * gridDim.z;
	draw.seed(seed);
	Order threads_by(thread_count), blocks_by(blocks);
	for (unsigned t = 0; t < thread_count; t++)
		order[t] = (unsigned)threads_by[t];
	running = true;
	for (size_t b = 0; b < blocks; b++)
		run_block(blocks_by[b]);
	running = false;
}
