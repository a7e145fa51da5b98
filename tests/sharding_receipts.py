"""A forecast of one rank, and the same step on ranks that are up."""

import effkit as ek
from effkit.activations import on_ranks
from effkit.activations.levers import parted
from effkit.training import own_loss


def predicted_and_measured(model, batch, ranks, **how):
    """Both accounts; ValueError where the step cannot be forecast."""
    predicted = ek.activations.forecast(model, batch, world_size=ranks.num_ranks, **how)
    _, levers = parted(predicted.setting)
    measured = on_ranks.measured(
        model, batch, levers, dict(predicted.setting), loss=own_loss, optimizer=None, plan=None, repeats=1,
        progress=None, calibration=None, ranks=ranks,
    )  # fmt: skip
    return predicted, measured
