/* The search for a loss scale: sequences worked out by hand. */
#include "base/err.h"
#include "test/test.h"
#include "train/scaler.h"

enum { WORDS = 12 };

static bool open_config(struct config *c, const char *const *sets)
{
	static const char *const common[] = {"model.num_layers=1",          "model.hidden_size=8",
	                                     "model.num_attention_heads=1", "model.vocab_size=16",
	                                     "model.seq_length=6",          "train.train_iters=100",
	                                     "train.global_batch_size=16"};
	const char *all[2 * WORDS];
	size_t n = 0;
	for (; n < sizeof common / sizeof *common; n++)
		all[n] = common[n];
	while (*sets)
		all[n++] = *sets++;
	struct config_source source = {.sets = all, .n_sets = n};
	struct err e = {0};
	bool good = !config_load(c, &source, &e) && !config_check(c, 1, &e);
	if (!good)
		test_failed(__FILE__, __LINE__, "%s", e.text);
	return good;
}

struct sequence {
	const char *sets[WORDS];
	const char *steps; /* 'x': skipped */
	double scale[24];  /* behind each of them */
};

#define FP16 "mixed_precision.precision=fp16"
#define KEYS(initial, min, window, hysteresis)                                                      \
	FP16, "mixed_precision.initial_loss_scale=" initial, "mixed_precision.min_loss_scale=" min, \
	        "mixed_precision.loss_scale_window=" window, "mixed_precision.hysteresis=" hysteresis

static const struct sequence sequences[] = {
        /* Grows behind three clean steps, again behind the next three. */
        {{KEYS("64", "1", "3", "2")}, ".......", {64, 64, 128, 128, 128, 256, 256}},
        /* An overflow begins the count anew, but costs nothing while there is hysteresis left. */
        {{KEYS("64", "1", "3", "2")}, "..x...", {64, 64, 64, 64, 64, 128}},
        /* Used up, every overflow halves, and a clean step does not fill it up again … */
        {{KEYS("64", "1", "3", "2")}, "xx.x..x", {64, 32, 32, 16, 16, 16, 8}},
        /* … but growth does. */
        {{KEYS("64", "1", "2", "2")}, "xx..xx", {64, 32, 32, 64, 64, 32}},
        {{KEYS("64", "1", "2", "3")}, "xxx..xxx", {64, 64, 32, 32, 64, 64, 64, 32}},
        {{KEYS("64", "1", "2", "1")}, "x.x..", {32, 32, 16, 16, 32}},
        /* Not below the least, which need not be a half of a half. */
        {{KEYS("64", "20", "2", "1")}, "xxx..", {32, 20, 20, 20, 40}},
        {{KEYS("1", "1", "1", "1")}, "x.x", {1, 2, 1}},
        /* The defaults: 2^32, two steps. */
        {{FP16}, "xxx", {0x1p32, 0x1p31, 0x1p30}},
        /* No search. */
        {{FP16, "mixed_precision.loss_scale=1000"}, "xx.", {1000, 1000, 1000}},
        {{"mixed_precision=bf16"}, "xx.", {1, 1, 1}},
        {{"mixed_precision=fp32"}, "xx.", {1, 1, 1}},
};

TEST(scales_move_as_they_should)
{
	for (size_t i = 0; i < sizeof sequences / sizeof *sequences; i++) {
		const struct sequence *q = &sequences[i];
		struct config c;
		if (!open_config(&c, q->sets))
			continue;
		struct scaler s = scaler_start(&c);
		for (int k = 0; q->steps[k]; k++) {
			scaler_update(&s, &c, q->steps[k] == 'x');
			if (s.scale != q->scale[k])
				test_failed(__FILE__, __LINE__,
				            "sequence %zu, step %d: the scale is %g, not %g", i, k, s.scale,
				            q->scale[k]);
		}
		config_free(&c);
	}
}

TEST(the_lowest_scale_is_known)
{
	static const char *const search[] = {KEYS("4", "2", "10", "1"), NULL};
	static const char *const constant[] = {FP16, "mixed_precision.loss_scale=8", NULL};
	static const char *const none[] = {"mixed_precision=bf16", NULL};
	struct config c;
	MUST(open_config(&c, search));
	struct scaler s = scaler_start(&c);
	CHECK(scaler_searches(&c) && !scaler_is_lowest(&s, &c));
	scaler_update(&s, &c, true);
	CHECK(scaler_is_lowest(&s, &c));
	CHECK_NEAR(scaler_moderate(&c), 128, 0); /* 96 targets */
	config_free(&c);
	MUST(open_config(&c, constant));
	s = scaler_start(&c);
	CHECK(!scaler_searches(&c) && scaler_is_lowest(&s, &c));
	CHECK_NEAR(scaler_moderate(&c), 8, 0);
	config_free(&c);
	MUST(open_config(&c, none));
	s = scaler_start(&c);
	CHECK(!scaler_searches(&c) && scaler_is_lowest(&s, &c) && s.scale == 1);
	CHECK_NEAR(scaler_moderate(&c), 1, 0);
	config_free(&c);
}

int main(int argc, char **argv)
{
	return test_main(argc, argv);
}
