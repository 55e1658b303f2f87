"""The host shim, which runs the CUDA kernels on the CPU, and the cases and the oracle of the kernels' tests."""
