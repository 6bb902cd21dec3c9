"""Training through fused units."""
