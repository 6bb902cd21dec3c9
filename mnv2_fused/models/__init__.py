"""MobileNetV2 and its modules."""
