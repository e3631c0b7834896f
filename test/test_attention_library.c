/* What surrounds cuDNN's attention: which calls go to it, what it is given, what becomes of its results. The
 * library is one of our own that does what its plan's tensors say with the processor's kernels; the device is
 * simulated. test_cudnn has the real library. */
#include <stdlib.h>

#include "base/err.h"
#include "kernels/cuda/attention.h"
#include "kernels/cuda/attention_cudnn.h"
#include "kernels/kernels.h"
#include "test/ops_fixture.h"

enum { SAMPLES = 2, LENGTH = 128, HEADS = 4, GROUPS = 2, SIZE = 16, WORKSPACE = 1000 };
static const struct tensor none;

/* the library */

static struct {
	int plans, runs;
	bool refuses, fails; /* to plan, to run */
	int64_t number[TENSOR_COUNT], count;
	void *data[TENSOR_COUNT], *workspace;
	const struct attention_plan *plan;
	struct stream *s; /* whose memory it is */
} library;

size_t cudnnGetVersion(void)
{
	return 91900;
}

cudnnStatus_t cudnnCreate(cudnnHandle_t *handle)
{
	*handle = (cudnnHandle_t)&library;
	return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnDestroy(cudnnHandle_t handle)
{
	(void)handle;
	return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnSetStream(cudnnHandle_t handle, cudaStream_t stream)
{
	(void)handle, (void)stream;
	return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnBackendCreateDescriptor(cudnnBackendDescriptorType_t type, cudnnBackendDescriptor_t *d)
{
	CHECK_INT(type, CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR);
	*d = &library;
	return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnBackendDestroyDescriptor(cudnnBackendDescriptor_t d)
{
	(void)d;
	return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnBackendSetAttribute(cudnnBackendDescriptor_t d, cudnnBackendAttributeName_t name,
                                       cudnnBackendAttributeType_t type, int64_t count, const void *values)
{
	(void)d, (void)type;
	if (name == CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS)
		memcpy(library.number, values, (size_t)count * sizeof *library.number);
	else if (name == CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS)
		memcpy(library.data, values, (size_t)count * sizeof *library.data);
	else
		memcpy(&library.workspace, values, sizeof library.workspace);
	library.count = name == CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS ? count : library.count;
	return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnBackendFinalize(cudnnBackendDescriptor_t d)
{
	(void)d;
	return CUDNN_STATUS_SUCCESS;
}

int attention_failed(struct err *e, int code, cudnnStatus_t rc, const char *what)
{
	return err_set(e, code, "library: %s: %d", what, (int)rc);
}

int attention_plan_make(struct attention_plan *p, cudnnHandle_t handle, cudnnBackendDescriptor_t device,
                        struct err *e)
{
	CHECK(handle == (cudnnHandle_t)&library && !device);
	library.plans++;
	if (library.refuses)
		return err_set(e, EXIT_UNAVAILABLE, "library: refused");
	p->plan = p;
	p->workspace = WORKSPACE;
	return 0;
}

void attention_plan_free(struct attention_plan *p)
{
	p->plan = NULL;
}

/* What a run was given under this number; NULL: nothing. */
static void *given(enum attention_tensor number)
{
	void *data = NULL;
	for (int64_t i = 0; i < library.count; i++)
		if (library.number[i] == (int64_t)number)
			data = library.data[i];
	return data;
}

static struct tensor fetch(enum attention_tensor number, enum dtype dtype, int32_t rows, int32_t width)
{
	struct tensor t = TENSOR(dtype, 1, rows, width);
	if (CHECK(given(number) != NULL))
		cuda_backend.download(library.s, t.data, given(number), (size_t)tensor_bytes(&t));
	return t;
}

static void deliver(enum attention_tensor number, const struct tensor *t)
{
	if (CHECK(given(number) != NULL))
		cuda_backend.upload(library.s, given(number), t->data, (size_t)tensor_bytes(t));
}

/* to[samples][columns][rows] <- from[samples][rows][columns]. */
static void turn(const struct tensor *from, const struct tensor *to, int32_t rows, int32_t columns)
{
	for (int64_t i = 0; i < tensor_count(from); i++) {
		int64_t sample = i / (rows * columns), row = i / columns % rows, column = i % columns;
		tensor_put(to, (sample * columns + column) * rows + row, tensor_at(from, i));
	}
}

static union op_arg arg_of_plan(const struct attention_shape *s)
{
	union op_arg arg = {0};
	CHECK(*(const float *)given(TENSOR_minus_infinity) == -INFINITY);
	CHECK(!s->window == !given(TENSOR_window));
	if (s->window)
		CHECK(*(const float *)given(TENSOR_window) == (float)s->window);
	arg.attention.seq_length = s->length;
	arg.attention.heads = s->heads;
	arg.attention.groups = s->groups;
	arg.attention.head_dim = s->size;
	arg.attention.value_dim = s->value;
	arg.attention.window = s->window;
	arg.attention.scale = *(const float *)given(TENSOR_scale);
	return arg;
}

static void check_place(enum attention_tensor number, enum attention_tensor base, int32_t elements)
{
	CHECK((char *)given(number) - (char *)given(base) == 2 * elements);
}

static void run_forward(const struct attention_shape *s, union op_arg arg, const struct tensor *qkv)
{
	int32_t rows = s->samples * s->length;
	struct tensor o = TENSOR(DT_bf16, 1, rows, s->heads * s->value),
	              lse = TENSOR(DT_f32, 1, rows, s->heads);
	struct tensor stats = TENSOR(DT_f32, 1, rows, s->heads);
	op_run(&cpu_backend, OP_attention, arg, (struct tensor[]){*qkv, none, none},
	       (struct tensor[]){o, lse});
	turn(&lse, &stats, s->length, s->heads);
	deliver(TENSOR_o, &o);
	deliver(TENSOR_stats, &stats);
	tensor_free(&o);
	tensor_free(&lse);
	tensor_free(&stats);
}

static void run_backward(const struct attention_shape *s, union op_arg arg, const struct tensor *qkv)
{
	int32_t rows = s->samples * s->length, queries = s->heads * s->size, keys = s->groups * s->size;
	struct tensor dout = fetch(TENSOR_dout, DT_bf16, rows, s->heads * s->value),
	              o = fetch(TENSOR_o, DT_bf16, rows, s->heads * s->value),
	              stats = fetch(TENSOR_stats, DT_f32, rows, s->heads);
	struct tensor lse = TENSOR(DT_f32, 1, rows, s->heads), dqkv = TENSOR(DT_bf16, 1, rows, qkv->dim[1]);
	struct tensor sums = TENSOR(DT_f32, 1, rows, queries), row_sums = TENSOR(DT_f32, 1, rows, s->heads);
	CHECK(*(const float *)given(TENSOR_one) == 1);
	check_place(TENSOR_dk, TENSOR_dq, queries);
	check_place(TENSOR_dv, TENSOR_dq, queries + keys);
	turn(&stats, &lse, s->heads, s->length);
	op_run(&cpu_backend, OP_attention_bwd, arg, (struct tensor[]){dout, *qkv, o, lse, none, none}, &dqkv);
	deliver(TENSOR_dq, &dqkv);
	deliver(TENSOR_dq_sum, &sums); /* working space is spoilt */
	deliver(TENSOR_sum, &row_sums);
	struct tensor *all[] = {&dout, &o, &stats, &lse, &dqkv, &sums, &row_sums};
	for (size_t i = 0; i < sizeof all / sizeof *all; i++)
		tensor_free(all[i]);
}

cudnnStatus_t cudnnBackendExecute(cudnnHandle_t handle, cudnnBackendDescriptor_t plan,
                                  cudnnBackendDescriptor_t pack)
{
	const struct attention_shape *s = &((const struct attention_plan *)plan)->shape;
	struct tensor spoil = TENSOR(DT_f32, 1, WORKSPACE / 4);
	int32_t queries = s->heads * s->size, keys = s->groups * s->size;
	CHECK(handle == (cudnnHandle_t)&library && pack == &library);
	library.runs++;
	if (library.fails)
		return CUDNN_STATUS_EXECUTION_FAILED;
	struct tensor qkv =
	        fetch(TENSOR_q, DT_bf16, s->samples * s->length, queries + keys + s->groups * s->value);
	check_place(TENSOR_k, TENSOR_q, queries);
	check_place(TENSOR_v, TENSOR_q, queries + keys);
	cuda_backend.upload(library.s, library.workspace, spoil.data, WORKSPACE);
	if (s->backward)
		run_backward(s, arg_of_plan(s), &qkv);
	else
		run_forward(s, arg_of_plan(s), &qkv);
	tensor_free(&qkv);
	tensor_free(&spoil);
	return CUDNN_STATUS_SUCCESS;
}

/* calls */

/* One attention, forward and back: its tensors on the host, and their copies on the device. */
enum { QKV, DOUT, KEYS, BEGINS, O, LSE, DQKV, N_TENSORS };
struct trial {
	union op_arg arg;
	struct tensor host[N_TENSORS], device[N_TENSORS];
	struct stream *s;
};

static struct trial trial_open(enum dtype dtype, union op_arg arg, bool begins)
{
	int32_t length = arg.attention.seq_length, rows = SAMPLES * length, size = arg.attention.head_dim;
	int32_t value = attention_value_dim(&arg), width = (HEADS + GROUPS) * size + GROUPS * value;
	struct trial t = {.arg = arg};
	struct err e = {0};
	t.host[QKV] = TENSOR(dtype, 1, rows, width);
	t.host[DOUT] = TENSOR(dtype, 2, rows, HEADS * value);
	t.host[KEYS] = TENSOR(DT_i64, 3, SAMPLES);
	t.host[BEGINS] = begins ? TENSOR(DT_i32, 4, rows) : none;
	t.host[O] = TENSOR(dtype, 5, rows, HEADS * value);
	t.host[LSE] = TENSOR(DT_f32, 6, rows, HEADS);
	t.host[DQKV] = TENSOR(dtype, 7, rows, width);
	for (int32_t i = 0; begins && i < rows; i++)
		tensor_put(&t.host[BEGINS], i, 0);
	for (int i = 0; i < SAMPLES; i++)
		tensor_put(&t.host[KEYS], i, 77 + i);
	CHECK(cuda_backend.open(&t.s, THREADS(1), &e) == 0);
	library.s = t.s;
	for (int k = 0; k < N_TENSORS; k++) {
		size_t bytes = (size_t)tensor_bytes(&t.host[k]);
		t.device[k] = t.host[k];
		if (!t.host[k].data)
			continue;
		t.device[k].data = cuda_backend.alloc(t.s, bytes);
		cuda_backend.upload(t.s, t.device[k].data, t.host[k].data, bytes);
	}
	return t;
}

static void trial_close(struct trial *t)
{
	for (int k = 0; k < N_TENSORS; k++) {
		if (t->host[k].data)
			cuda_backend.free(t->s, t->device[k].data);
		tensor_free(&t->host[k]);
	}
	cuda_backend.close(t->s);
}

/* Forward, then backward, on tensors t; with `coming` the stream is only told. The first code that is not 0.
 */
static int tell(const struct backend *b, struct stream *s, const union op_arg *arg, const struct tensor *t,
                bool coming, struct err *e)
{
	const struct tensor in[] = {t[QKV], t[KEYS], t[BEGINS]}, out[] = {t[O], t[LSE]};
	const struct tensor in_bwd[] = {t[DOUT], t[QKV], t[O], t[LSE], t[KEYS], t[BEGINS]};
	if (coming) {
		b->workspace(s, &(struct kernel_call){OP_attention, arg, in, out});
		b->workspace(s, &(struct kernel_call){OP_attention_bwd, arg, in_bwd, &t[DQKV]});
		return 0;
	}
	int rc = b->kernel[OP_attention](s, arg, in, out, e);
	return rc ? rc : b->kernel[OP_attention_bwd](s, arg, in_bwd, &t[DQKV], e);
}

static void check_results(struct trial *t, double allowed)
{
	struct tensor want[N_TENSORS], got;
	for (int k = 0; k < N_TENSORS; k++)
		want[k] = tensor_copy(&t->host[k]);
	op_run(&cpu_backend, OP_attention, t->arg, (struct tensor[]){want[QKV], want[KEYS], want[BEGINS]},
	       (struct tensor[]){want[O], want[LSE]});
	op_run(&cpu_backend, OP_attention_bwd, t->arg,
	       (struct tensor[]){want[DOUT], want[QKV], want[O], want[LSE], want[KEYS], want[BEGINS]},
	       &want[DQKV]);
	for (int k = O; k < N_TENSORS; k++) {
		got = tensor_copy(&t->host[k]);
		cuda_backend.download(t->s, got.data, t->device[k].data, (size_t)tensor_bytes(&got));
		tensor_compare(&want[k], &got, allowed, k == O ? "o" : k == LSE ? "lse" : "dqkv");
		tensor_free(&got);
	}
	for (int k = 0; k < N_TENSORS; k++)
		tensor_free(&want[k]);
}

static union op_arg usual(void)
{
	union op_arg arg = {0};
	arg.attention.seq_length = LENGTH;
	arg.attention.heads = HEADS;
	arg.attention.groups = GROUPS;
	arg.attention.head_dim = SIZE;
	arg.attention.scale = 0.3f;
	return arg;
}

/* The library gives the processor's bits, our own kernels do not. */
static void check_taken(union op_arg arg, bool told)
{
	struct trial t = trial_open(DT_bf16, arg, false);
	struct err e = {0};
	int plans = library.plans, runs = library.runs;
	if (told)
		tell(&cuda_backend, t.s, &t.arg, t.host, true, &e);
	for (int i = 0; i < 2; i++)
		CHECK(tell(&cuda_backend, t.s, &t.arg, t.device, false, &e) == 0);
	CHECK_INT(library.plans - plans, 2);
	CHECK_INT(library.runs - runs, 4);
	check_results(&t, 0);
	trial_close(&t);
}

TEST(goes_to_the_library)
{
	union op_arg arg = usual();
	check_taken(arg, false);
	check_taken(arg, true);
	arg.attention.window = 40;
	check_taken(arg, true);
	arg.attention.window = LENGTH;
	arg.attention.head_dim = 192;
	arg.attention.value_dim = 128;
	check_taken(arg, true);
}

static void check_not_taken(enum dtype dtype, union op_arg arg, bool begins, int plans)
{
	struct trial t = trial_open(dtype, arg, begins);
	struct err e = {0};
	int before = library.plans, runs = library.runs;
	tell(&cuda_backend, t.s, &t.arg, t.host, true, &e);
	CHECK(tell(&cuda_backend, t.s, &t.arg, t.device, false, &e) == 0);
	CHECK_INT(library.plans - before, plans);
	CHECK_INT(library.runs - runs, 0);
	check_results(&t, dtype == DT_f32 ? 2e-5 : 4e-2);
	trial_close(&t);
}

TEST(goes_to_our_own_kernels)
{
	check_not_taken(DT_f32, usual(), false, 0);
	check_not_taken(DT_bf16, usual(), true, 0);
	for (int i = 0; i < 4; i++) {
		union op_arg arg = usual();
		arg.attention.dropout = i == 0 ? 0.1f : 0;
		arg.attention.seq_length = i == 1 ? 64 : LENGTH;
		arg.attention.head_dim = i == 2 ? 20 : SIZE;
		arg.attention.queries = i == 3 ? (struct context){2, 0, 2} : (struct context){0};
		check_not_taken(DT_bf16, arg, false, 0);
	}
}

/* What the library has refused once it is not asked for again. */
TEST(a_shape_without_an_engine)
{
	library.refuses = true;
	check_not_taken(DT_bf16, usual(), false, 2);
	library.refuses = false;
}

TEST(a_run_that_fails)
{
	struct trial t = trial_open(DT_bf16, usual(), false);
	struct err e = {0};
	library.fails = true;
	CHECK_INT(tell(&cuda_backend, t.s, &t.arg, t.device, false, &e), EXIT_INTERNAL);
	CHECK_HAS(e.text, "library: attention");
	library.fails = false;
	trial_close(&t);
}

int main(int argc, char **argv)
{
	CHECK_STR(cuda_attention_describe(), "cuDNN 9.19");
	return test_main(argc, argv);
}
