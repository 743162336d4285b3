"""Training under masks: what was pruned stays exactly zero while the rest of a model learns to do without it.

A training is a function of its start, its text and its recipe: the order of the data follows from the seed and the
step alone, and a checkpoint holds all else, so one that is killed goes on as if it had not been. Knows folders and
tensors, nothing of plans, rounds or the store. accelerate decides on devices and processes.
"""
