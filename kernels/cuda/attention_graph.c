/* Attention written as the chain of small operations that cuDNN recognises and runs as one kernel: this order
 * of operations, these types and these layouts, as the library's own front end sends them to versions
 * before 9.21. */
#include "kernels/cuda/attention_cudnn.h"

#include <stdio.h>
#include <string.h>

#include "base/err.h"
#include "base/mem.h"

typedef cudnnBackendDescriptor_t descriptor;

enum { MAX_OPERATIONS = 40, MAX_CONFIGS = 16, ALIGNMENT = 16 };

/* A graph under construction. After a failure nothing more is done. */
struct graph {
	struct attention_plan *p;
	int64_t samples, length, heads, groups, size, value;
	descriptor operations[MAX_OPERATIONS];
	int n_operations;
	cudnnStatus_t rc; /* the first failure */
	struct err *e;
};

int attention_failed(struct err *e, int code, cudnnStatus_t rc, const char *what)
{
	char why[300] = "";
	cudnnGetLastErrorString(why, sizeof why);
	return err_set(e, code, "cuda: cuDNN: %s: %s: %s", what, cudnnGetErrorString(rc), why);
}

static void check(struct graph *g, cudnnStatus_t rc, const char *what)
{
	if (rc == CUDNN_STATUS_SUCCESS || g->rc)
		return;
	g->rc = rc;
	attention_failed(g->e, EXIT_UNAVAILABLE, rc, what);
}

/* descriptors */

static descriptor make(struct graph *g, cudnnBackendDescriptorType_t type)
{
	descriptor d = NULL;
	if (g->rc)
		return NULL;
	ASSERT(g->p->n_kept < ATTENTION_MAX_KEPT);
	check(g, cudnnBackendCreateDescriptor(type, &d), "a descriptor");
	g->p->kept[g->p->n_kept++] = d;
	return d;
}

static void set(struct graph *g, descriptor d, cudnnBackendAttributeName_t name,
                cudnnBackendAttributeType_t type, int64_t count, const void *values)
{
	if (!g->rc)
		check(g, cudnnBackendSetAttribute(d, name, type, count, values), "an attribute");
}

static void set_descriptor(struct graph *g, descriptor d, cudnnBackendAttributeName_t name, descriptor value)
{
	if (value)
		set(g, d, name, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &value);
}

static void finalize(struct graph *g, descriptor d, const char *what)
{
	if (!g->rc)
		check(g, cudnnBackendFinalize(d), what);
}

/* tensors */

enum place { VIRTUAL, ON_DEVICE, ON_HOST };
struct layout {
	int64_t dim[4], stride[4];
};

static descriptor tensor(struct graph *g, enum attention_tensor number, enum place place,
                         cudnnDataType_t type, struct layout l)
{
	descriptor d = make(g, CUDNN_BACKEND_TENSOR_DESCRIPTOR);
	int64_t id = number ? (int64_t)number : TENSOR_COUNT + g->p->n_kept, alignment = ALIGNMENT;
	bool is_virtual = place == VIRTUAL, by_value = place == ON_HOST;
	set(g, d, CUDNN_ATTR_TENSOR_DATA_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &type);
	set(g, d, CUDNN_ATTR_TENSOR_DIMENSIONS, CUDNN_TYPE_INT64, 4, l.dim);
	set(g, d, CUDNN_ATTR_TENSOR_STRIDES, CUDNN_TYPE_INT64, 4, l.stride);
	set(g, d, CUDNN_ATTR_TENSOR_UNIQUE_ID, CUDNN_TYPE_INT64, 1, &id);
	set(g, d, CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, CUDNN_TYPE_INT64, 1, &alignment);
	set(g, d, CUDNN_ATTR_TENSOR_IS_VIRTUAL, CUDNN_TYPE_BOOLEAN, 1, &is_virtual);
	set(g, d, CUDNN_ATTR_TENSOR_IS_BY_VALUE, CUDNN_TYPE_BOOLEAN, 1, &by_value);
	finalize(g, d, "a tensor");
	return d;
}

static struct layout transposed(struct layout l)
{
	return (struct layout){{l.dim[0], l.dim[1], l.dim[3], l.dim[2]},
	                       {l.stride[0], l.stride[1], l.stride[3], l.stride[2]}};
}

/* Heads side by side in rows of `row` elements. */
static struct layout in_rows(const struct graph *g, int64_t heads, int64_t size, int64_t row)
{
	return (struct layout){{g->samples, heads, g->length, size}, {g->length * row, size, row, 1}};
}

static struct layout packed(const struct graph *g, int64_t heads, int64_t size)
{
	return in_rows(g, heads, size, (g->heads + g->groups) * g->size + g->groups * g->value);
}

/* One head of all rows after another. */
static struct layout by_head(const struct graph *g, int64_t size)
{
	int64_t one = g->length * size;
	return (struct layout){{g->samples, g->heads, g->length, size}, {g->heads * one, one, size, 1}};
}

static descriptor scalar(struct graph *g, enum attention_tensor number)
{
	struct layout l = {{1, 1, 1, 1}, {1, 1, 1, 1}};
	return tensor(g, number, ON_HOST, CUDNN_DATA_FLOAT, l);
}

/* Of every query and key; of every query. */
static descriptor scores(struct graph *g, cudnnDataType_t type)
{
	return tensor(g, TENSOR_none, VIRTUAL, type, by_head(g, g->length));
}

static descriptor column(struct graph *g)
{
	return tensor(g, TENSOR_none, VIRTUAL, CUDNN_DATA_FLOAT, by_head(g, 1));
}

/* operations */

static void add_operation(struct graph *g, descriptor d, const char *what)
{
	finalize(g, d, what);
	ASSERT(g->n_operations < MAX_OPERATIONS);
	g->operations[g->n_operations++] = d;
}

/* y <- mode(x, b, t). axis 0: not set. */
struct pointwise {
	cudnnPointwiseMode_t mode;
	descriptor x, b, t, y;
	int64_t axis;
	cudnnDataType_t type; /* that it computes in; 0 is f32 */
};

static descriptor pointwise(struct graph *g, struct pointwise p)
{
	descriptor how = make(g, CUDNN_BACKEND_POINTWISE_DESCRIPTOR);
	set(g, how, CUDNN_ATTR_POINTWISE_MODE, CUDNN_TYPE_POINTWISE_MODE, 1, &p.mode);
	set(g, how, CUDNN_ATTR_POINTWISE_MATH_PREC, CUDNN_TYPE_DATA_TYPE, 1, &p.type);
	if (p.axis)
		set(g, how, CUDNN_ATTR_POINTWISE_AXIS, CUDNN_TYPE_INT64, 1, &p.axis);
	finalize(g, how, "an operation's mode");
	descriptor d = make(g, CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR);
	set_descriptor(g, d, CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR, how);
	set_descriptor(g, d, CUDNN_ATTR_OPERATION_POINTWISE_XDESC, p.x);
	set_descriptor(g, d, CUDNN_ATTR_OPERATION_POINTWISE_BDESC, p.b);
	set_descriptor(g, d, CUDNN_ATTR_OPERATION_POINTWISE_TDESC, p.t);
	set_descriptor(g, d, CUDNN_ATTR_OPERATION_POINTWISE_YDESC, p.y);
	add_operation(g, d, "an elementwise operation");
	return p.y;
}
#define POINTWISE(g, ...) pointwise(g, (struct pointwise){__VA_ARGS__})

static descriptor reduce(struct graph *g, cudnnReduceTensorOp_t by, descriptor x, descriptor y)
{
	cudnnDataType_t type = CUDNN_DATA_FLOAT;
	descriptor how = make(g, CUDNN_BACKEND_REDUCTION_DESCRIPTOR);
	set(g, how, CUDNN_ATTR_REDUCTION_OPERATOR, CUDNN_TYPE_REDUCTION_OPERATOR_TYPE, 1, &by);
	set(g, how, CUDNN_ATTR_REDUCTION_COMP_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &type);
	finalize(g, how, "a reduction's mode");
	descriptor d = make(g, CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR);
	set_descriptor(g, d, CUDNN_ATTR_OPERATION_REDUCTION_DESC, how);
	set_descriptor(g, d, CUDNN_ATTR_OPERATION_REDUCTION_XDESC, x);
	set_descriptor(g, d, CUDNN_ATTR_OPERATION_REDUCTION_YDESC, y);
	add_operation(g, d, "a reduction");
	return y;
}

static descriptor matmul(struct graph *g, descriptor a, descriptor b, descriptor c)
{
	cudnnDataType_t type = CUDNN_DATA_FLOAT;
	descriptor how = make(g, CUDNN_BACKEND_MATMUL_DESCRIPTOR);
	set(g, how, CUDNN_ATTR_MATMUL_COMP_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &type);
	finalize(g, how, "a product's mode");
	descriptor d = make(g, CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR);
	set_descriptor(g, d, CUDNN_ATTR_OPERATION_MATMUL_DESC, how);
	set_descriptor(g, d, CUDNN_ATTR_OPERATION_MATMUL_ADESC, a);
	set_descriptor(g, d, CUDNN_ATTR_OPERATION_MATMUL_BDESC, b);
	set_descriptor(g, d, CUDNN_ATTR_OPERATION_MATMUL_CDESC, c);
	add_operation(g, d, "a product");
	return c;
}

static descriptor reshape(struct graph *g, descriptor x, descriptor y)
{
	descriptor d = make(g, CUDNN_BACKEND_OPERATION_RESHAPE_DESCRIPTOR);
	set_descriptor(g, d, CUDNN_ATTR_OPERATION_RESHAPE_XDESC, x);
	set_descriptor(g, d, CUDNN_ATTR_OPERATION_RESHAPE_YDESC, y);
	add_operation(g, d, "a reshape");
	return y;
}

/* attention */

/* Scores where more >= less, or more > less, else minus infinity. */
static descriptor select_scores(struct graph *g, cudnnPointwiseMode_t compare, descriptor x, descriptor more,
                                descriptor less, descriptor hidden)
{
	descriptor keep = POINTWISE(g, compare, more, less, .y = scores(g, CUDNN_DATA_BOOLEAN),
	                            .type = CUDNN_DATA_BOOLEAN);
	return POINTWISE(g, CUDNN_POINTWISE_BINARY_SELECT, x, hidden, keep, .y = scores(g, CUDNN_DATA_FLOAT));
}

static descriptor positions(struct graph *g, descriptor x, int64_t axis)
{
	return POINTWISE(g, CUDNN_POINTWISE_GEN_INDEX, x, .y = scores(g, CUDNN_DATA_INT32), .axis = axis);
}

/* A query sees keys up to its own position and, with a window, from `window - 1` before it on. */
static descriptor hide(struct graph *g, descriptor x)
{
	descriptor hidden = scalar(g, TENSOR_minus_infinity);
	descriptor query = positions(g, x, 2), key = positions(g, x, 3);
	x = select_scores(g, CUDNN_POINTWISE_CMP_GE, x, query, key, hidden);
	if (!g->p->shape.window)
		return x;
	query = positions(g, x, 2);
	key = positions(g, x, 3);
	descriptor last = POINTWISE(g, CUDNN_POINTWISE_ADD, key, scalar(g, TENSOR_window),
	                            .y = scores(g, CUDNN_DATA_FLOAT), .axis = 3);
	return select_scores(g, CUDNN_POINTWISE_CMP_GT, x, last, query, hidden);
}

static void forward(struct graph *g)
{
	const cudnnDataType_t type = CUDNN_DATA_BFLOAT16, f32 = CUDNN_DATA_FLOAT;
	descriptor q = tensor(g, TENSOR_q, ON_DEVICE, type, packed(g, g->heads, g->size));
	descriptor k = tensor(g, TENSOR_k, ON_DEVICE, type, transposed(packed(g, g->groups, g->size)));
	descriptor v = tensor(g, TENSOR_v, ON_DEVICE, type, packed(g, g->groups, g->value));
	descriptor o =
	        tensor(g, TENSOR_o, ON_DEVICE, type, in_rows(g, g->heads, g->value, g->heads * g->value));
	descriptor stats = tensor(g, TENSOR_stats, ON_DEVICE, f32, by_head(g, 1));

	descriptor s = matmul(g, q, k, scores(g, f32));
	s = POINTWISE(g, CUDNN_POINTWISE_MUL, s, scalar(g, TENSOR_scale), .y = scores(g, f32));
	s = hide(g, s);
	descriptor top = reduce(g, CUDNN_REDUCE_TENSOR_MAX, s, column(g));
	s = POINTWISE(g, CUDNN_POINTWISE_SUB, s, top, .y = scores(g, f32));
	s = POINTWISE(g, CUDNN_POINTWISE_EXP, s, .y = scores(g, f32));
	descriptor sum = reduce(g, CUDNN_REDUCE_TENSOR_ADD, s, column(g));
	descriptor log = POINTWISE(g, CUDNN_POINTWISE_LOG, sum, .y = column(g));
	POINTWISE(g, CUDNN_POINTWISE_ADD, top, log, .y = stats);
	descriptor p = POINTWISE(g, CUDNN_POINTWISE_DIV, s, sum, .y = scores(g, type));
	matmul(g, p, v, o);
}

/* y[G] <- x' z of every head, summed over the heads of a group. */
static void weighted_sum(struct graph *g, descriptor x, descriptor z, int64_t size, descriptor y)
{
	descriptor across =
	        tensor(g, TENSOR_none, VIRTUAL, CUDNN_DATA_BFLOAT16, transposed(by_head(g, g->length)));
	reshape(g, x, across);
	if (g->heads == g->groups) {
		matmul(g, across, z, y);
		return;
	}
	descriptor all = tensor(g, TENSOR_none, VIRTUAL, CUDNN_DATA_BFLOAT16, by_head(g, size));
	reduce(g, CUDNN_REDUCE_TENSOR_ADD, matmul(g, across, z, all), y);
}

/* sum <- row sums of do · o. */
static descriptor output_sum(struct graph *g, descriptor dout, descriptor o, descriptor one)
{
	struct layout l = {{g->samples, g->heads, g->length, g->value},
	                   {g->heads * g->length * g->value, g->length * g->value, g->heads * g->value, 1}};
	descriptor x = POINTWISE(g, CUDNN_POINTWISE_MUL, dout, o,
	                         .y = tensor(g, TENSOR_none, VIRTUAL, CUDNN_DATA_FLOAT, l));
	x = reduce(g, CUDNN_REDUCE_TENSOR_ADD, x, column(g));
	descriptor sum = tensor(g, TENSOR_sum, ON_DEVICE, CUDNN_DATA_FLOAT, by_head(g, 1));
	return POINTWISE(g, CUDNN_POINTWISE_MUL, x, one, .y = sum);
}

/* p = exp(scores - stats); dv = p' do; ds = p (do v' - sum) · scale; dk = ds' q; dq = ds k. */
static void backward(struct graph *g)
{
	const cudnnDataType_t type = CUDNN_DATA_BFLOAT16, f32 = CUDNN_DATA_FLOAT;
	struct layout keys = packed(g, g->groups, g->size), values = packed(g, g->groups, g->value);
	struct layout rows = in_rows(g, g->heads, g->value, g->heads * g->value);
	descriptor q = tensor(g, TENSOR_q, ON_DEVICE, type, packed(g, g->heads, g->size));
	descriptor k = tensor(g, TENSOR_k, ON_DEVICE, type, transposed(keys));
	descriptor v = tensor(g, TENSOR_v, ON_DEVICE, type, transposed(values));
	descriptor o = tensor(g, TENSOR_o, ON_DEVICE, type, rows);
	descriptor dout = tensor(g, TENSOR_dout, ON_DEVICE, type, rows);
	descriptor stats = tensor(g, TENSOR_stats, ON_DEVICE, f32, by_head(g, 1));
	descriptor scale = scalar(g, TENSOR_scale);
	descriptor sum = output_sum(g, dout, o, scalar(g, TENSOR_one));

	descriptor p = matmul(g, q, k, scores(g, f32));
	p = POINTWISE(g, CUDNN_POINTWISE_MUL, p, scale, .y = scores(g, f32));
	p = POINTWISE(g, CUDNN_POINTWISE_SUB, p, stats, .y = scores(g, f32));
	p = POINTWISE(g, CUDNN_POINTWISE_EXP, hide(g, p), .y = scores(g, f32));
	weighted_sum(g, p, dout, g->value, tensor(g, TENSOR_dv, ON_DEVICE, type, values));

	descriptor ds = matmul(g, dout, v, scores(g, f32));
	ds = POINTWISE(g, CUDNN_POINTWISE_SUB, ds, sum, .y = scores(g, f32));
	ds = POINTWISE(g, CUDNN_POINTWISE_MUL, ds, p, .y = scores(g, f32));
	ds = POINTWISE(g, CUDNN_POINTWISE_MUL, ds, scale, .y = scores(g, f32));
	weighted_sum(g, ds, q, g->size, tensor(g, TENSOR_dk, ON_DEVICE, type, keys));

	descriptor upright = reshape(g, k, tensor(g, TENSOR_none, VIRTUAL, type, keys));
	descriptor dq_sum = tensor(g, TENSOR_dq_sum, ON_DEVICE, f32, by_head(g, g->size));
	matmul(g, ds, upright, dq_sum);
	POINTWISE(g, CUDNN_POINTWISE_IDENTITY, dq_sum,
	          .y = tensor(g, TENSOR_dq, ON_DEVICE, type, packed(g, g->heads, g->size)));
}

/* plans */

static descriptor close_graph(struct graph *g, cudnnHandle_t handle)
{
	descriptor d = make(g, CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR);
	if (handle)
		set(g, d, CUDNN_ATTR_OPERATIONGRAPH_HANDLE, CUDNN_TYPE_HANDLE, 1, &handle);
	set(g, d, CUDNN_ATTR_OPERATIONGRAPH_OPS, CUDNN_TYPE_BACKEND_DESCRIPTOR, g->n_operations,
	    g->operations);
	finalize(g, d, "the graph of attention");
	return d;
}

/* How the library would run it, best first. Returns how many there are. */
static int ask(struct graph *g, descriptor operations, descriptor device, descriptor *configs)
{
	cudnnBackendHeurMode_t mode = CUDNN_HEUR_MODE_A;
	int64_t count = 0;
	descriptor d = make(g, CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR);
	set_descriptor(g, d, CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, operations);
	set(g, d, CUDNN_ATTR_ENGINEHEUR_MODE, CUDNN_TYPE_HEUR_MODE, 1, &mode);
	set_descriptor(g, d, CUDNN_ATTR_ENGINEHEUR_DEVICEPROP, device);
	finalize(g, d, "heuristics for attention");
	for (int i = 0; i < MAX_CONFIGS; i++)
		configs[i] = make(g, CUDNN_BACKEND_ENGINECFG_DESCRIPTOR);
	if (!g->rc)
		check(g,
		      cudnnBackendGetAttribute(d, CUDNN_ATTR_ENGINEHEUR_RESULTS,
		                               CUDNN_TYPE_BACKEND_DESCRIPTOR, MAX_CONFIGS, &count, configs),
		      "engines for attention");
	return g->rc ? 0 : (int)(count < MAX_CONFIGS ? count : MAX_CONFIGS);
}

/* Whether the library can build it; a failure is left in g, for the next to clear. */
static bool build(struct graph *g, descriptor config, cudnnHandle_t handle, descriptor device)
{
	int64_t count;
	g->rc = CUDNN_STATUS_SUCCESS;
	descriptor d = make(g, CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR);
	if (handle)
		set(g, d, CUDNN_ATTR_EXECUTION_PLAN_HANDLE, CUDNN_TYPE_HANDLE, 1, &handle);
	set_descriptor(g, d, CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, config);
	set_descriptor(g, d, CUDNN_ATTR_EXECUTION_PLAN_DEVICEPROP, device);
	finalize(g, d, "a plan for attention");
	if (!g->rc)
		check(g,
		      cudnnBackendGetAttribute(d, CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE, CUDNN_TYPE_INT64,
		                               1, &count, &g->p->workspace),
		      "a plan's working space");
	if (!g->rc)
		g->p->plan = d;
	return !g->rc;
}

int attention_plan_make(struct attention_plan *p, cudnnHandle_t handle, descriptor device, struct err *e)
{
	const struct attention_shape *s = &p->shape;
	descriptor configs[MAX_CONFIGS];
	struct graph g = {.p = p,
	                  .samples = s->samples,
	                  .length = s->length,
	                  .heads = s->heads,
	                  .groups = s->groups,
	                  .size = s->size,
	                  .value = s->value,
	                  .e = e};
	if (s->backward)
		backward(&g);
	else
		forward(&g);
	p->offered = ask(&g, close_graph(&g, handle), device, configs);
	if (!g.rc && !p->offered)
		err_set(e, EXIT_UNAVAILABLE, "cuda: cuDNN: no engine for this attention");
	for (int i = 0; i < p->offered; i++)
		if (build(&g, configs[i], handle, device))
			return 0;
	return EXIT_UNAVAILABLE;
}

void attention_plan_free(struct attention_plan *p)
{
	while (p->n_kept > 0) {
		descriptor d = p->kept[--p->n_kept];
		if (d)
			cudnnBackendDestroyDescriptor(d);
	}
	p->plan = NULL;
}
