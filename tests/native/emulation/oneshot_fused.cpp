// Each kernel in a file of its own: their parts share names.
#include "kernels/lamport/oneshot_fused.cu"
