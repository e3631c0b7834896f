/* Sums: of columns, of squares. */
#include "kernels/cuda/fold.cuh"

template <class T, int N> struct column_term {
	const T *x;
	int64_t width;
	__device__ __forceinline__ void operator()(int64_t n, int64_t c, float (&v)[1][N]) const
	{
		load_n(x + n * width + c, v[0]);
	}
};

template <class T, int N>
static int bias_grad_in(struct stream *s, const struct tensor *in, const struct tensor *out, struct err *e)
{
	int64_t width = tensor_row(&in[0]);
	struct column_parts p = column_parts_of(in[0].dim[0], width, N);
	float *partial = (float *)cuda_scratch(s, column_parts_bytes(&p, 1), e);
	struct column_term<T, N> term = {
		at<T>(&in[0]), width
	};
	if (!partial)
		return e->code;
	int rc = column_sums<N, 1>(s, "bias_grad", &p, term, partial, e);
	return rc ? rc : fold(s, "bias_grad", partial, p.parts, 1, width, out, e);
}

template <class T>
static int bias_grad(struct stream *s, const struct tensor *in, const struct tensor *out, struct err *e)
{
	return BY_PACK(T, tensor_row(&in[0]) % pack<T>::N == 0, bias_grad_in)(s, in, out, e);
}

template <class T> static size_t bias_grad_bytes(const struct tensor *x)
{
	int64_t width = tensor_row(x);
	struct column_parts p = column_parts_of(x->dim[0], width, width % pack<T>::N == 0 ? pack<T>::N : 1);
	return column_parts_bytes(&p, 1);
}

size_t cuda_space_bias_grad(struct stream *s, const struct kernel_call *call)
{
	(void)s;
	return BY_TYPE(call->in[0].dtype, bias_grad_bytes)(&call->in[0]);
}

int cuda_bias_grad(struct stream *s, const union op_arg *arg, const struct tensor *in,
                   const struct tensor *out, struct err *e)
{
	(void)arg;
	int rc = type_check(OP_bias_grad, &in[0], e);
	return rc ? rc : BY_TYPE(in[0].dtype, bias_grad)(s, in, out, e);
}

/* Everything in double: the squares are exact, so that the norm is the same to the last digits on every
 * device. */
enum { SQUARE_PARTS = 1024, SQUARE_LAST = 1024 };

template <class T>
__global__ void __launch_bounds__(BLOCK) square_kernel(const T *x, int64_t count, double *partial)
{
	constexpr int N = pack<T>::N;
	double sum = 0;
	each_pack<N>(count, [&](int64_t i, int64_t n) {
		float v[N];
		load_n(x + i, n, v);
#pragma unroll
		for (int k = 0; k < N; k++)
			sum += (double)v[k] * v[k];
	});
	sum = block_sum(sum);
	if (threadIdx.x == 0)
		partial[blockIdx.x] = sum;
}

static __global__ void __launch_bounds__(SQUARE_LAST)
        square_last_kernel(const double *partial, int parts, double *sum, bool adds)
{
	double all = block_sum((int)threadIdx.x < parts ? partial[threadIdx.x] : 0.0);
	if (threadIdx.x == 0)
		*sum = adds ? *sum + all : all;
}

/* How many parts there are: *parts. */
template <class T>
static int square_parts(struct stream *s, const struct tensor *in, double *partial, int *parts, struct err *e)
{
	int64_t n = tensor_count(&in[0]);
	struct shape shape = flat(n, pack<T>::N, SQUARE_PARTS);
	*parts = (int)shape.grid.x;
	return launch(s, "square_sum", shape, e, square_kernel<T>, at<T>(&in[0]), n, partial);
}

size_t cuda_space_square_sum(struct stream *s, const struct kernel_call *call)
{
	(void)s, (void)call;
	return SQUARE_PARTS * sizeof(double);
}

int cuda_square_sum(struct stream *s, const union op_arg *arg, const struct tensor *in,
                    const struct tensor *out, struct err *e)
{
	double *partial = (double *)cuda_scratch(s, SQUARE_PARTS * sizeof(double), e);
	int rc = type_check(OP_square_sum, &in[0], e), parts = 0;
	if (!partial || rc)
		return e->code;
	if (arg->square_sum.counts)
		rc = BY_TYPE(in[0].dtype, square_parts)(s, in, partial, &parts, e);
	struct shape last = {dim3(1), dim3(SQUARE_LAST), 0};
	return rc ? rc
	          : launch(s, "square_sum", last, e, square_last_kernel, (const double *)partial, parts,
	                   at<double>(&out[0]), (bool)out[0].acc);
}
