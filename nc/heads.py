"""Find the head and other layers of a model by name."""

import difflib

from torch import nn


def find_module(model: nn.Module, name: str) -> nn.Module:
    """Return the module of this name; if there is none, raise ValueError with near matches and the linear layers."""
    modules = dict(model.named_modules())
    if name not in modules:
        near = difflib.get_close_matches(name, modules, n=5, cutoff=0.4)
        linear = [n for n, module in modules.items() if isinstance(module, nn.Linear)]
        raise ValueError(
            f"measure: the model has no module {name!r}; near matches: {', '.join(near) or 'none'}; "
            f"linear layers: {', '.join(linear) or 'none'}"
        )
    return modules[name]
