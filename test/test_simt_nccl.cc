/* The simulated NCCL, between ranks that are threads. */
#include "test/test_simt.h"
#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "nccl.h"

#include <atomic>
#include <thread>

namespace
{
struct Rank {
	int rank;
	ncclComm_t comm;
	cudaStream_t stream;
};
} // namespace

static ncclResult_t settle(ncclComm_t comm, ncclResult_t result)
{
	while (result == ncclInProgress) {
		if (ncclCommGetAsyncError(comm, &result))
			return ncclInternalError;
	}
	return result;
}

/* Runs the body in as many threads, each with a device and its rank of a communicator. */
static void on_ranks(int count, bool blocking, const std::function<void(Rank)> &body)
{
	ncclUniqueId id;
	std::vector<std::thread> threads;
	OK(ncclGetUniqueId(&id));
	for (int rank = 0; rank < count; rank++)
		threads.emplace_back([&, rank] {
			Rank r = {rank, nullptr, nullptr};
			ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
			config.blocking = blocking;
			OK(cudaSetDevice(rank));
			r.stream = new_stream();
			ncclResult_t begun = ncclCommInitRankConfig(&r.comm, count, id, rank, &config);
			CHECK_INT(begun, blocking ? ncclSuccess : ncclInProgress);
			OK(settle(r.comm, begun));
			body(r);
			OK(ncclCommDestroy(r.comm));
			OK(cudaStreamDestroy(r.stream));
		});
	for (std::thread &thread : threads)
		thread.join();
}

static const int ranks = 4;

template <typename T> static void reduce_as(Rank r, ncclDataType_t type)
{
	std::vector<T> mine;
	for (int i = 0; i < ranks * 3; i++)
		mine.push_back(T((float)(i + r.rank)));
	T *at = upload(mine), *to = upload(std::vector<T>(3));
	OK(cudaDeviceSynchronize());
	OK(ncclReduceScatter(at, to, 3, type, ncclSum, r.comm, r.stream));
	OK(ncclAllReduce(at, at, ranks * 3, type, ncclMax, r.comm, r.stream));
	std::vector<T> part = download(to, 3), all = download(at, ranks * 3);
	for (int i = 0; i < 3; i++)
		CHECK_NEAR((float)part[(size_t)i], 4 * (3 * r.rank + i) + 6, 0);
	for (int i = 0; i < ranks * 3; i++)
		CHECK_NEAR((float)all[(size_t)i], i + 3, 0);
	OK(cudaFree(at));
	OK(cudaFree(to));
}

TEST(ranks_reduce_in_every_type)
{
	on_ranks(ranks, true, [](Rank r) {
		reduce_as<float>(r, ncclFloat32);
		reduce_as<double>(r, ncclFloat64);
		reduce_as<__nv_bfloat16>(r, ncclBfloat16);
		reduce_as<__half>(r, ncclFloat16);
		reduce_as<int>(r, ncclInt32);
		reduce_as<long long>(r, ncclInt64);
		reduce_as<unsigned char>(r, ncclUint8);
	});
}

TEST(ranks_gather_and_broadcast)
{
	on_ranks(ranks, true, [](Rank r) {
		int *at = upload(std::vector<int>(4, r.rank)), *root = upload(std::vector<int>{10 * r.rank});
		OK(cudaDeviceSynchronize());
		OK(ncclAllGather(at + r.rank, at, 1, ncclInt32, r.comm, r.stream));
		OK(ncclBroadcast(root, root, 1, ncclInt32, 2, r.comm, r.stream));
		std::vector<int> all = download(at, 4);
		for (int i = 0; i < 4; i++)
			CHECK_INT(all[(size_t)i], i);
		CHECK_INT(download(root, 1)[0], 20);
		CHECK_INT(ncclAllGather(at + (r.rank + 1) % ranks, at, 1, ncclInt32, r.comm, r.stream),
		          ncclInvalidArgument);
		CHECK_INT(ncclAllReduce(at, at, 5000, ncclInt32, ncclSum, r.comm, r.stream),
		          ncclInvalidArgument);
		OK(cudaFree(at));
		OK(cudaFree(root));
	});
}

enum way { grouped, one_by_one, in_two_streams };

/* For deeds that are to wait for ever: all ranks are there, and now nobody needs long. */
static void lose_patience(void)
{
	simt_set_timeout(0.5);
}

static void ring(Rank r, enum way way)
{
	int *at = upload(std::vector<int>{r.rank, -1});
	cudaStream_t other = way == in_two_streams ? new_stream() : r.stream;
	OK(cudaDeviceSynchronize());
	if (way == grouped)
		OK(ncclGroupStart());
	else
		lose_patience();
	OK(ncclSend(at, 1, ncclInt32, (r.rank + 1) % ranks, r.comm, r.stream));
	OK(ncclRecv(at + 1, 1, ncclInt32, (r.rank + ranks - 1) % ranks, r.comm, other));
	if (way == grouped)
		OK(ncclGroupEnd());
	CHECK_INT(download(at, 2)[1], (r.rank + ranks - 1) % ranks);
	OK(cudaFree(at));
}

/* Without a group every rank sends to one that sends, and a second stream does not help. */
TEST(sends_meet_receives)
{
	on_ranks(ranks, true, [](Rank r) { ring(r, grouped); });
	for (enum way way : {one_by_one, in_two_streams}) {
		const char *words = last_words([=] { on_ranks(ranks, true, [=](Rank r) { ring(r, way); }); });
		CHECK_HAS(words, "nothing can go on");
		CHECK_HAS(words, "device 2, stream");
		CHECK_HAS(words, "rank 2 of communicator");
		CHECK_HAS(words, "ncclSend of 1 ncclInt32 to rank 3");
	}
}

TEST(ranks_must_agree_on_what_they_call)
{
	auto disagree = [](const std::function<void(Rank, float *)> &body) {
		return last_words([&] {
			on_ranks(2, true, [&](Rank r) {
				float *at = upload(std::vector<float>(8));
				cudaDeviceSynchronize();
				body(r, at);
				cudaDeviceSynchronize();
			});
		});
	};
	CHECK_HAS(disagree([](Rank r, float *at) {
		          ncclAllReduce(at, at, r.rank ? 8 : 7, ncclFloat32, ncclSum, r.comm, r.stream);
	          }),
	          "ncclAllReduce of 8 ncclFloat32");
	CHECK_HAS(disagree([](Rank r, float *at) {
		          if (r.rank)
			          ncclBroadcast(at, at, 4, ncclFloat32, 0, r.comm, r.stream);
		          else
			          ncclAllReduce(at, at, 4, ncclFloat32, ncclSum, r.comm, r.stream);
	          }),
	          "collective 0: rank ");
	CHECK_HAS(disagree([](Rank r, float *at) {
		          if (r.rank)
			          ncclSend(at, 4, ncclFloat32, 0, r.comm, r.stream);
		          else
			          ncclRecv(at, 3, ncclFloat32, 1, r.comm, r.stream);
	          }),
	          "rank 1 calls ncclSend of 4");
	CHECK_HAS(disagree([](Rank r, float *at) {
		          lose_patience();
		          if (r.rank)
			          ncclAllReduce(at, at, 4, ncclFloat32, ncclSum, r.comm, r.stream);
	          }),
	          "nothing can go on");
}

TEST(communicators_split_without_blocking)
{
	on_ranks(ranks, false, [](Rank r) {
		ncclComm_t child, none;
		int count, rank;
		ncclResult_t begun = ncclCommSplit(r.comm, r.rank / 2, -r.rank, &child, nullptr);
		CHECK_INT(begun, ncclInProgress);
		CHECK_INT(ncclCommCount(r.comm, &count), ncclInvalidArgument); /* still in progress */
		OK(settle(r.comm, begun));
		OK(settle(child, begun));
		OK(ncclCommCount(child, &count));
		OK(ncclCommUserRank(child, &rank));
		CHECK_INT(count, 2);
		CHECK_INT(rank, 1 - r.rank % 2);
		int *at = upload(std::vector<int>{r.rank});
		OK(cudaDeviceSynchronize());
		begun = ncclAllReduce(at, at, 1, ncclInt32, ncclSum, child, r.stream);
		CHECK_INT(begun, ncclInProgress);
		OK(settle(child, begun));
		CHECK_INT(download(at, 1)[0], r.rank / 2 ? 5 : 1);
		OK(settle(r.comm, ncclCommSplit(r.comm, r.rank ? NCCL_SPLIT_NOCOLOR : 3, 0, &none, nullptr)));
		CHECK((none == nullptr) == (r.rank != 0));
		OK(ncclCommDestroy(child));
		OK(cudaFree(at));
	});
}

/* An event that is missing between a kernel and a collective, among ranks that are threads. */
TEST(collectives_run_in_stream_order_only)
{
	int wrong = 0;
	for (unsigned seed = 0; seed < 10; seed++) {
		simt_set_seed(seed);
		on_ranks(2, true, [&](Rank r) {
			int *at = upload(std::vector<int>{0, 0});
			cudaStream_t other = new_stream();
			cudaLaunchConfig_t config = grid_of(1, 1, other);
			OK(cudaDeviceSynchronize());
			OK(cudaLaunchKernelEx(&config, add_to, at, 1));
			OK(ncclAllReduce(at, at + 1, 1, ncclInt32, ncclSum, r.comm, r.stream));
			OK(ncclAllReduce(at + 1, at + 1, 1, ncclInt32, ncclSum, r.comm, other));
			int got = download(at, 2)[1];
			CHECK(got == 0 || got == 2 || got == 4);
			__atomic_fetch_add(&wrong, got != 4, __ATOMIC_RELAXED);
			OK(cudaStreamDestroy(other));
			OK(cudaFree(at));
		});
	}
	CHECK(wrong > 0 && wrong < 20);
}

TEST(collectives_in_a_graph_run_again)
{
	on_ranks(2, true, [](Rank r) {
		int *at = upload(std::vector<int>{1});
		cudaGraph_t graph;
		cudaGraphExec_t exec;
		OK(cudaDeviceSynchronize());
		OK(cudaStreamBeginCapture(r.stream, cudaStreamCaptureModeThreadLocal));
		OK(ncclAllReduce(at, at, 1, ncclInt32, ncclSum, r.comm, r.stream));
		OK(cudaStreamEndCapture(r.stream, &graph));
		OK(cudaGraphInstantiate(&exec, graph, 0));
		OK(cudaGraphLaunch(exec, r.stream));
		OK(cudaGraphLaunch(exec, r.stream));
		CHECK_INT(download(at, 1)[0], 4);
		OK(cudaGraphExecDestroy(exec));
		OK(cudaGraphDestroy(graph));
		OK(cudaFree(at));
	});
}

/* One rank comes to a collective, gives up and frees its memory: the other must not read it, but goes on
 * waiting until it gives up as well. */
TEST(an_abort_frees_the_rank)
{
	ncclUniqueId id;
	std::vector<std::thread> threads;
	std::atomic<bool> gone(false);
	OK(ncclGetUniqueId(&id));
	for (int rank = 0; rank < 2; rank++)
		threads.emplace_back([&, rank] {
			ncclComm_t comm;
			float *at;
			OK(cudaSetDevice(rank));
			OK(ncclCommInitRank(&comm, 2, id, rank));
			OK(ncclMemAlloc((void **)&at, 100));
			while (rank && !gone)
				std::this_thread::yield();
			OK(ncclAllReduce(at, at, 25, ncclFloat32, ncclSum, comm, nullptr));
			for (int i = 0; i < 10; i++)
				CHECK_INT(cudaStreamQuery(nullptr), cudaErrorNotReady);
			std::thread watcher([=] { OK(ncclCommAbort(comm)); });
			OK(cudaDeviceSynchronize());
			watcher.join();
			OK(ncclMemFree(at));
			gone = true;
		});
	for (std::thread &thread : threads)
		thread.join();
}
