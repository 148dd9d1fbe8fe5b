"""Run folders as `train fit` and `train evaluate` leave them, with made-up numbers."""

import json
from pathlib import Path
from typing import Any

import av
import numpy as np

from egopatch.configs.schema import Config, DataConfig, StoreConfig, VideoConfig


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
    open_: float | None = 40.0,
    binary: float | None = 60.0,
    n: tuple[int, int] = (600, 400),
    val: float = 50.0,
    tags: dict[str, Any] | None = None,
    predictions: dict[str, str] | None = None,
    kept: np.ndarray | None = None,
    config: dict[str, Any] | None = None,
    card: dict[str, Any] | None = None,
) -> Path:
    """One finished run; `kept` [Q, T, k] goes with `predictions` in order, which are `guesses`."""
    path = folder / name
    path.mkdir(parents=True)
    if predictions is not None:
        right: dict[bool, list[bool]] = {True: [], False: []}
        for question, answer in predictions.items():
            right[is_binary(question)].append(answer != "spoon")
        open_, binary = (100 * float(np.mean(right[one])) if right[one] else None for one in (False, True))
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
        "command": f"egopatch train fit --config configs/demo.yaml --head.name {model}",
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


COLOURS = ("red", "green", "blue", "white")
EVIL = 'is <script>alert("x")</script> & "quoted" \' shown?'


def write_dataset(root: Path, clips: int = 6, questions: int = 24, videos: bool = True) -> Config:
    """A jsonl data set of small real videos: a bright square moves over a grey table. Returns its config."""
    root.mkdir(parents=True)
    entries = []
    for clip in range(clips):
        if videos:
            _write_square_video(root / f"clip{clip}.mp4", clip)
        entries.append({"clip_id": f"clip{clip}", "video": f"clip{clip}.mp4"})
    (root / "clips.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    lines = []
    for index in range(questions):
        binary = is_binary(f"q{index:02d}")
        text = EVIL if index == 0 else f"what colour is the thing that the person moved to place {index}?"
        line = {
            "question_id": f"q{index:02d}",
            "clip_id": f"clip{index % clips}",
            "question": text,
            "answer": "yes" if binary else COLOURS[index % 4],
            "part": "test",
            "tags": ["world", "descriptive" if index % 2 else "predictive", "object", "direct"],
        }
        lines += [line, line | {"question_id": f"t{index}", "part": "train"}]
    (root / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Config(
        data=DataConfig(name="jsonl", root=root),
        video=VideoConfig(frames=4, size=112),
        store=StoreConfig(path=root / "store"),
    )


def is_binary(question: str) -> bool:
    """Whether a question of `write_dataset` asks for a yes or no."""
    return int(question.removeprefix("q")) % 3 == 0


def guesses(right_every: int, questions: int = 24) -> dict[str, str]:
    """Predictions for `write_dataset`: each `right_every`-th question is answered right."""
    truth = {q: "yes" if is_binary(q) else COLOURS[i % 4] for i in range(questions) for q in [f"q{i:02d}"]}
    return {q: a if i % right_every == 0 else "spoon" for i, (q, a) in enumerate(truth.items())}


def kept_patches(questions: int = 24, frames: int = 4, patches: int = 49, k: int = 13) -> np.ndarray:
    """Selections for `write_dataset`: [Q, T, k], rising."""
    generator = np.random.default_rng(0)
    weight = np.linspace(0.2, 3, patches) / np.linspace(0.2, 3, patches).sum()
    draw = [generator.choice(patches, k, replace=False, p=weight) for _ in range(questions * frames)]
    return np.sort(np.array(draw), axis=1).reshape(questions, frames, k)


def _write_square_video(path: Path, seed: int) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "18", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 160, 120, "yuv420p"
        for index in range(16):
            pixels = np.full((120, 160, 3), (120, 105, 90), np.uint8)
            x, y = 20 + 6 * index, 30 + (13 * seed + 3 * index) % 60
            pixels[y : y + 16, x : x + 16] = (220, 40 * (seed % 6), 60)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
