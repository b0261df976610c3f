"""A model as it is, for R runs: one by one, or all at once under `torch.func.vmap`."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ncollapse.samples import pooled
from ncollapse.train.networks.model_parts import Parts
from ncollapse.train.networks.precision import rounds_products, same_attention
from ncollapse.train.networks.stacked_layers import ForwardContext, channels_last, head


class WholeModule:
    """The forward pass of any model for R runs; the logits are computed of the features that reach its head.

    Args:
        sample_dims: number of dimensions of one sample.
        vmapped: several runs are computed at once, else one after the other.
        ours: the module comes with ncollapse: it takes maps in channels-last memory, and bfloat16 copies of the weights
            of its hidden layers. One of the user's may view maps as vectors, which such memory does not allow.
    """

    def __init__(self, module: nn.Module, parts: Parts, sample_dims: int, *, vmapped: bool, ours: bool = False) -> None:
        self.module, self.parts, self.channels_last = module, parts, ours
        self.sample_dims, self._vmapped = sample_dims, vmapped
        self._head = module.get_submodule(parts.head)
        self._slots = _slots(module)
        self._put: Mapping[str, Tensor] = {}  # the tensors that are in the module's places for good
        self._memory: Mapping[str, Tensor] = {}  # theirs
        self._blocks = {name: module.get_submodule(name) for name in parts.blocks}

    def __call__(self, samples: Tensor, context: ForwardContext) -> tuple[Tensor, Tensor]:
        """Compute features `[R, B, d]` and logits `[R, B, K]` of samples `[B, …]` for all runs or `[R, B, …]`."""
        shared = samples.dim() == self.sample_dims + 1
        if self.channels_last:
            samples = channels_last(samples) if shared else channels_last(samples.flatten(0, 1)).view_as(samples)
        names: Mapping[str, nn.Module] = {} if context.outputs is None else self._blocks
        run = partial(self._one, names)
        if self.module.training != context.train:
            self.module.train(context.train)
        with _settings(samples.device.type, context.half):
            if context.runs == 1:
                # Unlike indexing, this has a backward pass that copies nothing.
                tensors = {name: value.squeeze(0) for name, value in context.tensors.items()}
                features, *outputs = (out.unsqueeze(0) for out in run(tensors, samples if shared else samples[0]))
            elif self._vmapped:
                # Models that draw random numbers are not run this way.
                vmapped = torch.func.vmap(run, in_dims=(0, None if shared else 0), randomness="different")
                features, *outputs = vmapped(dict(context.tensors), samples)
            else:
                rows = [{name: value[r] for name, value in context.tensors.items()} for r in range(context.runs)]
                of_runs = [run(row, samples if shared else samples[r]) for r, row in enumerate(rows)]
                features, *outputs = map(torch.stack, zip(*of_runs, strict=True))
        if context.outputs is not None:
            context.outputs.update(zip(names, outputs, strict=True))
        weight, bias = self.parts.weight, self.parts.bias
        return features, head(features, context.tensors[weight], context.tensors[bias] if bias else None)

    def of_one(self, samples: Tensor, tensors: Mapping[str, Tensor], *, train: bool) -> tuple[Tensor, Tensor]:
        """Compute features `[B, d]` and logits `[B, K]` of one run as the module itself does.

        Args:
            samples: `[B, …]`.
            tensors: name -> parameter or buffer, without a dimension of runs. They stay in the module's places: a step
                of a small network would take a third longer otherwise. Attention must have the form that
                `precision.arithmetic` gives it.
        """
        if self._put is not tensors:
            for name, slots, key in self._slots:
                slots[key] = tensors[name]
            self._put, self._memory = tensors, _memory(tensors)
        if self.module.training != train:
            self.module.train(train)
        seen: dict[str, Tensor] = {}
        handle = self._head.register_forward_hook(partial(_record_call, seen), with_kwargs=True)
        try:
            # In training a batch is gathered anew; in an evaluation it is the data set's memory.
            self.module(samples if train else samples.clone())
        except BaseException:
            self._put = {}  # what it has assigned is no value of the run's
            for name, memory in self._memory.items():
                tensors[name].data = memory
            raise
        finally:
            handle.remove()
        self._keep_assigned(tensors, self._memory)
        if "features" not in seen:
            raise ValueError(f"the head {self.parts.head} did not run")
        features, logits = seen["features"], seen["logits"]
        if rounds_products(features.device):
            weight, bias = self.parts.weight, self.parts.bias
            of_head = head(
                features.unsqueeze(0), tensors[weight].unsqueeze(0), tensors[bias].unsqueeze(0) if bias else None
            )
            logits = of_head.squeeze(0)
        return features, logits

    def _keep_assigned(self, tensors: Mapping[str, Tensor], memory: Mapping[str, Tensor]) -> None:
        """Write what the module has assigned anew, a buffer or the `data` of a tensor, to where it is kept."""
        for name, slots, key in self._slots:
            kept = tensors[name]
            if (assigned := slots[key]) is not kept:
                kept.copy_(assigned.detach())
                slots[key] = kept
            if memory and kept.data_ptr() != memory[name].data_ptr():
                memory[name].copy_(kept.data)
                kept.data = memory[name]

    @contextmanager
    def _holding(self, tensors: Mapping[str, Tensor], memory: Mapping[str, Tensor]) -> Iterator[None]:
        """Put tensors into the module's places, as `torch.func.functional_call` does, which takes longer."""
        before = [slots[key] for _, slots, key in self._slots]
        try:
            for name, slots, key in self._slots:
                slots[key] = tensors[name]
            yield
            self._keep_assigned(tensors, memory)
        finally:
            for (_, slots, key), own in zip(self._slots, before, strict=True):
                slots[key] = own

    def copied(self, name: str, value: Tensor) -> bool:
        """Return whether a parameter `[R, …]` may be replaced by a bfloat16 copy in the forward pass."""
        return self.channels_last and value.dim() > 2 and name != self.parts.weight and name.endswith("weight")

    def _one(self, blocks: Mapping[str, nn.Module], tensors: dict[str, Tensor], samples: Tensor) -> tuple[Tensor, ...]:
        """Return the features `[B, d]` of one run, and the pooled outputs of the blocks."""
        seen: dict[str, Tensor] = {}
        with ExitStack() as stack:
            record = partial(_record_input, seen)
            stack.callback(self._head.register_forward_pre_hook(record, with_kwargs=True).remove)
            for name, block in blocks.items():
                stack.callback(block.register_forward_hook(partial(_record_output, seen, f"block {name}")).remove)
            # vmap has no memory of a single run's, and refuses an assignment to it.
            stack.enter_context(self._holding(tensors, {} if self._vmapped else _memory(tensors)))
            # A model may work in place on its input, which is the data set's, or of the next run too.
            self.module(samples if self.channels_last else samples.clone())
        if "features" not in seen:
            raise ValueError(f"the head {self.parts.head} did not run")
        return seen["features"], *(seen[f"block {name}"] for name in blocks)


def _slots(module: nn.Module) -> list[tuple[str, dict[str, Any], str]]:
    """Return the places of a module's tensors: name, dictionary and key; those that are shared have several."""
    tensors = (*module.named_parameters(), *module.named_buffers())
    names = {id(tensor): name for name, tensor in tensors}
    return [
        (names[id(tensor)], slots, key)
        for part in module.modules()
        for slots in (part._parameters, part._buffers)
        for key, tensor in slots.items()
        if tensor is not None
    ]


def _memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors in the same memory, which stay there when others are assigned to `data`."""
    return {name: tensor.data for name, tensor in tensors.items()}


def _record_input(seen: dict[str, Tensor], _: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
    seen["features"] = args[0] if args else next(iter(kwargs.values()))


def _record_call(
    seen: dict[str, Tensor], _: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor
) -> None:
    seen["features"], seen["logits"] = args[0] if args else next(iter(kwargs.values())), output


def _record_output(seen: dict[str, Tensor], name: str, _: nn.Module, __: Any, output: Tensor) -> None:
    value = pooled(output, "mean")
    # The next layer may work in place, as many a ReLU does.
    seen[name] = value.clone() if value is output else value


@contextmanager
def _settings(device: str, half: bool) -> Iterator[None]:
    """Compute the same numbers every time, in bfloat16 where `half`."""
    with (
        same_attention(),
        torch.autocast(device, torch.bfloat16, cache_enabled=False) if half else nullcontext(),
    ):
        yield
