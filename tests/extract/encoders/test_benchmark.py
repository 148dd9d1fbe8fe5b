"""How `benchmarks/encoder.py` reports its measurements, including those of a GPU, which not every machine has."""

from typing import Any

import pytest

from benchmarks import encoder


def measured(seconds: dict[str, float], rate: float, work: encoder.Work) -> dict[str, Any]:
    """As `encoder.measure` gives it; `rate` in FLOP/s."""
    rows = {
        variant: {
            "seconds": s,
            "clips_per_s": work.batch / s,
            "gflops": work.flops() / s / 1e9,
            "share_of_matrix_rate": work.flops() / s / rate,
        }
        for variant, s in seconds.items()
    }
    return rows | {"matrix_gflops": {"float32": {"a": rate / 2e9}, "bfloat16": {"a": rate / 1e9, "b": 1.0}}}


@pytest.fixture
def result(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(encoder, "bfloat16_instructions", lambda: True)
    work = encoder.Work(16, 6, 1)
    seconds = dict(zip((*encoder.VARIANTS, encoder.SIDE_BY_SIDE), (2.0, 1.6, 1.0, 0.95), strict=True))
    found = measured(seconds, work.flops() / 0.9, work)  # at the whole rate, bfloat16 would take 0.9 s
    found["cuda"] = {
        batch: measured(
            {"ours float32": 0.04 * batch, "ours bfloat16": 0.01 * batch}, share, encoder.Work(16, 6, batch)
        )
        for batch, share in ((1, work.flops() / 0.004), (8, work.flops() / 0.007))
    }
    return found | {"work": {"batch": 1}, "machine": {"gpu": "a GPU"}}


def test_claims_include_the_limits_of_the_machine(result: dict[str, Any]) -> None:
    found = list(encoder.claims(result).values())
    assert found == pytest.approx([2.0 / 1.6, 2.0, 2.0 / 0.9, 0.9, 2.0 / 0.95, 0.9 / 0.95, 0.7])


def test_report_has_a_table_for_each_batch(result: dict[str, Any]) -> None:
    text = encoder.report(result | {"claims": encoder.claims(result)})
    cpu, first, second, promised = text.split("\n\n")
    assert cpu.startswith("CPU, batch 1\n")
    assert cpu.count("\n") == 1 + 4 + 1
    assert first.startswith("a GPU, batch 1\n")
    (row,) = [line for line in second.splitlines() if line.startswith("ours bfloat16")]
    assert row.split()[2:] == ["0.080", "100.00", str(round(encoder.Work(16, 6, 8).flops() / 0.08e9)), "0.70"]
    assert "plain" not in first + second
    assert promised.splitlines()[-1] == "CUDA, bfloat16 share of the matrix rate, best batch (reach 0.5): 0.70"


def test_flop_count_sums_the_matrix_products() -> None:
    """Written out for one block of one frame: 197 tokens, of which 196 see 197 in space and 2 in time."""
    width, tokens, patches = 64, 197, 196
    embed = patches * 3 * 16 * 16 * width
    linear = tokens * width * (3 * width + width + 3 * width + width + 4 * width + 4 * width)
    attention = 2 * width * (patches * 197 + patches * 2 + 2 * tokens)
    assert encoder.Work(1, 1, 1, width).flops() == 2 * (embed + linear + attention)
