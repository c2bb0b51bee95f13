// Each kernel in a file of its own: their parts share names.
#include "kernels/lamport/twoshot_fused.cu"
