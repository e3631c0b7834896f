/* A build without cuDNN: attention is our own kernels. */
#include "kernels/cuda/cuda.h"

int cuda_attention_open(struct stream *s, struct err *e)
{
	(void)s, (void)e;
	return 0;
}

void cuda_attention_close(struct stream *s)
{
	(void)s;
}

int cuda_attention_library(struct stream *s, const union op_arg *arg, const struct tensor *in,
                           const struct tensor *out, struct err *e)
{
	(void)s, (void)arg, (void)in, (void)out, (void)e;
	return -1;
}

int cuda_attention_bwd_library(struct stream *s, const union op_arg *arg, const struct tensor *in,
                               const struct tensor *out, struct err *e)
{
	(void)s, (void)arg, (void)in, (void)out, (void)e;
	return -1;
}

int64_t cuda_attention_library_bytes(struct stream *s, const struct kernel_call *call)
{
	(void)s, (void)call;
	return -1;
}

const char *cuda_attention_describe(void)
{
	return "own attention";
}
