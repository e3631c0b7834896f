/* Linear layers: products, with what goes before and behind them. */
#include "kernels/cuda/product.h"

/* Products by the shapes of the operation's tensors, which need no data. */
static struct product linear_of(const struct tensor *in, const struct tensor *y)
{
	return (struct product){.kind = PRODUCT_linear,
	                        .size = {in[0].dim[0], in[1].dim[0], tensor_row(&in[0])},
	                        .batch = 1,
	                        .rows = in[0].data,
	                        .with = in[1].data,
	                        .result = y->data,
	                        .bias = in[2].data,
	                        .dtype = (enum dtype)in[0].dtype,
	                        .result_dtype = (enum dtype)y->dtype};
}

static struct product linear_dx_of(const struct tensor *in, const struct tensor *dx)
{
	return (struct product){.kind = PRODUCT_linear_dx,
	                        .size = {in[0].dim[0], tensor_row(&in[0]), tensor_row(&in[1])},
	                        .batch = 1,
	                        .rows = in[0].data,
	                        .with = in[1].data,
	                        .result = dx->data,
	                        .dtype = (enum dtype)in[0].dtype,
	                        .result_dtype = (enum dtype)dx->dtype};
}

static struct product linear_dw_of(const struct tensor *in, const struct tensor *dw)
{
	return (struct product){.kind = PRODUCT_linear_dw,
	                        .size = {in[0].dim[0], tensor_row(&in[0]), tensor_row(&in[1])},
	                        .batch = 1,
	                        .rows = in[0].data,
	                        .with = in[1].data,
	                        .result = dw->data,
	                        .dtype = (enum dtype)in[0].dtype,
	                        .result_dtype = (enum dtype)dw->dtype,
	                        .acc = dw->acc};
}

static int multiply(struct stream *s, const union op_arg *arg, const struct product *p, struct err *e)
{
	return arg->linear.fp8 ? cuda_product_fp8(s, p, e) : cuda_product(s, p, e);
}

static size_t space(struct stream *s, const struct kernel_call *call, struct product p)
{
	return call->arg->linear.fp8 ? cuda_fp8_bytes(s, &p) : cuda_product_workspace(s);
}

size_t cuda_space_linear(struct stream *s, const struct kernel_call *call)
{
	return space(s, call, linear_of(call->in, call->out));
}

size_t cuda_space_linear_dx(struct stream *s, const struct kernel_call *call)
{
	return space(s, call, linear_dx_of(call->in, call->out));
}

size_t cuda_space_linear_dw(struct stream *s, const struct kernel_call *call)
{
	return space(s, call, linear_dw_of(call->in, call->out));
}

/* Of the product and of the sums of columns, one after the other. */
size_t cuda_space_linear_dw_bias(struct stream *s, const struct kernel_call *call)
{
	const struct kernel_call sums = {OP_bias_grad, call->arg, call->in, call->out + 1};
	size_t dw = cuda_space_linear_dw(s, call), db = cuda_space_bias_grad(s, &sums);
	return dw > db ? dw : db;
}

int cuda_linear(struct stream *s, const union op_arg *arg, const struct tensor *in, const struct tensor *out,
                struct err *e)
{
	struct product p = linear_of(in, out);
	return multiply(s, arg, &p, e);
}

int cuda_linear_dx(struct stream *s, const union op_arg *arg, const struct tensor *in,
                   const struct tensor *out, struct err *e)
{
	struct product p = linear_dx_of(in, out);
	return multiply(s, arg, &p, e);
}

int cuda_linear_dw(struct stream *s, const union op_arg *arg, const struct tensor *in,
                   const struct tensor *out, struct err *e)
{
	struct product p = linear_dw_of(in, out);
	return multiply(s, arg, &p, e);
}

/* The library knows one activation, and only where it pays: in halves, with rows of whole 16 bytes. */
static bool is_along(const union op_arg *arg, const struct tensor *h)
{
	return arg->linear.kind == ACT_gelu && dtype_is_half((enum dtype)h->dtype) && tensor_row(h) % 8 == 0;
}

int cuda_linear_act(struct stream *s, const union op_arg *arg, const struct tensor *in,
                    const struct tensor *out, struct err *e)
{
	const union op_arg act = {.activation = {arg->linear.kind}};
	struct product p = linear_of(in, &out[1]);
	if (is_along(arg, &out[1])) {
		p.aux = out[1].data;
		p.result = out[0].data;
		return multiply(s, arg, &p, e);
	}
	int rc = multiply(s, arg, &p, e);
	return rc ? rc : cuda_activation(s, &act, &out[1], &out[0], e);
}

int cuda_linear_dx_act(struct stream *s, const union op_arg *arg, const struct tensor *in,
                       const struct tensor *out, struct err *e)
{
	const union op_arg act = {.activation = {arg->linear.kind}};
	struct product p = linear_dx_of(in, out);
	if (is_along(arg, &in[2])) {
		p.aux = in[2].data;
		return multiply(s, arg, &p, e);
	}
	int rc = multiply(s, arg, &p, e);
	return rc ? rc : cuda_activation_bwd(s, &act, (struct tensor[]){out[0], in[2]}, out, e);
}

/* The library would only write the sums of columns, where they are added to more often than not. */
int cuda_linear_dw_bias(struct stream *s, const union op_arg *arg, const struct tensor *in,
                        const struct tensor *out, struct err *e)
{
	int rc = cuda_linear_dw(s, arg, in, out, e);
	return rc ? rc : cuda_bias_grad(s, arg, in, &out[1], e);
}
