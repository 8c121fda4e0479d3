"""Records: the environment and the results of a measurement."""
