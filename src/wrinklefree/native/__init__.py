"""The C library of the CPU kernels: its sources, how it is built and found, weights in the order in which it reads them."""
