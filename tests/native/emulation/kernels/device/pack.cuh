// In place of csrc/kernels/device/pack.cuh, for kernels that only move.
#pragma once

#include "native/emulation/cuda.h"
#include "protocol/workspace.h"
