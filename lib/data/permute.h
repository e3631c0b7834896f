/* A keyed permutation of [0, n) that needs no memory: element i in constant time, both ways.
 *
 * A generalised Feistel network over pairs (l, r), l < a, r < b, a·b >= n, whose round function is Philox,
 * with cycle walking for values of n and above: J. Black and P. Rogaway, "Ciphers with Arbitrary Finite
 * Domains", CT-RSA 2002. The same on every machine. Local. Floor: data. */
#ifndef PENTAD_DATA_PERMUTE_H
#define PENTAD_DATA_PERMUTE_H

#include <stdint.h>

#define PERMUTE_MAX ((uint64_t)1 << 62)

/* Where i goes; i < n <= PERMUTE_MAX. */
uint64_t permute_index(uint64_t key, uint64_t n, uint64_t i);
/* What goes to i: permute_inverse(key, n, permute_index(key, n, i)) == i. */
uint64_t permute_inverse(uint64_t key, uint64_t n, uint64_t i);

#endif
