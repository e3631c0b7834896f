/* The program against PyTorch: logits, every gradient, five losses and gradient norms, final weights, of
 * eight small models; on one rank, and on many in every kind of layout. */
#include "kernels/kernels.h"
#include "test/golden_run.h"
#include "test/test.h"

TEST(every_model_equals_pytorch)
{
	static const struct golden_layout one = {1, 1, {ALL_AT_ONCE}};
	for (size_t i = 0; i < GOLDEN_MODELS; i++)
		golden_check(&golden_models[i], &one, &cpu_backend, &golden_fp32);
}

TEST(on_two_threads_too)
{
	static const struct golden_layout one = {1, 2, {ALL_AT_ONCE}};
	golden_check(&golden_models[GPT2], &one, &cpu_backend, &golden_fp32);
}

TEST(the_reference_kernels_too)
{
	static const struct golden_layout one = {1, 1, {ALL_AT_ONCE}};
	golden_check(&golden_models[GPT2], &one, &cpu_reference_backend, &golden_fp32);
	golden_check(&golden_models[LLAMA1], &one, &cpu_reference_backend, &golden_fp32);
	golden_check(&golden_models[MIXTRAL], &one, &cpu_reference_backend, &golden_fp32);
	golden_check(&golden_models[DEEPSEEK], &one, &cpu_reference_backend, &golden_fp32);
}

TEST(gradient_accumulation_changes_nothing)
{
	static const struct golden_layout one = {1, 1, {ONE_BY_ONE}};
	golden_check(&golden_models[GPT2], &one, &cpu_backend, &golden_fp32);
	golden_check(&golden_models[LLAMA1], &one, &cpu_backend, &golden_fp32);
	golden_check(&golden_models[MIXTRAL], &one, &cpu_backend, &golden_fp32);
}

TEST(recomputation_changes_nothing)
{
	static const struct golden_layout how[] = {{1, 1, {ALL_AT_ONCE, "recompute.granularity=full"}},
	                                           {1, 1, {ALL_AT_ONCE, "recompute.granularity=selective"}}};
	for (size_t i = 0; i < 2; i++) {
		golden_check(&golden_models[GPT2], &how[i], &cpu_backend, &golden_fp32);
		golden_check(&golden_models[QWEN3], &how[i], &cpu_backend, &golden_fp32);
		golden_check(&golden_models[DEEPSEEK], &how[i], &cpu_backend, &golden_fp32);
	}
}

TEST(bf16_stays_near)
{
	static const struct golden_layout one = {1, 1, {"mixed_precision=bf16"}};
	for (size_t i = 0; i < GOLDEN_MODELS; i++)
		golden_check(&golden_models[i], &one, &cpu_backend, &golden_bf16);
}

/* A step has three samples, so three data-parallel ranks are what shares them out. */
static bool cuts_rows_with_heads(const struct golden_layout *l)
{
	bool tp = false, sp = false;
	for (size_t i = 0; i < sizeof l->sets / sizeof *l->sets && l->sets[i]; i++) {
		tp |= strstr(l->sets[i], "parallel.tensor_model_parallel_size") != NULL;
		sp |= strstr(l->sets[i], "parallel.sequence_parallel") != NULL;
	}
	return !tp || sp;
}

#define FP16 "mixed_precision=fp16"
TEST(fp16_stays_near)
{
	static const struct golden_layout one = {1, 1, {FP16}}, four = {4, 1, {TP2, SP, PP2, FP16}},
	                                  three = {3, 1, {ONE_BY_ONE, ZERO "3", FP16}};
	for (size_t i = 0; i < GOLDEN_MODELS; i++)
		golden_check(&golden_models[i], &one, &cpu_backend,
		             i == MIXTRAL ? &golden_fp16_choice : &golden_fp16);
	golden_check(&golden_models[GPT2], &four, &cpu_backend, &golden_fp16);
	golden_check(&golden_models[DEEPSEEK], &four, &cpu_backend, &golden_fp16);
	golden_check(&golden_models[LLAMA3], &three, &cpu_backend, &golden_fp16);
}

/* Experts want every rank to have rows of its own. */
static void check_models(const struct golden_layout *l, size_t first, size_t end)
{
	for (size_t i = first; i < end; i++)
		if (i < MIXTRAL || cuts_rows_with_heads(l))
			golden_check(&golden_models[i], l, &cpu_backend, &golden_fp32);
}
#define EACH_MODEL_IN(layouts)                                           \
	for (size_t k = 0; k < sizeof(layouts) / sizeof *(layouts); k++) \
	check_models(&(layouts)[k], 0, GOLDEN_MODELS)

TEST(tensor_parallel_ranks_equal_pytorch)
{
	static const struct golden_layout layouts[] = {{2, 1, {TP2, ALL_AT_ONCE}},
	                                               {2, 1, {TP2, SP, ALL_AT_ONCE}}};
	static const struct golden_layout four[] = {
	        {4, 1, {"parallel.tensor_model_parallel_size=4", ALL_AT_ONCE}},
	        {4, 1, {"parallel.tensor_model_parallel_size=4", SP, ONE_BY_ONE}}};
	EACH_MODEL_IN(layouts);
	/* Of the dense ones, that with four key-value heads. */
	for (size_t k = 0; k < 2; k++)
		golden_check(&golden_models[GPT2], &four[k], &cpu_backend, &golden_fp32);
}

TEST(pipeline_stages_equal_pytorch)
{
	static const struct golden_layout layouts[] = {
	        {2, 1, {PP2}},
	        {2, 1, {PP2, "parallel.pipeline_schedule=zero_bubble"}},
	        {4,
	         1,
	         {"parallel.pipeline_model_parallel_size=4", ONE_BY_ONE,
	          "parallel.pipeline_model_parallel_layout=E|t|t|L"}}};
	EACH_MODEL_IN(layouts);
}

TEST(data_parallel_ranks_equal_pytorch)
{
	static const struct golden_layout layouts[] = {{3, 1, {ONE_BY_ONE, ZERO "0"}},
	                                               {3, 1, {ONE_BY_ONE, ZERO "1"}},
	                                               {3, 1, {ONE_BY_ONE, ZERO "2"}},
	                                               {3, 1, {ONE_BY_ONE, ZERO "3"}}};
	EACH_MODEL_IN(layouts);
}

TEST(all_axes_together_equal_pytorch)
{
	static const struct golden_layout layouts[] = {
	        {4, 1, {TP2, SP, PP2}},
	        {12, 1, {TP2, PP2, ZERO "1"}},
	        {12, 1, {TP2, SP, PP2, ZERO "2"}},
	        {12, 1, {TP2, PP2, ZERO "3", "recompute.granularity=full"}}};
	EACH_MODEL_IN(layouts);
}

TEST(communication_beside_computation_equals_pytorch)
{
	static const struct golden_layout layouts[] = {
	        {4, 1, {TP2, PP2, "comm_overlap.tp_comm_overlap=true"}},
	        {6, 1, {TP2, SP, ONE_BY_ONE, ZERO "2", "ddp.overlap_grad_reduce=true"}}};
	EACH_MODEL_IN(layouts);
}

TEST(generation_equals_pytorch)
{
	for (size_t i = 0; i < GOLDEN_MODELS; i++)
		golden_check_generation(&golden_models[i], &cpu_backend);
}

TEST(context_parallel_ranks_equal_pytorch)
{
	static const struct golden_layout layouts[] = {
	        {2, 1, {CP "2", ALL_AT_ONCE}},
	        {4, 1, {CP "4", ALL_AT_ONCE}},
	        {2, 1, {CP "2", "parallel.cp_comm_type=all_gather", ALL_AT_ONCE}},
	        {2, 1, {CP "2", "parallel.cp_comm_type=a2a", ALL_AT_ONCE}}};
	EACH_MODEL_IN(layouts);
}

TEST(expert_parallel_ranks_equal_pytorch)
{
	static const struct golden_layout layouts[] = {
	        {3, 1, {ONE_BY_ONE, ZERO "1"}},
	        {2, 1, {CP "2", EP "2", ALL_AT_ONCE}},
	        {2, 1, {CP "2", EP "2", ALL_AT_ONCE, "model.moe_token_dispatcher_type=allgather"}},
	        {4, 1, {TP2, SP, CP "2", EP "4", "parallel.expert_tensor_parallel_size=1", ALL_AT_ONCE}},
	        {4, 1, {TP2, SP, CP "2", EP "2", "parallel.expert_tensor_parallel_size=2", ALL_AT_ONCE}},
	        {8, 1, {TP2, SP, PP2, CP "2", EP "2"}}};
	for (size_t k = 0; k < sizeof layouts / sizeof *layouts; k++)
		check_models(&layouts[k], MIXTRAL, GOLDEN_MODELS);
}

int main(int argc, char **argv)
{
	return test_main(argc, argv);
}
