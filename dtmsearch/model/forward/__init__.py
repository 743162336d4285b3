"""Forward passes that share what plans have in common, and the metrics of their outputs."""
