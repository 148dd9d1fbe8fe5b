"""`extract standin`: a tiny checkpoint with random weights, and a tokenizer, at the paths in the config."""

from collections.abc import Sequence
from pathlib import Path

from egopatch.configs.command_line import ConfigParser, parse_config
from egopatch.configs.schema import ConfigError
from egopatch.extract.datasets import load_dataset
from egopatch.features.common.command_line import print_result


def main(parser: ConfigParser, args: Sequence[str]) -> int:
    """Write both; returns 0."""
    config, options = parse_config(parser, args)
    # Imported here to save start-up time: a wrong option is reported before torch is imported.
    from egopatch.extract.encoders.checkpoints.standin import is_standin, is_standin_tokenizer, write_standin

    arch, path = config.encoder.arch, config.encoder.checkpoint
    if arch not in ("egovlp", "egovlpv2") or path is None:
        raise ConfigError(
            f"encoder.arch is {arch!r} and encoder.checkpoint {str(path)!r}; expected egovlp or egovlpv2 (mfas starts"
            " from egovlpv2's stand-in), and the path to write the stand-in to"
        )
    for option, there, may_be_replaced in (
        ("encoder.checkpoint", path, is_standin),
        ("text.model", Path(config.text.model), is_standin_tokenizer),
    ):
        if there.exists() and not may_be_replaced(there):
            raise ConfigError(
                f"{option} is {str(there)!r}, which exists and is not a stand-in, so it is not replaced; name another "
                "path, or move away what is there"
            )
    texts = load_dataset(config.data).texts
    if not texts:
        raise ConfigError(
            "data.questions is null, but a stand-in's tokenizer is trained on questions; set data.questions to their "
            "file"
        )
    depth = config.encoder.depth
    write_standin(
        arch,
        path,
        texts=texts,
        # EgoVLPv2's tokens are tapped where fusion starts; a CPU trains one fused block above it in a demo's time.
        depth=depth + 1 if arch == "egovlpv2" else depth,
        fusion=depth,
        frames=config.video.frames,
        size=config.video.size,
        tokenizer=config.text.model,
    )
    print_result(
        options.json,
        {"checkpoint": path, "tokenizer": config.text.model, "arch": arch},
        f"{path}: a stand-in with RANDOM WEIGHTS in {arch}'s file format; {config.text.model}: its tokenizer."
        " Neither was trained.",
    )
    return 0
