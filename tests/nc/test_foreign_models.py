"""A contract over foreign code: torchvision, timm and transformers models, against a plain float64 reference.

What a model's head multiplies is read here by a hook on the layer that is named below, apart from `measure`. timm and
transformers are skipped where they are not installed.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn

from ncollapse import NCResult, measure
from plain_metrics import plain_metrics

N, K = 24, 3
LABELS = torch.arange(N) % K
# Right-padded sentences; 0 is padding.
LENGTHS = torch.arange(N) % 5 + 4
WORDS = torch.randint(3, 50, (N, 9), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(9) < LENGTHS[:, None]).long()
WORDS = WORDS * MASK


class Case(NamedTuple):
    """A model, its inputs, the name of its head, and how the features follow from the head's input."""

    model: nn.Module
    inputs: dict[str, Tensor] | Tensor
    head: str
    features: Callable[[Tensor], Tensor] = lambda h: h
    labels: Tensor = LABELS


def images(size: int = 32) -> Tensor:
    return torch.randn(N, 3, size, size, generator=torch.Generator().manual_seed(1))


def vision(name: str, head: str, features: Callable[[Tensor], Tensor] = lambda h: h, **options: Any) -> Case:
    return Case(torchvision.models.get_model(name, num_classes=K, **options), images(), head, features)


def vision_transformer() -> Case:
    model = torchvision.models.VisionTransformer(32, 8, 1, 2, 16, 32, num_classes=K)
    nn.init.normal_(model.heads.head.weight)  # zero at first, and then it has no geometry
    return Case(model, images(), "heads.head")


def timm(name: str, head: str) -> Case:
    library = pytest.importorskip("timm")
    return Case(library.create_model(name, num_classes=K), images(), head, lambda h: h.flatten(1))


def transformer(kind: str, head: str, inputs: dict[str, Tensor], **more: Any) -> Case:
    library = pytest.importorskip("transformers")
    config = getattr(library, f"{kind.partition('For')[0]}Config")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    made = config(num_labels=K, **({} if "embedding_size" in more else sizes), **more)
    return Case(getattr(library, kind)(made), inputs, head)


def tokens(kind: str, head: str, **more: Any) -> Case:
    inputs = {"input_ids": WORDS, "attention_mask": MASK}
    return transformer(kind, head, inputs, vocab_size=50, pad_token_id=0, bos_token_id=1, eos_token_id=2, **more)


def last_word(h: Tensor) -> Tensor:
    return h[torch.arange(N), LENGTHS - 1]


def every_word() -> Case:
    labels = (WORDS % K).masked_fill(MASK == 0, -100)
    case = tokens("BertForTokenClassification", "classifier")
    return case._replace(features=lambda h: h[MASK > 0], labels=labels)


CASES: dict[str, Callable[[], Case]] = {
    "resnet18": lambda: vision("resnet18", "fc"),
    "squeezenet": lambda: vision("squeezenet1_1", "classifier.1", lambda h: h.mean((2, 3))),
    "shufflenet": lambda: vision("shufflenet_v2_x0_5", "fc"),
    "vision transformer": vision_transformer,
    "swin": lambda: Case(
        torchvision.models.SwinTransformer([4, 4], 16, [1, 1], [2, 2], [4, 4], num_classes=K), images(), "head"
    ),
    "timm resnet": lambda: timm("test_resnet", "fc"),
    "timm resnetv2": lambda: timm("resnetv2_18", "head.fc"),
    "timm convnext": lambda: timm("test_convnext", "head.fc"),
    "timm efficientnet": lambda: timm("test_efficientnet", "classifier"),
    "bert": lambda: tokens("BertForSequenceClassification", "classifier"),
    "bert tokens": every_word,
    "roberta": lambda: tokens("RobertaForSequenceClassification", "classifier.out_proj"),
    "llama": lambda: tokens("LlamaForSequenceClassification", "score")._replace(features=last_word),
    "gpt2": lambda: tokens("GPT2ForSequenceClassification", "score")._replace(features=last_word),
    "transformers vit": lambda: transformer(
        "ViTForImageClassification", "classifier", {"pixel_values": images()}, image_size=32, patch_size=8
    ),
    "transformers resnet": lambda: transformer(
        "ResNetForImageClassification", "classifier.1", {"pixel_values": images()}, embedding_size=8,
        hidden_sizes=[8, 16], depths=[1, 1],
    ),
}  # fmt: skip


def expected(case: Case) -> dict[str, float]:
    """The metrics from the inputs of the head, which a hook of the test's own takes."""
    seen: list[Tensor] = []
    layer = case.model.get_submodule(case.head)
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        output = case.model(**case.inputs) if isinstance(case.inputs, dict) else case.model(case.inputs)
    hook.remove()
    logits, labels = output if isinstance(output, Tensor) else output["logits"], case.labels
    if logits.dim() == 3:
        logits, labels = logits[labels >= 0], labels[labels >= 0]
    return plain_metrics(case.features(seen[0]), layer.weight.flatten(1), logits, labels)


def batches(case: Case, rows: slice) -> list[Any]:
    """Two batches of the rows."""
    at = torch.arange(N)[rows].tensor_split(2)
    if isinstance(case.inputs, dict):
        return [{**{name: value[i] for name, value in case.inputs.items()}, "labels": case.labels[i]} for i in at]
    return [(case.inputs[i], case.labels[i]) for i in at]


def agree(result: NCResult, case: Case, numbers: dict[str, float]) -> None:
    assert result.head == case.head
    assert {name: getattr(result, name) for name in numbers} == pytest.approx(numbers, rel=1e-3, abs=1e-5)


@pytest.mark.filterwarnings("ignore")  # those of the libraries
@pytest.mark.parametrize("name", CASES)
def test_a_foreign_model_compiled_in_place(name: str) -> None:
    case = CASES[name]()
    case.model.eval()
    numbers = expected(case)
    case.model.compile(backend="eager")
    agree(measure(case.model, batches(case, slice(None))), case, numbers)
    agree(measure(case.model, batches(case, slice(None)), head=case.head, moment="projected"), case, numbers)


def over_two_processes(rank: int, folder: str) -> None:
    """In one of two processes: measure each model, wrapped in DDP, on half of the data."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for name in ("squeezenet", "llama", "bert tokens"):
        torch.manual_seed(0)
        try:
            case = CASES[name]()
        except pytest.skip.Exception:
            continue
        case.model.eval()
        numbers = expected(case)
        wrapped = nn.parallel.DistributedDataParallel(case.model)
        half = slice(0, 10) if rank == 0 else slice(10, N)
        agree(measure(wrapped, batches(case, half), group=dist.group.WORLD), case, numbers)
    dist.destroy_process_group()


def test_foreign_models_under_ddp(tmp_path: Path) -> None:
    path = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(tmp_path)],
            env=path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)


if __name__ == "__main__":
    over_two_processes(int(sys.argv[1]), sys.argv[2])
