/* Training on the CUDA device against PyTorch: streams, recordings, groups of devices, on one rank and in
 * layouts of every axis. On a device where there is one, else in the simulator, which carries out what
 * streams were told as late and in as odd an order as they allow. */
#include "base/err.h"
#include "kernels/kernels.h"
#include "test/device.h"
#include "test/golden_run.h"
#include "test/test.h"

#include <stdlib.h>
#include <string.h>

/* Ranks are threads here, and real devices want a process each: there `pentad verify` takes over. */
static bool can_run(const struct golden_layout *l)
{
	return device_is_here() && (l->ranks == 1 || strstr(cuda_backend.describe(), "simulated"));
}

/* The simulator takes a second for what a device does in no time: by default one model stands for its kind,
 * and the first layout for the others. */
static void check(const struct golden_layout *l, size_t n, int model,
                  const struct golden_tolerance *tolerance)
{
	bool all = getenv("PENTAD_LONG_TESTS");
	for (size_t i = 0; i < (all ? n : 1); i++)
		for (int k = 0; k < GOLDEN_MODELS && can_run(&l[i]); k++)
			if (k == model || (all && (model < MIXTRAL) == (k < MIXTRAL)))
				golden_check(&golden_models[k], &l[i], &cuda_backend, tolerance);
}
#define CHECK_LAYOUTS(layouts, model) check(layouts, sizeof(layouts) / sizeof *(layouts), model, &golden_fp32)

TEST(every_kind_of_model_equals_pytorch)
{
	static const int kinds[] = {GPT2, LLAMA3, MIXTRAL, DEEPSEEK};
	static const struct golden_layout one = {1, 1, {ALL_AT_ONCE}};
	for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
		check(&one, 1, kinds[i], &golden_fp32);
}

TEST(halves_stay_near)
{
	static const struct golden_layout b16 = {1, 1, {"mixed_precision=bf16"}},
	                                  h16 = {1, 1, {"mixed_precision=fp16"}};
	check(&b16, 1, QWEN3, &golden_bf16);
	check(&h16, 1, GPT2, &golden_bf16);
}

TEST(eight_bits_stay_near)
{
	static const struct golden_tolerance eight_bits = {5e-2, 0.15, 0, 0};
	static const struct golden_layout one = {1, 1, {"mixed_precision=fp8"}};
	check(&one, 1, GPT2, &eight_bits);
}

TEST(recorded_parts_equal_told_ones)
{
	static const struct golden_layout layouts[] = {{1, 1, {ONE_BY_ONE, "recompute.granularity=full"}},
	                                               {1, 1, {ONE_BY_ONE}},
	                                               {1, 1, {ONE_BY_ONE, "dist.cuda_graphs=false"}}};
	CHECK_LAYOUTS(layouts, LLAMA1);
}

TEST(tensor_parallel_ranks_equal_pytorch)
{
	static const struct golden_layout layouts[] = {
	        {2, 1, {TP2, SP, ONE_BY_ONE, "comm_overlap.tp_comm_overlap=true"}},
	        {2, 1, {TP2, ALL_AT_ONCE}}};
	CHECK_LAYOUTS(layouts, GPT2);
}

TEST(pipeline_stages_equal_pytorch)
{
	static const struct golden_layout layouts[] = {
	        {4,
	         1,
	         {"parallel.pipeline_model_parallel_size=4", ONE_BY_ONE,
	          "parallel.pipeline_model_parallel_layout=E|t|t|L"}},
	        {2, 1, {PP2}},
	        {2, 1, {PP2, "parallel.pipeline_schedule=zero_bubble"}}};
	CHECK_LAYOUTS(layouts, QWEN2);
}

TEST(data_parallel_ranks_equal_pytorch)
{
	static const struct golden_layout layouts[] = {
	        {3, 1, {ONE_BY_ONE, ZERO "1", "ddp.overlap_grad_reduce=true"}},
	        {3, 1, {ONE_BY_ONE, ZERO "0"}},
	        {3, 1, {ONE_BY_ONE, ZERO "2"}},
	        {3, 1, {ONE_BY_ONE, ZERO "3"}}};
	CHECK_LAYOUTS(layouts, LLAMA1);
}

TEST(context_parallel_ranks_equal_pytorch)
{
	static const struct golden_layout layouts[] = {
	        {2, 1, {CP "2", "parallel.cp_comm_type=a2a", ALL_AT_ONCE}},
	        {2, 1, {CP "2", ALL_AT_ONCE}},
	        {2, 1, {CP "2", "parallel.cp_comm_type=all_gather", ALL_AT_ONCE}}};
	CHECK_LAYOUTS(layouts, MISTRAL);
}

TEST(expert_parallel_ranks_equal_pytorch)
{
	static const struct golden_layout layouts[] = {
	        {2, 1, {CP "2", EP "2", ALL_AT_ONCE, "model.moe_token_dispatcher_type=allgather"}},
	        {2, 1, {CP "2", EP "2", ALL_AT_ONCE}}};
	CHECK_LAYOUTS(layouts, DEEPSEEK);
}

TEST(five_axes_equal_pytorch)
{
	static const struct golden_layout layouts[] = {{8, 1, {TP2, SP, PP2, CP "2", EP "2"}}};
	CHECK_LAYOUTS(layouts, MIXTRAL);
}

TEST(generation_equals_pytorch)
{
	if (device_is_here())
		golden_check_generation(&golden_models[DEEPSEEK], &cuda_backend);
}

int main(int argc, char **argv)
{
	return test_main(argc, argv);
}
