"""Models to serve: how they are loaded, and which of them can be served."""

from .load import ModelError, check_model, load_model

__all__ = ["ModelError", "check_model", "load_model"]
