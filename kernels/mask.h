/* Random masks of dropout and attention dropout, the same on every device. Floor: kernels.
 *
 * Element i of a sample with key k survives where word i % 4 of the philox block i / 4, drawn under
 * (key k, counter_lo = i / 4, counter_hi = salt), is at least mask_threshold(p). Survivors are multiplied by
 * mask_scale(p), in f32. dropout: i = position in the sample · C + column. attention: i = (head in the whole
 * model · T + query) · T + key. Jitter multiplies element i by mask_jitter of the same word. Local. */
#ifndef PENTAD_KERNELS_MASK_H
#define PENTAD_KERNELS_MASK_H

#include <stdbool.h>
#include <stdint.h>

#include "base/rng.h"
#include "op/op.h"

/* p · 2^32, at most 2^32 - 1. 0 <= p < 1. */
ANYWHERE uint32_t mask_threshold(float p)
{
	double t = (double)p * 0x1p32;
	return t < 0xffffffffu ? (uint32_t)t : 0xffffffffu;
}

ANYWHERE float mask_scale(float p)
{
	return 1 / (1 - p);
}

/* 1 - p + 2p·u, u = word / 2^32. In double and rounded once, so that it does not depend on who computes it.
 */
ANYWHERE float mask_jitter(float p, uint32_t word)
{
	return (float)(1 - (double)p + (double)p * word * 0x1p-31);
}

ANYWHERE uint32_t mask_word(uint64_t key, uint32_t salt, uint64_t i)
{
	uint32_t word[4];
	rng_philox(key, i / 4, salt, word);
	return word[i % 4];
}

ANYWHERE bool mask_survives(uint64_t key, uint32_t salt, uint64_t i, uint32_t threshold)
{
	return mask_word(key, salt, i) >= threshold;
}

/* Which sample row n of dropout's input belongs to, and where it stands there. */
struct mask_place {
	int64_t sample, position;
};

ANYWHERE struct mask_place mask_place_of(const union op_arg *arg, int64_t n)
{
	struct context rows = arg->dropout.rows;
	int32_t each = arg->dropout.seq_length / (rows.ranks > 1 ? rows.ranks : 1);
	int64_t row = arg->dropout.first_row + n;
	struct mask_place at = {row / each, context_position(arg->dropout.seq_length, rows.ranks, rows.first,
	                                                     (int32_t)(row % each))};
	return at;
}

#endif
