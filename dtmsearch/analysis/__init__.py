"""What is read from a store: SQL, named queries, summaries."""
