"""Statistics of inputs, and matrices solved over them."""
