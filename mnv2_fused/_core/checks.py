"""Checks of arguments that users pass. Every error names the function, the argument, the rule and what was got."""

from __future__ import annotations

from torch import Tensor, nn


def what(value: object) -> str:
    """A description of `value` for error messages."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {value.dtype} on {value.device}"
    return f"{value!r}" if isinstance(value, (int, float, str, bool, tuple, list)) else f"a {type(value).__name__}"


def check_tensor(function: str, name: str, value: object, shape: tuple[int | None, ...] | None) -> None:
    """Raises TypeError unless `value` is a floating-point tensor, ValueError unless it has `shape`.

    A size of None matches any size; a shape of None matches any shape.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{function}: {name} must be a torch.Tensor; got {what(value)}")
    if not value.is_floating_point():
        raise TypeError(f"{function}: {name} must be of a floating-point dtype; got {what(value)}")
    if shape is None:
        return
    if value.dim() != len(shape) or any(s not in (None, got) for s, got in zip(shape, value.shape, strict=True)):
        wanted = ", ".join("any" if s is None else str(s) for s in shape)
        raise ValueError(f"{function}: {name} must have the shape ({wanted}); got {what(value)}")


def check_module(function: str, model: object) -> None:
    """Raises TypeError unless `model` is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module; got a {type(model).__name__}")
