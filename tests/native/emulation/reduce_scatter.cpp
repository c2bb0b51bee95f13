#include "kernels/lamport/reduce_scatter.cu"
