/* Blends datasets by weight: sample i of the blend is sample c_k(i) of dataset k, a pure function of
 * (weights, i) in O(log of the shares) time and O(n) memory, without index files or state.
 *
 * The datasets are the leaves of a Huffman tree over their weights. Of the first c samples of a node its
 * left child has round(c · w_left / w), halves up, and the right child the rest; this count grows by at
 * most one when c does, so that sample i walks down to exactly one leaf. With exact arithmetic a leaf's
 * count differs from its exact share by at most 1/2 · (1 + Σ w_leaf / w_a), a over its ancestors below
 * the root. In a Huffman tree w_a grows like the Fibonacci numbers, so this is below 1.68 for any
 * weights at any i (1/2 for two datasets, below 1 for equal ones; Megatron-LM's greedy choice passes 1.8).
 * Local. Floor: data. */
#ifndef PENTAD_DATA_BLEND_H
#define PENTAD_DATA_BLEND_H

#include <stdint.h>

struct err;
struct blend;

/* weights[n] > 0 and finite, in any scale; whole numbers with a sum up to 2^52 are taken exactly, others to
 * 2^-52 of the sum. *out is the caller's, set only on success. EXIT_CONFIG names the weight that is not
 * allowed. */
int blend_new(const double *weights, int n, struct blend **out, struct err *e);
void blend_free(struct blend *b); /* NULL is fine */

/* Sample i < 2^62 of the blend is sample *index of dataset *k. Within a dataset the indices are 0, 1, 2, …
 * as i grows. */
void blend_get(const struct blend *b, uint64_t i, int *k, uint64_t *index);
/* c_k(i): how many of the first i samples dataset k has, into counts[n]. Their sum is i. */
void blend_counts(const struct blend *b, uint64_t i, uint64_t *counts);
/* The share of dataset k, in (0, 1]. */
double blend_share(const struct blend *b, int k);

#endif
