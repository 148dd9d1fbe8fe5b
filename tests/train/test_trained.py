"""A trained head that is opened again, by every command that does so: what is wrong with its files, and what to do."""

from collections.abc import Callable

import pytest
from safetensors.torch import load_file, save_file

from egopatch.configs.schema import Config
from egopatch.train.explanation.explain import explain
from egopatch.train.fitting.fit import evaluate, fit
from egopatch.train.fitting.predict import predict_clips
from egopatch.train.rundir.card import RunError
from tests.train.tiny import with_run


def ask(config: Config) -> object:
    return predict_clips(config, ["clip|P0|0|1"], "what colour is the left thing?")


@pytest.mark.parametrize("command", [evaluate, explain, ask])
def test_weights_that_are_gone_or_of_another_head(tiny: Config, command: Callable[[Config], object]) -> None:
    config = with_run(tiny, "psa", train_epochs=1)
    fit(config, "x")
    command(config)
    weights = config.run.dir / "best.safetensors"
    tensors = load_file(weights)
    name, tensor = next((name, tensor) for name, tensor in sorted(tensors.items()) if tensor.ndim == 2)
    save_file(tensors | {name: tensor[:1].clone()}, weights)
    with pytest.raises(RunError) as refused:
        command(config)
    assert str(refused.value) == (
        f"{weights} does not fit the psa head that card.json beside it describes ({name} is (1, {tensor.shape[1]}), "
        f"expected {tuple(tensor.shape)}); restore both files from one training and, of a head from outside, the "
        "version of its package in the card; or delete the folder and train again"
    )
    weights.unlink()
    with pytest.raises(RunError) as refused:
        command(config)
    assert str(refused.value) == (
        f"{weights}: no such file, but card.json beside it describes a head that was trained: the weights were deleted,"
        " or the head was trained in another folder and only evaluated into this one; restore the file, use the folder "
        "that the head was trained in, or train in another --run.dir"
    )
