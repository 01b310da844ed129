"""Traces of `torch.profiler`, of any engine: read, cut into steps, and their gaps explained."""
