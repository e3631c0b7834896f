/* Matrix fragments of a warp. Lane l holds elements l·size/32 … of the tile in row-major order; where the
 * chip keeps them is unspecified too, so code can only treat them all alike. */
#ifndef SIMT_MMA_H
#define SIMT_MMA_H

#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace nvcuda
{
namespace wmma
{
struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
enum layout_t { mem_row_major, mem_col_major };

template <typename Use, int M, int N, int K> struct simt_tile;
template <int M, int N, int K> struct simt_tile<matrix_a, M, N, K> {
	static constexpr int rows = M, columns = K;
};
template <int M, int N, int K> struct simt_tile<matrix_b, M, N, K> {
	static constexpr int rows = K, columns = N;
};
template <int M, int N, int K> struct simt_tile<accumulator, M, N, K> {
	static constexpr int rows = M, columns = N;
};

template <typename Use, int M, int N, int K, typename T, typename Layout = void> struct fragment {
	using Tile = simt_tile<Use, M, N, K>;
	static constexpr int num_elements = Tile::rows * Tile::columns / 32;
	T x[num_elements];
};

template <typename T> inline void simt_check_matrix(const T *at, unsigned stride)
{
	if ((uintptr_t)at % 32)
		simt_kernel_fault("a matrix fragment lies at an address that is no multiple of 32");
	if (stride * sizeof(T) % 16)
		simt_kernel_fault("the rows of a matrix fragment are no multiple of 16 bytes apart");
}

/* The place in memory of element i of this lane. */
template <typename Fragment> inline size_t simt_offset(int i, unsigned stride, bool by_rows)
{
	unsigned element = (unsigned)(simt_lane() * Fragment::num_elements + i);
	unsigned row = element / Fragment::Tile::columns, column = element % Fragment::Tile::columns;
	return by_rows ? (size_t)row * stride + column : (size_t)column * stride + row;
}

template <typename Use, int M, int N, int K, typename T, typename Layout, typename V>
inline void fill_fragment(fragment<Use, M, N, K, T, Layout> &f, const V &value)
{
	for (T &x : f.x)
		x = (T)value;
}

/* All lanes must come, but what they wrote before they came is not promised to the others: a lane loads
 * before it waits and stores after it, so that a missing __syncwarp shows. */
static inline void simt_meet(simt_place place)
{
	int nothing = 0, also;
	simt_warp_exchange(place, 0xffffffffu, simt_lane(), &nothing, sizeof nothing, &also);
}

template <typename Fragment, typename T>
inline void simt_load(Fragment &f, const T *from, unsigned stride, bool by_rows, simt_place place)
{
	simt_check_matrix(from, stride);
	for (int i = 0; i < Fragment::num_elements; i++)
		f.x[i] = from[simt_offset<Fragment>(i, stride, by_rows)];
	simt_meet(place);
}

template <typename Use, int M, int N, int K, typename T, typename Layout>
inline void load_matrix_sync(fragment<Use, M, N, K, T, Layout> &f, const T *from, unsigned stride, SIMT_AT)
{
	simt_load(f, from, stride, std::is_same_v<Layout, row_major>, {"load_matrix_sync", file, line});
}

template <int M, int N, int K, typename T>
inline void load_matrix_sync(fragment<accumulator, M, N, K, T> &f, const T *from, unsigned stride,
                             layout_t layout, SIMT_AT)
{
	simt_load(f, from, stride, layout == mem_row_major, {"load_matrix_sync", file, line});
}

template <int M, int N, int K, typename T>
inline void store_matrix_sync(T *to, const fragment<accumulator, M, N, K, T> &f, unsigned stride,
                              layout_t layout, SIMT_AT)
{
	using Fragment = fragment<accumulator, M, N, K, T>;
	simt_check_matrix(to, stride);
	simt_meet({"store_matrix_sync", file, line});
	for (int i = 0; i < Fragment::num_elements; i++)
		to[simt_offset<Fragment>(i, stride, layout == mem_row_major)] = f.x[i];
}

template <int M, int N, int K, typename T, typename LayoutA, typename LayoutB, typename D, typename C>
inline void mma_sync(fragment<accumulator, M, N, K, D> &d, const fragment<matrix_a, M, N, K, T, LayoutA> &a,
                     const fragment<matrix_b, M, N, K, T, LayoutB> &b,
                     const fragment<accumulator, M, N, K, C> &c, SIMT_AT)
{
	simt_place place = {"mma_sync", file, line};
	struct alignas(16) Operands {
		const T *a, *b;
	} mine = {a.x, b.x}, all[32];
	simt_warp_exchange(place, 0xffffffffu, -1, &mine, sizeof mine, all);
	for (int i = 0; i < d.num_elements; i++) {
		int element = simt_lane() * d.num_elements + i, row = element / N, column = element % N;
		D sum = (D)c.x[i];
		for (int k = 0; k < K; k++) {
			int at_a = row * K + k, at_b = k * N + column;
			sum += (D)(float)all[at_a / a.num_elements].a[at_a % a.num_elements] *
			       (D)(float)all[at_b / b.num_elements].b[at_b % b.num_elements];
		}
		d.x[i] = sum;
	}
	simt_warp_exchange(place, 0xffffffffu, -1, &mine, sizeof mine, all);
}
} // namespace wmma
} // namespace nvcuda

#endif
