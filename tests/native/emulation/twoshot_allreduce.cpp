#include "kernels/lamport/twoshot_allreduce.cu"
