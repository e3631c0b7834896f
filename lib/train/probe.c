#include "train/probe.h"
#include "base/clock.h"
#include "base/err.h"
#include "base/rng.h"

#include <stdlib.h>

/* No power of two: rows 4 KiB apart fall onto the same cache sets, which costs a fifth. */
enum { ROWS = 1024, WIDTH = 768, MIN_TRIES = 5, MOST_TIMES = 16 };
static const double SHORT_S = 5e-4;
static const double LEAST_S = 0.15; /* the first products of a process find cold caches and sleepy cores */

static struct tensor make_operand(const struct backend *b, struct stream *s, int32_t rows, int32_t width,
                                  enum dtype dtype, bool fill)
{
	size_t n = (size_t)rows * (size_t)width, bytes = n * dtype_rows[dtype].bytes;
	struct tensor t = {
	        .data = b->alloc(s, bytes), .dim = {rows, width, 1, 1}, .nd = 2, .dtype = (uint8_t)dtype};
	float *x = malloc(n * sizeof *x);
	if (!fill || !x)
		goto done;
	rng_normal(rng_key(0, "probe"), 0, n, 0, 1, x); /* zeros would run faster than data */
	for (size_t i = 0; dtype_is_half(dtype) && i < n; i++)
		((uint16_t *)x)[i] = half_from_f32(dtype, x[i]);
	b->upload(s, t.data, x, bytes);
done:
	free(x);
	return t;
}

/* The best of some products of [rows, width] and [width, width], flop/s; *spent_s: of that one. */
static double best_rate(const struct backend *backend, struct stream *stream, enum dtype dtype, int32_t rows,
                        int32_t width, double *spent_s)
{
	struct tensor in[OP_MAX_IN] = {make_operand(backend, stream, rows, width, dtype, true),
	                               make_operand(backend, stream, width, width, dtype, true)};
	struct tensor out[OP_MAX_OUT] = {make_operand(backend, stream, rows, width, dtype, false)};
	union op_arg arg = {0};
	struct err e = {0};
	double best = 0, start = clock_now_s();
	for (int i = 0; i < MIN_TRIES || clock_now_s() - start < LEAST_S; i++) {
		double begin = clock_now_s();
		if (backend->kernel[OP_linear](stream, &arg, in, out, &e))
			break;
		backend->wait(stream);
		*spent_s = clock_now_s() - begin;
		double rate = 2.0 * rows * width * width / *spent_s;
		best = rate > best ? rate : best;
	}
	backend->free(stream, in[0].data);
	backend->free(stream, in[1].data);
	backend->free(stream, out[0].data);
	return best;
}

/* A device is fast where it has much to do: sizes double until a product takes long enough to be timed. */
double probe_matmul_peak(const struct backend *backend, struct stream *stream, enum dtype dtype)
{
	double spent_s = 0, best = best_rate(backend, stream, dtype, ROWS, WIDTH, &spent_s);
	for (int32_t times = 2; times <= MOST_TIMES && spent_s < SHORT_S && spent_s > 0; times *= 2) {
		double rate = best_rate(backend, stream, dtype, times * ROWS, times * WIDTH, &spent_s);
		best = rate > best ? rate : best;
	}
	return best;
}
