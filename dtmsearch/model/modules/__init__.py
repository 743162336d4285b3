"""The model as modules: loading it, finding its components, the matrices they hold."""
