#include "train/scaler.h"

#include <math.h>

static const double growth = 2, backoff = 0.5;

bool scaler_searches(const struct config *c)
{
	return c->mixed_precision.precision == PRECISION_FP16 && isnan(c->mixed_precision.loss_scale);
}

struct scaler scaler_start(const struct config *c)
{
	const struct mixed_precision_config *m = &c->mixed_precision;
	return (struct scaler){.scale = scaler_searches(c) ? m->initial_loss_scale : scaler_moderate(c),
	                       .left = m->hysteresis};
}

void scaler_update(struct scaler *s, const struct config *c, bool skipped)
{
	const struct mixed_precision_config *m = &c->mixed_precision;
	if (!scaler_searches(c))
		return;
	if (skipped) {
		s->clean = 0;
		if (--s->left <= 0)
			s->scale = fmax(backoff * s->scale, m->min_loss_scale);
	} else if (++s->clean >= m->loss_scale_window) {
		*s = (struct scaler){.scale = growth * s->scale, .left = m->hysteresis};
	}
}

bool scaler_is_lowest(const struct scaler *s, const struct config *c)
{
	return !scaler_searches(c) || s->scale <= c->mixed_precision.min_loss_scale;
}

double scaler_moderate(const struct config *c)
{
	double targets = (double)c->train.global_batch_size * (double)c->model.seq_length;
	if (c->mixed_precision.precision != PRECISION_FP16)
		return 1;
	return scaler_searches(c) ? exp2(ceil(log2(targets))) : c->mixed_precision.loss_scale;
}
