"""One file a format, registered by name."""
