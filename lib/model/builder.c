#include "model/builder.h"
#include "base/hash.h"

#include <math.h>
#include <string.h>

/* Parameters */

struct shares { /* who a parameter is dealt to */
	int32_t ranks, rank;
};

static int64_t share_of(struct shares s, int64_t n)
{
	return (n + s.ranks - 1) / s.ranks;
}

/* The box of a logical parameter [rows,columns] on this rank; a last share may be smaller, or empty. */
static void add_part(struct builder *b, const char *name, int nd, int64_t rows, int64_t columns, enum cut cut,
                     struct shares shares, int64_t local_row, enum init init, double std)
{
	struct model *m = b->m;
	struct part part = {.name = arena_printf(&b->p->arena, "%s%s", b->prefix, name),
	                    .nd = nd,
	                    .shape = {rows, columns},
	                    .extent = {rows, columns},
	                    .local_row = local_row,
	                    .init = init,
	                    .std = std};
	if (cut != WHOLE) {
		int k = cut == BY_COLUMNS;
		int64_t share = share_of(shares, part.shape[k]), begin = share * shares.rank;
		part.offset[k] = begin < part.shape[k] ? begin : part.shape[k];
		int64_t rest = part.shape[k] - part.offset[k];
		part.extent[k] = rest < share ? rest : share;
	}
	m->part = mem_grow(m->part, m->n_part, &m->cap_part, sizeof *m->part);
	m->part[m->n_part++] = part;
}

/* The parts of one value, from local row `total` on; returns the row behind them. */
static int64_t add_parts(struct builder *b, int nd, int64_t columns, enum cut cut, struct shares shares,
                         int64_t total, const struct rows *rows, int n, enum init init, double std)
{
	for (int i = 0; i < n; i++) {
		if (!rows[i].rows)
			continue;
		add_part(b, rows[i].name, nd, rows[i].rows, columns, cut, shares, total, init, std);
		total += cut == BY_ROWS ? share_of(shares, rows[i].rows) : rows[i].rows;
	}
	return total;
}

static const enum place cut_places[] = {[BY_ROWS] = PLACE_SHARD0, [BY_COLUMNS] = PLACE_SHARD1};

static int32_t add_value(struct builder *b, enum dtype dtype, int nd, int64_t rows, int64_t columns,
                         int32_t first_part)
{
	struct model *m = b->m;
	int32_t v = prog_value(b->p, m->part[first_part].name, R_PARAM, dtype, nd,
	                       (int32_t[]){(int32_t)rows, (int32_t)columns});
	m->param = mem_grow(m->param, m->n_param, &m->cap_param, sizeof *m->param);
	m->param[m->n_param++] = (struct param){.value = v,
	                                        .first_part = first_part,
	                                        .n_parts = (int32_t)m->n_part - first_part,
	                                        .chunk = b->p->chunk,
	                                        .layer = b->p->layer,
	                                        .decay = nd > 1};
	return v;
}

int32_t build_param(struct builder *b, int nd, int64_t columns, enum cut cut, const struct rows *rows, int n,
                    enum init init, double std)
{
	struct shares shares = {b->ranks, b->rank};
	int32_t first = (int32_t)b->m->n_part;
	int64_t total = add_parts(b, nd, columns, cut, shares, 0, rows, n, init, std);
	int32_t v = add_value(b, b->m->spec.dtype, nd, total,
	                      cut == BY_COLUMNS ? share_of(shares, columns) : columns, first);
	prog_place(b->p, v, AXIS_tp, cut_places[cut]);
	/* Under sequence parallelism a rank sees its rows alone, so what all ranks hold gets partial
	 * gradients. */
	if (cut == WHOLE && b->m->spec.sequence_parallel)
		b->m->param[b->m->n_param - 1].partial = AXIS_BIT(tp);
	return v;
}

int32_t build_vector(struct builder *b, enum cut cut, enum init init, const struct rows *rows, int n)
{
	return build_param(b, 1, 1, cut, rows, n, init, 0);
}

int32_t build_f32_param(struct builder *b, int64_t columns, const struct rows *rows, enum init init,
                        double std, bool is_buffer)
{
	int32_t first = (int32_t)b->m->n_part;
	int nd = columns > 1 ? 2 : 1;
	add_parts(b, nd, columns, WHOLE, (struct shares){1, 0}, 0, rows, 1, init, std);
	int32_t v = add_value(b, DT_f32, nd, rows->rows, columns, first);
	struct param *q = &b->m->param[b->m->n_param - 1];
	q->is_buffer = is_buffer;
	q->partial = b->m->spec.sequence_parallel && !is_buffer ? AXIS_BIT(tp) : 0;
	b->p->value[v].want_grad = !is_buffer;
	return v;
}

int32_t build_expert_param(struct builder *b, int64_t columns, enum cut cut, const struct rows *rows, int n,
                           double std)
{
	struct shares shares = {b->p->axis_size[AXIS_etp], b->p->axis_rank[AXIS_etp]};
	int64_t own = b->c->num_experts / b->p->axis_size[AXIS_ep], total = 0;
	int32_t first = (int32_t)b->m->n_part;
	const char *outer = b->prefix;
	for (int64_t e = own * b->p->axis_rank[AXIS_ep], end = e + own; e < end; e++) {
		b->prefix = arena_printf(&b->p->arena, "%smlp.experts.%lld.", outer, (long long)e);
		total = add_parts(b, 2, columns, cut, shares, total, rows, n, INIT_NORMAL, std);
	}
	b->prefix = outer;
	int32_t v = add_value(b, b->m->spec.dtype, 2, total,
	                      cut == BY_COLUMNS ? share_of(shares, columns) : columns, first);
	prog_place(b->p, v, AXIS_etp, cut_places[cut]);
	prog_place(b->p, v, AXIS_ep, PLACE_SHARD0);
	return v;
}

double build_output_std(const struct builder *b)
{
	return b->c->init_method_std / sqrt(2.0 * (double)b->c->num_layers);
}

/* Pieces */

int32_t build_enter(struct builder *b, int32_t x)
{
	if (b->ranks == 1)
		return x;
	const union op_arg *over = ARG(.comm = {AXIS_BIT(tp)});
	return b->m->spec.sequence_parallel ? EMIT(b->p, all_gather, over, x) : EMIT(b->p, fan_out, over, x);
}

int32_t build_add_up(struct builder *b, int32_t y)
{
	if (b->ranks == 1)
		return y;
	const union op_arg *over = ARG(.comm = {AXIS_BIT(tp)});
	return b->m->spec.sequence_parallel ? EMIT(b->p, reduce_scatter, over, y)
	                                    : EMIT(b->p, all_reduce, over, y);
}

int32_t build_linear_back(struct builder *b, int32_t h, int32_t w, int32_t bias)
{
	if (b->ranks == 1)
		return EMIT(b->p, linear, LAYER_PRODUCT(b), h, w, bias);
	int32_t y = build_add_up(b, EMIT(b->p, linear, LAYER_PRODUCT(b), h, w));
	return bias == NONE ? y : EMIT(b->p, bias_add, NO_ARG, y, bias);
}

int32_t build_norm(struct builder *b, const char *weight, const char *bias, int64_t width, int32_t x)
{
	float eps = (float)b->c->norm_epsilon;
	int32_t w = build_vector(b, WHOLE, INIT_ONE, ROWS({weight, width}));
	if (b->c->normalization == MODEL_RMSNORM)
		return EMIT(b->p, rmsnorm, ARG(.norm = {.eps = eps}), x, w);
	int32_t beta = build_vector(b, WHOLE, INIT_ZERO, ROWS({bias, width}));
	return EMIT(b->p, layernorm, ARG(.norm = {.eps = eps}), x, w, beta);
}

uint32_t build_salt(const struct builder *b, const char *site)
{
	uint64_t h = hash_bytes(b->prefix, strlen(b->prefix), 0);
	return (uint32_t)hash_bytes(site, strlen(site), h);
}

static int32_t randomize(struct builder *b, const char *site, int32_t x, double p, bool jitter)
{
	return EMIT(b->p, dropout,
	            ARG(.dropout = {.p = (float)p,
	                            .salt = build_salt(b, site),
	                            .seq_length = b->m->spec.rows,
	                            .first_row = b->first_row,
	                            .rows = b->context,
	                            .axes = b->row_axes,
	                            .jitter = jitter}),
	            x, b->m->keys);
}

int32_t build_dropout(struct builder *b, const char *site, int32_t x)
{
	double p = b->c->hidden_dropout;
	return b->m->spec.use != MODEL_TRAIN || p == 0 ? x : randomize(b, site, x, p, false);
}

int32_t build_jitter(struct builder *b, const char *site, int32_t x, double eps)
{
	return b->m->spec.use != MODEL_TRAIN || eps == 0 ? x : randomize(b, site, x, eps, true);
}

void build_place_rows(struct builder *b, int32_t v)
{
	static const enum mesh_axis axes[] = {AXIS_dp, AXIS_rp, AXIS_cp};
	for (size_t i = 0; i < sizeof axes / sizeof *axes; i++)
		prog_place(b->p, v, axes[i], PLACE_SHARD0);
}

static const struct activation_kind activations[] = {
        [MODEL_GELU] = {ACT_gelu, false},  [MODEL_GELU_EXACT] = {ACT_gelu_exact, false},
        [MODEL_RELU] = {ACT_relu, false},  [MODEL_SQUARED_RELU] = {ACT_squared_relu, false},
        [MODEL_SWIGLU] = {ACT_silu, true}, [MODEL_GEGLU] = {ACT_gelu, true},
};

struct activation_kind build_activation_kind(const struct model_config *c)
{
	return activations[c->activation];
}

/* Gate and up rows lie side by side for one product. */
int32_t build_feed_forward(struct builder *b, const char *name, int64_t F, bool biases, int32_t x)
{
	const struct model_config *c = b->c;
	struct activation_kind kind = build_activation_kind(c);
	union op_arg act = {.activation = {kind.kind}};
	const char *outer = b->prefix;
	b->prefix = arena_printf(&b->p->arena, "%s%s", outer, name);
	const struct rows weights[] = {{kind.gated ? "gate.weight" : "fc1.weight", F},
	                               {"up.weight", kind.gated ? F : 0}};
	const struct rows offsets[] = {{kind.gated ? "gate.bias" : "fc1.bias", F},
	                               {"up.bias", kind.gated ? F : 0}};
	int32_t w = build_param(b, 2, c->hidden_size, BY_ROWS, weights, 2, INIT_NORMAL, c->init_method_std);
	int32_t bias = biases ? build_vector(b, BY_ROWS, INIT_ZERO, offsets, 2) : NONE;
	int32_t h = EMIT(b->p, linear, LAYER_PRODUCT(b), build_enter(b, x), w, bias);
	h = kind.gated ? EMIT(b->p, glu, &act, h) : EMIT(b->p, activation, &act, h);
	int32_t w2 = build_param(b, 2, F, BY_COLUMNS, ROWS({"fc2.weight", c->hidden_size}), INIT_NORMAL,
	                         build_output_std(b));
	int32_t b2 = biases ? build_vector(b, WHOLE, INIT_ZERO, ROWS({"fc2.bias", c->hidden_size})) : NONE;
	b->prefix = outer;
	return build_linear_back(b, h, w2, b2);
}

int32_t build_mlp(struct builder *b, int32_t x)
{
	const struct model_config *c = b->c;
	int32_t y = build_feed_forward(b, "mlp.", c->ffn_hidden_size, c->add_bias_linear, x);
	return build_dropout(b, "mlp.output", y);
}
