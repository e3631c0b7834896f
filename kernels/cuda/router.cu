/* The router: rows of as many logits as there are experts, in f32, a warp to a row. */
#include "kernels/cuda/experts.cuh"

/* ---- scores ---- */

__device__ static float sigmoid(float x)
{
	return 1 / (1 + expf(-x));
}

/* Value and slope of the scores that each expert has for itself. */
__device__ static float own_score(int32_t score, float x)
{
	return score == SCORE_sigmoid ? sigmoid(x) : sqrtf(fmaxf(x, 0) + log1pf(expf(-fabsf(x))));
}

__device__ static float own_slope(int32_t score, float x)
{
	float s = own_score(score, x);
	return score == SCORE_sigmoid ? s * sigmoid(-x) : s == 0 ? 0 : sigmoid(x) / (2 * s);
}

/* The softmax of a row: p = exp(x - top) / sum. */
struct softmax {
	float top, sum;
};

__device__ static float part_of(struct softmax s, float x)
{
	return expf(x - s.top) / s.sum;
}

__device__ static float log_sum_exp(struct softmax s)
{
	return s.top + logf(s.sum);
}

/* Of the n elements that `index` names, those outside the row left out; NULL: of the first n. A warp's. */
__device__ static struct softmax softmax_of(const float *x, int32_t experts, const int32_t *index, int32_t n)
{
	struct softmax s = {-INFINITY, 0};
	for (int32_t i = threadIdx.x % WARP; i < n; i += WARP)
		if (!index || is_among(index[i], experts))
			s.top = fmaxf(s.top, x[index ? index[i] : i]);
	s.top = warp_max(s.top);
	if (s.top == -INFINITY)
		s.top = 0;
	for (int32_t i = threadIdx.x % WARP; i < n; i += WARP)
		if (!index || is_among(index[i], experts))
			s.sum += expf(x[index ? index[i] : i] - s.top);
	s.sum = warp_sum(s.sum);
	return s;
}

/* ---- the choice ---- */

struct route_job {
	union op_arg arg;
	const float *logits, *bias;
	float *probs;
	int32_t *index;
	int64_t rows;
	int32_t experts;
};

/* Above all others: the largest key, of equals the first. Where a number of the warp's lanes looks at keys
 * [begin, end), this is the best that is below another. */
__device__ static uint64_t best_below(const uint32_t *key, int32_t begin, int32_t end, uint64_t other)
{
	uint64_t best = 0;
	for (int32_t i = begin + threadIdx.x % WARP; i < end; i += WARP) {
		uint64_t own = (uint64_t)key[i] << 32 | ~(uint32_t)i;
		best = own < other && own > best ? own : best;
	}
	for (int k = WARP / 2; k; k /= 2) {
		uint64_t own = __shfl_xor_sync(0xffffffffu, (unsigned long long)best, k);
		best = own > best ? own : best;
	}
	return best;
}

__device__ static int32_t named_by(uint64_t best)
{
	return (int32_t) ~(uint32_t)best;
}

/* What experts are chosen by, before the bias. */
__device__ static float choice_score(const union op_arg *arg, struct softmax all, float x)
{
	if (arg->route.score != SCORE_softmax)
		return own_score(arg->route.score, x);
	return arg->route.pre_softmax ? part_of(all, x) : x;
}

__device__ static float choice_of(const struct route_job *j, struct softmax all, const float *x, int32_t i)
{
	return choice_score(&j->arg, all, x[i]) + (j->bias ? j->bias[i] : 0);
}

/* Group-limited choice (DeepSeek-AI 2024): takes the experts of all groups but the best. */
__device__ static void close_groups(const struct route_job *j, struct softmax all, const float *x,
                                    uint32_t *key, uint32_t *group)
{
	int32_t groups = j->arg.route.num_groups, size = j->experts / groups, lane = threadIdx.x % WARP;
	for (int32_t g = 0; g < groups; g++) {
		uint64_t best = UINT64_MAX;
		float value = 0;
		for (int32_t k = 0; k < group_best(&j->arg, size); k++) {
			best = best_below(key, g * size, (g + 1) * size, best);
			value += choice_of(j, all, x, named_by(best));
		}
		if (lane == 0)
			group[g] = order_key(value);
	}
	__syncwarp();
	uint64_t last = UINT64_MAX;
	for (int32_t k = 0; k < j->arg.route.group_topk; k++)
		last = best_below(group, 0, groups, last);
	for (int32_t i = lane; i < j->experts; i += WARP)
		if (((uint64_t)group[i / size] << 32 | ~(uint32_t)(i / size)) < last)
			key[i] = 0;
	__syncwarp();
}

/* Weights of the chosen. */
__device__ static void weigh(const struct route_job *j, struct softmax all, const float *x,
                             const int32_t *chosen, float *probs)
{
	const union op_arg *arg = &j->arg;
	int32_t topk = arg->route.topk, lane = threadIdx.x % WARP;
	bool is_softmax = arg->route.score == SCORE_softmax;
	float sum = 0;
	if (is_softmax && !arg->route.pre_softmax)
		all = softmax_of(x, j->experts, chosen, topk);
	for (int32_t k = lane; k < topk && !is_softmax; k += WARP)
		sum += own_score(arg->route.score, x[chosen[k]]);
	sum = is_softmax || topk == 1 ? 1 : warp_sum(sum) + 1e-20f;
	for (int32_t k = lane; k < topk; k += WARP) {
		float s = is_softmax ? part_of(all, x[chosen[k]]) : own_score(arg->route.score, x[chosen[k]]);
		probs[k] = s / sum * arg->route.scaling_factor;
	}
}

/* key[E] and more[max(groups, K)] are the warp's own. */
__device__ static void route_row(const struct route_job *j, int64_t row, uint32_t *key, uint32_t *more)
{
	const union op_arg *arg = &j->arg;
	const float *x = j->logits + row * j->experts;
	int32_t lane = threadIdx.x % WARP, topk = arg->route.topk, *chosen = (int32_t *)more;
	struct softmax all = {0, 1};
	if (arg->route.score == SCORE_softmax && arg->route.pre_softmax)
		all = softmax_of(x, j->experts, NULL, j->experts);
	__syncwarp(); /* the row before is done with */
	for (int32_t i = lane; i < j->experts; i += WARP)
		key[i] = order_key(choice_of(j, all, x, i));
	__syncwarp();
	if (arg->route.num_groups)
		close_groups(j, all, x, key, more);
	uint64_t best = UINT64_MAX;
	for (int32_t k = 0; k < topk; k++) {
		best = best_below(key, 0, j->experts, best);
		if (lane == 0)
			chosen[k] = j->index[row * topk + k] = named_by(best);
	}
	__syncwarp();
	weigh(j, all, x, chosen, j->probs + row * topk);
}

static size_t route_bytes(const union op_arg *arg, int64_t experts)
{
	int32_t more = arg->route.num_groups > arg->route.topk ? arg->route.num_groups : arg->route.topk;
	return (size_t)(experts + more) * sizeof(uint32_t);
}

__global__ static void route_rows(struct route_job j, int32_t each)
{
	DYNAMIC_SHARED(uint32_t, shared);
	uint32_t *key = shared + threadIdx.x / WARP * each;
	each_row(j.rows, [&](int64_t row) { route_row(&j, row, key, key + j.experts); });
}

int cuda_route(struct stream *s, const union op_arg *arg, const struct tensor *in, const struct tensor *out,
               struct err *e)
{
	int64_t experts = tensor_row(&in[0]);
	if (route_check(arg, &in[0], &out[1], e) || experts_check(OP_route, experts, e))
		return e->code;
	struct route_job j = {
	        *arg,         at<float>(&in[0]), at<float>(&in[1]), at<float>(&out[0]), at<int32_t>(&out[1]),
	        in[0].dim[0], (int32_t)experts};
	size_t bytes = route_bytes(arg, experts);
	return launch(s, "route", warp_rows_with(j.rows, bytes), e, route_rows, j,
	              (int32_t)(bytes / sizeof(uint32_t)));
}

struct route_bwd_job {
	union op_arg arg;
	const float *dprobs, *logits;
	const int32_t *index;
	float *dlogits;
	int64_t rows;
	int32_t experts;
};

struct route_row {
	const union op_arg *arg;
	const float *dprobs, *x;
	const int32_t *index;
	float *dx;
	int32_t experts;
};

/* Of the chosen p (g - sum of g p); of the others -p times that sum where the softmax saw them. */
__device__ static void softmax_backward(const struct route_row *r)
{
	int32_t topk = r->arg->route.topk, lane = threadIdx.x % WARP;
	bool pre = r->arg->route.pre_softmax;
	float factor = r->arg->route.scaling_factor, sum = 0;
	struct softmax s = softmax_of(r->x, r->experts, pre ? NULL : r->index, pre ? r->experts : topk);
	for (int32_t k = lane; k < topk; k += WARP)
		if (is_among(r->index[k], r->experts))
			sum += r->dprobs[k] * part_of(s, r->x[r->index[k]]);
	sum = warp_sum(sum);
	for (int32_t i = lane; i < r->experts; i += WARP)
		r->dx[i] = pre ? -sum * part_of(s, r->x[i]) * factor : 0;
	__syncwarp();
	for (int32_t k = lane; k < topk; k += WARP)
		if (is_among(r->index[k], r->experts))
			r->dx[r->index[k]] = (r->dprobs[k] - sum) * part_of(s, r->x[r->index[k]]) * factor;
}

__device__ static void own_score_backward(const struct route_row *r)
{
	int32_t topk = r->arg->route.topk, score = r->arg->route.score, lane = threadIdx.x % WARP;
	float sum = 0, along = 0, factor = r->arg->route.scaling_factor;
	for (int32_t k = lane; k < topk; k += WARP) {
		float value = is_among(r->index[k], r->experts) ? own_score(score, r->x[r->index[k]]) : 0;
		sum += value;
		along += value * r->dprobs[k];
	}
	sum = warp_sum(sum) + 1e-20f;
	along = warp_sum(along);
	for (int32_t i = lane; i < r->experts; i += WARP)
		r->dx[i] = 0;
	__syncwarp();
	for (int32_t k = lane; k < topk; k += WARP) {
		if (!is_among(r->index[k], r->experts))
			continue;
		float g = topk == 1 ? r->dprobs[k] : (r->dprobs[k] - along / sum) / sum;
		r->dx[r->index[k]] = g * own_slope(score, r->x[r->index[k]]) * factor;
	}
}

__global__ static void route_bwd_rows(struct route_bwd_job j)
{
	int32_t topk = j.arg.route.topk;
	each_row(j.rows, [&](int64_t row) {
		struct route_row r = {&j.arg,
		                      j.dprobs + row * topk,
		                      j.logits + row * j.experts,
		                      j.index + row * topk,
		                      j.dlogits + row * j.experts,
		                      j.experts};
		if (j.arg.route.score == SCORE_softmax)
			softmax_backward(&r);
		else
			own_score_backward(&r);
	});
}

int cuda_route_bwd(struct stream *s, const union op_arg *arg, const struct tensor *in,
                   const struct tensor *out, struct err *e)
{
	if (route_check(arg, &in[1], &in[2], e))
		return e->code;
	struct route_bwd_job j = {
	        *arg,           at<float>(&in[0]), at<float>(&in[1]),          at<int32_t>(&in[2]),
	        at<float>(out), in[1].dim[0],      (int32_t)tensor_row(&in[1])};
	return launch(s, "route_bwd", warp_rows(j.rows), e, route_bwd_rows, j);
}

/* ---- counts ---- */

struct count_job {
	union op_arg arg;
	const int32_t *index;
	int32_t *counts;
	int64_t rows;
	int32_t topk, experts, sequences, parts; /* blocks of each sequence */
};

/* Rows [first, end) of a sequence are here. */
__device__ static int64_t sequence_begin(const struct count_job *j, int64_t sequence)
{
	if (j->sequences == 1)
		return sequence * j->rows;
	int64_t row = sequence * j->arg.balance.sequence_rows - j->arg.balance.first_row;
	return row < 0 ? 0 : row < j->rows ? row : j->rows;
}

__global__ static void count_experts(struct count_job j)
{
	DYNAMIC_SHARED(int32_t, count);
	int64_t sequence = blockIdx.x / j.parts, part = blockIdx.x % j.parts;
	int64_t begin = sequence_begin(&j, sequence) * j.topk,
	        end = sequence_begin(&j, sequence + 1) * j.topk;
	for (int32_t x = threadIdx.x; x < j.experts; x += blockDim.x)
		count[x] = 0;
	__syncthreads();
	for (int64_t i = begin + part * blockDim.x + threadIdx.x; i < end; i += (int64_t)j.parts * blockDim.x)
		if (is_among(j.index[i], j.experts))
			atomicAdd(&count[j.index[i]], 1);
	__syncthreads();
	for (int32_t x = threadIdx.x; x < j.experts; x += blockDim.x)
		if (count[x])
			atomicAdd(&j.counts[sequence * j.experts + x], count[x]);
}

int cuda_expert_counts(struct stream *s, const union op_arg *arg, const struct tensor *in,
                       const struct tensor *out, struct err *e)
{
	const int64_t each = 4096,
	              most = 256; /* choices that a block counts before another joins it; blocks */
	int64_t experts = tensor_row(out), sequences = out->dim[0];
	if (sequence_check("expert_counts", arg, in[0].dim[0], out, e) ||
	    experts_check(OP_expert_counts, experts, e))
		return e->code;
	int64_t parts = (tensor_count(&in[0]) / (sequences > 1 ? sequences : 1) + each - 1) / each;
	parts = parts < 1 ? 1 : parts < most ? parts : most;
	struct count_job j = {*arg,
	                      at<int32_t>(&in[0]),
	                      at<int32_t>(out),
	                      in[0].dim[0],
	                      (int32_t)tensor_row(&in[0]),
	                      (int32_t)experts,
	                      (int32_t)sequences,
	                      (int32_t)parts};
	struct shape shape = {dim3((unsigned)(sequences * parts)), dim3(BLOCK), experts * sizeof(int32_t)};
	CUDA_TRY(e, cudaMemsetAsync(out->data, 0, (size_t)tensor_bytes(out), s->compute));
	return launch(s, "expert_counts", shape, e, count_experts, j);
}

/* ---- balance ---- */

struct balance_job {
	union op_arg arg;
	const float *scale, *logits; /* scale: of the gradient */
	const int32_t *counts;
	float *dlogits;
	double *partial; /* [blocks][BALANCES] */
	int64_t rows;
	int32_t experts, sequences;
};
enum { BALANCES = 3, BALANCE_BLOCKS = 1024 };

/* One row of logits as the balance sees it. */
struct balance_row {
	const float *x;
	const int32_t *counts; /* of the row's sequence */
	struct softmax all;
	float sum, per_count; /* of the scores; price of a unit of p for each count */
	int32_t score;
};

__device__ static float row_score(const struct balance_row *r, int32_t i)
{
	return r->score == SCORE_softmax ? part_of(r->all, r->x[i]) : own_score(r->score, r->x[i]);
}

/* What the loss has for a unit of p. */
__device__ static float row_price(const struct balance_row *r, int32_t i)
{
	return r->per_count * (float)r->counts[i];
}

__device__ static struct balance_row balance_row(const struct balance_job *j, int64_t row)
{
	struct balance_row r;
	int64_t routed = 0;
	r.x = j->logits + row * j->experts;
	r.counts = j->counts + sequence_of(&j->arg, j->sequences, row) * j->experts;
	r.score = j->arg.balance.score;
	r.all = softmax_of(r.x, j->experts, NULL, j->experts);
	r.sum = 0;
	for (int32_t i = threadIdx.x % WARP; i < j->experts; i += WARP) {
		r.sum += row_score(&r, i);
		routed += r.counts[i];
	}
	r.sum = warp_sum(r.sum) + (r.score == SCORE_softmax ? 0 : 1e-20f);
	routed = warp_sum(routed);
	r.per_count = routed > 0 ? j->arg.balance.aux_coeff * (float)j->experts / (float)routed : 0;
	return r;
}

/* Every lane gets the row's terms of loss, z, entropy. */
__device__ static void balance_terms(const struct balance_job *j, int64_t row, double *sum)
{
	struct balance_row r = balance_row(j, row);
	float loss = 0, entropy = 0, lse = log_sum_exp(r.all);
	for (int32_t i = threadIdx.x % WARP; i < j->experts; i += WARP) {
		float p = row_score(&r, i) / r.sum;
		loss += row_price(&r, i) * p;
		entropy -= p > 0 ? p * logf(p) : p;
	}
	double z = (double)lse * lse;
	sum[0] += warp_sum(loss) + j->arg.balance.z_coeff * z;
	sum[1] += z;
	sum[2] += warp_sum(entropy);
}

__global__ static void balance_rows(struct balance_job j)
{
	double sum[BALANCES] = {0, 0, 0};
	each_row(j.rows, [&](int64_t row) { balance_terms(&j, row, sum); });
	for (int k = 0; k < BALANCES; k++) {
		double all = block_sum(threadIdx.x % WARP ? 0 : sum[k]);
		if (threadIdx.x == 0)
			j.partial[blockIdx.x * BALANCES + k] = all;
	}
}

struct balance_out {
	double *sum[BALANCES];
	int32_t acc[BALANCES];
};

/* One block: what the blocks have, in one order. */
__global__ static void balance_sums(const double *partial, int32_t blocks, struct balance_out out)
{
	for (int k = 0; k < BALANCES; k++) {
		double sum = 0;
		for (int32_t i = threadIdx.x; i < blocks; i += blockDim.x)
			sum += partial[i * BALANCES + k];
		sum = block_sum(sum);
		if (threadIdx.x == 0)
			*out.sum[k] = out.acc[k] ? *out.sum[k] + sum : sum;
	}
}

size_t cuda_space_balance(struct stream *s, const struct kernel_call *call)
{
	(void)s, (void)call;
	return (size_t)BALANCE_BLOCKS * BALANCES * sizeof(double);
}

int cuda_balance(struct stream *s, const union op_arg *arg, const struct tensor *in, const struct tensor *out,
                 struct err *e)
{
	if (sequence_check("balance", arg, in[0].dim[0], &in[1], e))
		return e->code;
	struct balance_job j = {*arg, NULL,         at<float>(&in[0]),           at<int32_t>(&in[1]), NULL,
	                        NULL, in[0].dim[0], (int32_t)tensor_row(&in[0]), in[1].dim[0]};
	struct balance_out sums;
	for (int k = 0; k < BALANCES; k++) {
		sums.sum[k] = at<double>(&out[k]);
		sums.acc[k] = out[k].acc;
	}
	struct shape shape = warp_rows_with(j.rows, 0, BALANCE_BLOCKS), one = {dim3(1), dim3(BLOCK), 0};
	j.partial = (double *)cuda_scratch(s, cuda_space_balance(s, NULL), e);
	if (!j.partial || launch(s, "balance", shape, e, balance_rows, j))
		return e->code;
	return launch(s, "balance", one, e, balance_sums, (const double *)j.partial, (int32_t)shape.grid.x,
	              sums);
}

__global__ static void balance_bwd_rows(struct balance_job j)
{
	const int lane = threadIdx.x % WARP;
	const float scale = *j.scale;
	each_row(j.rows, [&](int64_t row) {
		struct balance_row r = balance_row(&j, row);
		float mean = 0, of_z = j.arg.balance.z_coeff * 2 * log_sum_exp(r.all);
		for (int32_t i = lane; i < j.experts; i += WARP)
			mean += row_price(&r, i) * row_score(&r, i) / r.sum;
		mean = warp_sum(mean); /* of the prices, weighted by p */
		for (int32_t i = lane; i < j.experts; i += WARP) {
			float slope = r.score == SCORE_softmax ? row_score(&r, i)
			                                       : own_slope(r.score, r.x[i]) / r.sum;
			j.dlogits[row * j.experts + i] =
			        scale * ((row_price(&r, i) - mean) * slope + of_z * part_of(r.all, r.x[i]));
		}
	});
}

int cuda_balance_bwd(struct stream *s, const union op_arg *arg, const struct tensor *in,
                     const struct tensor *out, struct err *e)
{
	if (sequence_check("balance_bwd", arg, in[1].dim[0], &in[2], e))
		return e->code;
	struct balance_job j = {
	        *arg, at<float>(&in[0]), at<float>(&in[1]),           at<int32_t>(&in[2]), at<float>(out),
	        NULL, in[1].dim[0],      (int32_t)tensor_row(&in[1]), in[2].dim[0]};
	return launch(s, "balance_bwd", warp_rows(j.rows), e, balance_bwd_rows, j);
}

/* Wang et al. 2024, auxiliary-loss-free balancing. One block. */
__global__ static void update_bias(float *bias, const int32_t *counts, int32_t experts, float rate)
{
	int64_t sum = 0;
	for (int32_t i = threadIdx.x; i < experts; i += blockDim.x)
		sum += counts[i];
	sum = block_sum(sum);
	for (int32_t i = threadIdx.x; i < experts; i += blockDim.x) {
		double mean = (double)sum / (double)experts;
		bias[i] += rate * (float)((mean > counts[i]) - (mean < counts[i]));
	}
}

int cuda_bias_update(struct stream *s, const union op_arg *arg, const struct tensor *in,
                     const struct tensor *out, struct err *e)
{
	(void)out;
	struct shape one = {dim3(1), dim3(BLOCK), 0};
	return launch(s, "bias_update", one, e, update_bias, at<float>(&in[0]),
	              (const int32_t *)at<int32_t>(&in[1]), (int32_t)tensor_count(&in[0]),
	              arg->bias_update.rate);
}
