/* Rows in order of expert: how many count is known on the device alone, so grids are for all that there could
 * be, and kernels look at sizes. Rows that sizes promise beyond a tensor are left out. */
#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/experts.cuh"

/* The part of sizes[R,E] that is of own experts. */
struct counted {
	const int32_t *size;
	int32_t ranks, experts, first, count, pad;
};

static struct counted counted_of(const union op_arg *arg, const struct tensor *sizes)
{
	struct counted c = {at<int32_t>(sizes), sizes->dim[0],     sizes->dim[1],
	                    arg->expert.first,  arg->expert.count, arg->expert.pad};
	return c;
}

/* What can be checked of sizes without a look at them. */
static struct tensor unseen(const struct tensor *sizes)
{
	struct tensor t = *sizes;
	t.dim[0] = 0;
	return t;
}

__device__ static int64_t size_at(const struct counted &c, int64_t rank, int64_t own)
{
	int32_t size = c.size[rank * c.experts + c.first + own];
	return size > 0 ? size : 0;
}

/* Rows of a tensor of `most` that count. All threads of a block ask, and get it. */
__device__ static int64_t rows_of(const struct counted &c, int64_t most)
{
	int64_t rows = 0;
	for (int64_t i = threadIdx.x; i < (int64_t)c.ranks * c.count && !c.pad; i += blockDim.x)
		rows += size_at(c, i / c.count, i % c.count);
	rows = c.pad ? (int64_t)c.pad * c.count : block_sum(rows);
	return rows < most ? rows : most;
}

/* Warps for the rows: no more blocks than are at work at once, since each sums the sizes. */
static struct shape counted_rows(struct stream *s, int64_t rows)
{
	return warp_rows_with(rows, 0, 8 * (int64_t)s->properties.multiProcessorCount);
}

/* ---- regroup ---- */

/* Where pieces begin that one rank sends one expert, n = R·e of them, and where all end. */
struct places {
	struct counted of;
	int64_t *group; /* [n+1]: in order of expert, then rank, nothing filled up */
	int64_t *sent;  /* [n+1]: in order of rank, then expert */
};

/* One block. */
__global__ static void find_places(struct places p)
{
	const int64_t ranks = p.of.ranks, count = p.of.count, n = ranks * count;
	int64_t group = 0, sent = 0, all;
	for (int64_t chunk = 0; chunk < n; chunk += blockDim.x) {
		int64_t i = chunk + threadIdx.x;
		int64_t before = block_before(i < n ? size_at(p.of, i % ranks, i / ranks) : 0, &all);
		if (i < n)
			p.group[i] = group + before;
		group += all;
		before = block_before(i < n ? size_at(p.of, i / count, i % count) : 0, &all);
		if (i < n)
			p.sent[i] = sent + before;
		sent += all;
	}
	if (threadIdx.x == 0) {
		p.group[n] = group;
		p.sent[n] = sent;
	}
}

/* Which piece `at` lies in: the last that begins there or before. */
__device__ static int64_t piece_of(const int64_t *begin, int64_t n, int64_t at)
{
	int64_t low = 0, high = n;
	while (high - low > 1) {
		int64_t middle = (low + high) / 2;
		if (begin[middle] <= at)
			low = middle;
		else
			high = middle;
	}
	return low;
}

enum { ZEROS = -1, NOWHERE = -2 };

/* Which row of x goes to row `to` of the rows in order of expert. */
__device__ static int64_t source_in_group(const struct places &p, int64_t to)
{
	const int64_t ranks = p.of.ranks, count = p.of.count;
	int64_t own = p.of.pad ? to / p.of.pad : 0, at = p.of.pad ? p.group[own * ranks] + to % p.of.pad : to;
	if (p.of.pad && at >= p.group[(own + 1) * ranks])
		return ZEROS;
	int64_t piece = piece_of(p.group, ranks * count, at);
	return p.sent[piece % ranks * count + piece / ranks] + at - p.group[piece];
}

/* The same of the rows in order of rank. */
__device__ static int64_t source_in_sent(const struct places &p, int64_t to)
{
	const int64_t ranks = p.of.ranks, count = p.of.count;
	int64_t piece = piece_of(p.sent, ranks * count, to), own = piece % count;
	int64_t at = p.group[own * ranks + piece / count] + to - p.sent[piece],
	        in_own = at - p.group[own * ranks];
	if (!p.of.pad)
		return at;
	return in_own < p.of.pad ? own * p.of.pad + in_own : (int64_t)NOWHERE;
}

template <class U>
__global__ static void regroup_rows(struct places p, const U *x, int64_t x_rows, U *y, int64_t y_rows,
                                    int64_t units, int back)
{
	const int64_t n = (int64_t)p.of.ranks * p.of.count, rows = back       ? p.sent[n]
	                                                           : p.of.pad ? (int64_t)p.of.pad * p.of.count
	                                                                      : p.group[n];
	each_row(rows < y_rows ? rows : y_rows, [&](int64_t to) {
		int64_t from = back ? source_in_sent(p, to) : source_in_group(p, to);
		if (from < x_rows && from != NOWHERE)
			move_row(from == ZEROS ? NULL : x + from * units, y + to * units, units);
	});
}

template <class U>
static int regroup_by(struct stream *s, const struct places *p, const struct tensor *x,
                      const struct tensor *y, int32_t back, struct err *e)
{
	int64_t units = tensor_row(y) * dtype_rows[y->dtype].bytes / (int64_t)sizeof(U);
	return launch(s, "regroup", warp_rows(y->dim[0]), e, regroup_rows<U>, *p, (const U *)at<U>(x),
	              (int64_t)x->dim[0], at<U>(y), (int64_t)y->dim[0], units, (int)back);
}

static int64_t pieces(const union op_arg *arg, const struct tensor *sizes)
{
	return (int64_t)sizes->dim[0] * arg->expert.count;
}

size_t cuda_space_regroup(struct stream *s, const struct kernel_call *call)
{
	(void)s;
	return 2 * (size_t)(pieces(call->arg, &call->in[1]) + 1) * sizeof(int64_t);
}

int cuda_regroup(struct stream *s, const union op_arg *arg, const struct tensor *in, const struct tensor *out,
                 struct err *e)
{
	const struct tensor *sent = arg->expert.back ? out : in, *grouped = arg->expert.back ? in : out,
	                    sizes = unseen(&in[1]);
	struct kernel_call call = {OP_regroup, arg, in, out};
	struct shape one = {dim3(1), dim3(1024), 0};
	if (regroup_check(arg, &sizes, sent->dim[0], grouped->dim[0], e))
		return e->code;
	if (!pieces(arg, &in[1]))
		return 0;
	int64_t *room = (int64_t *)cuda_scratch(s, cuda_space_regroup(s, &call), e);
	if (!room)
		return e->code;
	struct places p = {counted_of(arg, &in[1]), room, room + pieces(arg, &in[1]) + 1};
	if (launch(s, "regroup: places", one, e, find_places, p))
		return e->code;
	return BY_UNIT(tensor_row(out) * dtype_rows[out->dtype].bytes, regroup_by)(s, &p, &in[0], out,
	                                                                           arg->expert.back, e);
}

/* ---- activations ---- */

typedef int activation_run(struct stream *s, const union op_arg *arg, const struct tensor *in,
                           const struct tensor *out, struct err *e);

/* What f(gate) is multiplied by. */
template <int N, class T> __device__ __forceinline__ void load_up(const T *p, int gated, float (&up)[N])
{
	if (gated)
		load_n(p, up);
	for (int k = 0; k < N && !gated; k++)
		up[k] = 1;
}

template <class T, class A, int N>
__global__ static void __launch_bounds__(BLOCK)
        weighted_kernel(const T *x, const float *w, T *y, struct counted counted, int64_t most, int64_t width,
                        int gated)
{
	const int64_t rows = rows_of(counted, most), pitch = gated ? 2 * width : width;
	each_row(rows, [&](int64_t row) {
		const float weight = w[row];
		each_column<N>(width, [&](int64_t c) {
			float gate[N], up[N], value[N];
			load_n(x + row * pitch + c, gate);
			load_up(x + row * pitch + width + c, gated, up);
#pragma unroll
			for (int k = 0; k < N; k++)
				value[k] = A::value(gate[k]) * up[k] * weight;
			store_n(y + row * width + c, value);
		});
	});
}

/* dw is the sum of what y would be with w 1, times dy. */
template <class T, class A, int N>
__global__ static void __launch_bounds__(BLOCK)
        weighted_bwd_kernel(const T *dy, const T *x, const float *w, T *dx, float *dw, struct counted counted,
                            int64_t most, int64_t width, int gated)
{
	const int64_t rows = rows_of(counted, most), pitch = gated ? 2 * width : width;
	each_row(rows, [&](int64_t row) {
		const float weight = w[row];
		float sum = 0;
		each_column<N>(width, [&](int64_t c) {
			float d[N], gate[N], up[N], dgate[N], dup[N];
			load_n(dy + row * width + c, d);
			load_n(x + row * pitch + c, gate);
			load_up(x + row * pitch + width + c, gated, up);
#pragma unroll
			for (int k = 0; k < N; k++) {
				float value = A::value(gate[k]);
				sum += d[k] * value * up[k];
				dgate[k] = d[k] * weight * up[k] * A::slope(gate[k]);
				dup[k] = d[k] * weight * value;
			}
			store_n(dx + row * pitch + c, dgate);
			if (gated)
				store_n(dx + row * pitch + width + c, dup);
		});
		sum = warp_sum(sum);
		if (threadIdx.x % WARP == 0)
			dw[row] = sum;
	});
}

static int64_t least(int64_t a, int64_t b)
{
	return a < b ? a : b;
}

template <class T, class A> struct weighted_forward {
	static int run(struct stream *s, const union op_arg *arg, const struct tensor *in,
	               const struct tensor *out, struct err *e)
	{
		int64_t width = tensor_row(out),
		        rows = least(least(in[0].dim[0], out->dim[0]), tensor_count(&in[1]));
		bool whole = width % pack<T>::N == 0;
		return launch(s, "expert_activation", counted_rows(s, rows), e,
		              whole ? weighted_kernel<T, A, pack<T>::N> : weighted_kernel<T, A, 1>,
		              (const T *)at<T>(&in[0]), (const float *)at<float>(&in[1]), at<T>(out),
		              counted_of(arg, &in[2]), rows, width, (int)arg->expert.gated);
	}
};

template <class T, class A> struct weighted_backward {
	static int run(struct stream *s, const union op_arg *arg, const struct tensor *in,
	               const struct tensor *out, struct err *e)
	{
		int64_t width = tensor_row(&in[0]),
		        rows = least(least(in[1].dim[0], in[0].dim[0]), tensor_count(&in[2]));
		bool whole = width % pack<T>::N == 0;
		return launch(s, "expert_activation_bwd", counted_rows(s, rows), e,
		              whole ? weighted_bwd_kernel<T, A, pack<T>::N> : weighted_bwd_kernel<T, A, 1>,
		              (const T *)at<T>(&in[0]), (const T *)at<T>(&in[1]),
		              (const float *)at<float>(&in[2]), at<T>(&out[0]), at<float>(&out[1]),
		              counted_of(arg, &in[3]), rows, width, (int)arg->expert.gated);
	}
};

template <class T> static activation_run *forward_by(int32_t kind)
{
	return by_activation<weighted_forward, T, activation_run>(kind);
}

template <class T> static activation_run *backward_by(int32_t kind)
{
	return by_activation<weighted_backward, T, activation_run>(kind);
}

int cuda_expert_activation(struct stream *s, const union op_arg *arg, const struct tensor *in,
                           const struct tensor *out, struct err *e)
{
	const struct tensor sizes = unseen(&in[2]);
	if (type_check(OP_expert_activation, &in[0], e) ||
	    activation_check("expert_activation", arg, &sizes, &in[0], out, &in[1], e))
		return e->code;
	return BY_TYPE(in[0].dtype, forward_by)(arg->expert.kind)(s, arg, in, out, e);
}

int cuda_expert_activation_bwd(struct stream *s, const union op_arg *arg, const struct tensor *in,
                               const struct tensor *out, struct err *e)
{
	const struct tensor sizes = unseen(&in[3]);
	if (type_check(OP_expert_activation_bwd, &in[0], e) ||
	    activation_check("expert_activation_bwd", arg, &sizes, &in[1], &in[0], &in[2], e))
		return e->code;
	return BY_TYPE(in[0].dtype, backward_by)(arg->expert.kind)(s, arg, in, out, e);
}
