"""Tensor -> tensor (rounding) and module -> module (bitsandbytes): what a scheme does to one component."""
