"""Tensor -> tensor (rounding, pruning) and module -> module (bitsandbytes): what a scheme does to one component."""
