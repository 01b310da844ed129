"""Several GPUs, several machines: ranks started by `torchrun`, tensor parallel or as replicas."""
