"""Turn a small Llama into a sub-domain expert on one consumer GPU, and know whether it worked."""

from lit_llama.config import LlamaConfig
from lit_llama.model import Llama

__all__ = ["Llama", "LlamaConfig"]
