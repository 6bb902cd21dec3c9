"""The private core: what lies between a module and its operator."""
