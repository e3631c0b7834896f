/* The small vectors of CUDA, with the alignment that lets the chip load one in a single access: code
 * that casts a badly aligned pointer to float4 should fail here as it fails there. */
#ifndef SIMT_VECTOR_TYPES_H
#define SIMT_VECTOR_TYPES_H

#define SIMT_VECTOR2(T, name, bytes)                     \
	typedef struct __attribute__((aligned(bytes))) { \
		T x, y;                                  \
	} name
#define SIMT_VECTOR4(T, name, bytes)                     \
	typedef struct __attribute__((aligned(bytes))) { \
		T x, y, z, w;                            \
	} name

SIMT_VECTOR2(signed char, char2, 2);
SIMT_VECTOR4(signed char, char4, 4);
SIMT_VECTOR2(unsigned char, uchar2, 2);
SIMT_VECTOR4(unsigned char, uchar4, 4);
SIMT_VECTOR2(short, short2, 4);
SIMT_VECTOR4(short, short4, 8);
SIMT_VECTOR2(unsigned short, ushort2, 4);
SIMT_VECTOR4(unsigned short, ushort4, 8);
SIMT_VECTOR2(int, int2, 8);
SIMT_VECTOR4(int, int4, 16);
SIMT_VECTOR2(unsigned, uint2, 8);
SIMT_VECTOR4(unsigned, uint4, 16);
SIMT_VECTOR2(float, float2, 8);
SIMT_VECTOR4(float, float4, 16);
SIMT_VECTOR2(long long, longlong2, 16);
SIMT_VECTOR2(unsigned long long, ulonglong2, 16);
SIMT_VECTOR2(double, double2, 16);
#undef SIMT_VECTOR2
#undef SIMT_VECTOR4

typedef struct {
	int x, y, z;
} int3;
typedef struct {
	unsigned x, y, z;
} uint3;
typedef struct {
	float x, y, z;
} float3;

#ifdef __cplusplus
struct dim3 {
	unsigned x, y, z;
	constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c)
	{
	}
	constexpr dim3(uint3 a) : x(a.x), y(a.y), z(a.z)
	{
	}
};

#define SIMT_MAKE2(T, name)                                \
	static inline constexpr name make_##name(T x, T y) \
	{                                                  \
		return name{x, y};                         \
	}
#define SIMT_MAKE3(T, name)                                     \
	static inline constexpr name make_##name(T x, T y, T z) \
	{                                                       \
		return name{x, y, z};                           \
	}
#define SIMT_MAKE4(T, name)                                          \
	static inline constexpr name make_##name(T x, T y, T z, T w) \
	{                                                            \
		return name{x, y, z, w};                             \
	}
SIMT_MAKE2(signed char, char2)
SIMT_MAKE4(signed char, char4)
SIMT_MAKE2(unsigned char, uchar2)
SIMT_MAKE4(unsigned char, uchar4)
SIMT_MAKE2(short, short2)
SIMT_MAKE4(short, short4)
SIMT_MAKE2(unsigned short, ushort2)
SIMT_MAKE4(unsigned short, ushort4)
SIMT_MAKE2(int, int2)
SIMT_MAKE3(int, int3)
SIMT_MAKE4(int, int4)
SIMT_MAKE2(unsigned, uint2)
SIMT_MAKE3(unsigned, uint3)
SIMT_MAKE4(unsigned, uint4)
SIMT_MAKE2(float, float2)
SIMT_MAKE3(float, float3)
SIMT_MAKE4(float, float4)
SIMT_MAKE2(long long, longlong2)
SIMT_MAKE2(unsigned long long, ulonglong2)
SIMT_MAKE2(double, double2)
#undef SIMT_MAKE2
#undef SIMT_MAKE3
#undef SIMT_MAKE4
#else
typedef struct dim3 {
	unsigned x, y, z;
} dim3;
#endif

#endif
