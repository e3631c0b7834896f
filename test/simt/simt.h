/* What the files of the simulator share. One lock guards all of it; kernels run while it is held. */
#ifndef SIMT_H
#define SIMT_H

#include "cuda_runtime.h"

#include <functional>
#include <string>

/* ---- memory.cc: where pointers lead ---- */

/* Names of its own, for kernels and tests may well have a Task too. */
namespace simt
{
enum class Place { pageable, pinned, device };
struct Region {
	Place place;
	char *base; /* of pageable memory: unknown */
	size_t size;
	int device;
	bool freed;
};
} // namespace simt
using namespace simt;
/* The region a pointer lies in; one past the end still belongs to it. */
Region region_of(const void *pointer);
/* Whether so many bytes from the pointer on lie in living memory of the device. */
bool on_device(const void *pointer, size_t bytes, int device);
/* From now on this thread's accesses are those of the device, or of nobody but the host. Memory that was
 * open for another device closes. */
constexpr int nobody = -1, every_device = -2;
void touch_as(int device);
cudaError_t device_allocate(int device, size_t size, void **pointer);
cudaError_t device_release(void *pointer);
cudaError_t host_allocate(size_t size, void **pointer);
cudaError_t host_release(void *pointer);
size_t device_memory_in_use(int device);
constexpr size_t device_memory_total = (size_t)4 << 30;

/* ---- execute.cc: running a kernel ---- */

namespace simt
{
struct Grid {
	const void *kernel;
	dim3 blocks, threads;
	size_t shared_bytes;
	std::function<void()> body;
};
} // namespace simt
/* Runs every thread of every block, in an order drawn from `seed`. */
void run_grid(const Grid &grid, unsigned seed);
/* "kernel k, block (0,0,0), thread (1,0,0)" while one runs, else "no kernel". */
const char *running_thread(void);

/* ---- names.cc ---- */

/* The name of the function at this address, static ones included. */
std::string function_name(const void *address);
/* One sentence on stderr, then abort. */
[[noreturn]] void die(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* Why a call was refused, for who asked for it with SIMT_TALK. */
void talk(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* A number from the environment. */
double environment(const char *name, double otherwise);

/* ---- runtime.cc ---- */

/* Remembers the error of this thread for cudaGetLastError. */
cudaError_t report(cudaError_t error);
int device_count(void);
int current_device(void);

#endif
