/* LayerNorm (Ba, Kiros, Hinton 2016) and RMSNorm (Zhang & Sennrich 2019) of rows, or of the query and key
 * heads of rows.
 *
 * A team of threads works on one row: a few lanes of a warp where the row is narrow, a block where it is
 * wide. A thread has a share of its row; rows wider than the shares of a block are walked through in a
 * loop. */
#include "kernels/cuda/fold.cuh"

enum { BWD_THREADS = 264 * BLOCK };
/* Of accesses of n elements; single ones, of rows that are no whole packs, want more registers each. */
static constexpr int share_of(int n)
{
	return n > 1 ? 32 : 8;
}
static constexpr int widest_of(int n)
{
	return share_of(n) * BLOCK;
}
enum kind { LAYER, RMS, HEADS };

/* Rows of heads, side by side: `first` that the first weight belongs to, `second` of the second, `rest` that
 * stay as they are. A plain norm has one head. */
struct heads {
	int64_t rows;
	int32_t width; /* of a head */
	int32_t first, second, rest;
};

/* Which head of which row a team works on. */
struct place {
	int64_t row;
	int32_t head;
};
__device__ __forceinline__ struct place place_of(const struct heads &h, int64_t item)
{
	int32_t each = h.first + h.second + h.rest;
	if (each == 1)
		return {item, 0};
	return {item / each, (int32_t)(item % each)};
}
__device__ __forceinline__ int64_t place_at(const struct heads &h, const struct place &p)
{
	return (p.row * (h.first + h.second + h.rest) + p.head) * h.width;
}

__device__ __forceinline__ float team_sum(float x, int team)
{
	__shared__ float part[BLOCK / WARP];
	if (team <= WARP) {
		for (int k = team / 2; k; k /= 2)
			x += __shfl_xor_sync(0xffffffffu, x, k);
		return x;
	}
	x = warp_sum(x);
	__syncthreads(); /* an earlier call's parts have been read */
	if (threadIdx.x % WARP == 0)
		part[threadIdx.x / WARP] = x;
	__syncthreads();
	x = 0;
	for (int k = 0; k < team / WARP; k++)
		x += part[k];
	return x;
}

/* How a thread goes through its elements: keeps them in registers (memory is read once), reads them again
 * (from the nearest cache; registers are short where there are sums of columns), or loops over more of them
 * than its share. */
enum way { KEEPS, READS, LOOPS };

/* A thread's elements of R rows at once; of width 0 where the team has none. */
template <class T, int N, int R, way WAY> struct rows_of {
	enum { PACKS = share_of(N) / N };
	elements<T, N> kept[WAY == KEEPS ? R : 1][WAY == KEEPS ? PACKS : 1];
	const T *x[R];
	int width, first, step;

	__device__ __forceinline__ void open(int w, int team)
	{
		width = w;
		first = (int)threadIdx.x % team * N;
		step = team * N;
		if constexpr (WAY == KEEPS)
#pragma unroll
			for (int k = 0; k < PACKS; k++)
				if (first + k * step < width)
#pragma unroll
					for (int r = 0; r < R; r++)
						kept[r][k] = raw<N>(x[r] + first + k * step);
	}

	/* f(k, c, v): v[r] are N elements of row r from column c on, the thread's k-th. */
	template <class F> __device__ __forceinline__ void visit(int k, int c, F f) const
	{
		float v[R][N];
#pragma unroll
		for (int r = 0; r < R; r++)
			if constexpr (WAY == KEEPS)
				widen(kept[r][k], v[r]);
			else
				load_n(x[r] + c, v[r]);
		f(k, c, v);
	}
	template <class F> __device__ __forceinline__ void each(F f) const
	{
		if constexpr (WAY == LOOPS)
			for (int c = first; c < width; c += step)
				visit(0, c, f);
		else
#pragma unroll
			for (int k = 0; k < PACKS; k++)
				if (first + k * step < width)
					visit(k, first + k * step, f);
	}
};

template <class T> struct forward {
	const T *x, *weight, *second, *bias;
	T *y;
	float *mean, *rstd;
	float eps;
};

template <class T, int N, kind K, way WAY>
__global__ void __launch_bounds__(BLOCK) norm_kernel(struct heads h, int team, struct forward<T> a)
{
	int teams = blockDim.x / team;
	int64_t normed = h.first + h.second, items = h.rows * (normed + h.rest);
	for (int64_t i = (int64_t)blockIdx.x * teams; i < items; i += (int64_t)gridDim.x * teams) {
		int64_t item = i + threadIdx.x / team;
		struct place p = place_of(h, item < items ? item : 0);
		int64_t from = place_at(h, p);
		rows_of<T, N, 1, WAY> row;
		row.x[0] = a.x + from;
		row.open(item < items ? h.width : 0, team);

		float sum = 0, mean = 0;
		if (K == LAYER) {
			row.each([&](int, int, const float(&v)[1][N]) {
#pragma unroll
				for (int j = 0; j < N; j++)
					sum += v[0][j];
			});
			mean = team_sum(sum, team) / (float)h.width;
		}
		sum = 0;
		row.each([&](int, int, const float(&v)[1][N]) {
#pragma unroll
			for (int j = 0; j < N; j++)
				sum += (v[0][j] - mean) * (v[0][j] - mean);
		});
		float rstd = 1 / sqrtf(team_sum(sum, team) / (float)h.width + a.eps);

		bool scales = K != HEADS || p.head < normed;
		const T *weight = K == HEADS && p.head >= h.first ? a.second : a.weight;
		row.each([&](int, int c, const float(&v)[1][N]) {
			float w[N], b[N], y[N];
			load_n(weight + c, w);
			if (K == LAYER)
				load_n(a.bias + c, b);
#pragma unroll
			for (int j = 0; j < N; j++) {
				y[j] = (v[0][j] - mean) * rstd * w[j] + (K == LAYER ? b[j] : 0);
				y[j] = scales ? y[j] : v[0][j];
			}
			store_n(a.y + from + c, y);
		});
		if (row.width && row.first == 0 && scales) {
			a.rstd[p.row * normed + p.head] = rstd;
			if (K == LAYER)
				a.mean[p.row] = mean;
		}
	}
}

template <class T> struct backward {
	const T *dy, *x, *weight, *second, *addend;
	const float *mean, *rstd;
	T *dx;
	float *partial; /* [blocks][K == RMS ? 1 : 2][width]: of the weights, of weight and bias */
};

/* What a thread's columns of the parameters' gradients sum to, over the heads that its team had. */
template <int N> struct parameter_sums {
	enum { COUNT = share_of(N) };
	float sum[2][COUNT];

	/* Of all teams of the block, one after the other, into `to`[sums][width]. */
	__device__ __forceinline__ void add_up(int sums, int width, int team, float *to) const
	{
		int first = (int)threadIdx.x % team * N, own = threadIdx.x / team;
		for (int t = 0; t < (int)blockDim.x / team; t++) {
#pragma unroll
			for (int k = 0; k < COUNT; k++) {
				int c = first + k / N * team * N + k % N;
#pragma unroll
				for (int i = 0; i < 2; i++)
					if (t == own && i < sums && c < width)
						to[i * width + c] =
						        t ? to[i * width + c] + sum[i][k] : sum[i][k];
			}
			__syncthreads();
		}
	}
};

/* With g = dy · w and the normalised row n: dx = rstd · (g - mean(g) - n · mean(g n)) + addend; RMSNorm has
 * no mean(g). */
template <class T, int N, kind K, way WAY>
__global__ void __launch_bounds__(BLOCK, 2) norm_bwd_kernel(struct heads h, int team, struct backward<T> a)
{
	DYNAMIC_SHARED(float, shared);
	int teams = blockDim.x / team;
	int64_t normed = h.first + h.second, items = h.rows * (normed + h.rest);
	parameter_sums<N> of = {};
	for (int64_t i = (int64_t)blockIdx.x * teams; i < items; i += (int64_t)gridDim.x * teams) {
		int64_t item = i + threadIdx.x / team;
		struct place p = place_of(h, item < items ? item : 0);
		int64_t from = place_at(h, p);
		rows_of<T, N, 2, WAY> row;
		row.x[0] = a.dy + from;
		row.x[1] = a.x + from;
		row.open(item < items ? h.width : 0, team);

		bool scales = K != HEADS || p.head < normed, first = K != HEADS || p.head < h.first;
		const T *weight = first ? a.weight : a.second;
		float mean = K == LAYER ? a.mean[p.row] : 0;
		float rstd = scales ? a.rstd[p.row * normed + p.head] : 0, g_sum = 0, gn_sum = 0;
		row.each([&](int k, int c, const float(&v)[2][N]) {
			float w[N];
			load_n(weight + c, w);
#pragma unroll
			for (int j = 0; j < N; j++) {
				float normal = (v[1][j] - mean) * rstd, dw = v[0][j] * normal;
				g_sum += v[0][j] * w[j];
				gn_sum += dw * w[j];
				if (WAY == LOOPS)
					continue;
				of.sum[0][k * N + j] += first ? dw : 0;
				if (K == LAYER)
					of.sum[1][k * N + j] += v[0][j];
				if (K == HEADS)
					of.sum[1][k * N + j] += scales && !first ? dw : 0;
			}
		});
		g_sum = K == LAYER ? team_sum(g_sum, team) / (float)h.width : 0;
		gn_sum = team_sum(gn_sum, team) / (float)h.width;
		row.each([&](int, int c, const float(&v)[2][N]) {
			float w[N], more[N] = {}, dx[N];
			load_n(weight + c, w);
			if (a.addend)
				load_n(a.addend + from + c, more);
#pragma unroll
			for (int j = 0; j < N; j++) {
				float normal = (v[1][j] - mean) * rstd;
				dx[j] = (v[0][j] * w[j] - g_sum - normal * gn_sum) * rstd + more[j];
				dx[j] = scales ? dx[j] : v[0][j];
			}
			store_n(a.dx + from + c, dx);
		});
	}
	if constexpr (WAY != LOOPS) {
		int sums = K == RMS ? 1 : 2, count = sums * h.width;
		float *own = a.partial + (int64_t)blockIdx.x * count;
		of.add_up(sums, h.width, team, teams > 1 ? shared : own);
		for (int c = threadIdx.x; teams > 1 && c < count; c += blockDim.x)
			own[c] = shared[c];
	}
}

/* The gradients of weight and bias where rows are wider than a block's share. */
template <class T, int N, kind K> struct wide_term {
	const T *dy, *x;
	const float *mean, *rstd;
	int64_t width;
	__device__ __forceinline__ void operator()(int64_t n, int64_t c,
	                                           float (&v)[K == RMS ? 1 : 2][N]) const
	{
		float d[N], u[N], of_row = K == LAYER ? mean[n] : 0, scale = rstd[n];
		load_n(dy + n * width + c, d);
		load_n(x + n * width + c, u);
#pragma unroll
		for (int j = 0; j < N; j++) {
			v[0][j] = d[j] * (u[j] - of_row) * scale;
			if constexpr (K == LAYER)
				v[1][j] = d[j];
		}
	}
};

/* Threads that share a row: a power of two within a warp, or whole warps. */
static int team_of(int64_t width, int n)
{
	int64_t want = (width + share_of(n) - 1) / share_of(n);
	int team = 1;
	while (team < want && team < WARP)
		team *= 2;
	if (want > WARP)
		team = want < BLOCK ? (int)(want + WARP - 1) / WARP * WARP : (int)BLOCK;
	return team;
}

/* Teams of several warps wait for each other at barriers, so they have blocks of their own. */
static struct shape teams_shape(const struct heads *h, int team, int64_t most_threads)
{
	int threads = team > WARP ? team : BLOCK;
	int64_t items = h->rows * (h->first + h->second + h->rest), most = most_threads / threads;
	int64_t blocks = (items + threads / team - 1) / (threads / team);
	struct shape s = {dim3((unsigned)(blocks < most ? blocks : most)), dim3((unsigned)threads), 0};
	return s;
}

/* Elements of an access. */
template <class T> static int access_of(const struct heads *h)
{
	return h->width % pack<T>::N == 0 ? pack<T>::N : 1;
}

template <class T, int N, kind K>
static int run_forward(struct stream *s, enum op op, const struct heads *h, const struct forward<T> *a,
                       struct err *e)
{
	int team = team_of(h->width, N);
	auto *kernel = h->width <= widest_of(N) ? norm_kernel<T, N, K, KEEPS> : norm_kernel<T, N, K, LOOPS>;
	return launch(s, op_rows[op].name, teams_shape(h, team, 1 << 24), e, kernel, *h, team, *a);
}

template <class T, kind K>
static int forward_by(struct stream *s, enum op op, const struct heads *h, const struct forward<T> *a,
                      struct err *e)
{
	return (access_of<T>(h) > 1 ? run_forward<T, pack<T>::N, K> : run_forward<T, 1, K>)(s, op, h, a, e);
}

static struct heads row_heads(const struct tensor *x)
{
	struct heads h = {x->dim[0], (int32_t)tensor_row(x), 1, 0, 0};
	return h;
}

static struct heads qk_heads(const union op_arg *arg, const struct tensor *x)
{
	struct heads h = {x->dim[0], arg->norm.head_dim, arg->norm.heads, arg->norm.groups, arg->norm.groups};
	return h;
}

template <class T>
static int layernorm(struct stream *s, const union op_arg *arg, const struct tensor *in,
                     const struct tensor *out, struct err *e)
{
	struct heads h = row_heads(&in[0]);
	struct forward<T> a = {
	};
	a.x = at<T>(&in[0]);
	a.weight = at<T>(&in[1]);
	a.bias = at<T>(&in[2]);
	a.y = at<T>(&out[0]);
	a.mean = at<float>(&out[1]);
	a.rstd = at<float>(&out[2]);
	a.eps = arg->norm.eps;
	return forward_by<T, LAYER>(s, OP_layernorm, &h, &a, e);
}

template <class T>
static int rmsnorm(struct stream *s, const union op_arg *arg, const struct tensor *in,
                   const struct tensor *out, struct err *e)
{
	struct heads h = row_heads(&in[0]);
	struct forward<T> a = {
	};
	a.x = at<T>(&in[0]);
	a.weight = at<T>(&in[1]);
	a.y = at<T>(&out[0]);
	a.rstd = at<float>(&out[1]);
	a.eps = arg->norm.eps;
	return forward_by<T, RMS>(s, OP_rmsnorm, &h, &a, e);
}

template <class T>
static int qk_norm(struct stream *s, const union op_arg *arg, const struct tensor *in,
                   const struct tensor *out, struct err *e)
{
	struct heads h = qk_heads(arg, &in[0]);
	struct forward<T> a = {
	};
	a.x = at<T>(&in[0]);
	a.weight = at<T>(&in[1]);
	a.second = at<T>(&in[2]);
	a.y = at<T>(&out[0]);
	a.rstd = at<float>(&out[1]);
	a.eps = arg->norm.eps;
	return forward_by<T, HEADS>(s, OP_qk_norm, &h, &a, e);
}

#define NORM_OP(name)                                                                       \
	int cuda_##name(struct stream *s, const union op_arg *arg, const struct tensor *in, \
	                const struct tensor *out, struct err *e)                            \
	{                                                                                   \
		int rc = type_check(OP_##name, &in[0], e);                                  \
		return rc ? rc : BY_TYPE(in[0].dtype, name)(s, arg, in, out, e);            \
	}
NORM_OP(layernorm)
NORM_OP(rmsnorm)
NORM_OP(qk_norm)

/* Partial sums of the parameters' gradients: of the blocks of norm_bwd_kernel, or of column_sums. */
template <class T> static size_t backward_bytes(const struct heads *h, int sums)
{
	int n = access_of<T>(h);
	struct column_parts p = column_parts_of(h->rows, h->width, n);
	if (h->width > widest_of(n))
		return column_parts_bytes(&p, sums);
	return teams_shape(h, team_of(h->width, n), BWD_THREADS).grid.x * (size_t)(sums * h->width) *
	       sizeof(float);
}

static size_t rows_space(const struct kernel_call *call, int sums)
{
	struct heads h = row_heads(&call->in[0]);
	return BY_TYPE(call->in[0].dtype, backward_bytes)(&h, sums);
}

size_t cuda_space_layernorm_bwd(struct stream *s, const struct kernel_call *call)
{
	(void)s;
	return rows_space(call, 2);
}

size_t cuda_space_rmsnorm_bwd(struct stream *s, const struct kernel_call *call)
{
	(void)s;
	return rows_space(call, 1);
}

size_t cuda_space_qk_norm_bwd(struct stream *s, const struct kernel_call *call)
{
	(void)s;
	struct heads h = qk_heads(call->arg, &call->in[0]);
	return BY_TYPE(call->in[0].dtype, backward_bytes)(&h, 2);
}

/* dx, and in the same pass the blocks' sums for the parameters. */
template <class T, int N, kind K>
static int share_backward(struct stream *s, enum op op, const struct heads *h, const struct backward<T> *a,
                          const struct tensor *gradients, struct err *e)
{
	int sums = K == RMS ? 1 : 2, team = team_of(h->width, N);
	struct shape shape = teams_shape(h, team, BWD_THREADS);
	shape.shared_bytes = team < (int)shape.block.x ? (size_t)(sums * h->width) * sizeof(float) : 0;
	int rc = launch(s, op_rows[op].name, shape, e, norm_bwd_kernel<T, N, K, READS>, *h, team, *a);
	return rc ? rc : fold(s, op_rows[op].name, a->partial, shape.grid.x, sums, h->width, gradients, e);
}

/* dx, then the sums of columns. */
template <class T, int N, kind K>
static int wide_backward(struct stream *s, enum op op, const struct heads *h, const struct backward<T> *a,
                         const struct tensor *gradients, struct err *e)
{
	constexpr int sums = K == RMS ? 1 : 2;
	const char *name = op_rows[op].name;
	int team = team_of(h->width, N);
	struct column_parts p = column_parts_of(h->rows, h->width, N);
	struct wide_term<T, N, K> term = {
		a->dy, a->x, a->mean, a->rstd, h->width
	};
	int rc = launch(s, name, teams_shape(h, team, 1 << 24), e, norm_bwd_kernel<T, N, K, LOOPS>, *h, team,
	                *a);
	rc = rc ? rc : column_sums<N, sums>(s, name, &p, term, a->partial, e);
	return rc ? rc : fold(s, name, a->partial, p.parts, sums, h->width, gradients, e);
}

template <class T, int N, kind K>
static int run_backward(struct stream *s, enum op op, const struct heads *h, const struct backward<T> *a,
                        const struct tensor *gradients, struct err *e)
{
	if (h->width <= widest_of(N))
		return share_backward<T, N, K>(s, op, h, a, gradients, e);
	if constexpr (K == HEADS)
		return err_set(e, EXIT_INTERNAL,
		               "cuda: qk_norm_bwd of heads of %d elements; allowed: up to %d", h->width,
		               widest_of(N));
	else
		return wide_backward<T, N, K>(s, op, h, a, gradients, e);
}

template <class T, kind K>
static int backward_by(struct stream *s, enum op op, const struct heads *h, struct backward<T> *a,
                       const struct tensor *gradients, struct err *e)
{
	a->partial = (float *)cuda_scratch(s, backward_bytes<T>(h, K == RMS ? 1 : 2), e);
	if (!a->partial)
		return e->code;
	return (access_of<T>(h) > 1 ? run_backward<T, pack<T>::N, K> : run_backward<T, 1, K>)(s, op, h, a,
	                                                                                      gradients, e);
}

/* What they all begin with; statistics and the rest differ. */
template <class T> static struct backward<T> backward_of(const struct tensor *in, const struct tensor *out)
{
	struct backward<T> a = {};
	a.dy = at<T>(&in[0]);
	a.x = at<T>(&in[1]);
	a.weight = at<T>(&in[2]);
	a.dx = at<T>(&out[0]);
	return a;
}

template <class T>
static int layernorm_bwd(struct stream *s, const union op_arg *arg, const struct tensor *in,
                         const struct tensor *out, struct err *e)
{
	(void)arg;
	struct heads h = row_heads(&in[0]);
	struct backward<T> a = backward_of<T>(in, out);
	a.mean = at<float>(&in[3]);
	a.rstd = at<float>(&in[4]);
	a.addend = at<T>(&in[5]);
	return backward_by<T, LAYER>(s, OP_layernorm_bwd, &h, &a, out + 1, e);
}

template <class T>
static int rmsnorm_bwd(struct stream *s, const union op_arg *arg, const struct tensor *in,
                       const struct tensor *out, struct err *e)
{
	(void)arg;
	struct heads h = row_heads(&in[0]);
	struct backward<T> a = backward_of<T>(in, out);
	a.rstd = at<float>(&in[3]);
	a.addend = at<T>(&in[4]);
	return backward_by<T, RMS>(s, OP_rmsnorm_bwd, &h, &a, out + 1, e);
}

template <class T>
static int qk_norm_bwd(struct stream *s, const union op_arg *arg, const struct tensor *in,
                       const struct tensor *out, struct err *e)
{
	struct heads h = qk_heads(arg, &in[0]);
	struct backward<T> a = backward_of<T>(in, out);
	a.second = at<T>(&in[3]);
	a.rstd = at<float>(&in[4]);
	return backward_by<T, HEADS>(s, OP_qk_norm_bwd, &h, &a, out + 1, e);
}

NORM_OP(layernorm_bwd)
NORM_OP(rmsnorm_bwd)
NORM_OP(qk_norm_bwd)
