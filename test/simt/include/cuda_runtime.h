/* What nvcc gives a .cu file before its first line, and the launch of a kernel. */
#ifndef SIMT_CUDA_RUNTIME_H
#define SIMT_CUDA_RUNTIME_H

#include "cuda_runtime_api.h"

#ifdef __cplusplus
#include "simt_device.h"
#include "simt_launch.h"
#endif

#endif
