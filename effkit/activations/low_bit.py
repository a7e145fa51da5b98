"""AdamW whose moments are kept in eight bits between steps."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch

from effkit.arguments import checked_number, checked_whole, checked_word
from effkit.quantisation import SIGNED, UNSIGNED, QuantisedState, dequantise_state, quantise_state
from effkit.training import PerParameter

STATES = ("float32", *SIGNED)
_FORMATS = {"exp_avg": SIGNED, "exp_avg_sq": UNSIGNED}


class LowBitAdamW(PerParameter):
    """AdamW (arXiv 1711.05101) with both moments in eight bits, expanded as in COAT (arXiv 2410.19313, Section 4).

    A parameter's moments are read into float32, used and packed again before the next parameter's are read, so that a
    step's peak holds the moments of one parameter in full. The state is 2 bytes per parameter and 16 bytes per group.
    torchao has AdamW8bit and AdamWFp8, but compiles its step and does not expand.

    Parameters
    ----------
    params, lr, betas, eps, weight_decay
        As in torch.optim.AdamW.
    states
        ``"int8"`` (the second moment in unsigned integers), ``"fp8_e4m3"``, or ``"float32"``, which is
        torch.optim.AdamW (foreach=False, float32 parameters) bit for bit.
    group
        Neighbouring values that share a scale. Best a divisor of the rows' width: rows of an embedding differ in size,
        and a group that holds parts of several has a wide range, which leaves expansion less to gain.
    expand
        Whether a group is expanded to the range of the format. Without it, second moments in int8 that are below a
        500th of their group's largest become 0, and their updates enormous.
    """

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 1e-2, *, states: str = "int8", group: int = 128, expand: bool = True,
    ) -> None:  # fmt: skip
        checked_word("states", states, STATES)
        group = checked_whole("group", group, 1)
        for name, value in {"lr": lr, "eps": eps, "weight_decay": weight_decay}.items():
            checked_number(name, value)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        # among the settings of parameter groups, so that a loaded state is read as it was written
        super().__init__(params, {**defaults, "states": states, "group": group, "expand": expand})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict()`` gave, in the dtypes it has (torch would turn codes into floats)."""
        super().load_state_dict(state_dict)
        saved = chain.from_iterable(settings["params"] for settings in state_dict["param_groups"])
        own = chain.from_iterable(settings["params"] for settings in self.param_groups)
        for key, parameter in zip(saved, own, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                # cloned, since float32 moments are updated in place
                self.state[parameter][name] = value.to(parameter.device).clone() if torch.is_tensor(value) else value

    def _update(self, parameter: torch.Tensor, settings: dict[str, Any]) -> None:
        """torch's own order of operations, for equality to the last bit."""
        state = self.state[parameter]
        state["step"] = step = state.get("step", 0) + 1  # a plain number: tensors may be fake
        beta1, beta2 = settings["betas"]
        gradient = parameter.grad.float()  # type: ignore[union-attr]
        parameter.mul_(1 - settings["lr"] * settings["weight_decay"])
        first = _read(state, "exp_avg", parameter, settings).lerp_(gradient, 1 - beta1)
        second = _read(state, "exp_avg_sq", parameter, settings)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        denominator = second.sqrt().div_((1 - beta2**step) ** 0.5).add_(settings["eps"])
        parameter.addcdiv_(first, denominator, value=-settings["lr"] / (1 - beta1**step))
        del gradient, denominator
        _write(state, "exp_avg", first, settings)
        del first
        _write(state, "exp_avg_sq", second, settings)


def _read(state: dict[str, Any], name: str, parameter: torch.Tensor, settings: dict[str, Any]) -> torch.Tensor:
    """A moment in float32; the state itself where that is how it is kept."""
    if name not in state:
        return torch.zeros_like(parameter, dtype=torch.float32, memory_format=torch.preserve_format)
    if settings["states"] == "float32":
        return state[name]
    packed = QuantisedState(state[name], state[f"{name}_largest"], state[f"{name}_power"])
    return dequantise_state(packed, _FORMATS[name][settings["states"]], parameter.shape)


def _write(state: dict[str, Any], name: str, moment: torch.Tensor, settings: dict[str, Any]) -> None:
    if settings["states"] == "float32":
        state[name] = moment
        return
    form = _FORMATS[name][settings["states"]]
    packed = quantise_state(moment, form, settings["group"], expand=settings["expand"])
    state[name], state[f"{name}_largest"], state[f"{name}_power"] = packed
