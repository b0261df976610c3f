"""Find the head and other layers of a model by name."""

import difflib

from torch import nn


def find_module(model: nn.Module, name: str) -> nn.Module:
    """Return the module of this name, as in `model.named_modules()`.

    Raises:
        ValueError: no such module; the message lists near matches and the linear layers.
    """
    modules = dict(model.named_modules())
    if name not in modules:
        near = difflib.get_close_matches(name, modules, n=5, cutoff=0.4)
        linear = [n for n, module in modules.items() if isinstance(module, nn.Linear)]
        raise ValueError(
            f"measure: the model has no module {name!r}; near matches: {', '.join(near) or 'none'}; "
            f"linear layers: {', '.join(linear) or 'none'}"
        )
    return modules[name]


def find_head(model: nn.Module, name: str) -> nn.Linear:
    """Return the classifier's last layer.

    Raises:
        ValueError: no module of this name.
        TypeError: the module is not linear.
    """
    head = find_module(model, name)
    if not isinstance(head, nn.Linear):
        raise TypeError(f"measure: the head must be an nn.Linear; {name!r} is a {type(head).__name__}")
    return head
