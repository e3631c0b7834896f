#include "train/learning_rate.h"

#include <math.h>

/* What is left of lr - min_lr when the part r in [0, 1] of the decay is over. */
static double left_linear(double r)
{
	return 1 - r;
}

static double left_cosine(double r)
{
	return 0.5 * (cos(M_PI * r) + 1);
}

static double left_exponential(double r)
{
	return 2 * pow(0.5, r) - 1;
}

static double left_minus_sqrt(double r)
{
	return 1 - sqrt(r);
}

static double (*const tails[])(double r) = {[WSD_EXPONENTIAL] = left_exponential,
                                            [WSD_LINEAR] = left_linear,
                                            [WSD_COSINE] = left_cosine,
                                            [WSD_MINUS_SQRT] = left_minus_sqrt};

static double part_done(double step, double begin, double end)
{
	return end > begin ? (step - begin) / (end - begin) : 1;
}

static double decay_constant(const struct config *c, double step)
{
	(void)step;
	return c->optimizer.lr;
}

static double between(const struct config *c, double left)
{
	return c->optimizer.min_lr + left * (c->optimizer.lr - c->optimizer.min_lr);
}

static double decay_linear(const struct config *c, double step)
{
	return between(c, left_linear(part_done(step, (double)c->scheduler.lr_warmup_iters,
	                                        (double)c->scheduler.lr_decay_iters)));
}

static double decay_cosine(const struct config *c, double step)
{
	return between(c, left_cosine(part_done(step, (double)c->scheduler.lr_warmup_iters,
	                                        (double)c->scheduler.lr_decay_iters)));
}

static double decay_inverse_square_root(const struct config *c, double step)
{
	double warmup = fmax((double)c->scheduler.lr_warmup_iters, 1);
	return fmax(c->optimizer.min_lr, c->optimizer.lr * sqrt(warmup) / sqrt(fmax(step, 1)));
}

static double decay_wsd(const struct config *c, double step)
{
	double end = (double)c->scheduler.lr_decay_iters,
	       begin = end - (double)c->scheduler.lr_wsd_decay_iters;
	return step <= begin
	               ? c->optimizer.lr
	               : between(c, tails[c->scheduler.lr_wsd_decay_style](part_done(step, begin, end)));
}

static double (*const styles[])(const struct config *c, double step) = {
        [LR_CONSTANT] = decay_constant, [LR_LINEAR] = decay_linear,
        [LR_COSINE] = decay_cosine,     [LR_INVERSE_SQUARE_ROOT] = decay_inverse_square_root,
        [LR_WSD] = decay_wsd,
};

double learning_rate(const struct config *c, int64_t step)
{
	int64_t warmup = c->scheduler.lr_warmup_iters;
	if (warmup > 0 && step <= warmup)
		return c->scheduler.lr_warmup_init +
		       (c->optimizer.lr - c->scheduler.lr_warmup_init) * (double)step / (double)warmup;
	if (c->scheduler.lr_decay_style == LR_CONSTANT)
		return c->optimizer.lr;
	if (step > c->scheduler.lr_decay_iters)
		return c->optimizer.min_lr;
	return styles[c->scheduler.lr_decay_style](c, (double)step);
}
