#pragma once

#include "native/emulation/cuda_fp16.h"
