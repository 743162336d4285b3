"""Durable tables of runs, evaluations and plans, and the questions put to them."""
