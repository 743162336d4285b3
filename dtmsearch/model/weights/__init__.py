"""Weights of components: compressed ones in place, trained ones."""
