/* Reductions in a fixed order: an accumulator is loaded from rank 0 and the others are folded in. */
#include "comm/link.h"

#define LOAD_SAME(x) (x)
#define LOAD_BF16(x) bf16_to_f32(x)
#define LOAD_F16(x) f16_to_f32(x)
#define STORE_SAME(x) (x)
#define STORE_BF16(x) bf16_from_f32(x)
#define STORE_F16(x) f16_from_f32(x)
#define SUM_FLOAT(acc, type, a, b) ((a) + (b))
/* Whole numbers wrap around. */
#define SUM_WHOLE(acc, type, a, b) ((acc)((type)(a) + (type)(b)))
/* A NaN wins, whoever brought it. */
#define MAX_OF(a, b) ((b) > (a) || (b) != (b) ? (b) : (a))
#define MIN_OF(a, b) ((b) < (a) || (b) != (b) ? (b) : (a))

/* name, type in memory, accumulator, its type for sums, conversions, sum */
#define REDUCERS(X)                                                          \
	X(f32, float, float, float, LOAD_SAME, STORE_SAME, SUM_FLOAT)        \
	X(bf16, uint16_t, float, float, LOAD_BF16, STORE_BF16, SUM_FLOAT)    \
	X(f16, uint16_t, float, float, LOAD_F16, STORE_F16, SUM_FLOAT)       \
	X(f64, double, double, double, LOAD_SAME, STORE_SAME, SUM_FLOAT)     \
	X(i32, int32_t, int32_t, uint32_t, LOAD_SAME, STORE_SAME, SUM_WHOLE) \
	X(i64, int64_t, int64_t, uint64_t, LOAD_SAME, STORE_SAME, SUM_WHOLE)

#define REDUCER_CODE(name, type, acc, sum_type, LOAD, STORE, SUM)                      \
	static void load_##name(void *restrict a_, const void *restrict x_, size_t n)  \
	{                                                                              \
		acc *a = a_;                                                           \
		const type *x = x_;                                                    \
		for (size_t i = 0; i < n; i++)                                         \
			a[i] = LOAD(x[i]);                                             \
	}                                                                              \
	static void sum_##name(void *restrict a_, const void *restrict x_, size_t n)   \
	{                                                                              \
		acc *a = a_;                                                           \
		const type *x = x_;                                                    \
		for (size_t i = 0; i < n; i++)                                         \
			a[i] = SUM(acc, sum_type, a[i], LOAD(x[i]));                   \
	}                                                                              \
	static void max_##name(void *restrict a_, const void *restrict x_, size_t n)   \
	{                                                                              \
		acc *a = a_;                                                           \
		const type *x = x_;                                                    \
		for (size_t i = 0; i < n; i++)                                         \
			a[i] = MAX_OF(a[i], LOAD(x[i]));                               \
	}                                                                              \
	static void min_##name(void *restrict a_, const void *restrict x_, size_t n)   \
	{                                                                              \
		acc *a = a_;                                                           \
		const type *x = x_;                                                    \
		for (size_t i = 0; i < n; i++)                                         \
			a[i] = MIN_OF(a[i], LOAD(x[i]));                               \
	}                                                                              \
	static void store_##name(void *restrict x_, const void *restrict a_, size_t n) \
	{                                                                              \
		type *x = x_;                                                          \
		const acc *a = a_;                                                     \
		for (size_t i = 0; i < n; i++)                                         \
			x[i] = STORE(a[i]);                                            \
	}
REDUCERS(REDUCER_CODE)

const struct reducer reducers[DT_COUNT] = {
#define REDUCER_ROW(name, type, acc, sum_type, LOAD, STORE, SUM) \
	[DT_##name] = {sizeof(acc), load_##name, {sum_##name, max_##name, min_##name}, store_##name},
        REDUCERS(REDUCER_ROW)
#undef REDUCER_ROW
};

const char *const reduction_name[REDUCE_COUNT] = {"sum", "max", "min"};
