/* Who runs next. Streams go on only when somebody waits, in an order drawn at random that honours nothing
 * but what the program asked for, so that an event that is missing shows as a wrong result. */
#include "streams.h"
#include "simt_control.h"

#include <condition_variable>
#include <list>
#include <map>
#include <random>
#include <thread>

static std::mutex everything;
static std::condition_variable moved;
static unsigned long moves;
static std::list<const char *> waiting_hosts; /* the calls in which threads wait */

namespace
{
struct Draws {
	std::minstd_rand generator;
	CUstream_st *favourite; /* runs on for a while, so that streams also come far ahead of each other */
};
} // namespace
static std::map<int, Draws> draws;
static unsigned seed_set;
static bool seed_known;

Lock take_lock(void)
{
	return Lock(everything);
}

void note_move(void)
{
	moves++;
	moved.notify_all();
}

/* ---- chance ---- */

void simt_set_seed(unsigned seed)
{
	Lock lock = take_lock();
	seed_set = seed;
	seed_known = true;
	draws.clear();
}

static Draws &draws_of(int device)
{
	if (!seed_known) {
		seed_set = (unsigned)environment("SIMT_SEED", 1);
		seed_known = true;
	}
	auto found = draws.find(device);
	if (found == draws.end()) {
		std::seed_seq both{seed_set, (unsigned)device};
		found = draws.emplace(device, Draws{std::minstd_rand(both), nullptr}).first;
	}
	return found->second;
}

unsigned draw_number(int device)
{
	return (unsigned)draws_of(device).generator();
}

/* ---- choosing ---- */

static bool can_try(const CUstream_st *stream)
{
	if (stream->queue.empty() || stream->queue.front().tried == moves)
		return false;
	for (const MarkPtr &mark : stream->queue.front().after) {
		if (!mark->passed)
			return false;
	}
	return true;
}

/* One of the device's streams that may go on, or of any device's. */
static CUstream_st *choose(int device, bool any)
{
	Draws &d = draws_of(device);
	std::vector<CUstream_st *> able;
	for (CUstream_st *stream : all_streams()) {
		if (!(any || stream->device == device) || !can_try(stream))
			continue;
		able.push_back(stream);
		if (stream == d.favourite && d.generator() % 8)
			return stream;
	}
	d.favourite = able.empty() ? nullptr : able[d.generator() % able.size()];
	return d.favourite;
}

/* Tries the first operation of a stream; whether anything was tried. */
static bool step(int device)
{
	CUstream_st *stream = choose(device, false);
	if (!stream)
		stream = choose(device, true);
	if (!stream)
		return false;
	touch_as(stream->device);
	unsigned long before = moves;
	if (!stream->queue.front().run()) {
		stream->queue.front().tried = before;
		return true;
	}
	Mark &mark = *stream->queue.front().mark;
	mark = {true, std::chrono::steady_clock::now()};
	stream->queue.pop_front();
	note_move();
	return true;
}

/* ---- waiting ---- */

static std::string name_of(const CUstream_st *stream)
{
	return "device " + std::to_string(stream->device) + ", stream " + std::to_string(stream->number);
}

static std::string who_makes(const MarkPtr &mark)
{
	for (const CUstream_st *stream : all_streams()) {
		for (const Operation &o : stream->queue) {
			if (o.mark == mark)
				return o.describe() + " (" + name_of(stream) + ")";
		}
	}
	return "something that is not queued";
}

[[noreturn]] static void give_up(void)
{
	std::string list;
	for (const CUstream_st *stream : all_streams()) {
		if (stream->queue.empty())
			continue;
		const Operation &o = stream->queue.front();
		list += "\n  " + name_of(stream) + ": " + o.describe();
		for (const MarkPtr &mark : o.after) {
			if (!mark->passed)
				list += ", after " + who_makes(mark);
		}
	}
	for (const char *call : waiting_hosts)
		list += std::string("\n  a thread of the host: ") + call;
	die("nothing can go on, and nobody has moved for long; who waits for what:%s", list.c_str());
}

static double timeout_set;

void simt_set_timeout(double seconds)
{
	Lock lock = take_lock();
	timeout_set = seconds;
}

static std::chrono::microseconds patience(void)
{
	static const double seconds = environment("SIMT_TIMEOUT", 20);
	return std::chrono::microseconds((long long)((timeout_set > 0 ? timeout_set : seconds) * 1e6));
}

void work_until(Lock &lock, int device, const char *call, const std::function<bool()> &done)
{
	auto here = waiting_hosts.insert(waiting_hosts.end(), call);
	while (!done()) {
		if (step(device))
			continue;
		touch_as(nobody);
		unsigned long before = moves;
		if (!moved.wait_for(lock, patience(), [&] { return moves != before; }))
			give_up();
	}
	waiting_hosts.erase(here);
	touch_as(nobody);
}

/* For threads that ask again and again. */
static void pause_thread(Lock &lock)
{
	static unsigned long moves_seen = ~0ul;
	static std::chrono::steady_clock::time_point since, asked;
	auto now = std::chrono::steady_clock::now();
	if (moves_seen != moves || now - asked > patience() / 10)
		since = now;
	moves_seen = moves;
	asked = now;
	if (now - since > patience())
		give_up();
	lock.unlock();
	std::this_thread::yield();
	lock.lock();
}

void work_a_little(Lock &lock, int device)
{
	bool worked = false;
	for (unsigned count = 1 + draw_number(device) % 3; count; count--)
		worked |= step(device);
	touch_as(nobody);
	if (!worked)
		pause_thread(lock);
}
