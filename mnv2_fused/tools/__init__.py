"""Measuring: time, memory, rates, and the machine that they were measured on."""
