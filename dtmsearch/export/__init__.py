"""From a plan to files that others load: checkpoint folders and recipes.

Knows nothing of searches, stores or clusters.
"""
