"""The tables of the MobileNetV2 paper: what it prints, and the same counted and measured on this machine."""
