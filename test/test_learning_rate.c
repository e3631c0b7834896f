/* The learning rate of every style: points worked out by hand, and Megatron-LM's formula written another way.
 */
#include "base/err.h"
#include "test/test.h"
#include "train/learning_rate.h"

enum { WORDS = 12 };

static bool open_config(struct config *c, const char *const *sets)
{
	static const char *const common[] = {"model.num_layers=1",          "model.hidden_size=8",
	                                     "model.num_attention_heads=1", "model.vocab_size=16",
	                                     "model.seq_length=4",          "train.train_iters=100"};
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

struct point {
	int64_t step;
	double lr;
};

struct style {
	const char *sets[WORDS];
	struct point at[8]; /* ends at step 0 */
};

#define RATES "optimizer.lr=1.0", "optimizer.min_lr=0.1"
#define WSD(tail)                                                                    \
	RATES, "scheduler.lr_decay_style=WSD", "scheduler.lr_wsd_decay_style=" tail, \
	        "scheduler.lr_wsd_decay_iters=16", "scheduler.lr_warmup_iters=10"

static const struct style styles[] = {
        {{RATES, "scheduler.lr_decay_style=constant", "scheduler.lr_decay_iters=50"},
         {{1, 1}, {50, 1}, {51, 1}, {100000, 1}}},
        {{RATES, "scheduler.lr_decay_style=constant", "scheduler.lr_warmup_iters=4"},
         {{1, 0.25}, {2, 0.5}, {3, 0.75}, {4, 1}, {5, 1}, {101, 1}}},
        /* From 0.2 to 1 in four steps. */
        {{RATES, "scheduler.lr_decay_style=linear", "scheduler.lr_warmup_iters=4",
          "scheduler.lr_warmup_init=0.2"},
         {{1, 0.4}, {2, 0.6}, {3, 0.8}, {4, 1}, {52, 0.55}, {100, 0.1}, {101, 0.1}}},
        {{RATES, "scheduler.lr_decay_style=linear"}, {{1, 0.991}, {50, 0.55}, {100, 0.1}, {500, 0.1}}},
        {{RATES, "scheduler.lr_decay_style=linear", "scheduler.lr_decay_iters=10"},
         {{1, 0.91}, {9, 0.19}, {10, 0.1}, {11, 0.1}}},
        /* The cosine of 0, 60, 90, 120, 180 degrees. */
        {{RATES, "scheduler.lr_decay_style=cosine", "scheduler.lr_warmup_iters=40"},
         {{20, 0.5}, {40, 1}, {60, 0.775}, {70, 0.55}, {80, 0.325}, {100, 0.1}, {101, 0.1}}},
        {{RATES, "scheduler.lr_decay_style=cosine", "scheduler.lr_warmup_fraction=0.4"},
         {{20, 0.5}, {40, 1}, {60, 0.775}, {70, 0.55}, {80, 0.325}, {100, 0.1}, {101, 0.1}}},
        /* sqrt(16 / step), never below the smallest rate. */
        {{RATES, "scheduler.lr_decay_style=inverse-square-root", "scheduler.lr_warmup_iters=16",
          "scheduler.lr_decay_iters=10000"},
         {{8, 0.5}, {16, 1}, {64, 0.5}, {100, 0.4}, {1600, 0.1}, {6400, 0.1}, {10001, 0.1}}},
        {{RATES, "scheduler.lr_decay_style=inverse-square-root", "scheduler.lr_warmup_iters=16",
          "scheduler.lr_decay_iters=64"},
         {{4, 0.25}, {16, 1}, {25, 0.8}, {64, 0.5}, {65, 0.1}}},
        {{RATES, "scheduler.lr_decay_style=inverse-square-root"},
         {{1, 1}, {4, 0.5}, {25, 0.2}, {100, 0.1}, {101, 0.1}}},
        /* The tail is steps 84 to 100: 88 is a quarter, 92 the half of it. */
        {{WSD("linear")}, {{5, 0.5}, {10, 1}, {84, 1}, {88, 0.775}, {92, 0.55}, {100, 0.1}, {101, 0.1}}},
        {{WSD("cosine")},
         {{5, 0.5}, {84, 1}, {88, 0.1 + 0.9 * 0.85355339059327379}, {92, 0.55}, {100, 0.1}, {101, 0.1}}},
        {{WSD("minus_sqrt")}, {{84, 1}, {85, 0.775}, {88, 0.55}, {93, 0.325}, {100, 0.1}, {101, 0.1}}},
        {{WSD("exponential")},
         {{84, 1},
          {88, 0.1 + 0.9 * 0.68179283050742912},
          {92, 0.1 + 0.9 * 0.41421356237309505},
          {100, 0.1},
          {101, 0.1}}},
};

TEST(every_style_passes_its_known_points)
{
	for (size_t i = 0; i < sizeof styles / sizeof *styles; i++) {
		struct config c;
		if (open_config(&c, styles[i].sets))
			for (const struct point *p = styles[i].at; p->step; p++)
				if (fabs(learning_rate(&c, p->step) - p->lr) > 1e-12)
					test_failed(__FILE__, __LINE__,
					            "%s …: step %lld has %.12g, not %.12g", styles[i].sets[2],
					            (long long)p->step, learning_rate(&c, p->step), p->lr);
		config_free(&c);
	}
}

/* What every schedule does, whatever its shape: it rises by equal steps to lr, never rises again, and stays
 * between min_lr and lr. */
TEST(every_style_rises_once_and_then_falls)
{
	for (size_t i = 0; i < sizeof styles / sizeof *styles; i++) {
		struct config c;
		if (open_config(&c, styles[i].sets)) {
			int64_t warm = c.scheduler.lr_warmup_iters;
			double stride = warm ? (1 - c.scheduler.lr_warmup_init) / (double)warm : 0;
			for (int64_t s = 1; s < 2 * c.scheduler.lr_decay_iters; s++) {
				double before = learning_rate(&c, s - (s > 1)), now = learning_rate(&c, s);
				CHECK(now <= 1 + 1e-15 && (s <= warm || now >= 0.1 - 1e-15));
				if (s > 1 && s <= warm)
					CHECK_NEAR(now - before, stride, 1e-12);
				else
					CHECK(s == 1 || now <= before + 1e-15);
			}
		}
		config_free(&c);
	}
}

/* Megatron-LM counts samples; with steps of 512 samples the rates are those of steps (its inverse square root
 * with a warm-up too: the batch size cancels). */
static double by_samples(const struct config *c, int64_t step)
{
	double batch = 512, now = batch * (double)step, warm = batch * (double)c->scheduler.lr_warmup_iters;
	double end = batch * (double)c->scheduler.lr_decay_iters, low = c->optimizer.min_lr,
	       high = c->optimizer.lr;
	double tail = batch * (double)c->scheduler.lr_wsd_decay_iters, r = (now - (end - tail)) / tail, left;
	if (warm > 0 && now <= warm)
		return c->scheduler.lr_warmup_init + (high - c->scheduler.lr_warmup_init) * now / warm;
	if (c->scheduler.lr_decay_style == LR_CONSTANT)
		return high;
	if (now > end)
		return low;
	if (c->scheduler.lr_decay_style == LR_INVERSE_SQUARE_ROOT)
		return fmax(low, high * sqrt(warm) / sqrt(now));
	if (c->scheduler.lr_decay_style == LR_LINEAR)
		left = (end - now) / (end - warm);
	else if (c->scheduler.lr_decay_style == LR_COSINE)
		left = pow(cos(acos(-1.0) / 2 * (now - warm) / (end - warm)), 2);
	else if (r <= 0)
		left = 1;
	else if (c->scheduler.lr_wsd_decay_style == WSD_EXPONENTIAL)
		left = exp2(1 - r) - 1;
	else if (c->scheduler.lr_wsd_decay_style == WSD_COSINE)
		left = pow(cos(acos(-1.0) / 2 * r), 2);
	else
		left = 1 - (c->scheduler.lr_wsd_decay_style == WSD_LINEAR ? r : sqrt(r));
	return low + left * (high - low);
}

TEST(it_is_megatrons_formula)
{
	for (size_t i = 0; i < sizeof styles / sizeof *styles; i++) {
		struct config c;
		bool good = open_config(&c, styles[i].sets);
		bool batch_matters = c.scheduler.lr_decay_style == LR_INVERSE_SQUARE_ROOT &&
		                     c.scheduler.lr_warmup_iters == 0;
		for (int64_t s = 1; good && !batch_matters && s < 130; s++)
			CHECK_NEAR(learning_rate(&c, s), by_samples(&c, s), 1e-12);
		config_free(&c);
	}
}

int main(int argc, char **argv)
{
	return test_main(argc, argv);
}
