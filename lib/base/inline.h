/* Small functions of headers that device code calls too. Floor: base. */
#ifndef PENTAD_BASE_INLINE_H
#define PENTAD_BASE_INLINE_H

#ifdef __CUDACC__
#define ANYWHERE static inline __host__ __device__
#else
#define ANYWHERE static inline
#endif

#endif
