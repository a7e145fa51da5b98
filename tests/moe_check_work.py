"""What the ranks of test_moe_rank.py compute, to compare with what one rank alone does."""

from pathlib import Path

import torch

from effkit.moe.rank import Job
from effkit.ranks.group import joined


def main(folder: Path, met: Path) -> None:
    with joined(folder, met) as member:
        num_steps, seen = member.run["num_steps"], []
        for job in (Job(one, num_steps, member, 0) for one in member.run["jobs"]):
            inner, outer = job.layer.inner, job.layer.outer
            for x, scores in job.batches:
                job.layer.zero_grad(set_to_none=True)
                y = job.layer(x, scores)
                if job.setting.backward:
                    y.backward(job.grad)
                seen.append({
                    "output": projection(y), "input_gradient": projection(x.grad) if job.setting.backward else 0.0,
                    "expert_gradients": {e: projection(inner[e].grad) + projection(outer[e].grad)
                                         for e in (inner if job.setting.backward else ())},
                })  # fmt: skip
            job.layer.exchange.close()
        member.write({"seen": seen})


def projection(values: torch.Tensor) -> float:
    """One number that tells a tensor from another, and from itself in another order: its product with cosines."""
    flat = values.detach().double().cpu().reshape(-1)
    return float(flat @ torch.arange(len(flat), dtype=torch.float64).cos())
