/* Attention by cuDNN: which calls it takes, a plan for each shape, and their runs. What it does not take is
 * left to our own kernels; so is a shape that none of its engines takes. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "kernels/cuda/attention.h"
#include "kernels/cuda/attention_cudnn.h"

/* Earlier versions want their sums zeroed, or get lengths wrong that are no multiples of 128. */
enum { LEAST_VERSION = 91600, PIECE = 256 };

struct cuda_attention {
	cudnnHandle_t handle; /* NULL: not to be used */
	struct attention_plan **plans;
	size_t n_plans, cap_plans;
};

int cuda_attention_open(struct stream *s, struct err *e)
{
	s->attention = mem_array(1, sizeof *s->attention);
	if (cudnnGetVersion() < LEAST_VERSION)
		return 0;
	cudnnStatus_t rc = cudnnCreate(&s->attention->handle);
	if (rc == CUDNN_STATUS_SUCCESS)
		rc = cudnnSetStream(s->attention->handle, s->compute);
	return rc == CUDNN_STATUS_SUCCESS ? 0 : attention_failed(e, EXIT_UNAVAILABLE, rc, "its start");
}

void cuda_attention_close(struct stream *s)
{
	struct cuda_attention *a = s->attention;
	if (!a)
		return;
	for (size_t i = 0; i < a->n_plans; i++) {
		attention_plan_free(a->plans[i]);
		free(a->plans[i]);
	}
	free(a->plans);
	if (a->handle)
		cudnnDestroy(a->handle);
	free(a);
	s->attention = NULL;
}

const char *cuda_attention_describe(void)
{
	static _Thread_local char text[64];
	size_t version = cudnnGetVersion();
	snprintf(text, sizeof text, "cuDNN %zu.%zu%s", version / 10000, version / 100 % 100,
	         version < LEAST_VERSION ? " (too old, not used)" : "");
	return text;
}

/* Heads that its kernels are made for. */
static bool knows_heads(const struct attention_shape *s)
{
	bool latent = s->size == 192 && s->value == 128;
	return latent || (s->size == s->value && s->size <= 256 && s->size % 8 == 0);
}

/* Whole samples of bf16, without documents and dropout. Lengths are multiples of its largest tile: the last,
 * where it is not full, is what its known mistakes are about. */
static bool shape_of(const struct kernel_call *call, struct attention_shape *shape)
{
	const union op_arg *arg = call->arg;
	int32_t length = arg->attention.seq_length, window = arg->attention.window;
	bool backward = call->op == OP_attention_bwd;
	const struct tensor *qkv = &call->in[backward], *begins = &call->in[backward ? 5 : 2];
	if ((call->op != OP_attention && !backward) || qkv->dtype != DT_bf16 || begins->nd || length < 1 ||
	    arg->attention.dropout > 0 || arg->attention.queries.ranks > 1 || length % 128)
		return false;
	*shape = (struct attention_shape){.samples = qkv->dim[0] / length,
	                                  .length = length,
	                                  .heads = arg->attention.heads,
	                                  .groups = arg->attention.groups,
	                                  .size = arg->attention.head_dim,
	                                  .value = attention_value_dim(arg),
	                                  .window = window < length ? window : 0,
	                                  .backward = backward};
	return shape->samples > 0 && knows_heads(shape);
}

/* The plan of a shape, made when it is first asked for; NULL where the library has none. */
static struct attention_plan *plan_of(struct stream *s, const struct kernel_call *call)
{
	struct cuda_attention *a = s->attention;
	struct attention_shape shape;
	struct err why;
	/* The library adds up dq in whatever order its blocks come. */
	bool refused = s->deterministic && call->op == OP_attention_bwd;
	if (!a || !a->handle || refused || !shape_of(call, &shape))
		return NULL;
	for (size_t i = 0; i < a->n_plans; i++)
		if (!memcmp(&a->plans[i]->shape, &shape, sizeof shape))
			return a->plans[i]->plan ? a->plans[i] : NULL;
	struct attention_plan *p = mem_array(1, sizeof *p);
	p->shape = shape;
	a->plans = mem_grow(a->plans, a->n_plans, &a->cap_plans, sizeof *a->plans);
	a->plans[a->n_plans++] = p;
	if (attention_plan_make(p, a->handle, NULL, &why))
		attention_plan_free(p);
	return p->plan ? p : NULL;
}

/* Pieces of a call's scratch, in bytes from its begin: first the plan's own. */
struct pieces {
	size_t stats, sum, dq_sum, end;
};

static size_t behind(size_t at, size_t bytes)
{
	return at + (bytes + PIECE - 1) / PIECE * PIECE;
}

static struct pieces pieces_of(const struct attention_plan *p)
{
	const struct attention_shape *s = &p->shape;
	size_t rows = (size_t)s->samples * (size_t)s->heads * (size_t)s->length * sizeof(float);
	struct pieces at = {.stats = behind(0, (size_t)p->workspace)};
	at.sum = behind(at.stats, rows);
	at.dq_sum = behind(at.sum, s->backward ? rows : 0);
	at.end = behind(at.dq_sum, s->backward ? rows * (size_t)s->size : 0);
	return at;
}

int64_t cuda_attention_library_bytes(struct stream *s, const struct kernel_call *call)
{
	const struct attention_plan *p = plan_of(s, call);
	return p ? (int64_t)pieces_of(p).end : -1;
}

/* The values that a plan takes from the host. */
struct scalars {
	float scale, minus_infinity, window, one;
};

/* What a run reads and writes, by its number; NULL: the plan does not have it. */
struct run {
	struct attention_plan *plan;
	struct scalars scalars;
	void *at[TENSOR_COUNT];
	void *workspace;
};

/* In the order of the calls: the plan, its tensors, its working space. */
static cudnnStatus_t set_pack(cudnnBackendDescriptor_t pack, const struct run *r)
{
	int64_t number[TENSOR_COUNT], count = 0;
	void *data[TENSOR_COUNT];
	for (int i = 0; i < TENSOR_COUNT; i++) {
		number[count] = i;
		data[count] = r->at[i];
		count += r->at[i] != NULL;
	}
	cudnnStatus_t rc = cudnnBackendSetAttribute(pack, CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS,
	                                            CUDNN_TYPE_INT64, count, number);
	if (!rc)
		rc = cudnnBackendSetAttribute(pack, CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS,
		                              CUDNN_TYPE_VOID_PTR, count, data);
	if (!rc)
		rc = cudnnBackendSetAttribute(pack, CUDNN_ATTR_VARIANT_PACK_WORKSPACE, CUDNN_TYPE_VOID_PTR, 1,
		                              &r->workspace);
	return rc ? rc : cudnnBackendFinalize(pack);
}

static int run(struct stream *s, const struct run *r, struct err *e)
{
	cudnnBackendDescriptor_t pack = NULL;
	cudnnStatus_t rc = cudnnBackendCreateDescriptor(CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR, &pack);
	if (!rc)
		rc = set_pack(pack, r);
	if (!rc)
		rc = cudnnBackendExecute(s->attention->handle, r->plan->plan, pack);
	int code = rc ? attention_failed(e, EXIT_INTERNAL, rc, "attention") : 0;
	if (pack)
		cudnnBackendDestroyDescriptor(pack);
	return code;
}

/* What both directions have: queries, keys and values in the rows of qkv, o, and the scalars. */
static void set_common(struct run *r, const union op_arg *arg, const struct tensor *qkv,
                       const struct tensor *o)
{
	const struct attention_shape *s = &r->plan->shape;
	uint16_t *q = qkv->data;
	r->scalars = (struct scalars){arg->attention.scale, -INFINITY, (float)s->window, 1};
	r->at[TENSOR_q] = q;
	r->at[TENSOR_k] = q + s->heads * s->size;
	r->at[TENSOR_v] = q + (s->heads + s->groups) * s->size;
	r->at[TENSOR_o] = o->data;
	r->at[TENSOR_scale] = &r->scalars.scale;
	r->at[TENSOR_minus_infinity] = &r->scalars.minus_infinity;
	r->at[TENSOR_window] = s->window ? &r->scalars.window : NULL;
}

/* Gives the run its scratch; 0, or -1 where the library does not know the call. */
static int begin(struct stream *s, struct run *r, enum op op, const union op_arg *arg,
                 const struct tensor *in, const struct tensor *out, struct err *e)
{
	struct kernel_call call = {op, arg, in, out};
	r->plan = plan_of(s, &call);
	if (!r->plan)
		return -1;
	struct pieces at = pieces_of(r->plan);
	char *scratch = cuda_scratch(s, at.end, e);
	if (!scratch)
		return e->code;
	r->workspace = scratch;
	r->at[TENSOR_stats] = scratch + at.stats;
	if (op == OP_attention)
		return 0;
	r->at[TENSOR_sum] = scratch + at.sum;
	r->at[TENSOR_dq_sum] = scratch + at.dq_sum;
	return 0;
}

/* The library's sums are [B,H,T], ours [B,T,H]: versions before 9.26 read no others. */
int cuda_attention_library(struct stream *s, const union op_arg *arg, const struct tensor *in,
                           const struct tensor *out, struct err *e)
{
	struct run r = {0};
	int rc = begin(s, &r, OP_attention, arg, in, out, e);
	if (rc)
		return rc;
	set_common(&r, arg, &in[0], &out[0]);
	rc = run(s, &r, e);
	const struct attention_shape *shape = &r.plan->shape;
	return rc ? rc
	          : cuda_attention_transpose(s, r.at[TENSOR_stats], out[1].data, shape->samples, shape->heads,
	                                     shape->length, e);
}

int cuda_attention_bwd_library(struct stream *s, const union op_arg *arg, const struct tensor *in,
                               const struct tensor *out, struct err *e)
{
	struct run r = {0};
	int rc = begin(s, &r, OP_attention_bwd, arg, in, out, e);
	if (rc)
		return rc;
	const struct attention_shape *shape = &r.plan->shape;
	uint16_t *dq = out[0].data;
	set_common(&r, arg, &in[1], &in[2]);
	r.at[TENSOR_one] = &r.scalars.one;
	r.at[TENSOR_dout] = in[0].data;
	r.at[TENSOR_dq] = dq;
	r.at[TENSOR_dk] = dq + shape->heads * shape->size;
	r.at[TENSOR_dv] = dq + (shape->heads + shape->groups) * shape->size;
	rc = cuda_attention_transpose(s, in[3].data, r.at[TENSOR_stats], shape->samples, shape->length,
	                              shape->heads, e);
	return rc ? rc : run(s, &r, e);
}
