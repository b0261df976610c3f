"""Hugging Face: Trainer with an optimizer of ncollapse, and a callback that measures NC0–NC4 of a text classifier."""

import tempfile
from typing import Any

import torch
import transformers

import ncollapse as nc


class NeuralCollapse(transformers.TrainerCallback):
    """Measures on the training data after every epoch; `head` is the classifier, a name of model.named_modules()."""

    def __init__(self, head: str | None = None) -> None:
        self.head = head
        self.history: list[nc.NCResult] = []

    def on_epoch_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.history.append(nc.measure(given["model"], given["train_dataloader"], head=self.head))


def make_data(samples: int = 300, classes: int = 3, length: int = 12) -> list[dict[str, Any]]:
    """Sentences of random words, in which the words of one class are more frequent."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(classes, 60, (samples, length), generator=generator)
    labels = torch.arange(samples) % classes
    words[:, 4:9] = labels[:, None]
    return [{"input_ids": w, "labels": int(y)} for w, y in zip(words, labels, strict=True)]


if __name__ == "__main__":
    transformers.set_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=60, num_labels=3, **size)  # yours: from_pretrained("…")
    model = transformers.BertForSequenceClassification(config)
    opt = nc.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    probe = NeuralCollapse(head="classifier")
    with tempfile.TemporaryDirectory() as folder:
        args = transformers.TrainingArguments(
            output_dir=folder,
            num_train_epochs=4,
            per_device_train_batch_size=50,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        transformers.Trainer(model, args, train_dataset=make_data(), optimizers=(opt, None), callbacks=[probe]).train()
    print("training accuracy:", ", ".join(f"{result.train_accuracy:.2f}" for result in probe.history))
    print("NC1:", ", ".join(f"{result.nc1:.3g}" for result in probe.history))
