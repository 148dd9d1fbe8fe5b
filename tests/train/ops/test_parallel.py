"""`select_attend` in data-parallel training: two processes, each with half of the questions."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from egopatch.train.ops.select_attend import select_attend
from tests.train.ops.cases import Case, make_case

PROCESSES = 2
QUESTIONS = 12


class Head(nn.Module):
    """Projections on both sides of `select_attend`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.select, self.value = (nn.Linear(32, 32) for _ in range(3))
        self.prior = nn.Parameter(torch.zeros(17))

    def forward(self, case: Case, rows: slice) -> Tensor:
        """[B, T, H, D] of these questions."""
        question = case.selector[rows] * math.sqrt(32)
        queries, selector = self.query(question)[:, None].expand(-1, 2, -1), self.select(question)
        out = select_attend(case.tokens, case.clip_index[rows], queries, selector, case.bias + self.prior, 5)
        return self.value(out.pooled)


def loss_of(head: nn.Module, rows: slice) -> Tensor:
    return head(make_case(3, QUESTIONS, 2, 17, 32, 2, torch.float16), rows).square().mean()


def work(rank: int, folder: str) -> None:
    """Two steps of one process; the first one saves the weights."""
    store = distributed.FileStore(f"{folder}/store", PROCESSES)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES)
    head = DistributedDataParallel(Head())
    optimiser = torch.optim.SGD(head.parameters(), lr=0.1)
    for _ in range(2):
        optimiser.zero_grad()
        each = QUESTIONS // PROCESSES
        loss_of(head, slice(rank * each, (rank + 1) * each)).backward()
        optimiser.step()
    if rank == 0:
        torch.save(head.module.state_dict(), f"{folder}/weights.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_learn_the_same_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=PROCESSES)
    head = Head()
    optimiser = torch.optim.SGD(head.parameters(), lr=0.1)
    before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    for _ in range(2):
        optimiser.zero_grad()
        loss_of(head, slice(None)).backward()
        optimiser.step()
    learned = torch.load(tmp_path / "weights.pt", weights_only=True)
    for name, tensor in head.state_dict().items():
        assert not torch.equal(tensor, before[name])
        torch.testing.assert_close(learned[name], tensor, rtol=1e-5, atol=1e-6)
