"""Studies: questions about metrics and models, each answered by searches that only measure. One module a study."""
