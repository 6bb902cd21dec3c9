"""Runs one inverted-residual block from its weights alone, without modules."""

import torch

from mnv2_fused import functional, reference

torch.manual_seed(0)
c_in, c_hidden, c_out = 24, 144, 24


def folded(*shape):
    """A random convolution weight and bias, with a random batch norm folded in."""
    weight = torch.randn(shape) / (shape[1] * shape[2] * shape[3]) ** 0.5
    gamma, beta, mean = torch.randn(3, shape[0])
    variance = torch.rand(shape[0]) + 0.5
    return functional.fold_bn(weight, None, gamma, beta, mean, variance)


weights = (*folded(c_hidden, c_in, 1, 1), *folded(c_hidden, 1, 3, 3), *folded(c_out, c_hidden, 1, 1))
x = torch.randn(1, c_in, 56, 56).to(memory_format=torch.channels_last)

packed = functional.pack_block(*weights)  # once, in the order in which the kernels read them
y = functional.run_block(x, packed, residual=True)

expected = reference.inverted_residual(x, *weights, padding=(1, 1, 1, 1), residual=True)
print(f"input {tuple(x.shape)}, hidden channels {c_hidden}, output {tuple(y.shape)}")
print(f"packed weights: {packed.data.numel() * packed.data.element_size() / 1e3:.0f} kB")
print(f"largest difference from plain PyTorch: {(y - expected).abs().max():.1e} of {expected.abs().max():.1f}")
