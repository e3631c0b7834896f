/* The whole model against two independent witnesses: a forward and backward of the smallest model written out
 * by hand in double precision, sharing no code with the engine; and finite differences of the variants that
 * have no reference data. */
#include "base/err.h"
#include "base/rng.h"
#include "kernels/kernels.h"
#include "test/test.h"
#include "train/pieces.h"
#include "train/step.h"

#include <stdlib.h>

/* Written out by hand: RMSNorm, rotary positions, causal attention with shared keys, SwiGLU, untied head. */

enum {
	B = 2,
	T = 7,
	N = B * T,
	C = 12,
	H = 4,
	G = 2,
	D = 6,
	F = 10,
	V = 17,
	PADDED = 20,
	LAYERS = 2,
	MOST = H * D * C
};
#define NORM_EPS 1e-5
#define ROTARY_BASE 100.0

struct matrix { /* a parameter and its gradient */
	double w[MOST], g[MOST];
};

struct layer {
	struct matrix norm1, query, key, value, output, norm2, gate, up, down;
	double x[N * C], h[N * C], q[N * H * D], k[N * G * D], v[N * G * D], p[B][H][T][T], o[N * H * D],
	        mid[N * C], h2[N * C], a[N * F], b[N * F], s[N * F];
};

static struct oracle {
	struct layer layer[LAYERS];
	struct matrix table, norm, head;
	double x[N * C], h[N * C], logits[N * V];
} model;

/* y[n][m] = sum x[n][k] w[m][k] */
static void product(int m, int k, const double *x, const struct matrix *w, double *y)
{
	for (int n = 0; n < N; n++)
		for (int i = 0; i < m; i++) {
			y[n * m + i] = 0;
			for (int j = 0; j < k; j++)
				y[n * m + i] += x[n * k + j] * w->w[i * k + j];
		}
}

/* dx += …, and the weight's gradient */
static void product_back(int m, int k, const double *dy, const double *x, struct matrix *w, double *dx)
{
	for (int n = 0; n < N; n++)
		for (int i = 0; i < m; i++)
			for (int j = 0; j < k; j++) {
				dx[n * k + j] += dy[n * m + i] * w->w[i * k + j];
				w->g[i * k + j] += dy[n * m + i] * x[n * k + j];
			}
}

static double inverse_rms(const double *x)
{
	double sum = 0;
	for (int j = 0; j < C; j++)
		sum += x[j] * x[j];
	return 1 / sqrt(sum / C + NORM_EPS);
}

static void normalize(const double x[N * C], const struct matrix *w, double *y)
{
	for (int n = 0; n < N; n++)
		for (int j = 0; j < C; j++)
			y[n * C + j] = x[n * C + j] * inverse_rms(x + n * C) * w->w[j];
}

static void normalize_back(const double *dy, const double x[N * C], struct matrix *w, double *dx)
{
	for (int n = 0; n < N; n++) {
		double r = inverse_rms(x + n * C), dot = 0;
		for (int j = 0; j < C; j++) {
			dot += dy[n * C + j] * w->w[j] * x[n * C + j];
			w->g[j] += dy[n * C + j] * x[n * C + j] * r;
		}
		for (int j = 0; j < C; j++)
			dx[n * C + j] += r * w->w[j] * dy[n * C + j] - x[n * C + j] * r * r * r * dot / C;
	}
}

/* Turns the pairs (i, i + D/2) of every head; direction -1 turns back. */
static void rotate(int heads, double *x, int direction)
{
	for (int n = 0; n < N; n++)
		for (int h = 0; h < heads; h++)
			for (int i = 0; i < D / 2; i++) {
				double angle = direction * (n % T) * pow(ROTARY_BASE, -2.0 * i / D);
				double *a = x + (n * heads + h) * D + i, *b = a + D / 2, old = *a;
				*a = old * cos(angle) - *b * sin(angle);
				*b = old * sin(angle) + *b * cos(angle);
			}
}

static void attend(struct layer *l)
{
	memset(l->o, 0, sizeof l->o);
	for (int b = 0; b < B; b++)
		for (int h = 0; h < H; h++)
			for (int t = 0; t < T; t++) {
				double *p = l->p[b][h][t], sum = 0;
				int n = b * T + t, g = h / (H / G);
				for (int u = 0; u <= t; u++) {
					double dot = 0;
					for (int d = 0; d < D; d++)
						dot += l->q[(n * H + h) * D + d] *
						       l->k[((b * T + u) * G + g) * D + d];
					sum += p[u] = exp(dot / sqrt(D));
				}
				for (int u = 0; u <= t; u++)
					for (int d = 0; d < D; d++)
						l->o[(n * H + h) * D + d] +=
						        p[u] / sum * l->v[((b * T + u) * G + g) * D + d];
				for (int u = 0; u <= t; u++)
					p[u] /= sum;
			}
}

static void attend_back(struct layer *l, double *d_o, double *dq, double *dk, double *dv)
{
	for (int b = 0; b < B; b++)
		for (int h = 0; h < H; h++)
			for (int t = 0; t < T; t++) {
				double *p = l->p[b][h][t], dp[T] = {0}, mean = 0;
				int n = b * T + t, g = h / (H / G);
				for (int u = 0; u <= t; u++) {
					for (int d = 0; d < D; d++) {
						dp[u] += d_o[(n * H + h) * D + d] *
						         l->v[((b * T + u) * G + g) * D + d];
						dv[((b * T + u) * G + g) * D + d] +=
						        p[u] * d_o[(n * H + h) * D + d];
					}
					mean += p[u] * dp[u];
				}
				for (int u = 0; u <= t; u++)
					for (int d = 0; d < D; d++) {
						double ds = p[u] * (dp[u] - mean) / sqrt(D);
						dq[(n * H + h) * D + d] +=
						        ds * l->k[((b * T + u) * G + g) * D + d];
						dk[((b * T + u) * G + g) * D + d] +=
						        ds * l->q[(n * H + h) * D + d];
					}
			}
}

static void layer_forward(struct layer *l, double *out)
{
	double y[N * C];
	normalize(l->x, &l->norm1, l->h);
	product(H * D, C, l->h, &l->query, l->q);
	product(G * D, C, l->h, &l->key, l->k);
	product(G * D, C, l->h, &l->value, l->v);
	rotate(H, l->q, 1);
	rotate(G, l->k, 1);
	attend(l);
	product(C, H * D, l->o, &l->output, y);
	for (int i = 0; i < N * C; i++)
		l->mid[i] = l->x[i] + y[i];
	normalize(l->mid, &l->norm2, l->h2);
	product(F, C, l->h2, &l->gate, l->a);
	product(F, C, l->h2, &l->up, l->b);
	for (int i = 0; i < N * F; i++)
		l->s[i] = l->a[i] / (1 + exp(-l->a[i])) * l->b[i];
	product(C, F, l->s, &l->down, y);
	for (int i = 0; i < N * C; i++)
		out[i] = l->mid[i] + y[i];
}

/* dx: the gradient of the layer's output on entry, of its input on return. */
static void layer_back(struct layer *l, double *dx)
{
	double ds[N * F] = {0}, da[N * F], db[N * F], dh[N * C] = {0}, d_o[N * H * D] = {0},
	              dq[N * H * D] = {0}, dk[N * G * D] = {0}, dv[N * G * D] = {0};
	product_back(C, F, dx, l->s, &l->down, ds);
	for (int i = 0; i < N * F; i++) {
		double a = l->a[i], sigma = 1 / (1 + exp(-a));
		db[i] = ds[i] * a * sigma;
		da[i] = ds[i] * l->b[i] * sigma * (1 + a * (1 - sigma));
	}
	product_back(F, C, da, l->h2, &l->gate, dh);
	product_back(F, C, db, l->h2, &l->up, dh);
	normalize_back(dh, l->mid, &l->norm2, dx);
	product_back(C, H * D, dx, l->o, &l->output, d_o);
	attend_back(l, d_o, dq, dk, dv);
	rotate(H, dq, -1);
	rotate(G, dk, -1);
	memset(dh, 0, sizeof dh);
	product_back(H * D, C, dq, l->h, &l->query, dh);
	product_back(G * D, C, dk, l->h, &l->key, dh);
	product_back(G * D, C, dv, l->h, &l->value, dh);
	normalize_back(dh, l->x, &l->norm1, dx);
}

/* Mean loss of all targets and every gradient. */
static double oracle_run(const int32_t *tokens, const int32_t *targets)
{
	double loss = 0, dlogits[N * V], dh[N * C] = {0}, dx[N * C] = {0};
	for (int i = 0; i < N * C; i++)
		model.layer[0].x[i] = model.table.w[tokens[i / C] * C + i % C];
	for (int l = 0; l < LAYERS; l++)
		layer_forward(&model.layer[l], l + 1 < LAYERS ? model.layer[l + 1].x : model.x);
	normalize(model.x, &model.norm, model.h);
	product(V, C, model.h, &model.head, model.logits);
	for (int n = 0; n < N; n++) {
		double sum = 0;
		for (int v = 0; v < V; v++)
			sum += exp(model.logits[n * V + v]);
		loss += (log(sum) - model.logits[n * V + targets[n]]) / N;
		for (int v = 0; v < V; v++)
			dlogits[n * V + v] = (exp(model.logits[n * V + v]) / sum - (v == targets[n])) / N;
	}
	product_back(V, C, dlogits, model.h, &model.head, dh);
	normalize_back(dh, model.x, &model.norm, dx);
	for (int l = LAYERS; l-- > 0;)
		layer_back(&model.layer[l], dx);
	for (int i = 0; i < N * C; i++)
		model.table.g[tokens[i / C] * C + i % C] += dx[i];
	return loss;
}

static struct matrix *oracle_find(const char *name)
{
	static const char *const in_layer[] = {
	        "input_layernorm.weight", "attention.query.weight",  "attention.key.weight",
	        "attention.value.weight", "attention.output.weight", "pre_mlp_layernorm.weight",
	        "mlp.gate.weight",        "mlp.up.weight",           "mlp.fc2.weight"};
	int l, at = 0;
	if (!strcmp(name, "embedding.word_embeddings.weight"))
		return &model.table;
	if (!strcmp(name, "decoder.final_layernorm.weight"))
		return &model.norm;
	if (!strcmp(name, "output_layer.weight"))
		return &model.head;
	if (sscanf(name, "decoder.layers.%d.%n", &l, &at) == 1 && at && l < LAYERS)
		for (int i = 0; i < 9; i++)
			if (!strcmp(name + at, in_layer[i]))
				return &model.layer[l].norm1 + i;
	return NULL;
}

/* The engine beside it. */

static bool open_config(struct config *c, const char *const *sets)
{
	const char *all[40];
	size_t n = 0;
	for (; sets[n]; n++)
		all[n] = sets[n];
	struct config_source source = {.sets = all, .n_sets = n};
	struct err e = {0};
	bool good = !config_load(c, &source, &e) && !config_check(c, 1, &e);
	if (!good)
		test_failed(__FILE__, __LINE__, "%s", e.text);
	return good;
}

/* A weight that hides nothing: norms and biases too are random. */
static double random_weight(const struct part *p, int64_t i)
{
	double z = 2 * rng_uniform(rng_key(5, p->name), (uint64_t)i) - 1;
	return p->init == INIT_ONE ? 1 + 0.4 * z : p->init == INIT_ZERO ? 0.4 * z : 0.9 * z;
}

static void compare_part(const struct part *p, const float *mine, const struct matrix *hand)
{
	double worst = 0, scale = 0;
	int64_t count = p->extent[0] * p->extent[1];
	for (int64_t i = 0; i < count; i++) {
		scale = fmax(scale, fabs(hand->g[i]));
		worst = fmax(worst, fabs(mine[i] - hand->g[i]));
	}
	CHECK(scale > 1e-4);
	if (!(worst <= 1e-5 * scale))
		test_failed(__FILE__, __LINE__, "%s: gradient differs by %.3g, largest %.3g", p->name, worst,
		            scale);
}

static void set_weights(struct step *s)
{
	struct piece *list;
	size_t n = pieces_list(&s->program, SHARD_PARAM, &list);
	for (size_t i = 0; i < n; i++) {
		float host[MOST];
		struct matrix *hand = oracle_find(list[i].part->name);
		MUST(hand != NULL && piece_count(&list[i]) <= MOST);
		for (int64_t j = 0; j < piece_count(&list[i]); j++)
			hand->w[j] = host[j] = (float)random_weight(list[i].part, j);
		piece_write(&s->program, s->exec, &list[i], host);
	}
	free(list);
}

static void compare_gradients(struct step *s)
{
	struct piece *list;
	size_t n = pieces_list(&s->program, SHARD_GRAD, &list);
	CHECK_INT(n, s->program.model.n_part);
	for (size_t i = 0; i < n; i++) {
		float host[MOST];
		piece_read(&s->program, s->exec, &list[i], host);
		compare_part(list[i].part, host, oracle_find(list[i].part->name));
	}
	free(list);
}

static void run_beside(const struct backend *backend)
{
	static const char *const sets[] = {"model.num_layers=2",
	                                   "model.hidden_size=12",
	                                   "model.num_attention_heads=4",
	                                   "model.num_query_groups=2",
	                                   "model.kv_channels=6",
	                                   "model.ffn_hidden_size=10",
	                                   "model.vocab_size=17",
	                                   "model.seq_length=7",
	                                   "model.make_vocab_size_divisible_by=20",
	                                   "model.rotary_base=100",
	                                   "train.micro_batch_size=2",
	                                   "train.global_batch_size=2",
	                                   "train.train_iters=1",
	                                   NULL};
	struct config c;
	struct step s;
	struct err e = {0};
	struct step_result r;
	struct place_of_rank at = {.backend = backend};
	memset(&model, 0, sizeof model);
	MUST(open_config(&c, sets));
	MUST(!backend->open(&at.stream, THREADS(1), &e));
	MUST(!step_create(&s, &c, MODEL_TRAIN, &at, NULL, &e));
	set_weights(&s);
	MUST(!step_gradients(&s, NULL, 3, &r, &e));
	CHECK_NEAR(r.lm_loss / oracle_run(s.batch.tokens, s.batch.targets), 1, 1e-6);
	compare_gradients(&s);
	step_free(&s);
	backend->close(at.stream);
	config_free(&c);
}

TEST(the_smallest_model_equals_the_one_written_by_hand)
{
	run_beside(&cpu_reference_backend);
	run_beside(&cpu_backend);
}

/* Finite differences, in double precision throughout: the reference kernels take f64. */

#define SMALL                                                                                               \
	"model.num_layers=2", "model.hidden_size=16", "model.num_attention_heads=4", "model.vocab_size=23", \
	        "model.seq_length=8", "model.make_vocab_size_divisible_by=8", "train.micro_batch_size=2",   \
	        "train.train_iters=1", "model.ffn_hidden_size=12"

static const char *const variants[][20] = {
        {SMALL, "model.activation=gelu"},
        {SMALL, "model.activation=gelu_exact"},
        {SMALL, "model.activation=relu"},
        {SMALL, "model.activation=squared_relu"},
        {SMALL, "model.activation=geglu"},
        {SMALL, "model.position_embedding_type=none"},
        {SMALL, "model.position_embedding_type=learned_absolute", "model.max_position_embeddings=11"},
        {SMALL, "model.normalization=LayerNorm", "model.rotary_percent=0.5"},
        {SMALL, "model.add_bias_linear=true", "model.num_query_groups=2"},
        {SMALL, "model.add_qkv_bias=true", "model.num_query_groups=1", "model.kv_channels=6"},
        {SMALL, "model.qk_layernorm=true", "model.num_query_groups=2"},
        {SMALL, "model.window_size=3"},
        {SMALL, "model.untie_embeddings_and_output_weights=false"},
        {SMALL, "model.use_rope_scaling=true", "model.rope_scaling_original_max_position_embeddings=8"},
        {SMALL, "model.hidden_dropout=0.3"},
        {SMALL, "model.attention_dropout=0.3", "model.num_query_groups=2"},
        {SMALL, "model.hidden_dropout=0.2", "model.attention_dropout=0.2", "model.add_bias_linear=true",
         "model.position_embedding_type=learned_absolute", "model.normalization=LayerNorm",
         "model.activation=gelu", "model.untie_embeddings_and_output_weights=false"},
};

struct bench {
	struct config config;
	struct prog prog;
	struct model model;
	struct stream *stream;
	struct exec *exec;
};

static void upload_inputs(struct bench *b)
{
	const struct model *m = &b->model;
	int32_t tokens[16], targets[16], positions[16];
	for (int i = 0; i < 16; i++) {
		tokens[i] = (int32_t)(rng_bits(1, (uint64_t)i) % 23);
		targets[i] = i == 5 ? -1 : (int32_t)(rng_bits(2, (uint64_t)i) % 23);
		positions[i] = i % 8;
	}
	exec_upload(b->exec, m->tokens, tokens);
	exec_upload(b->exec, m->targets, targets);
	if (m->positions != NONE)
		exec_upload(b->exec, m->positions, positions);
	if (m->keys != NONE)
		exec_upload(b->exec, m->keys, (int64_t[]){12345, 678910});
	exec_upload(b->exec, m->loss_scale, (float[]){1});
}

static void upload_weights(struct bench *b)
{
	const struct model *m = &b->model;
	for (size_t k = 0; k < m->n_param; k++) {
		double *w = exec_data(b->exec, m->param[k].value);
		for (int32_t i = 0; i < m->param[k].n_parts; i++) {
			const struct part *p = &m->part[m->param[k].first_part + i];
			for (int64_t j = 0; j < p->extent[0] * p->extent[1]; j++)
				w[p->local_row * p->extent[1] + j] = random_weight(p, j);
		}
	}
}

static bool open_bench(struct bench *b, const char *const *sets)
{
	struct err e = {0};
	*b = (struct bench){0};
	prog_init(&b->prog);
	if (!open_config(&b->config, sets) || !CHECK(!cpu_reference_backend.open(&b->stream, THREADS(1), &e)))
		return false;
	struct model_spec spec = {.config = &b->config.model,
	                          .padded_vocab_size = b->config.derived.padded_vocab_size,
	                          .dtype = DT_f64,
	                          .use = MODEL_TRAIN,
	                          .batch = 2,
	                          .rows = 8};
	struct prog *p = &b->prog;
	bool good = !model_build(&b->model, p, &spec, &e) &&
	            !prog_backward(p, &(struct seed){b->model.loss, b->model.loss_scale}, 1) &&
	            !prog_fuse(p, false) && !prog_plan(p) && !prog_check(p) &&
	            !exec_create(&b->exec, p, &cpu_reference_backend, b->stream, NULL, &e);
	if (!good) {
		test_failed(__FILE__, __LINE__, "%s%s", e.text, p->e.text);
		return false;
	}
	model_fill_constants(&b->model, b->exec);
	upload_inputs(b);
	upload_weights(b);
	return true;
}

static void close_bench(struct bench *b)
{
	exec_free(b->exec);
	model_free(&b->model);
	prog_free(&b->prog);
	cpu_reference_backend.close(b->stream);
	config_free(&b->config);
}

static bool run_segment(struct bench *b, uint32_t segments)
{
	struct err e = {0};
	return CHECK(!exec_run(b->exec, &(struct exec_part){.segments = segments, .first = true}, &e));
}

static double loss_of(struct bench *b)
{
	double loss = NAN;
	if (run_segment(b, SEG_BIT(FWD)))
		exec_download(b->exec, b->model.loss, &loss);
	return loss;
}

/* Moves a few elements of one parameter. */
static void check_parameter(struct bench *b, const char *variant, size_t k, const float *grad)
{
	const double step = 1e-5;
	int32_t id = b->model.param[k].value;
	const struct value *v = &b->prog.value[id];
	double *w = exec_data(b->exec, id), scale = 0;
	for (int64_t i = 0; i < value_count(v); i++)
		scale = fmax(scale, fabs(grad[i]));
	for (uint64_t i = 0; i < 4; i++) {
		uint64_t at = rng_bits(rng_key(9, v->name), i) % (uint64_t)value_count(v);
		double old = w[at];
		w[at] = old + step;
		double up = loss_of(b);
		w[at] = old - step;
		double difference = (up - loss_of(b)) / (2 * step);
		w[at] = old;
		if (!(fabs(difference - grad[at]) <= 3e-6 * scale))
			test_failed(__FILE__, __LINE__, "%s, %s[%d]: differences give %.9g, backward %.9g",
			            variant, v->name, (int)at, difference, (double)grad[at]);
	}
}

static void check_variant(const char *const *sets)
{
	struct bench b;
	int last = 0;
	while (sets[last + 1])
		last++;
	if (open_bench(&b, sets)) {
		CHECK(isfinite(loss_of(&b)));
		run_segment(&b, SEG_BIT(BWD));
		for (size_t k = 0; k < b.model.n_param; k++) {
			int32_t id = b.prog.value[b.model.param[k].value].grad;
			float *grad = malloc((size_t)value_bytes(&b.prog.value[id]));
			exec_download(b.exec, id, grad);
			check_parameter(&b, sets[last], k, grad);
			free(grad);
		}
	}
	close_bench(&b);
}

TEST(finite_differences_agree_for_every_variant)
{
	for (size_t i = 0; i < sizeof variants / sizeof *variants; i++)
		check_variant(variants[i]);
}

int main(int argc, char **argv)
{
	return test_main(argc, argv);
}
