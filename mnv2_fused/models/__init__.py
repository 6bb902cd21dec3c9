"""MobileNetV2 and the modules that it is made of."""
