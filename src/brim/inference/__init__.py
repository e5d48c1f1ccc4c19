"""What a finished model does: perplexity over a text, generated text."""

from brim.inference.generate import Generation, generate
from brim.inference.load import Loaded, load, locate, resident_bytes
from brim.inference.perplexity import Perplexity, perplexity
from brim.inference.text import held_text, read_text

__all__ = [
    "Generation",
    "Loaded",
    "Perplexity",
    "generate",
    "held_text",
    "load",
    "locate",
    "perplexity",
    "read_text",
    "resident_bytes",
]
