"""Records: what a measurement was made on."""
