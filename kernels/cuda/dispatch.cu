/* Which rows go to which expert and where: whole numbers, the same as on a processor. Atomic additions are of
 * whole numbers alone, so their order does not show. */
#include "kernels/cuda/experts.cuh"

/* out (acc) <- the number at `count`, where it counts. */
__global__ static void put_count(const unsigned long long *count, int counts, int acc, double *out)
{
	double n = counts ? (double)*count : 0;
	*out = acc ? *out + n : n;
}

static int count_to(struct stream *s, enum op op, const unsigned long long *count, bool counts,
                    const struct tensor *out, struct err *e)
{
	struct shape one = {dim3(1), dim3(1), 0};
	return launch(s, op_rows[op].name, one, e, put_count, count, (int)counts, (int)out->acc,
	              at<double>(out));
}

/* ---- capacity: the keys of an expert's choices, of which it keeps the smallest ---- */

enum { BINS = 256, DIGIT = 8 };

/* The key of an expert's best choice that it drops, as far as it is found; `rank` choices that share these
 * digits are better. Below 0: it drops none. */
struct selection {
	uint64_t key;
	int64_t rank;
};

struct capacity_job {
	union op_arg arg;
	const int32_t *index;
	const float *probs;
	int64_t rows;
	int32_t topk;
	struct selection *selection; /* [experts] */
	uint32_t *bins;              /* [experts][BINS] */
	unsigned long long *dropped;
};

/* Smaller the better the choice is, and its own: the weight, then the order. */
__device__ static uint64_t key_of(const struct capacity_job *j, int64_t choice)
{
	int64_t row = choice / j->topk;
	uint64_t order = (uint64_t)(capacity_order(&j->arg, j->rows, row) * j->topk + choice % j->topk);
	if (j->arg.capacity.by_position)
		return order;
	return (uint64_t)~order_key(j->probs[choice]) << 32 | order;
}

/* Counts the digits at `shift` of the keys that share all above it with what is looked for. */
__global__ static void count_digits(struct capacity_job j, int shift, int is_first)
{
	for (int64_t i = grid_first(); i < j.rows * j.topk; i += grid_step()) {
		int32_t x = j.index[i];
		if (!is_among(x, j.arg.capacity.experts) || (!is_first && j.selection[x].rank < 0))
			continue;
		uint64_t key = key_of(&j, i);
		if (is_first || (key ^ j.selection[x].key) >> (shift + DIGIT) == 0)
			atomicAdd(&j.bins[(int64_t)x * BINS + (key >> shift) % BINS], 1u);
	}
}

/* A block of BINS threads finds the digit of its expert, and leaves the bins empty. */
__global__ static void choose_digit(struct capacity_job j, int shift, int is_first)
{
	struct selection *found = &j.selection[blockIdx.x], old = {0, j.arg.capacity.limit};
	uint32_t *bin = &j.bins[(int64_t)blockIdx.x * BINS + threadIdx.x];
	int64_t count = *bin, all;
	if (!is_first)
		old = *found;
	int64_t before = block_before(count, &all);
	*bin = 0;
	if (is_first && all <= old.rank) {
		if (threadIdx.x == 0)
			*found = {0, -1};
	} else if (before <= old.rank && old.rank < before + count) {
		*found = {old.key | (uint64_t)threadIdx.x << shift, old.rank - before};
	}
}

/* This rank's choices, [first, first + count) of all. */
__global__ static void keep_best(struct capacity_job j, int64_t first, int64_t count, int32_t *kept)
{
	int dropped = 0;
	for (int64_t i = grid_first(); i < count; i += grid_step()) {
		int32_t x = j.index[first + i];
		bool keeps = is_among(x, j.arg.capacity.experts) &&
		             (j.selection[x].rank < 0 || key_of(&j, first + i) < j.selection[x].key);
		kept[i] = keeps ? x : -1;
		dropped += x >= 0 && !keeps;
	}
	dropped = block_sum(dropped);
	if (threadIdx.x == 0 && dropped)
		atomicAdd(j.dropped, (unsigned long long)dropped);
}

/* Whether any key has a digit other than 0 here. */
static bool has_digit(const struct capacity_job *j, int shift)
{
	if (shift >= 32)
		return !j->arg.capacity.by_position;
	return shift == 0 || (uint64_t)(j->rows * j->topk - 1) >> shift != 0;
}

static int find_limits(struct stream *s, const struct capacity_job *j, struct err *e)
{
	struct shape choices = flat(j->rows * j->topk, 4),
	             experts = {dim3((unsigned)j->arg.capacity.experts), dim3(BINS), 0};
	int is_first = 1;
	for (int shift = 64 - DIGIT; shift >= 0; shift -= DIGIT) {
		if (!has_digit(j, shift))
			continue;
		if (launch(s, "capacity", choices, e, count_digits, *j, shift, is_first) ||
		    launch(s, "capacity", experts, e, choose_digit, *j, shift, is_first))
			return e->code;
		is_first = 0;
	}
	return 0;
}

size_t cuda_space_capacity(struct stream *s, const struct kernel_call *call)
{
	(void)s;
	return sizeof(unsigned long long) +
	       (size_t)call->arg->capacity.experts * (sizeof(struct selection) + BINS * sizeof(uint32_t));
}

int cuda_capacity(struct stream *s, const union op_arg *arg, const struct tensor *in,
                  const struct tensor *out, struct err *e)
{
	struct kernel_call call = {OP_capacity, arg, in, out};
	size_t bytes = cuda_space_capacity(s, &call);
	int64_t own = tensor_count(&out[0]), first = arg->capacity.rank * own;
	if (capacity_check(arg, in, out, e) || experts_check(OP_capacity, arg->capacity.experts, e))
		return e->code;
	struct capacity_job j = {};
	j.arg = *arg;
	j.index = at<int32_t>(&in[0]);
	j.probs = at<float>(&in[1]);
	j.rows = in[0].dim[0];
	j.topk = (int32_t)tensor_row(&in[0]);
	j.dropped = (unsigned long long *)cuda_scratch(s, bytes, e);
	if (!j.dropped)
		return e->code;
	j.selection = (struct selection *)(j.dropped + 1);
	j.bins = (uint32_t *)(j.selection + arg->capacity.experts);
	CUDA_TRY(e, cudaMemsetAsync(j.dropped, 0, bytes, s->compute));
	if (find_limits(s, &j, e) ||
	    launch(s, "capacity", flat(own, 4), e, keep_best, j, first, own, at<int32_t>(&out[0])))
		return e->code;
	return count_to(s, OP_capacity, j.dropped, true, &out[1], e);
}

/* ---- dispatch_plan ---- */

/* Choices are cut into blocks of so many that there are at most PLAN_BLOCKS; a block's warps take equal parts
 * of it in order. */
enum { PLAN_BLOCKS = 1024, PLAN_LEAST = 1024 };

struct plan_job {
	union op_arg arg;
	const int32_t *index, *counts;
	int32_t *slot, *sizes;
	int64_t choices, each; /* each: choices of a block, a multiple of 8 WARPs */
	int32_t experts, blocks;
	unsigned long long *cut;
	int32_t *first;  /* [experts]: the first slot */
	int32_t *before; /* [blocks][experts]: choices of an expert in a block; then in those before it */
};

__device__ static int64_t count_at(const struct plan_job *j, int64_t at)
{
	return j->counts[at] > 0 ? j->counts[at] : 0;
}

/* What ranks send to a block's experts, which are on one rank: all, or, where that is too much, equal parts
 * of it, rounded down, and one row more each for the first that have one until the rank is full. */
__global__ static void cut_sizes(struct plan_job j, int32_t begin, int32_t each)
{
	int64_t n = (int64_t)j.arg.dispatch.ranks * each, total = 0, left = j.arg.dispatch.capacity,
	        given = 0;
	int32_t first = begin + blockIdx.x * each;
	for (int64_t i = threadIdx.x; i < n; i += blockDim.x)
		total += count_at(&j, i / each * j.experts + first + i % each);
	total = block_sum(total);
	bool fits = !j.arg.dispatch.capacity || total <= j.arg.dispatch.capacity;
	for (int64_t i = threadIdx.x; i < n && !fits; i += blockDim.x)
		given += count_at(&j, i / each * j.experts + first + i % each) * j.arg.dispatch.capacity /
		         total;
	left -= block_sum(given);
	for (int64_t chunk = 0; chunk < n; chunk += blockDim.x) {
		int64_t i = chunk + threadIdx.x, at = i / each * j.experts + first + i % each, all;
		int64_t count = i < n ? count_at(&j, at) : 0;
		int64_t size = fits ? count : count * j.arg.dispatch.capacity / total;
		int64_t place = block_before((int64_t)(size < count), &all);
		if (i < n)
			j.sizes[at] = (int32_t)(size + (size < count && place < left));
		left -= all;
	}
}

/* The part of the choices that a block has, and a warp of it. */
struct span {
	int64_t begin, end;
};

__device__ static struct span span_of_block(const struct plan_job *j)
{
	int64_t begin = blockIdx.x * j->each, end = begin + j->each;
	return {begin, end < j->choices ? end : j->choices};
}

__device__ static struct span span_of_warp(const struct plan_job *j)
{
	int64_t each = j->each / (blockDim.x / WARP),
	        begin = blockIdx.x * j->each + threadIdx.x / WARP * each, end = begin + each;
	return {begin, end < j->choices ? end : j->choices};
}

__global__ static void count_choices(struct plan_job j)
{
	DYNAMIC_SHARED(int32_t, count);
	struct span span = span_of_block(&j);
	for (int32_t x = threadIdx.x; x < j.experts; x += blockDim.x)
		count[x] = 0;
	__syncthreads();
	for (int64_t i = span.begin + threadIdx.x; i < span.end; i += blockDim.x)
		if (is_among(j.index[i], j.experts))
			atomicAdd(&count[j.index[i]], 1);
	__syncthreads();
	for (int32_t x = threadIdx.x; x < j.experts; x += blockDim.x)
		j.before[(int64_t)blockIdx.x * j.experts + x] = count[x];
}

__device__ static bool is_dealt(const struct plan_job *j, int32_t x)
{
	int32_t begin = j->arg.dispatch.first, count = j->arg.dispatch.count;
	return count ? x >= begin && x < begin + count : is_among(x, j->experts);
}

/* A block's expert: its first slot, how many of its choices are before each block, how many get no slot. */
__global__ static void sum_choices(struct plan_job j)
{
	const int32_t x = blockIdx.x, *size = j.sizes + (int64_t)j.arg.dispatch.rank * j.experts;
	int32_t sum = 0, all;
	int64_t first = 0;
	for (int32_t i = threadIdx.x; i < x; i += blockDim.x)
		first += size[i];
	first = block_sum(first);
	for (int32_t chunk = 0; chunk < j.blocks; chunk += blockDim.x) {
		int32_t b = chunk + threadIdx.x, *at = &j.before[(int64_t)b * j.experts + x];
		int32_t count = b < j.blocks ? *at : 0, before = block_before(count, &all);
		if (b < j.blocks)
			*at = sum + before;
		sum += all;
	}
	if (threadIdx.x == 0) {
		j.first[x] = (int32_t)first;
		if (is_dealt(&j, x) && sum > size[x])
			atomicAdd(j.cut, (unsigned long long)(sum - size[x]));
	}
}

/* Lanes of the warp that have the same x as this one, which is at most 2^bits - 1. */
__device__ static uint32_t lanes_with(uint32_t x, int bits)
{
	uint32_t same = 0xffffffffu;
	for (int b = 0; b < bits; b++) {
		uint32_t set = __ballot_sync(0xffffffffu, x >> b & 1);
		same &= x >> b & 1 ? set : ~set;
	}
	return same;
}

/* next[x] <- how many choices of x come before the warp's first one. */
__device__ static void begin_warps(const struct plan_job *j, int32_t *counts)
{
	int32_t warp = threadIdx.x / WARP, all_warps = blockDim.x / WARP, *next = counts + warp * j->experts;
	struct span span = span_of_warp(j);
	for (int32_t i = threadIdx.x; i < all_warps * j->experts; i += blockDim.x)
		counts[i] = 0;
	__syncthreads();
	for (int64_t i = span.begin + threadIdx.x % WARP; i < span.end; i += WARP)
		if (is_among(j->index[i], j->experts))
			atomicAdd(&next[j->index[i]], 1);
	__syncthreads();
	for (int32_t x = threadIdx.x; x < j->experts; x += blockDim.x) {
		int32_t sum = j->before[(int64_t)blockIdx.x * j->experts + x];
		for (int32_t w = 0; w < all_warps; w++) {
			int32_t count = counts[w * j->experts + x];
			counts[w * j->experts + x] = sum;
			sum += count;
		}
	}
	__syncthreads();
}

__global__ static void give_slots(struct plan_job j, int bits)
{
	DYNAMIC_SHARED(int32_t, counts);
	const int32_t lane = threadIdx.x % WARP, *size = j.sizes + (int64_t)j.arg.dispatch.rank * j.experts;
	int32_t *next = counts + threadIdx.x / WARP * j.experts;
	struct span span = span_of_warp(&j);
	begin_warps(&j, counts);
	for (int64_t at = span.begin; at < span.end; at += WARP) {
		int32_t x = at + lane < span.end ? j.index[at + lane] : -1;
		bool is_expert = is_among(x, j.experts);
		uint32_t same = lanes_with(is_expert ? (uint32_t)x : (uint32_t)j.experts, bits);
		int32_t place = is_expert ? next[x] + __popc(same & ((1u << lane) - 1)) : 0;
		__syncwarp();
		if (is_expert && same >> lane == 1) /* the last of its kind */
			next[x] = place + 1;
		__syncwarp();
		if (at + lane < span.end)
			j.slot[at + lane] =
			        is_expert && is_dealt(&j, x) && place < size[x] ? j.first[x] + place : -1;
	}
}

static int64_t round_up(int64_t n, int64_t to)
{
	return (n + to - 1) / to * to;
}

static struct plan_job plan_of(const union op_arg *arg, const struct tensor *in, const struct tensor *out)
{
	struct plan_job j = {};
	j.arg = *arg;
	j.index = at<int32_t>(&in[0]);
	j.counts = at<int32_t>(&in[1]);
	j.slot = at<int32_t>(&out[0]);
	j.sizes = at<int32_t>(&out[1]);
	j.choices = tensor_count(&in[0]);
	j.each = round_up((j.choices + PLAN_BLOCKS - 1) / PLAN_BLOCKS, BLOCK);
	j.each = j.each < PLAN_LEAST ? (int64_t)PLAN_LEAST : j.each;
	j.blocks = j.choices ? (int32_t)((j.choices + j.each - 1) / j.each) : 1;
	j.experts = in[1].dim[1];
	return j;
}

size_t cuda_space_dispatch_plan(struct stream *s, const struct kernel_call *call)
{
	(void)s;
	struct plan_job j = plan_of(call->arg, call->in, call->out);
	return sizeof *j.cut + ((size_t)j.blocks + 1) * (size_t)j.experts * sizeof(int32_t);
}

static int plan_sizes(struct stream *s, const struct plan_job *j, struct err *e)
{
	int32_t own = j->arg.dispatch.count, each = own ? own : j->experts / j->arg.dispatch.ranks;
	struct shape groups = {dim3(own ? 1 : j->arg.dispatch.ranks), dim3(BLOCK), 0};
	CUDA_TRY(e, cudaMemsetAsync(j->cut, 0, sizeof *j->cut, s->compute));
	if (own)
		CUDA_TRY(e, cudaMemsetAsync(j->sizes, 0,
		                            sizeof *j->sizes * (size_t)j->arg.dispatch.ranks *
		                                    (size_t)j->experts,
		                            s->compute));
	return launch(s, "dispatch_plan: sizes", groups, e, cut_sizes, *j, own ? j->arg.dispatch.first : 0,
	              each);
}

static int plan_slots(struct stream *s, const struct plan_job *j, struct err *e)
{
	size_t bytes = (size_t)j->experts * sizeof(int32_t);
	struct shape counting = {dim3((unsigned)j->blocks), dim3(BLOCK), bytes},
	             experts = {dim3((unsigned)j->experts), dim3(BLOCK), 0},
	             giving = warp_rows_with(1, bytes);
	int bits = 1;
	while (j->experts >> bits)
		bits++;
	giving.grid = counting.grid;
	if (launch(s, "dispatch_plan: counts", counting, e, count_choices, *j) ||
	    launch(s, "dispatch_plan: sums", experts, e, sum_choices, *j))
		return e->code;
	return launch(s, "dispatch_plan: slots", giving, e, give_slots, *j, bits);
}

int cuda_dispatch_plan(struct stream *s, const union op_arg *arg, const struct tensor *in,
                       const struct tensor *out, struct err *e)
{
	struct kernel_call call = {OP_dispatch_plan, arg, in, out};
	if (plan_check(arg, &in[1], e) || experts_check(OP_dispatch_plan, in[1].dim[1], e))
		return e->code;
	struct plan_job j = plan_of(arg, in, out);
	j.cut = (unsigned long long *)cuda_scratch(s, cuda_space_dispatch_plan(s, &call), e);
	if (!j.cut)
		return e->code;
	j.first = (int32_t *)(j.cut + 1);
	j.before = j.first + j.experts;
	if (plan_sizes(s, &j, e) || plan_slots(s, &j, e) ||
	    count_to(s, OP_dispatch_plan, j.cut, arg->dispatch.counts, &out[2], e))
		return e->code;
	return cuda_counts_follow(s, &out[1], e);
}

/* ---- moving rows ---- */

/* source[slot] <- the choice; of several, the last. */
__global__ static void invert_slots(const int32_t *slot, int64_t choices, int32_t *source, int64_t rows)
{
	for (int64_t i = grid_first(); i < choices; i += grid_step())
		if (is_among(slot[i], rows))
			atomicMax(&source[slot[i]], (int32_t)i);
}

template <class U>
__global__ static void gather_rows(const U *x, const int32_t *source, U *y, int64_t rows, int64_t units,
                                   int32_t topk)
{
	each_row(rows, [&](int64_t row) {
		int32_t from = source[row];
		move_row(from < 0 ? NULL : x + from / topk * units, y + row * units, units);
	});
}

template <class U>
static int gather_by(struct stream *s, const struct tensor *x, const struct tensor *y, const int32_t *source,
                     int32_t topk, struct err *e)
{
	int64_t units = tensor_row(y) * dtype_rows[y->dtype].bytes / (int64_t)sizeof(U);
	return launch(s, "permute", warp_rows(y->dim[0]), e, gather_rows<U>, (const U *)at<U>(x), source,
	              at<U>(y), (int64_t)y->dim[0], units, topk);
}

size_t cuda_space_permute(struct stream *s, const struct kernel_call *call)
{
	(void)s;
	return (size_t)call->out[0].dim[0] * sizeof(int32_t);
}

int cuda_permute(struct stream *s, const union op_arg *arg, const struct tensor *in, const struct tensor *out,
                 struct err *e)
{
	struct kernel_call call = {OP_permute, arg, in, out};
	size_t bytes = cuda_space_permute(s, &call);
	int64_t choices = tensor_count(&in[1]);
	int32_t *source = (int32_t *)cuda_scratch(s, bytes, e);
	if (!source)
		return e->code;
	CUDA_TRY(e, cudaMemsetAsync(source, 0xff, bytes, s->compute));
	if (launch(s, "permute", flat(choices), e, invert_slots, (const int32_t *)at<int32_t>(&in[1]),
	           choices, source, (int64_t)out[0].dim[0]))
		return e->code;
	return BY_UNIT(tensor_row(&out[0]) * dtype_rows[out[0].dtype].bytes,
	               gather_by)(s, &in[0], &out[0], source, (int32_t)tensor_row(&in[1]), e);
}

/* A thread adds up N columns of a token's rows. */
template <class T, int N>
__global__ static void sum_rows(const T *x, int64_t rows, const int32_t *slot, int32_t topk, T *y,
                                int64_t tokens, int64_t width)
{
	each_pack<N>(tokens * width, [&](int64_t i, int64_t) {
		int64_t token = i / width, c = i % width;
		float sum[N] = {}, one[N];
		for (int32_t k = 0; k < topk; k++) {
			int32_t from = slot[token * topk + k];
			if (!is_among(from, rows))
				continue;
			load_n(x + from * width + c, one);
#pragma unroll
			for (int n = 0; n < N; n++)
				sum[n] += one[n];
		}
		store_n(y + i, sum);
	});
}

template <class T>
static int sum_by(struct stream *s, const struct tensor *in, const struct tensor *y, struct err *e)
{
	int64_t width = tensor_row(y);
	bool whole = width % pack<T>::N == 0;
	return launch(s, "unpermute", flat(tensor_count(y), whole ? (int)pack<T>::N : 1), e,
	              BY_PACK(T, whole, sum_rows), (const T *)at<T>(&in[0]), (int64_t)in[0].dim[0],
	              (const int32_t *)at<int32_t>(&in[1]), (int32_t)tensor_row(&in[1]), at<T>(y),
	              (int64_t)y->dim[0], width);
}

int cuda_unpermute(struct stream *s, const union op_arg *arg, const struct tensor *in,
                   const struct tensor *out, struct err *e)
{
	(void)arg;
	if (type_check(OP_unpermute, &in[0], e))
		return e->code;
	return BY_TYPE(in[0].dtype, sum_by)(s, in, &out[0], e);
}

__global__ static void scatter_probs(const float *probs, const int32_t *slot, int64_t choices, float *w,
                                     int64_t rows)
{
	for (int64_t i = grid_first(); i < choices; i += grid_step())
		if (is_among(slot[i], rows))
			w[slot[i]] = probs[i];
}

__global__ static void gather_probs(const float *w, const int32_t *slot, int64_t choices, float *probs,
                                    int64_t rows)
{
	for (int64_t i = grid_first(); i < choices; i += grid_step())
		probs[i] = is_among(slot[i], rows) ? w[slot[i]] : 0;
}

int cuda_permute_probs(struct stream *s, const union op_arg *arg, const struct tensor *in,
                       const struct tensor *out, struct err *e)
{
	bool back = arg->permute.back;
	int64_t choices = tensor_count(&in[1]);
	if (!back)
		CUDA_TRY(e, cudaMemsetAsync(out[0].data, 0, (size_t)tensor_bytes(&out[0]), s->compute));
	return launch(s, "permute_probs", flat(choices), e, back ? gather_probs : scatter_probs,
	              (const float *)at<float>(&in[0]), (const int32_t *)at<int32_t>(&in[1]), choices,
	              at<float>(&out[0]), tensor_count(back ? &in[0] : &out[0]));
}
