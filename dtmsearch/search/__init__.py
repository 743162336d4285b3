"""How a plan is chosen. Pure: knows no device, no file, no Ray."""
