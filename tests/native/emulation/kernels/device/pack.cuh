// Before csrc/kernels/device/pack.cuh: what it takes from CUDA.
#pragma once

#include "native/emulation/cuda_fp16.h"

#include_next "kernels/device/pack.cuh"
