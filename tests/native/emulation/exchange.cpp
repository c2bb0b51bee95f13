#include "kernels/channel/exchange.cu"
