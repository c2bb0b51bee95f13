#include "kernels/lamport/oneshot_allreduce.cu"
