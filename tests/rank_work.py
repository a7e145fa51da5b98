"""What the ranks of test_ranks.py do: they meet as often as they are told, and one may fail."""

from pathlib import Path

import torch
import torch.distributed as dist

from effkit.ranks.group import joined


def main(folder: Path, met: Path) -> None:
    with joined(folder, met) as member:
        together = 0
        for _ in range(member.run["num_meetings"]):
            one = torch.ones(1, device=member.travels_on)
            dist.all_reduce(one)
            together += int(one)
            member.tick()
        if member.rank == member.run.get("failing"):
            raise ArithmeticError("this rank was told to fail")
        member.write({"together": together})
