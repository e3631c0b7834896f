/* The table of the CUDA device: memory, copies, kernels. */
#include "kernels/cuda/cuda.h"
#include "base/mem.h"
#include "kernels/kernels.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SCRATCH_ALIGN = 256 };

int cuda_failed(struct err *e, cudaError_t rc, const char *what)
{
	bool absent = rc == cudaErrorMemoryAllocation || rc == cudaErrorNoDevice ||
	              rc == cudaErrorInsufficientDriver;
	return err_set(e, absent ? EXIT_UNAVAILABLE : EXIT_INTERNAL, "cuda: %s: %s (%s)", what,
	               cudaGetErrorString(rc), cudaGetErrorName(rc));
}

bool cuda_kept(struct stream *s, cudaError_t rc, const char *what)
{
	struct err e;
	if (rc == cudaSuccess)
		return true;
	cuda_failed(&e, rc, what);
	if (!s->failed.code)
		s->failed = e;
	return false;
}

static void fatal(const struct err *e)
{
	fprintf(stderr, "%s\n", e->text);
	exit(e->code);
}

void *cuda_scratch(struct stream *s, size_t bytes, struct err *e)
{
	if (bytes > s->scratch_bytes) {
		ASSERT(!s->is_told || bytes <= s->scratch_expected);
		size_t want = bytes > s->scratch_expected ? bytes : s->scratch_expected;
		cudaStreamSynchronize(s->compute); /* earlier work may still be in it */
		cudaFree(s->scratch);
		s->scratch = NULL;
		s->scratch_bytes = 0;
		cudaError_t rc = cudaMalloc(&s->scratch, want);
		if (rc != cudaSuccess) {
			cuda_failed(e, rc, "working memory of kernels");
			return NULL;
		}
		s->scratch_bytes = want;
	}
	return s->scratch;
}

static int probe(struct err *e)
{
	int count = 0;
	cudaError_t rc = cudaGetDeviceCount(&count);
	if (rc != cudaSuccess || count < 1)
		return err_set(e, EXIT_UNAVAILABLE, "no CUDA device can be used: %s",
		               rc == cudaSuccess ? "none is visible" : cudaGetErrorString(rc));
	return 0;
}

static const char *describe(void)
{
	static _Thread_local char text[300];
	struct cudaDeviceProp p;
	int device = 0, driver = 0;
	cudaGetDevice(&device);
	cudaDriverGetVersion(&driver);
	if (cudaGetDeviceProperties(&p, device) != cudaSuccess)
		return "no device";
	snprintf(text, sizeof text, "%s, driver CUDA %d.%d, %s, %s", p.name, driver / 1000,
	         driver % 1000 / 10, cuda_blas_describe(), cuda_attention_describe());
	return text;
}

/* One device a rank; several ranks may share one where only one is visible. */
static int choose_device(struct stream *s, const struct stream_options *o, struct err *e)
{
	const struct rank_on_host *host = &o->host;
	int count = 0;
	CUDA_TRY(e, cudaGetDeviceCount(&count));
	if (o->share_device)
		cuda_share_device(host);
	else if (count > 1 && count < host->ranks)
		return err_set(
		        e, EXIT_UNAVAILABLE,
		        "cuda: %d ranks on this host, %d devices; allowed: as many devices as ranks, or "
		        "one for each rank or for all (CUDA_VISIBLE_DEVICES)",
		        host->ranks, count);
	s->device = host->rank % count;
	CUDA_TRY(e, cudaSetDevice(s->device));
	CUDA_TRY(e, cudaGetDeviceProperties(&s->properties, s->device));
	return 0;
}

static void stream_close(struct stream *s)
{
	if (!s)
		return;
	if (s->compute)
		cudaStreamSynchronize(s->compute);
	cuda_lanes_close(s);
	cuda_attention_close(s);
	cuda_blas_close(s);
	cuda_counts_close(s);
	cuda_staging_close(s);
	cudaFree(s->scratch);
	if (s->compute)
		cudaStreamDestroy(s->compute);
	free(s);
}

static int open_parts(struct stream *s, const struct stream_options *options, struct err *e)
{
	static int (*const parts[])(struct stream *, struct err *) = {
	        cuda_staging_open, cuda_counts_open, cuda_blas_open, cuda_attention_open, cuda_lanes_open};
	int rc = choose_device(s, options, e);
	s->deterministic = options->deterministic;
	if (rc)
		return rc;
	CUDA_TRY(e, cudaStreamCreateWithFlags(&s->compute, cudaStreamNonBlocking));
	for (size_t i = 0; i < sizeof parts / sizeof *parts && !rc; i++)
		rc = parts[i](s, e);
	return rc;
}

static int stream_open(struct stream **s, const struct stream_options *options, struct err *e)
{
	struct stream *opened = mem_array(1, sizeof *opened);
	if (options->num_threads < 0) {
		free(opened);
		return err_set(e, EXIT_CONFIG, "cuda: %d threads asked for; 0 or more are allowed",
		               options->num_threads);
	}
	int rc = open_parts(opened, options, e);
	if (rc) {
		stream_close(opened);
		return rc;
	}
	*s = opened;
	return 0;
}

static void *memory_alloc(struct stream *s, size_t bytes)
{
	void *p = NULL;
	struct err e;
	cudaError_t rc = cudaMalloc(&p, bytes ? bytes : 1);
	if (rc == cudaSuccess)
		rc = cudaMemsetAsync(p, 0, bytes, s->compute);
	if (rc != cudaSuccess) {
		size_t free_bytes = 0, total = 0;
		cudaMemGetInfo(&free_bytes, &total);
		err_set(&e, EXIT_UNAVAILABLE,
		        "cuda: %zu bytes of device memory asked for, %zu are free of %zu: %s", bytes,
		        free_bytes, total, cudaGetErrorString(rc));
		fatal(&e);
	}
	cuda_counts_forget(s, p, bytes);
	return p;
}

static void memory_free(struct stream *s, void *p)
{
	cudaStreamSynchronize(s->compute);
	cudaFree(p);
}

/* After a failure nothing that comes from the device may look like a number. */
static void memory_download(struct stream *s, void *host, const void *device, size_t bytes)
{
	struct err e;
	bool good = !s->failed.code &&
	            cuda_kept(s, cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, s->compute),
	                      "a copy to the host");
	if (good && cuda_settle(s, &e) == 0)
		return;
	memset(host, 0xff, bytes);
}

static void memory_zero(struct stream *s, void *device, size_t bytes)
{
	cuda_counts_forget(s, device, bytes);
	cuda_kept(s, cudaMemsetAsync(device, 0, bytes, s->compute), "zeros");
}

static void stream_wait(struct stream *s)
{
	struct err e;
	cuda_settle(s, &e);
}

static cuda_space_fn *const spaces[OP_COUNT] = {
#define SCRATCH(name, space) [OP_##name] = cuda_space_##space,
#include "kernels/cuda/scratch.def"
#undef SCRATCH
};

static struct workspace stream_workspace(struct stream *s, const struct kernel_call *coming)
{
	s->is_told |= coming != NULL;
	if (coming && spaces[coming->op]) {
		size_t need = spaces[coming->op](s, coming);
		need = (need + SCRATCH_ALIGN - 1) / SCRATCH_ALIGN * SCRATCH_ALIGN;
		s->scratch_expected = need > s->scratch_expected ? need : s->scratch_expected;
	}
	return (struct workspace){(int64_t)s->scratch_expected, (int64_t)s->scratch_bytes};
}

/* Dense bf16 and f32 rates of NVIDIA's data sheets, flop/s. */
static double datasheet_peak(struct stream *s, enum dtype dtype)
{
	static const struct {
		const char *name;
		double bf16, f32;
	} rows[] = {{"B200", 2250e12, 80e12},     {"H200", 989e12, 67e12},     {"GH200", 989e12, 67e12},
	            {"H100 PCIe", 756e12, 51e12}, {"H100 NVL", 835e12, 60e12}, {"H100", 989e12, 67e12},
	            {"A100", 312e12, 19.5e12},    {"L40S", 362e12, 91.6e12},   {"A40", 150e12, 37.4e12}};
	for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
		if (strstr(s->properties.name, rows[i].name))
			return dtype == DT_f32 ? rows[i].f32 : rows[i].bf16;
	return 0;
}

static void memory_of_device(struct stream *s, int64_t *free_bytes, int64_t *total_bytes)
{
	size_t free_now = 0, total = 0;
	cuda_kept(s, cudaMemGetInfo(&free_now, &total), "the device's memory");
	*free_bytes = (int64_t)free_now;
	*total_bytes = (int64_t)total;
}

/* The condition is constant, so a COMM row asks for no symbol and any other row's kernel must link. */
#define KERNEL_ROW(name, flags) [OP_##name] = (flags)&COMM ? NULL : cuda_##name
static kernel_fn *const kernels[OP_COUNT] = {
#define OP(name, n_in, n_out, flags, doc) KERNEL_ROW(name, flags),
#include "op/ops.def"
#undef OP
};

const struct backend cuda_backend = {
        .name = "cuda",
        .probe = probe,
        .describe = describe,
        .open = stream_open,
        .close = stream_close,
        .alloc = memory_alloc,
        .free = memory_free,
        .upload = cuda_upload,
        .download = memory_download,
        .zero = memory_zero,
        .wait = stream_wait,
        .workspace = stream_workspace,
        .kernel = kernels,
        .status = cuda_settle,
        .counts = cuda_counts,
        .datasheet_peak = datasheet_peak,
        .memory = memory_of_device,
        .host_bytes = (int64_t)144 << 20, /* measured: CUDA 13.0, cuDNN 9.19, NCCL 2.28.9 */
        .groups = &cuda_groups,
        .recorder = &cuda_recorder,
};
