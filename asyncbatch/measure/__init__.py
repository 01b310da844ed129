"""Measuring: latency points, what-if, the bandwidth floor, and recordings of real GPUs."""
