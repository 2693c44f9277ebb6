"""The fused experts layer on GPUs, in Triton: see `layer` for the whole and `products` for parts."""
