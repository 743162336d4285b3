"""Numbers only: exact solvers, damage models, posteriors."""
