#include "train/probe.h"
#include "base/clock.h"
#include "base/err.h"
#include "base/rng.h"

#include <stdlib.h>

/* No power of two: rows 4 KiB apart fall onto the same cache sets, which costs a fifth. */
enum { ROWS = 1024, WIDTH = 768, MIN_TRIES = 5 };
static const double LEAST_S = 0.15; /* the first products of a process find cold caches and sleepy cores */

static struct tensor make_operand(const struct backend *b, struct stream *s, int32_t rows, bool bf16,
                                  bool fill)
{
	size_t n = (size_t)rows * WIDTH, bytes = n * (bf16 ? 2 : 4);
	struct tensor t = {.data = b->alloc(s, bytes),
	                   .dim = {rows, WIDTH, 1, 1},
	                   .nd = 2,
	                   .dtype = bf16 ? DT_bf16 : DT_f32};
	float *x = malloc(n * sizeof *x);
	if (!fill || !x)
		goto done;
	rng_normal(rng_key(0, "probe"), 0, n, 0, 1, x); /* zeros would run faster than data */
	for (size_t i = 0; bf16 && i < n; i++)
		((uint16_t *)x)[i] = bf16_from_f32(x[i]);
	b->upload(s, t.data, x, bytes);
done:
	free(x);
	return t;
}

double probe_matmul_peak(const struct backend *backend, struct stream *stream, bool bf16)
{
	struct tensor in[OP_MAX_IN] = {make_operand(backend, stream, ROWS, bf16, true),
	                               make_operand(backend, stream, WIDTH, bf16, true)};
	struct tensor out[OP_MAX_OUT] = {make_operand(backend, stream, ROWS, bf16, false)};
	union op_arg arg = {0};
	struct err e = {0};
	double best = 0, start = clock_now_s();
	for (int i = 0; i < MIN_TRIES || clock_now_s() - start < LEAST_S; i++) {
		double begin = clock_now_s();
		if (backend->kernel[OP_linear](stream, &arg, in, out, &e))
			break;
		backend->wait(stream);
		double rate = 2.0 * ROWS * WIDTH * WIDTH / (clock_now_s() - begin);
		best = rate > best ? rate : best;
	}
	backend->free(stream, in[0].data);
	backend->free(stream, in[1].data);
	backend->free(stream, out[0].data);
	return best;
}
