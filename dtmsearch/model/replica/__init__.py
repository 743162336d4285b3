"""A replica: the model, resident, evaluating plans."""
