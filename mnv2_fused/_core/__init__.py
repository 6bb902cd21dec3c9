"""The private core: the road from a module to its operator."""
