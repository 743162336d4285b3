"""What can be chosen, and what is asked and told about it. Pure: no torch, no Ray, no Arrow."""
