"""One module a use case, composed of the packages below."""
