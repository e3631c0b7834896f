#include "train/program.h"

#include <stdlib.h>
#include <string.h>

static const enum dtype weight_types[] = {[PRECISION_FP32] = DT_f32, [PRECISION_BF16] = DT_bf16};

static const enum repeat repeats[] = {[RECOMPUTE_NONE] = REPEAT_NOTHING,
                                      [RECOMPUTE_SELECTIVE] = REPEAT_CHEAP,
                                      [RECOMPUTE_FULL] = REPEAT_LAYERS};

static int32_t like(struct prog *p, int32_t value, enum region region)
{
	struct value v = p->value[value];
	int32_t id = prog_value(p, v.name, region, DT_f32, v.nd, v.dim);
	memcpy(p->value[id].place, v.place, sizeof v.place);
	return id;
}

/* Gradients and loss are partial sums over the samples of each data-parallel rank; the norm needs them whole.
 */
static void emit_reduction(struct program *t)
{
	struct prog *p = &t->prog;
	int32_t one = 1;
	p->segment = SEG_REDUCE;
	union op_arg over_dp = {.comm = {AXIS_BIT(dp)}};
	bool many = p->axis_size[AXIS_dp] > 1;
	t->norm2 = prog_value(p, "squared gradient norm", R_STAT, DT_f64, 1, &one);
	for (size_t k = 0; k < t->model.n_param; k++) {
		int32_t g = p->value[t->model.param[k].value].grad;
		if (many)
			g = EMIT(p, all_reduce, &over_dp, g);
		EMIT_INTO(p, square_sum, NO_ARG, (int32_t[OP_MAX_OUT]){t->norm2}, g);
		t->state[k].grad = g;
	}
	t->loss = many ? EMIT(p, all_reduce, &over_dp, t->model.loss) : t->model.loss;
}

static void emit_update(struct program *t)
{
	struct prog *p = &t->prog;
	int32_t length = HYPER_COUNT;
	p->segment = SEG_STEP;
	t->hyper = prog_value(p, "hyper", R_INPUT, DT_f32, 1, &length);
	for (size_t k = 0; k < t->model.n_param; k++) {
		const struct param *q = &t->model.param[k];
		struct param_state *s = &t->state[k];
		s->master = p->value[q->value].dtype == DT_f32 ? NONE : like(p, q->value, R_OPT);
		s->exp_avg = like(p, q->value, R_OPT);
		s->exp_avg_sq = like(p, q->value, R_OPT);
		EMIT(p, adamw, ARG(.adamw = {q->decay}), q->value, s->grad, s->master, s->exp_avg,
		     s->exp_avg_sq, t->hyper, t->norm2);
	}
}

static void run_passes(struct program *t, const struct config *c)
{
	struct prog *p = &t->prog;
	if (t->model.spec.use == MODEL_TRAIN) {
		prog_backward(p, t->model.loss, t->model.loss_scale);
		prog_check(p);
		prog_fuse(p);
		prog_check(p);
		prog_recompute(p, repeats[c->recompute.granularity], (int32_t)c->recompute.num_layers);
		prog_check(p);
		t->state = mem_array(t->model.n_param, sizeof *t->state);
		emit_reduction(t);
		emit_update(t);
	}
	prog_plan(p);
	prog_check(p);
}

int program_build(struct program *t, const struct config *c, enum model_use use, int32_t rows, struct err *e)
{
	*t = (struct program){.loss = NONE, .norm2 = NONE, .hyper = NONE};
	prog_init(&t->prog);
	if (use != MODEL_GENERATE)
		t->prog.axis_size[AXIS_dp] = (int32_t)c->derived.data_parallel_size;
	struct model_spec spec = {.config = &c->model,
	                          .padded_vocab_size = c->derived.padded_vocab_size,
	                          .dtype = weight_types[c->mixed_precision.precision],
	                          .use = use,
	                          .batch = use == MODEL_GENERATE ? 1 : (int32_t)c->train.micro_batch_size,
	                          .rows = use == MODEL_GENERATE ? rows : (int32_t)c->model.seq_length};
	int rc = model_build(&t->model, &t->prog, &spec, e);
	if (rc)
		return rc;
	t->loss = t->model.loss;
	if (use == MODEL_EVALUATE && t->prog.axis_size[AXIS_dp] > 1) {
		t->prog.segment = SEG_REDUCE;
		t->loss = EMIT(&t->prog, all_reduce, ARG(.comm = {AXIS_BIT(dp)}), t->model.loss);
	}
	run_passes(t, c);
	*e = t->prog.e;
	return e->code;
}

void program_free(struct program *t)
{
	free(t->state);
	t->state = NULL;
	model_free(&t->model);
	prog_free(&t->prog);
}
