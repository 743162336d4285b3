"""A stand-in for an engine: a process that passes questions on to a server of the test's, by Python alone."""
