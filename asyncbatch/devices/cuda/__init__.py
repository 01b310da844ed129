"""The device on CUDA, and what it is made fast with: graphs, kernels, compilation, and a plan of its memory."""
