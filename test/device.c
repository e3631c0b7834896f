#include "test/device.h"

#include <stdio.h>

#include "base/err.h"
#include "kernels/kernels.h"
#include "test/test.h"

bool device_is_here(void)
{
	struct err e = {0};
	if (!cuda_backend.probe(&e))
		return true;
	printf("no device: %s\n", e.text);
	return false;
}

struct stream *device_stream(void)
{
	struct stream *s = NULL;
	struct err e = {0};
	if (device_is_here())
		CHECK(cuda_backend.open(&s, THREADS(1), &e) == 0);
	return s;
}

struct tensor device_lend(struct stream *s, const struct tensor *host)
{
	struct tensor t = *host;
	t.data = cuda_backend.alloc(s, (size_t)tensor_bytes(host));
	cuda_backend.upload(s, t.data, host->data, (size_t)tensor_bytes(host));
	return t;
}

void device_take(struct stream *s, struct tensor *t, const struct tensor *host)
{
	if (host)
		cuda_backend.download(s, host->data, t->data, (size_t)tensor_bytes(t));
	cuda_backend.free(s, t->data);
}

void device_run(struct stream *s, enum op op, const union op_arg *arg, const struct tensor *in,
                const struct tensor *out)
{
	struct err e = {0};
	if (cuda_backend.kernel[op](s, arg, in, out, &e))
		test_failed(__FILE__, __LINE__, "%s: %s", op_rows[op].name, e.text);
}
