/* Body: what attention does to a block of scores, for one instruction set. Included by matmul_tile.c behind
 * matmul_isa.h, whose definitions it uses. */

typedef int32_t ISA(integers) __attribute__((vector_size(ISA_LANES * 4)));

/* 2^x for x up to 127, relative error below 3e-7; 0 below -126. x = n + f with f in [-1/2, 1/2], 2^f by its
 * series. */
ISA_INLINE void ISA(power)(ISA(vector) * value)
{
	const ISA(vector) x = *value, round = (ISA(vector)){0} + 0x1.8p23f;
	ISA(integers) keep = ~(x < -126.f); /* a NaN stays one */
	ISA(vector) whole = (ISA(vector))((ISA(integers))x & keep) + round;
	ISA(integers) exponent = ((ISA(integers))whole - (ISA(integers))round) << 23;
	ISA(vector) f = (ISA(vector))((ISA(integers))x & keep) - (whole - round);
	ISA(vector) p = f * 1.5403530e-4f + 1.3333558e-3f;
	p = p * f + 9.6181291e-3f;
	p = p * f + 5.5504109e-2f;
	p = p * f + 2.4022651e-1f;
	p = p * f + 6.9314718e-1f;
	p = p * f + 1.f;
	*value = (ISA(vector))(((ISA(integers))p + exponent) & keep);
}

/* Sum of the lanes, in a fixed order. */
ISA_INLINE float ISA(lane_sum)(const ISA(vector) * v)
{
	float sum[ISA_LANES];
	memcpy(sum, v, sizeof sum);
#pragma GCC unroll 4
	for (int half = ISA_LANES / 2; half; half /= 2)
		for (int i = 0; i < half; i++)
			sum[i] += sum[i + half];
	return sum[0];
}

ISA_INLINE float ISA(row_top)(int columns, const float *s, float top)
{
	ISA(vector) most = (ISA(vector)){0} + top;
	for (int j = 0; j < columns; j += ISA_LANES) {
		ISA(vector) x = *(const ISA(unaligned) *)(s + j);
		ISA(integers) larger = x > most;
		most = (ISA(vector))(((ISA(integers))x & larger) | ((ISA(integers))most & ~larger));
	}
	for (int i = 0; i < ISA_LANES; i++)
		top = most[i] > top ? most[i] : top;
	return top;
}

/* s <- 2^(s - top), sum of it. */
ISA_INLINE float ISA(row_power)(int columns, float *s, float top)
{
	ISA(vector) sum = {0};
	for (int j = 0; j < columns; j += ISA_LANES) {
		ISA(vector) x = *(const ISA(unaligned) *)(s + j) - top;
		ISA(power)(&x);
		*(ISA(unaligned) *)(s + j) = x;
		sum += x;
	}
	return ISA(lane_sum)(&sum);
}

static ISA_TARGET void ISA(softmax)(int rows, int columns, float *s, int64_t pitch, float *top, float *sum,
                                    float *shrink)
{
	for (int i = 0; i < rows; i++, s += pitch) {
		ISA(vector) older = {top[i]};
		top[i] = ISA(row_top)(columns, s, top[i]);
		older[0] -= top[i];
		ISA(power)(&older);
		shrink[i] = older[0];
		sum[i] = sum[i] * shrink[i] + ISA(row_power)(columns, s, top[i]);
	}
}

static ISA_TARGET void ISA(exponent)(int rows, int columns, float *s, int64_t pitch, const float *lse)
{
	for (int i = 0; i < rows; i++, s += pitch)
		ISA(row_power)(columns, s, lse[i]);
}

static ISA_TARGET void ISA(score_grad)(int rows, int columns, const float *p, float *ds, int64_t pitch,
                                       const float *delta)
{
	for (int i = 0; i < rows; i++, p += pitch, ds += pitch)
		for (int j = 0; j < columns; j += ISA_LANES) {
			ISA(unaligned) *d = (ISA(unaligned) *)(ds + j);
			*d = *(const ISA(unaligned) *)(p + j) * (*d - delta[i]);
		}
}

static ISA_TARGET float ISA(dot)(int64_t n, const float *a, const float *b)
{
	ISA(vector) sum = {0};
	int64_t i = 0;
	for (; i + ISA_LANES <= n; i += ISA_LANES)
		sum += *(const ISA(unaligned) *)(a + i) * *(const ISA(unaligned) *)(b + i);
	float rest = 0;
	for (; i < n; i++)
		rest += a[i] * b[i];
	return ISA(lane_sum)(&sum) + rest;
}

static ISA_TARGET void ISA(add_scaled)(int64_t n, float scale, const float *x, float *y)
{
	for (int64_t i = 0; i < n; i++)
		y[i] += scale * x[i];
}
