/* The small models whose values test/golden/make.py computed in double precision with Hugging Face
 * transformers, and a training run of one that is compared with them. */
#ifndef PENTAD_TEST_GOLDEN_RUN_H
#define PENTAD_TEST_GOLDEN_RUN_H

#include "backend/backend.h"

enum { STEPS = 5, WORDS = 40, VOCABULARY = 131 };
enum { GPT2, LLAMA1, LLAMA3, QWEN2, QWEN3, MISTRAL, MIXTRAL, DEEPSEEK, GOLDEN_MODELS };

struct golden {
	const char *folder;
	const char *sets[WORDS];
};
extern const struct golden golden_models[GOLDEN_MODELS];

struct golden_tolerance {
	double loss;   /* absolute */
	double norm;   /* relative */
	double grad;   /* of each element, relative to the largest of its parameter; 0: not compared */
	double weight; /* the same, after the last step */
};
extern const struct golden_tolerance golden_fp32, golden_bf16, golden_fp16, golden_fp16_choice;

struct golden_layout {
	int ranks, threads; /* threads: of each rank */
	const char *sets[6];
};

/* Five steps on ranks that are threads: logits (one rank, fp32), gradients, losses, norms, final weights. */
void golden_check(const struct golden *g, const struct golden_layout *l, const struct backend *backend,
                  const struct golden_tolerance *tolerance);
/* Tokens through the caches, a chunk and then one at a time: logits are those of the whole. */
void golden_check_generation(const struct golden *g, const struct backend *backend);

/* Keys of layouts. A step has three samples. */
#define ALL_AT_ONCE "train.micro_batch_size=3"
#define ONE_BY_ONE "train.micro_batch_size=1"
#define TP2 "parallel.tensor_model_parallel_size=2"
#define SP "parallel.sequence_parallel=true"
#define PP2 "parallel.pipeline_model_parallel_size=2", ONE_BY_ONE
#define ZERO "ddp.zero_stage="
#define CP "parallel.context_parallel_size="
#define EP "parallel.expert_model_parallel_size="

#endif
