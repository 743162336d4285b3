"""Search for what a language model can spare, judged by where its text first diverges."""

__version__ = "0.1.0"
