/* Value and slope of each row of ACTIVATIONS, in f32. Floor: kernels. */
#ifndef PENTAD_KERNELS_CUDA_ACTIVATION_CUH
#define PENTAD_KERNELS_CUDA_ACTIVATION_CUH

#include "kernels/cuda/device.cuh"

/* 1 / (1 + e^-x). The fast division gives 0 where e^-x is beyond 2^126, as it should. */
__device__ __forceinline__ float logistic(float x)
{
	return __fdividef(1.0f, 1.0f + __expf(-x));
}

/* The normal distribution. */
__device__ __forceinline__ float normal_below(float x)
{
	return 0.5f * erfcf(x * -0.707106781f);
}

/* With s the logistic function, gelu(x) is x s(2u), where u = sqrt(2/pi) (x + 0.044715 x³): nothing cancels
 * for negative x. */
struct activation_gelu {
	static __device__ __forceinline__ float share(float x)
	{
		return logistic(x * (1.59576912f + 0.0713548163f * x * x));
	}
	static __device__ __forceinline__ float value(float x)
	{
		return x * share(x);
	}
	static __device__ __forceinline__ float slope(float x)
	{
		float c = x < -30  ? -30
		          : x > 30 ? 30
		                   : x; /* beyond, it is 0 or 1; x³ must not meet infinity */
		float s = share(c);
		return s + c * s * (1 - s) * (1.59576912f + 0.214064449f * c * c);
	}
};

struct activation_gelu_exact {
	static __device__ __forceinline__ float value(float x)
	{
		return x * normal_below(x);
	}
	static __device__ __forceinline__ float slope(float x)
	{
		return normal_below(x) + x * 0.398942280f * __expf(-0.5f * x * x);
	}
};

struct activation_relu {
	static __device__ __forceinline__ float value(float x)
	{
		return x < 0 ? 0 : x;
	}
	static __device__ __forceinline__ float slope(float x)
	{
		return x > 0 ? 1 : 0;
	}
};

struct activation_squared_relu {
	static __device__ __forceinline__ float value(float x)
	{
		return x < 0 ? 0 : x * x;
	}
	static __device__ __forceinline__ float slope(float x)
	{
		return x < 0 ? 0 : 2 * x;
	}
};

struct activation_silu {
	static __device__ __forceinline__ float value(float x)
	{
		return x * logistic(x);
	}
	static __device__ __forceinline__ float slope(float x)
	{
		float s = logistic(x);
		return s + x * s * (1 - s);
	}
};

/* The row of a table of instances, one for each activation: Run<T, activation>::run. */
template <template <class, class> class Run, class T, class F> static inline F *by_activation(int32_t kind)
{
	static F *const rows[ACT_COUNT] = {
#define ACTIVATION_ROW(name, doc) Run<T, activation_##name>::run,
	        ACTIVATIONS(ACTIVATION_ROW)
#undef ACTIVATION_ROW
	};
	return rows[kind];
}

#endif
