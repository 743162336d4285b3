"""How a plan is measured: the model, its weights under a plan, its forward pass, its divergence from the reference."""
