"""The device on CUDA, and what makes it fast: graphs, kernels, compilation, and a plan of its memory."""
