"""Models that come quantized: what their files hold, and the same model unquantized."""
