"""What others see of a run: a file for their viewer, a bar on their screen. It knows nothing of the package."""
