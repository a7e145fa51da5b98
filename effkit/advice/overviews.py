"""Overview: time and memory of a step on one page, beside what this device can do, and what could not be seen."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from effkit import markup
from effkit.account import Account
from effkit.device import Device
from effkit.markup import Cell
from effkit.records import Record, named
from effkit.units import readable

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes

MFU_DEFINITION = (
    "model FLOPs utilisation = 3 x (2 per multiply-add of every matrix product, convolution and attention of the "
    "forward pass, as run) / (time of a step x measured matrix rate). Padding is included, attention counts in full "
    "where the operator computes it in full, recomputation is left out (PaLM, arXiv 2204.02311, appendix B, counts "
    "attention in full too)"
)
RECORDED_MFU_DEFINITION = (
    "2 per multiply-add of every recorded matrix product / (time of the steps x the datasheet's dense rate, of float32 "
    "TF32's). Convolutions and attention in one kernel are not counted, what is computed again is"
)

_KINDS = (
    ("attention", ("attention", "attn")),
    ("mixture of experts", ("expertparallel", "sparsemoeblock", "moe")),
    ("recurrent", ("lstm", "gru", "rnn", "mamba", "recurrent")),
    ("convolution", ("conv1d", "conv2d", "conv3d")),
)


@dataclass(frozen=True, eq=False)
class Overview(Record):
    """What a study saw, on one page.

    Attributes
    ----------
    accounts
        Time first, then memory where it was visible, then what else.
    ceilings
        How near the step comes to what the device can do: columns ``reached``, ``ceiling``, ``reached_frac``,
        ``definition``.
    found, unseen
        What kind of model and run this is; what was not visible, and how to make it so.
    """

    accounts: tuple[Account, ...]
    ceilings: pd.DataFrame
    found: tuple[str, ...]
    unseen: tuple[str, ...]

    @property
    def time(self) -> Account:
        """The first account."""
        return self.accounts[0]

    @property
    def memory(self) -> Account:
        """The account in bytes. ValueError when memory was not visible."""
        for account in self.accounts:
            if account.unit == "bytes":
                return account
        raise ValueError("memory is not visible in this study: " + "; ".join(self.unseen))

    def plot(self, axes: Sequence[Axes] | None = None) -> Sequence[Axes]:
        """Draw the accounts under one another; returns the axes."""
        from effkit import view

        return view.page(self.accounts, axes)

    def to_markdown(self) -> str:
        """What was found, a table per account, the ceilings, and what was not visible."""
        found = "".join(f"- {markup.escaped(sentence)}\n" for sentence in self.found)
        unseen = "".join(f"- **not visible**: {markup.escaped(sentence)}\n" for sentence in self.unseen)
        rows = [[name, f"{row['reached_frac']:.1%}", row["ceiling_text"]] for name, row in self.ceilings.iterrows()]
        ceilings = [markup.markdown(["ceiling", "reached", "of"], rows)] if rows else []
        return "\n".join([found, *(account.to_markdown() for account in self.accounts), *ceilings, unseen])

    def _plain(self) -> dict[str, Any]:
        ceilings = self.ceilings.reset_index(names="of").to_dict("records")
        return {"accounts": self.accounts, "ceilings": ceilings, "found": self.found, "unseen": self.unseen}

    @classmethod
    def _of_plain(cls, data: Mapping[str, Any]) -> Overview:
        rows = pd.DataFrame(data["ceilings"], columns=["of", *NO_CEILINGS.columns]).set_index("of")
        texts = (tuple(map(str, data[name])) for name in ("found", "unseen"))
        return cls(tuple(map(Account.from_dict, data["accounts"])), rows, *texts)

    def _scalars(self) -> Iterator[tuple[str, float]]:
        for account in self.accounts:
            yield from account._scalars()
        for name, frac in self.ceilings["reached_frac"].items():
            yield f"ceilings/{named(name)}_frac", float(frac)

    def __repr__(self) -> str:
        near = (f"{name}: {row['reached_frac']:.1%} of {row['ceiling_text']}" for name, row in self.ceilings.iterrows())
        unseen = (f"not visible: {sentence}" for sentence in self.unseen)
        return "\n".join([*self.found, *map(repr, self.accounts), *near, *unseen])

    def _repr_html_(self) -> str:
        found = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in self.found)
        unseen = "".join(f"<li><b>not visible</b>: {html.escape(sentence)}</li>" for sentence in self.unseen)
        ceilings = [
            [Cell(html.escape(str(name)), attributes=f" title='{html.escape(row['definition'])}'"),
             f"{row['reached_frac']:.1%}", row["ceiling_text"]]
            for name, row in self.ceilings.iterrows()
        ]  # fmt: skip
        caption = "How near to this device's ceilings"
        table = markup.table(["", "reached", "of"], ceilings, caption=caption) if ceilings else ""
        return f"<ul>{found}{unseen}</ul>" + "".join(account._repr_html_() for account in self.accounts) + table


def ceilings(device: Device, *, step_ns: float, forward_flops: int, half: bool, real_frac: float | None,
             num_operators: int, peak_bytes: int | None) -> pd.DataFrame:  # fmt: skip
    """The distance of a step to what the device was measured to do."""
    dtype = "bfloat16" if half else "float32"
    rate = device.rate_flops_per_s[dtype]
    seconds = step_ns / 1e9
    text = f"{rate / 1e9:,.0f} GFLOP/s measured in {dtype}"
    rows: dict[str, tuple[float, float, str, str]] = {}
    rows["model FLOPs utilisation"] = 3 * forward_flops / seconds, rate, text, MFU_DEFINITION
    if real_frac is not None:
        rows["the same without padding"] = (3 * forward_flops * real_frac / seconds, rate, text,
                                            "as above, times the real share of the input cells")  # fmt: skip
    rows["launch floor"] = (
        num_operators * device.launch_overhead_ns, step_ns, readable(round(step_ns), "ns") + " of the step",
        f"{num_operators:,} operators x {device.launch_overhead_ns / 1e3:.1f} us, the time from one tiny operator to "
        "the next",
    )  # fmt: skip
    if peak_bytes is not None and device.memory_bytes:
        capacity = readable(device.memory_bytes, "bytes")
        rows["memory"] = peak_bytes, device.memory_bytes, capacity, "peak over capacity"
    return beside(rows)


def beside(rows: Mapping[str, tuple[float, float, str, str]]) -> pd.DataFrame:
    """What was reached of each ceiling: rows of reached, ceiling, the ceiling in words, the definition."""
    frame = pd.DataFrame.from_dict(rows, orient="index", columns=["reached", "ceiling", "ceiling_text", "definition"])
    frame.insert(2, "reached_frac", frame["reached"] / frame["ceiling"])
    return frame.rename_axis("of")


NO_CEILINGS = pd.DataFrame(columns=["reached", "ceiling", "reached_frac", "ceiling_text", "definition"])


def recorded_ceilings(products: pd.DataFrame, steps_ns: int) -> pd.DataFrame:
    """The recorded matrix products of these steps beside the datasheet's rate for them."""
    known = products[products["rate_flops_per_s"].notna()]
    flops = known["calls"] * known["flops"]
    if flops.empty:
        return NO_CEILINGS
    reached, rate = flops.sum() / steps_ns * 1e9, flops.sum() / (flops / known["rate_flops_per_s"]).sum()
    text = f"{rate / 1e12:,.0f} TFLOP/s that the datasheet names for these dtypes"
    return beside({"model FLOPs utilisation": (reached, rate, text, RECORDED_MFU_DEFINITION)})


def changes(before: Sequence[Account], after: Sequence[Account]) -> pd.DataFrame:
    """Row by row, the accounts of two overviews that have one title: before, after, difference, ratio."""
    others = {(account.title, account.unit): account for account in reversed(after)}
    tables = {account.title: account.compare(others[account.title, account.unit])
              for account in before if (account.title, account.unit) in others}  # fmt: skip
    if not tables:
        raise ValueError("these two studies have no account in common: compare studies of one kind of run")
    return pd.concat(tables, names=["account", "item"]).rename(columns={"value": "before", "other": "after"})


def described(model: torch.nn.Module) -> str:
    """The model's class and its parts, in words: the outermost modules whose class name says what they are.

    >>> import torch
    >>> described(torch.nn.Sequential(torch.nn.LSTM(2, 2), torch.nn.MultiheadAttention(2, 1)))
    'Sequential: 1 attention, 1 recurrent'
    """
    parts: list[str] = []
    # without transformers.pytorch_utils: its Conv1D is a linear layer
    names = {path: type(module).__name__.lower() for path, module in model.named_modules()
             if module is not model and type(module).__module__ != "transformers.pytorch_utils"}  # fmt: skip
    for kind, words in _KINDS:
        inside: list[str] = []
        for path, name in names.items():
            if any(word in name for word in words) and not any(path.startswith(outer + ".") for outer in inside):
                inside.append(path)
        parts += [f"{len(inside)} {kind}"] * bool(inside)
    config: Any = getattr(model, "config", None)
    for name in ("encoder_layers", "decoder_layers"):
        if isinstance(num := getattr(config, name, None), int) and getattr(config, "is_encoder_decoder", False):
            parts.append(f"{num} {name.replace('_', ' ')}")
    return f"{type(model).__name__}: {', '.join(parts)}"
