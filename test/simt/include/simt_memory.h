/* Loads and stores with cache hints, and the atomic operations. */
#ifndef SIMT_MEMORY_H
#define SIMT_MEMORY_H

#define SIMT_LOAD(name)                                    \
	template <typename T> inline T name(const T *from) \
	{                                                  \
		return *from;                              \
	}
#define SIMT_STORE(name)                                             \
	template <typename T> inline void name(T *to, const T value) \
	{                                                            \
		*to = value;                                         \
	}
SIMT_LOAD(__ldg)
SIMT_LOAD(__ldca)
SIMT_LOAD(__ldcg)
SIMT_LOAD(__ldcs)
SIMT_LOAD(__ldcv)
SIMT_LOAD(__ldlu)
SIMT_STORE(__stcg)
SIMT_STORE(__stcs)
SIMT_STORE(__stwb)
SIMT_STORE(__stwt)
#undef SIMT_LOAD
#undef SIMT_STORE

/* Threads run one at a time and change places only at barriers, so plain updates are atomic. */
#define SIMT_ATOMIC(T, name, updated)                \
	static inline T atomic##name(T *at, T value) \
	{                                            \
		T old = *at;                         \
		*at = updated;                       \
		return old;                          \
	}
#define SIMT_ATOMICS(T)                                      \
	SIMT_ATOMIC(T, Max, value > old ? value : old)       \
	SIMT_ATOMIC(T, Min, value < old ? value : old)       \
	SIMT_ATOMIC(T, And, old &value)                      \
	SIMT_ATOMIC(T, Or, old | value)                      \
	SIMT_ATOMIC(T, Xor, old ^ value)                     \
	SIMT_ATOMIC(T, Exch, value)                          \
	static inline T atomicCAS(T *at, T compare, T value) \
	{                                                    \
		T old = *at;                                 \
		if (old == compare)                          \
			*at = value;                         \
		return old;                                  \
	}
SIMT_ATOMICS(int)
SIMT_ATOMICS(unsigned)
SIMT_ATOMICS(unsigned long long)
SIMT_ATOMIC(int, Add, (int)((unsigned)old + (unsigned)value))
SIMT_ATOMIC(unsigned, Add, old + value)
SIMT_ATOMIC(unsigned long long, Add, old + value)
SIMT_ATOMIC(float, Add, old + value)
SIMT_ATOMIC(double, Add, old + value)
SIMT_ATOMIC(float, Exch, value)
SIMT_ATOMIC(int, Sub, (int)((unsigned)old - (unsigned)value))
SIMT_ATOMIC(unsigned, Sub, old - value)
SIMT_ATOMIC(unsigned, Inc, old >= value ? 0 : old + 1)
SIMT_ATOMIC(unsigned, Dec, old == 0 || old > value ? value : old - 1)
#undef SIMT_ATOMICS
#undef SIMT_ATOMIC

static inline unsigned short atomicCAS(unsigned short *at, unsigned short compare, unsigned short value)
{
	unsigned short old = *at;
	if (old == compare)
		*at = value;
	return old;
}

static inline float2 atomicAdd(float2 *at, float2 value)
{
	return {atomicAdd(&at->x, value.x), atomicAdd(&at->y, value.y)};
}

static inline float4 atomicAdd(float4 *at, float4 value)
{
	return {atomicAdd(&at->x, value.x), atomicAdd(&at->y, value.y), atomicAdd(&at->z, value.z),
	        atomicAdd(&at->w, value.w)};
}

#endif
