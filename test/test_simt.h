/* What the tests of the simulator share. */
#ifndef TEST_SIMT_H
#define TEST_SIMT_H

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
extern "C" {
#include "test/test.h"
}

#include "cuda_runtime.h"
#include "simt_control.h"

#include <functional>
#include <string>
#include <vector>

#define OK(call) CHECK_INT(call, 0)

static inline cudaLaunchConfig_t grid_of(dim3 blocks, dim3 threads, cudaStream_t stream = nullptr,
                                         size_t shared = 0)
{
	cudaLaunchConfig_t config = {};
	config.gridDim = blocks;
	config.blockDim = threads;
	config.stream = stream;
	config.dynamicSmemBytes = shared;
	return config;
}

template <typename T> inline T *upload(const std::vector<T> &values)
{
	T *at = nullptr;
	OK(cudaMalloc(&at, values.size() * sizeof(T)));
	OK(cudaMemcpy(at, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
	return at;
}

template <typename T> inline std::vector<T> download(const T *at, size_t count)
{
	std::vector<T> values(count);
	OK(cudaDeviceSynchronize());
	OK(cudaMemcpy(values.data(), at, count * sizeof(T), cudaMemcpyDeviceToHost));
	return values;
}

static inline cudaStream_t new_stream(void)
{
	cudaStream_t stream;
	OK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
	return stream;
}

static inline cudaEvent_t new_event(void)
{
	cudaEvent_t event;
	OK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
	return event;
}

/* What a child says on stderr before it dies of a signal, or that it survived. */
const char *last_words(const std::function<void()> &deed);

static __global__ inline void add_to(int *at, int value)
{
	*at += value;
}

#endif
