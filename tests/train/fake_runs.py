"""Run folders as `train fit` and `train evaluate` leave them, with made-up numbers."""

import json
from pathlib import Path
from typing import Any

import numpy as np


def score(accuracy: float | None, n: int) -> dict[str, Any]:
    return {"accuracy": accuracy, "n": n}


def write_run(
    folder: Path,
    name: str,
    *,
    model: str = "psa",
    split: str = "direct",
    seed: int = 0,
    all_: float = 50.0,
    open_: float = 40.0,
    binary: float = 60.0,
    n: tuple[int, int] = (600, 400),
    val: float = 50.0,
    tags: dict[str, Any] | None = None,
    predictions: dict[str, str] | None = None,
    kept: np.ndarray | None = None,
    config: dict[str, Any] | None = None,
    card: dict[str, Any] | None = None,
) -> Path:
    """One finished run; `kept` [Q, T, k] goes with `predictions` in order."""
    path = folder / name
    path.mkdir(parents=True)
    test = {
        "model": model,
        "split": split,
        "seed": seed,
        "open": score(open_, n[0]),
        "binary": score(binary, n[1]),
        "all": score(all_, sum(n)),
        "split_tag": score(all_ + 1, sum(n) // 2),
        "tags": tags or {"descriptive": score(all_ - 2, 700), "predictive": score(all_ + 3, 300)},
    }
    resolved = {"head": {"name": model, "ratio": 0.25}, "data": {"split": split}, "train": {"seed": seed}}
    for section, options in (config or {}).items():
        resolved[section] = resolved.get(section, {}) | options
    resolved["run"] = {"dir": str(path)}
    full_card = {
        "model": model,
        "config": resolved,
        "fingerprint": {"depth": 6, "frames": 4},
        "text_fingerprint": {"depth": 6},
        "answers": ["yes", "no"],
        "seed": seed,
        "best_epoch": 3,
        "val": {"open": val - 10, "binary": val + 10, "all": val},
        "versions": {"torch": "2.13.0", "numpy": "2.3.0"},
        "command": f"python -m train fit --config configs/demo.yaml --head.name {model}",
    } | (card or {})
    (path / "test.json").write_text(json.dumps(test))
    (path / "card.json").write_text(json.dumps(full_card))
    (path / "best.safetensors").write_bytes(b"weights")
    log = [{"event": "step", "step": step, "loss": 3.0 / (1 + step), "lr": 1e-3} for step in range(8)]
    log += [{"event": "val", "epoch": e, "open": 30.0 + e, "binary": 50.0 + e, "all": 40.0 + e} for e in range(4)]
    (path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    if predictions is not None:
        lines = [json.dumps({"question_id": q, "answer": a}) + "\n" for q, a in predictions.items()]
        (path / "predictions.jsonl").write_text("".join(lines))
    if kept is not None and predictions is not None:
        np.savez(path / "selection.npz", question_ids=np.array(list(predictions)), kept=kept.astype(np.int16))
    return path


def write_sweep(folder: Path, split: str = "direct", seeds: int = 3) -> Path:
    """A sweep over three ratios: accuracy is 40 + 10 * ratio + seed."""
    path = folder / "sweeps" / f"ratio_{split}"
    path.mkdir(parents=True)
    members = [
        {
            "ratio": ratio,
            "seed": seed,
            "overrides": {},
            "open": 30.0,
            "binary": 55.0,
            "all": 40 + 10 * ratio + seed,
            "n": 1000,
            "dir": f"r{ratio}_s{seed}",
        }
        for ratio in (0.1, 0.25, 1.0)
        for seed in range(seeds)
    ]
    value = {"name": path.name, "split": split, "model": "psa", "members": members}
    (path / "sweep.json").write_text(json.dumps(value))
    return path
