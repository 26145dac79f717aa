"""Other methods for some modules of a model: compiled ones, or ones in C++."""

from collections.abc import Callable
from typing import Any

from torch import nn


def replace_methods(model: nn.Module, kind: type[nn.Module], **methods: Callable[..., Any]) -> None:
    """Make every module of `kind` in `model`, itself included, an instance of a subclass with these methods.

    (Set on a module itself, a bound method would refer back to it: a cycle, and memory that is not given back at once.)
    """
    subclasses: dict[type[nn.Module], type[nn.Module]] = {}
    for module in model.modules():
        if isinstance(module, kind):
            own = type(module)
            subclasses.setdefault(own, type(own.__name__, (own,), dict(methods)))
            module.__class__ = subclasses[own]
