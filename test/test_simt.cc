/* The simulator of CUDA: what works there, and above all what it must not let pass. */
#include "test/test_simt.h"
#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_fp8.h"
#include "mma.h"

#include <sys/wait.h>
#include <unistd.h>

const char *last_words(const std::function<void()> &deed)
{
	static std::string words;
	int ends[2], status = 0;
	char text[4096];
	words.clear();
	if (pipe(ends))
		return "no pipe";
	pid_t child = fork();
	if (!child) {
		dup2(ends[1], STDERR_FILENO);
		deed();
		cudaDeviceSynchronize();
		_exit(0);
	}
	close(ends[1]);
	for (ssize_t got; (got = read(ends[0], text, sizeof text)) > 0;)
		words.append(text, (size_t)got);
	close(ends[0]);
	waitpid(child, &status, 0);
	if (!WIFSIGNALED(status))
		words.insert(0, "survived: ");
	return words.c_str();
}

/* ---- kernels ---- */

static __global__ void sum_blocks(const float *__restrict__ in, float *out, int n)
{
	__shared__ float part[32];
	float sum = 0;
	for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x)
		sum += in[i];
	for (int lanes = 16; lanes; lanes /= 2)
		sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
	if (threadIdx.x % 32 == 0)
		part[threadIdx.x / 32] = sum;
	__syncthreads();
	if (threadIdx.x >= 32)
		return;
	sum = threadIdx.x < blockDim.x / 32 ? part[threadIdx.x] : 0;
	for (unsigned delta = 16; delta; delta /= 2)
		sum += __shfl_down_sync(0xffffffffu, sum, delta);
	if (threadIdx.x == 0)
		atomicAdd(&out[blockIdx.x], sum);
}

TEST(threads_of_a_block_sum_up)
{
	std::vector<float> in(1000);
	for (size_t i = 0; i < in.size(); i++)
		in[i] = (float)i;
	float *from = upload(in), *to = upload(std::vector<float>(3));
	for (unsigned threads : {32u, 96u, 1024u}) {
		cudaLaunchConfig_t config = grid_of(3, threads);
		OK(cudaMemset(to, 0, 12));
		OK(cudaLaunchKernelEx(&config, sum_blocks, from, to, 1000));
		for (float sum : download(to, 3))
			CHECK_NEAR(sum, 499500, 0);
	}
	OK(cudaFree(from));
	OK(cudaFree(to));
}

static __global__ void talk_in_warp(int *out)
{
	int lane = (int)threadIdx.x, *mine = out + 8 * lane;
	mine[0] = __shfl_sync(0xffffffffu, lane * lane, 5);
	mine[1] = __shfl_up_sync(0xffffffffu, lane, 3, 8);
	mine[2] = (int)__ballot_sync(0xffffffffu, lane % 3 == 0);
	mine[3] = __any_sync(0xffffffffu, lane == 31) + 2 * __all_sync(0xffffffffu, lane < 31);
	mine[4] = __reduce_max_sync(0xffffffffu, lane ^ 21);
	unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;
	mine[5] = (int)__reduce_add_sync(half, (unsigned)lane);
	mine[6] = __syncthreads_count(lane % 2) + 100 * __syncthreads_or(lane == 7) +
	          1000 * __syncthreads_and(1);
	mine[7] = (int)__shfl_xor_sync(half, make_float4(1, 2, (float)lane, 4), 1).z;
}

TEST(lanes_of_a_warp_exchange)
{
	int *out = upload(std::vector<int>(256));
	cudaLaunchConfig_t config = grid_of(1, 32);
	OK(cudaLaunchKernelEx(&config, talk_in_warp, out));
	std::vector<int> got = download(out, 256);
	for (int lane = 0; lane < 32; lane++) {
		const int *mine = &got[(size_t)(8 * lane)];
		CHECK_INT(mine[0], 25);
		CHECK_INT(mine[1], lane % 8 < 3 ? lane : lane - 3);
		CHECK_INT((unsigned)mine[2], 0x49249249u);
		CHECK_INT(mine[3], 1);
		CHECK_INT(mine[4], 31);
		CHECK_INT(mine[5], lane < 16 ? 120 : 376);
		CHECK_INT(mine[6], 1116);
		CHECK_INT(mine[7], lane ^ 1);
	}
	OK(cudaFree(out));
}

namespace
{
struct Shape {
	unsigned places[4];
};
} // namespace

static __global__ void count_places(unsigned *count, Shape shape)
{
	unsigned x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y,
	         z = blockIdx.z * blockDim.z + threadIdx.z;
	atomicAdd(&count[(z * shape.places[1] + y) * shape.places[0] + x], 1u);
	atomicMax(&count[shape.places[3]], (unsigned)gridDim.x * blockDim.y);
}

TEST(every_thread_of_a_grid_runs_once)
{
	unsigned *count = upload(std::vector<unsigned>(721));
	cudaLaunchConfig_t config = grid_of(dim3(3, 2, 5), dim3(4, 3, 2));
	OK(cudaLaunchKernelEx(&config, count_places, count, Shape{{12, 6, 10, 720}}));
	std::vector<unsigned> got = download(count, 721);
	for (size_t i = 0; i < 720; i++)
		CHECK_INT(got[i], 1);
	CHECK_INT(got[720], 9);
	OK(cudaFree(count));
}

static __global__ void reverse(int *values)
{
	int *shared = (int *)simt_dynamic_shared();
	unsigned n = blockDim.x, t = threadIdx.x;
	shared[t] = values[t];
	__syncthreads();
	values[t] = shared[n - 1 - t];
}

static __global__ void reverse_without_barrier(int *values)
{
	int *shared = (int *)simt_dynamic_shared();
	unsigned n = blockDim.x, t = threadIdx.x;
	shared[t] = values[t];
	values[t] = shared[n - 1 - t];
}

TEST(a_block_shares_memory)
{
	std::vector<int> in(256);
	for (size_t i = 0; i < in.size(); i++)
		in[i] = (int)i;
	int *values = upload(in);
	cudaLaunchConfig_t config = grid_of(1, 256, nullptr, 1024);
	OK(cudaLaunchKernelEx(&config, reverse, values));
	CHECK_INT(download(values, 256)[0], 255);
	OK(cudaLaunchKernelEx(&config, reverse_without_barrier, values));
	bool garbage = false;
	for (int value : download(values, 256))
		garbage |= value == (int)0xcbcbcbcb;
	CHECK(garbage);
	OK(cudaFree(values));
}

static __global__ void multiply_tiles(const __nv_bfloat16 *a, const __nv_bfloat16 *b, float *c)
{
	using namespace nvcuda::wmma;
	fragment<matrix_a, 16, 16, 16, __nv_bfloat16, row_major> fa;
	fragment<matrix_b, 16, 16, 16, __nv_bfloat16, col_major> fb;
	fragment<accumulator, 16, 16, 16, float> fc;
	fill_fragment(fc, 1.0f);
	load_matrix_sync(fa, a, 16);
	load_matrix_sync(fb, b, 16);
	mma_sync(fc, fa, fb, fc);
	for (int i = 0; i < fc.num_elements; i++)
		fc.x[i] *= 2;
	store_matrix_sync(c, fc, 16, mem_row_major);
}

TEST(a_warp_multiplies_tiles)
{
	std::vector<__nv_bfloat16> a(256), b(256);
	for (int i = 0; i < 256; i++) {
		a[(size_t)i] = (float)(i % 7);
		b[(size_t)i] = (float)(i % 5 - 2);
	}
	__nv_bfloat16 *da = upload(a), *db = upload(b);
	float *dc = upload(std::vector<float>(256));
	cudaLaunchConfig_t config = grid_of(1, 32);
	OK(cudaLaunchKernelEx(&config, multiply_tiles, da, db, dc));
	std::vector<float> c = download(dc, 256);
	for (size_t i = 0; i < 256; i++) {
		float sum = 1;
		for (size_t k = 0; k < 16; k++)
			sum += (float)a[i / 16 * 16 + k] * (float)b[i % 16 * 16 + k];
		CHECK_NEAR(c[i], 2 * sum, 0);
	}
	for (void *p : {(void *)da, (void *)db, (void *)dc})
		OK(cudaFree(p));
}

/* ---- narrow floats ---- */

TEST(narrow_floats_round_to_the_nearest)
{
	for (unsigned code = 0; code < 65536; code++) {
		float half = __half2float(__ushort_as_half((unsigned short)code));
		float bf16 = __bfloat162float(__ushort_as_bfloat16((unsigned short)code));
		if (!std::isnan(half))
			CHECK_INT(__half_as_ushort(__float2half_rn(half)), code);
		if (!std::isnan(bf16))
			CHECK_INT(__bfloat16_as_ushort(__float2bfloat16_rn(bf16)), code);
	}
	for (unsigned code = 0; code < 256; code++) {
		for (auto format : {__NV_E4M3, __NV_E5M2}) {
			float x = __half2float(__nv_cvt_fp8_to_halfraw((unsigned char)code, format));
			if (std::isfinite(x))
				CHECK_INT(__nv_cvt_float_to_fp8(x, __NV_SATFINITE, format), code);
		}
	}
	CHECK_NEAR(__half2float(__half(1 + 1 / 2048.0f)), 1, 0); /* ties to even, down and up */
	CHECK_NEAR(__half2float(__half(1 + 3 / 2048.0f)), 1 + 2 / 1024.0f, 0);
	CHECK_NEAR(__half2float(__half(ldexpf(1, -25))), 0, 0); /* half of the smallest */
	CHECK_NEAR(__half2float(__half(ldexpf(1.5f, -25))), ldexpf(1, -24), 0);
	CHECK(std::isinf(__half2float(__half(65520.0f))) && !std::isinf(__half2float(__half(65519.0f))));
	CHECK_NEAR((float)__nv_bfloat16(1 + 1 / 256.0f), 1, 0);
	CHECK_NEAR((float)__nv_bfloat16(1 + 3 / 256.0f), 1 + 1 / 64.0f, 0);
	CHECK(std::isnan((float)__nv_bfloat16(NAN)) && std::isnan(__half2float(__half(NAN))));
	CHECK_NEAR((float)__nv_fp8_e4m3(1e9f), 448, 0);
	CHECK_NEAR((float)__nv_fp8_e5m2(-1e9f), -57344, 0);
	CHECK_NEAR((float)__nv_fp8_e4m3(ldexpf(1, -9)), ldexpf(1, -9), 0);
	CHECK_INT(__nv_cvt_float_to_fp8(1e9f, __NV_NOSAT, __NV_E4M3), 0x7f);
	CHECK_INT(__nv_cvt_float_to_fp8(1e9f, __NV_NOSAT, __NV_E5M2), 0x7c);
}

/* ---- what is refused and what is fatal ---- */

TEST(launches_beyond_the_machine_are_refused)
{
	int *values = upload(std::vector<int>(256));
	for (dim3 threads : {dim3(1025), dim3(0), dim3(32, 33), dim3(1, 1, 65)}) {
		cudaLaunchConfig_t config = grid_of(1, threads, nullptr, 1024);
		CHECK_INT(cudaLaunchKernelEx(&config, reverse, values), cudaErrorInvalidConfiguration);
	}
	cudaLaunchConfig_t config = grid_of(dim3(1, 65536), 32);
	CHECK_INT(cudaLaunchKernelEx(&config, reverse, values), cudaErrorInvalidConfiguration);
	config = grid_of(1, 256, nullptr, (48 << 10) + 1);
	CHECK_INT(cudaLaunchKernelEx(&config, reverse, values), cudaErrorInvalidValue);
	CHECK_INT(cudaFuncSetAttribute(reverse, cudaFuncAttributeMaxDynamicSharedMemorySize, (227 << 10) + 1),
	          cudaErrorInvalidValue);
	OK(cudaFuncSetAttribute(reverse, cudaFuncAttributeMaxDynamicSharedMemorySize, 227 << 10));
	config = grid_of(1, 256, nullptr, 227 << 10);
	CHECK_INT(cudaGetLastError(), cudaErrorInvalidValue);
	CHECK_INT(cudaGetLastError(), cudaSuccess);
	OK(cudaLaunchKernelEx(&config, reverse, values));
	OK(cudaFree(values));
	CHECK_INT(cudaFree(&config), cudaErrorInvalidValue);
}

static __global__ void wait_apart(int *out)
{
	if (threadIdx.x < 40)
		__syncthreads();
	out[threadIdx.x] = 1;
}

static __global__ void wait_at_two_places(int *out)
{
	if (threadIdx.x < 32)
		__syncthreads();
	else
		__syncthreads();
	out[threadIdx.x] = 1;
}

static __global__ void shuffle_without_lane(int *out)
{
	if (threadIdx.x != 5)
		out[threadIdx.x] = __shfl_sync(0xffffffffu, 1, 2);
}

static __global__ void write_at(int *out, long at)
{
	out[at] = 1;
}

TEST(mistakes_of_kernels_are_fatal)
{
	int *out = upload(std::vector<int>(64));
	cudaLaunchConfig_t config = grid_of(1, 64);
	auto words_of = [&](auto kernel, auto... arguments) {
		return last_words([&] { cudaLaunchKernelEx(&config, kernel, arguments...); });
	};
	const char *words = words_of(wait_apart, out);
	CHECK_HAS(words, "wait_apart(int*), block (0,0,0), thread (0,0,0)");
	CHECK_HAS(words, "but thread (40,0,0) has finished");
	CHECK_HAS(words_of(wait_at_two_places, out), "waits in __syncthreads at test_simt.cc:");
	CHECK_HAS(words_of(shuffle_without_lane, out), "lane 5, thread (5,0,0) has finished");
	CHECK_HAS(words_of(write_at, out, 64l), "byte 256 of an allocation of 256 bytes of device memory");
	CHECK_HAS(words_of(write_at, out, -1024l), "byte -4096 of an allocation");
	CHECK_HAS(words_of(write_at, (int *)nullptr, 0l), "which is no memory");
	CHECK_HAS(words_of(write_at, (int *)&config, 0l), "pageable host memory");
	CHECK_HAS(last_words([&] {
		          cudaFree(out);
		          cudaLaunchKernelEx(&config, write_at, out, 0l);
	          }),
	          "freed memory");
	CHECK_HAS(last_words([&] {
		          int *small;
		          cudaMalloc(&small, 100);
		          cudaLaunchKernelEx(&config, write_at, small, 25l);
		          cudaFree(small);
	          }),
	          "past the end of an allocation of 100 bytes");
	CHECK_HAS(last_words([&] {
		          cudaSetDevice(1);
		          cudaLaunchKernelEx(&config, write_at, out, 0l);
		          cudaDeviceSynchronize();
	          }),
	          "device 1 touches memory of device 0");
	OK(cudaFree(out));
}

TEST(the_host_may_not_touch_device_memory)
{
	float *at = upload(std::vector<float>{1, 2, 3});
	CHECK_HAS(last_words([&] { at[1] = 5; }), "the host touched device memory: byte 4");
	CHECK_NEAR(download(at, 3)[1], 2, 0);
	float host[3];
	CHECK_INT(cudaMemcpy(at, host, 12, cudaMemcpyDeviceToHost), cudaErrorInvalidValue);
	CHECK_INT(cudaMemcpy(host, host + 1, 4, cudaMemcpyHostToDevice), cudaErrorInvalidValue);
	CHECK_INT(cudaMemcpy(host, at, 16, cudaMemcpyDeviceToHost), cudaErrorInvalidValue);
	OK(cudaFree(at));
}

/* ---- streams ---- */

static __global__ void copy_value(int *to, const int *from)
{
	*to = *from;
}

/* One stream makes a value, the other uses it; whether it got the right one. */
static bool pass_on(unsigned seed, bool with_event)
{
	simt_set_seed(seed);
	cudaStream_t maker = new_stream(), user = new_stream();
	cudaEvent_t made = new_event();
	int *values = upload(std::vector<int>{7, 0, 0});
	OK(cudaDeviceSynchronize());
	cudaLaunchConfig_t first = grid_of(1, 1, maker), second = grid_of(1, 1, user);
	OK(cudaLaunchKernelEx(&first, copy_value, values + 1, values));
	OK(cudaEventRecord(made, maker));
	if (with_event)
		OK(cudaStreamWaitEvent(user, made));
	OK(cudaLaunchKernelEx(&second, copy_value, values + 2, values + 1));
	bool right = download(values, 3)[2] == 7;
	OK(cudaStreamDestroy(maker));
	OK(cudaStreamDestroy(user));
	OK(cudaEventDestroy(made));
	OK(cudaFree(values));
	return right;
}

TEST(a_missing_event_shows)
{
	int right = 0;
	for (unsigned seed = 0; seed < 20; seed++) {
		CHECK(pass_on(seed, true));
		right += pass_on(seed, false);
	}
	CHECK(right > 0 && right < 20);
}

TEST(nothing_runs_before_somebody_waits)
{
	int *pinned, *device = upload(std::vector<int>(1));
	cudaStream_t stream = new_stream();
	OK(cudaMallocHost(&pinned, 8));
	for (bool pageable : {false, true}) {
		int local = 1;
		pinned[0] = 1;
		pinned[1] = 0;
		OK(cudaMemcpyAsync(device, pageable ? &local : pinned, 4, cudaMemcpyHostToDevice, stream));
		OK(cudaMemcpyAsync(pinned + 1, device, 4, cudaMemcpyDeviceToHost, stream));
		pinned[0] = local = 2;
		CHECK_INT(pinned[1], 0);
		CHECK(local == 2);
		OK(cudaStreamSynchronize(stream));
		CHECK_INT(pinned[1], pageable ? 1 : 2); /* pinned memory is read when the copy runs */
	}
	int arrived = 0;
	OK(cudaMemsetAsync(device, 0x11, 4, stream));
	OK(cudaMemcpyAsync(&arrived, device, 4, cudaMemcpyDeviceToHost, stream));
	CHECK_INT(arrived, 0x11111111);
	OK(cudaStreamDestroy(stream));
	OK(cudaFreeHost(pinned));
	OK(cudaFree(device));
}

TEST(events_tell_how_far_a_stream_is)
{
	cudaEvent_t never, start, end;
	OK(cudaEventCreate(&never));
	OK(cudaEventCreate(&start));
	OK(cudaEventCreate(&end));
	OK(cudaEventQuery(never));
	OK(cudaEventSynchronize(never));
	int *value = upload(std::vector<int>(1)), tries = 0;
	cudaStream_t stream = new_stream();
	float ms = -1;
	OK(cudaEventRecord(start, stream));
	for (int i = 0; i < 20; i++)
		OK(cudaMemsetAsync(value, i, 4, stream));
	OK(cudaEventRecord(end, stream));
	CHECK_INT(cudaEventElapsedTime(&ms, start, end), cudaErrorNotReady);
	while (cudaEventQuery(end) == cudaErrorNotReady)
		tries++;
	CHECK(tries > 3 && tries < 40);
	OK(cudaEventElapsedTime(&ms, start, end));
	CHECK(ms >= 0);
	CHECK_INT(cudaEventElapsedTime(&ms, never, end), cudaErrorInvalidResourceHandle);
	OK(cudaStreamQuery(stream));
	CHECK_INT(cudaStreamQuery((cudaStream_t)value), cudaErrorInvalidResourceHandle);
	for (cudaEvent_t event : {never, start, end})
		OK(cudaEventDestroy(event));
	OK(cudaStreamDestroy(stream));
	OK(cudaFree(value));
}

/* The legacy stream waits for streams that block, and for no others. */
TEST(the_legacy_stream_waits_for_blocking_streams)
{
	int *value = upload(std::vector<int>(1)), wrong = 0;
	for (unsigned seed = 0; seed < 20; seed++) {
		for (unsigned flags : {cudaStreamDefault, cudaStreamNonBlocking}) {
			cudaStream_t stream;
			int got = -1;
			simt_set_seed(seed);
			OK(cudaStreamCreateWithFlags(&stream, flags));
			OK(cudaMemset(value, 0, 4));
			OK(cudaDeviceSynchronize());
			OK(cudaMemsetAsync(value, 1, 4, stream));
			OK(cudaMemcpy(&got, value, 4, cudaMemcpyDeviceToHost));
			if (flags == cudaStreamDefault)
				CHECK_INT(got, 0x01010101);
			else
				wrong += got == 0;
			OK(cudaStreamDestroy(stream));
		}
	}
	CHECK(wrong > 0 && wrong < 20);
	OK(cudaFree(value));
}

/* ---- graphs ---- */

TEST(a_capture_runs_again)
{
	int *values = upload(std::vector<int>(2));
	cudaStream_t one = new_stream(), two = new_stream();
	cudaEvent_t fork = new_event(), join = new_event();
	cudaLaunchConfig_t on_one = grid_of(1, 1, one), on_two = grid_of(1, 1, two);
	cudaGraph_t graph;
	cudaGraphExec_t exec;
	size_t nodes;
	OK(cudaStreamBeginCapture(one, cudaStreamCaptureModeThreadLocal));
	OK(cudaLaunchKernelEx(&on_one, add_to, values, 1));
	OK(cudaEventRecord(fork, one));
	OK(cudaStreamWaitEvent(two, fork));
	OK(cudaLaunchKernelEx(&on_two, copy_value, values + 1, values));
	OK(cudaEventRecord(join, two));
	OK(cudaStreamWaitEvent(one, join));
	OK(cudaLaunchKernelEx(&on_one, add_to, values, 10));
	OK(cudaStreamEndCapture(one, &graph));
	OK(cudaGraphGetNodes(graph, nullptr, &nodes));
	CHECK_INT(nodes, 3);
	OK(cudaGraphInstantiate(&exec, graph, 0));
	OK(cudaGraphDestroy(graph));
	CHECK_INT(download(values, 1)[0], 0); /* captured, not run */
	for (unsigned seed = 0; seed < 10; seed++) {
		simt_set_seed(seed);
		for (int launch = 0; launch < 3; launch++)
			OK(cudaGraphLaunch(exec, launch % 2 ? two : one));
		std::vector<int> got = download(values, 2);
		CHECK_INT(got[0], 33 * (int)(seed + 1));
		CHECK_INT(got[1], got[0] - 10);
	}
	OK(cudaGraphExecDestroy(exec));
	OK(cudaStreamDestroy(one));
	OK(cudaStreamDestroy(two));
	OK(cudaFree(values));
}

/* The error of one call during a capture; the capture must end as `ending` says. */
static void during_capture(const std::function<cudaError_t(cudaStream_t, cudaStream_t)> &call,
                           cudaError_t error, cudaError_t ending)
{
	cudaStream_t stream = new_stream(), other = new_stream();
	cudaGraph_t graph;
	OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
	CHECK_INT(call(stream, other), error);
	CHECK_INT(cudaStreamEndCapture(stream, &graph), ending);
	CHECK((graph != nullptr) == (ending == cudaSuccess));
	if (graph)
		OK(cudaGraphDestroy(graph));
	OK(cudaStreamDestroy(stream));
	OK(cudaStreamDestroy(other));
}

TEST(captures_refuse_what_cannot_be_captured)
{
	int *value = upload(std::vector<int>(1)), *room;
	cudaEvent_t event = new_event(), before = new_event();
	const cudaError_t spoilt = cudaErrorStreamCaptureInvalidated,
	                  unsafe = cudaErrorStreamCaptureUnsupported;
	OK(cudaEventRecord(before, nullptr));
	OK(cudaDeviceSynchronize());
	during_capture([](auto s, auto) { return cudaStreamSynchronize(s); }, unsafe, spoilt);
	during_capture([](auto s, auto) { return cudaStreamQuery(s); }, unsafe, spoilt);
	during_capture([](auto, auto other) { return cudaStreamSynchronize(other); }, unsafe, spoilt);
	during_capture([](auto, auto) { return cudaDeviceSynchronize(); }, unsafe, spoilt);
	during_capture([&](auto, auto) { return cudaMalloc(&room, 4); }, unsafe, spoilt);
	during_capture([&](auto, auto) { return cudaMemset(value, 0, 4); }, unsafe, spoilt);
	during_capture([&](auto s, auto) { return cudaStreamWaitEvent(s, before); },
	               cudaErrorStreamCaptureIsolation, spoilt);
	during_capture(
	        [&](auto s, auto) {
		        OK(cudaEventRecord(event, s));
		        return cudaEventQuery(event);
	        },
	        cudaErrorCapturedEvent, spoilt);
	during_capture(
	        [&](auto s, auto other) {
		        OK(cudaEventRecord(event, s));
		        OK(cudaStreamWaitEvent(other, event));
		        return cudaMemsetAsync(value, 0, 4, other);
	        },
	        cudaSuccess, cudaErrorStreamCaptureUnjoined);
	during_capture([&](auto s, auto) { return cudaMemsetAsync(value, 0, 4, s); }, cudaSuccess,
	               cudaSuccess);
	OK(cudaEventDestroy(event));
	OK(cudaEventDestroy(before));
	OK(cudaFree(value));
}

int main(int argc, char **argv)
{
	return test_main(argc, argv);
}
