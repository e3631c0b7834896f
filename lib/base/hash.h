/* Checksums and fingerprints. Local. Floor: base. */
#ifndef PENTAD_BASE_HASH_H
#define PENTAD_BASE_HASH_H

#include <stddef.h>
#include <stdint.h>

/* CRC-32C (Castagnoli, RFC 3720 B.4), the hardware instruction where there is one. Start with 0;
 * pass the result on to continue. */
uint32_t hash_crc32c(uint32_t crc, const void *data, size_t bytes);
/* 64-bit fingerprint, not cryptographic, the same on every machine; chain through `seed`. */
uint64_t hash_bytes(const void *data, size_t bytes, uint64_t seed);

#endif
