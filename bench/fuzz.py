"""Try many damaged and hostile inputs, of the kinds of `tests/support/fuzzing.py`, and record what came of them.

python -m bench.fuzz --trials 20000
"""

import sys
import time
from collections import Counter
from pathlib import Path

import torch

from bench.record import Record, recording

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
import fuzzing


def main() -> int:
    """Run many trials and record them: command, machine, counts, the slowest, and every fault."""
    parser = recording(__doc__)
    parser.add_argument("--trials", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first trial of each kind")
    parser.add_argument("--minutes", type=float, default=600.0, help="what is tried by then is recorded")
    options = parser.parse_args()
    torch.set_num_threads(1)
    record = Record(options.out / "fuzz.json", " ".join(["python -m bench.fuzz", *sys.argv[1:]]), "cpu", options.commit)
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in fuzzing.KINDS}
    slowest: dict[str, float] = dict.fromkeys(fuzzing.KINDS, 0.0)
    faults: list[str] = []
    until, total = time.monotonic() + 60 * options.minutes, sum(share for _, share in fuzzing.KINDS.values())
    for number in range(options.trials):
        if time.monotonic() > until:
            break
        place, kind = number % total, ""
        for kind, (_, share) in fuzzing.KINDS.items():  # noqa: B007
            place -= share
            if place < 0:
                break
        started, seed = time.monotonic(), options.first + number
        try:
            counts[kind][fuzzing.trial(kind, seed)] += 1
        except Exception as error:
            counts[kind]["fault"] += 1
            faults.append(f"{kind} {seed}: {type(error).__name__}: {str(error)[:200]}")
            print(faults[-1], flush=True)
        slowest[kind] = max(slowest[kind], time.monotonic() - started)
        if number % 500 == 499:
            print(number + 1, {kind: dict(count) for kind, count in counts.items()}, flush=True)
    record.data |= {
        "first": options.first, "trials": sum(map(Counter.total, counts.values())), "counts": counts,
        "slowest_seconds": slowest, "faults": faults,
    }  # fmt: skip
    record.save()
    return 1 if faults or max(slowest.values()) > 10 else 0


if __name__ == "__main__":
    sys.exit(main())
