"""Stage two from the command line: `python -m train COMMAND --config configs/x.yaml`."""

import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from egopatch.configs.schema import Config, ConfigError, ConfigParser, add_config_arguments, parse_config

if TYPE_CHECKING:
    from egopatch.extract.datasets import Question
    from egopatch.extract.datasets.records import Part
    from egopatch.train.scores.metrics import Metrics

COMMANDS = {
    "fit": "train a head, choose its checkpoint on val, evaluate it on test",
    "evaluate": "evaluate the checkpoint in run.dir on test again, or a fine-tuned --head.checkpoint as it is",
    "score": "metrics of any system's answers",
    "sweep": "train many settings of a head on one reading of the features",
    "table": "gather the results table of every run below run.table",
    "report": "write the self-contained HTML report beside the table",
    "bench": "run a benchmark script: bench NAME [its options]",
}
INTERRUPTED = 130


def main(args: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0 done, 1 the work failed, 2 wrong usage or configuration."""
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] in ("-h", "--help"):
        print(_usage())
        return 0 if args else 2
    name, rest = args[0], args[1:]
    if name not in COMMANDS:
        print(f"train: error: {name!r} is no command; expected one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    from egopatch.extract.datasets import DatasetError
    from egopatch.extract.errors import CheckpointError
    from egopatch.features import BadLocation, FingerprintMismatch, StoreError

    who = f"train {name} (rank {os.environ['RANK']})" if "RANK" in os.environ else f"train {name}"
    try:
        code = _HANDLERS[name](rest)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Whoever reads what is printed, such as `head`, has enough. What is still buffered must go somewhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (DatasetError, CheckpointError, ConfigError, BadLocation, FingerprintMismatch) as error:
        print(f"{who}: error: {error}", file=sys.stderr)
        return 2
    except (StoreError, ValueError, OSError) as error:
        print(f"{who}: failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{who}: stopped; give the same command again to go on", file=sys.stderr)
        return INTERRUPTED


def _usage() -> str:
    lines = [f"  {name:<9} {text}" for name, text in COMMANDS.items()]
    return "\n".join(["usage: python -m train COMMAND [options]; COMMAND --help says more", *lines])


def _parse(command: str, args: Sequence[str]) -> Config:
    parser = ConfigParser(prog=f"train {command}", description=COMMANDS[command])
    add_config_arguments(parser)
    return parse_config(parser, args)[0]


def _fit(args: Sequence[str]) -> int:
    config = _parse("fit", args)
    from egopatch.train.fitting.experiment import pick_device
    from egopatch.train.fitting.fit import fit
    from egopatch.train.processes.distributed import join
    from egopatch.train.processes.stopping import Stopped

    with join(cuda=pick_device(config.train.device).type == "cuda") as ranks:
        try:
            metrics = fit(config, " ".join(["python -m train fit", *args]), ranks)
        except Stopped as stopped:
            if ranks.first:
                print(f"train fit: {stopped}", file=sys.stderr)
            return INTERRUPTED
        if ranks.first:
            _say(config, metrics)
    return 0


def _evaluate(args: Sequence[str]) -> int:
    config = _parse("evaluate", args)
    from egopatch.train.fitting.experiment import pick_device
    from egopatch.train.fitting.fit import evaluate
    from egopatch.train.processes.distributed import join

    with join(cuda=pick_device(config.train.device).type == "cuda") as ranks:
        metrics = evaluate(config, " ".join(["python -m train evaluate", *args]), ranks)
        if ranks.first:
            _say(config, metrics)
    return 0


def _say(config: Config, metrics: "Metrics") -> None:
    parts = {"open": metrics.open, "binary": metrics.binary, "all": metrics.all}
    figures = ", ".join(f"{k} {a.accuracy:.2f} (n {a.n})" for k, a in parts.items() if a.accuracy is not None)
    print(f"{config.run.dir}: {config.head.name} on the {config.data.split} test questions: {figures}")


def _score(args: Sequence[str]) -> int:
    parser = ConfigParser(prog="train score", description=COMMANDS["score"])
    parser.add_argument(
        "--questions", type=Path, required=True, help="EgoTaskQA annotation file, or .jsonl questions of your own"
    )
    parser.add_argument(
        "--predictions", type=Path, required=True, help='JSON lines, one a question: {"question_id", "answer"}'
    )
    parser.add_argument(
        "--split",
        type=str | None,
        default=None,
        help="tag that All is also counted on; default: what its folder or name says",
    )
    parser.add_argument(
        "--part", type=Literal["train", "val", "test"], default="test", help="part that is scored of a .jsonl file"
    )
    parser.add_argument(
        "--compare",
        type=Literal["lower-cased", "released"],
        default="lower-cased",
        help="how answers are compared in the JSON; the other way's difference is reported beside it",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(list(args))
    from egopatch.train.scores.metrics import difference, lines, read_predictions, same_as_released, score

    questions, vocabulary, split = _scored(options.questions, options.part)
    answers = read_predictions(options.predictions, questions)
    metrics = score(questions, answers, options.split or split)
    if vocabulary is None and any(question.encoded is None for question in questions):
        released = None
        missing = f"{options.questions.parent} has neither answer_set.txt nor training questions"
        if options.compare == "released":
            raise ConfigError(f"--compare is 'released', and {missing}; put one of them there, or leave --compare out")
        print(f"train score: not compared in the released way: {missing}", file=sys.stderr)
    else:
        released = score(questions, answers, options.split or split, same_as_released(vocabulary or ()))
    if options.json:
        chosen = released if options.compare == "released" and released is not None else metrics
        print(json.dumps(chosen.as_json(), indent=2))
        if released is not None:  # beside the figures, whose layout is fixed
            print(f"train score: {difference(metrics, released)}", file=sys.stderr)
    else:
        print("\n".join(lines(metrics, released)))
    return 0


def _scored(path: Path, part: "Part") -> "tuple[tuple[Question, ...], tuple[str, ...] | None, str | None]":
    """Questions of a file, the answer set that belongs to them, and the split that its folder or its name says."""
    from egopatch.extract.datasets import egotaskqa, jsonl
    from egopatch.extract.datasets.records import answer_vocabulary

    if path.suffix == ".jsonl":
        parts = jsonl.read_questions(path)
        return parts[part], answer_vocabulary([question.spelling for question in parts["train"]]), None
    folder = path.resolve().parent
    questions = egotaskqa.read_questions(path)
    words = re.split("[^a-z]+", f"{folder.name} {path.stem}")
    split = next((word for word in words if word in egotaskqa.SPLITS), None)
    return questions, egotaskqa.read_answers(folder), split


def _sweep(args: Sequence[str]) -> int:
    parser = ConfigParser(prog="train sweep", description=COMMANDS["sweep"])
    parser.add_argument("--ratios", type=float, nargs="+", default=None, help="values of head.ratio")
    parser.add_argument("--seeds", type=int, nargs="+", default=None, help="values of train.seed")
    parser.add_argument("--grid", type=Path | None, default=None, help="YAML file: section.field: [values]")
    parser.add_argument("--name", type=str | None, default=None, help="of the sweep's folder")
    add_config_arguments(parser)
    config, options = parse_config(parser, args)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "torchrun started this sweep; expected one start a machine or GPU, as in CUDA_VISIBLE_DEVICES=1 python -m "
            "train sweep ...: each takes the members that nobody holds"
        )
    from egopatch.train.processes.stopping import Stopped
    from egopatch.train.sweeps.sweep import run_sweep

    command = " ".join(["python -m train sweep", *args])
    try:
        print(run_sweep(config, options.ratios, options.seeds, options.grid, options.name, command))
    except Stopped as stopped:
        print(f"train sweep: {stopped}", file=sys.stderr)
        return INTERRUPTED
    return 0


def _table(args: Sequence[str]) -> int:
    config = _parse("table", args)
    from egopatch.train.report.table import write_table

    folder = table_folder(config)
    write_table(folder)
    print((folder / "table.md").read_text(encoding="utf-8"))
    return 0


def _report(args: Sequence[str]) -> int:
    config = _parse("report", args)
    from egopatch.train.report.page import write_report

    print(write_report(config, table_folder(config)))
    return 0


def table_folder(config: Config) -> Path:
    """Where `table` and `report` gather runs and write."""
    return config.run.dir.parent if config.run.table is None else config.run.table


def _bench(args: Sequence[str]) -> int:
    folder = Path(__file__).resolve().parents[1] / "benchmarks"
    names = sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))
    if not args or args[0] not in names:
        given = repr(args[0]) if args else "missing"
        print(f"train bench: error: NAME is {given}; expected one of {', '.join(names)}", file=sys.stderr)
        return 2
    spec = importlib.util.spec_from_file_location(f"benchmarks.{args[0]}", folder / f"{args[0]}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return int(module.main(list(args[1:])) or 0)


_HANDLERS: dict[str, Callable[[Sequence[str]], int]] = {
    "fit": _fit,
    "evaluate": _evaluate,
    "score": _score,
    "sweep": _sweep,
    "table": _table,
    "report": _report,
    "bench": _bench,
}


if __name__ == "__main__":
    sys.exit(main())
