/* Launching a kernel: its arguments are copied at the call, its body runs when the stream gets to it. */
#ifndef SIMT_LAUNCH_H
#define SIMT_LAUNCH_H

#include "cuda_runtime_api.h"

#include <functional>
#include <memory>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

/* `pointers` are the arguments that are pointers: none may lead to memory that a device cannot reach. */
cudaError_t simt_launch(const cudaLaunchConfig_t *config, const void *kernel, std::function<void()> body,
                        const std::vector<const void *> &pointers);

template <typename T> inline void simt_collect_pointer(std::vector<const void *> &list, const T &value)
{
	if constexpr (std::is_pointer_v<T> && !std::is_function_v<std::remove_pointer_t<T>>)
		list.push_back(value);
	else
		(void)list, (void)value;
}

template <typename... Parameter, typename... Argument>
inline cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *config, void (*kernel)(Parameter...),
                                      Argument &&...args)
{
	static_assert((sizeof(Parameter) + ... + 0) <= 32764,
	              "a kernel takes at most 32764 bytes of arguments");
	static_assert((std::is_trivially_copyable_v<Parameter> && ...), "arguments are copied byte by byte");
	using Values = std::tuple<std::decay_t<Parameter>...>;
	auto values = std::make_shared<Values>(static_cast<Parameter>(std::forward<Argument>(args))...);
	std::vector<const void *> pointers;
	std::apply([&](const auto &...v) { (simt_collect_pointer(pointers, v), ...); }, *values);
	return simt_launch(
	        config, reinterpret_cast<const void *>(kernel),
	        [kernel, values] { std::apply(kernel, *values); }, pointers);
}

/* The real header offers these to C++ as well. */
template <typename T> inline cudaError_t cudaMalloc(T **devPtr, size_t size)
{
	return ::cudaMalloc(reinterpret_cast<void **>(devPtr), size);
}

template <typename T> inline cudaError_t cudaMallocHost(T **ptr, size_t size, unsigned flags = 0)
{
	return ::cudaHostAlloc(reinterpret_cast<void **>(ptr), size, flags);
}

template <typename T> inline cudaError_t cudaHostAlloc(T **ptr, size_t size, unsigned flags)
{
	return ::cudaHostAlloc(reinterpret_cast<void **>(ptr), size, flags);
}

template <typename T> inline cudaError_t cudaFuncSetAttribute(T *func, enum cudaFuncAttribute attr, int value)
{
	return ::cudaFuncSetAttribute(reinterpret_cast<const void *>(func), attr, value);
}

template <typename T>
inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *numBlocks, T func, int blockSize,
                                                                 size_t dynamicSMemSize)
{
	return ::cudaOccupancyMaxActiveBlocksPerMultiprocessor(
	        numBlocks, reinterpret_cast<const void *>(func), blockSize, dynamicSMemSize);
}

inline cudaError_t cudaEventCreate(cudaEvent_t *event, unsigned flags)
{
	return ::cudaEventCreateWithFlags(event, flags);
}

#endif
