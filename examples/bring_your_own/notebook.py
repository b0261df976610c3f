"""The same from Python: one run, then a sweep."""

import mine

from ncollapse.train import sweep, train

result = train(mine.WideNet, mine.few_digits(), optimizer="adamw", lr=0.01, epochs=30)
print(result.history[["epoch", "train_accuracy", "nc0", "nc1"]])

runs = sweep(
    {"model": "wide", "data": "few", "optimizer": ["sgd", "normalized"], "lr": 0.05, "epochs": 60},
    out="results/mine-from-python",
    models={"wide": mine.WideNet},
    data={"few": mine.few_digits},
    optimizers={"normalized": mine.NormalizedSGD},
    metrics={"smallest_distance": mine.smallest_distance},
)
print(runs[["optimizer", "status", "train_accuracy", "nc1", "smallest_distance"]])
