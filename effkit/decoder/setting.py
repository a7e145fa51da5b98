"""Setting: one way to generate, with everything that can be asked what-if."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

SWITCH = ("off", "on")
DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes of a value


@dataclass(frozen=True)
class Setting:
    """One way to generate.

    Attributes
    ----------
    decoder_layers, encoder_layers
        Depths; no encoder: 0.
    width
        Values per token between layers; heads and feed-forward go with it.
    batch, num_steps, input_length
        Sequences, tokens generated for each, and the length of the input [cells of the model's input: frames, tokens].
    kv_heads
        Key-value heads of self-attention; fewer than query heads share them (GQA, arXiv 2305.13245).
    cache
        ``"off"``: every step computes all positions anew.
    dtype, weight_bits
        Format of weights and values; bits of a weight where they are fewer (0: as ``dtype`` says).
    num_beams
        Beams of a beam search; 1 is greedy.
    exit_layer
        Stop each step after so many decoder layers (0: none); weights stay in memory.
    compiled
        A static cache and a compiled step, or a CUDA graph: launches cost nothing.
    num_draft, acceptance, draft_frac
        Speculative decoding: tokens drafted per cycle (0: none), the share of them that the model accepts, and the time
        of a draft's step over the model's.
    hold_parameters
        ``"on"``: as many encoder layers as keep the number of parameters.
    """

    decoder_layers: int
    encoder_layers: int = 0
    width: int = 0
    batch: int = 1
    num_steps: int = 20
    input_length: int = 0
    kv_heads: int = 1
    cache: str = "on"
    dtype: str = "float32"
    weight_bits: int = 0
    num_beams: int = 1
    exit_layer: int = 0
    compiled: str = "off"
    num_draft: int = 0
    acceptance: float = 0.8
    draft_frac: float = 0.2
    hold_parameters: str = "off"

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is a whole number, at least {least}; given: {value!r}")
        for name, words in _WORDS.items():
            if getattr(self, name) not in words:
                raise ValueError(f"{name} is one of {', '.join(words)}; given: {getattr(self, name)!r}")
        if not 0 <= self.acceptance <= 1:
            raise ValueError(f"acceptance is a share from 0 to 1; given: {self.acceptance}")
        if self.draft_frac < 0:
            raise ValueError(f"draft_frac is at least 0; given: {self.draft_frac}")
        if self.exit_layer > self.decoder_layers:
            raise ValueError(
                f"exit_layer={self.exit_layer} lies behind the last of {self.decoder_layers} decoder layers; take fewer"
            )
        if self.weight_bits not in (0, 2, 3, 4, 8, 16, 32):
            raise ValueError(f"weight_bits is 0 (as dtype says), 2, 3, 4, 8, 16 or 32; given: {self.weight_bits}")
        if self.num_draft and (self.encoder_layers or self.batch > 1):
            raise ValueError("speculative decoding is for one sequence of a decoder-only model; take num_draft=0")
        if self.num_draft and self.num_beams > 1:
            raise ValueError("speculative decoding is greedy: take num_beams=1 or num_draft=0")

    def change(self, changes: Mapping[str, Any]) -> Setting:
        """A copy with some of it changed.

        Raises
        ------
        ValueError
            For an unknown name, or a value that cannot be.
        """
        known = [field.name for field in fields(self)]
        if unknown := sorted(set(changes) - set(known)):
            raise ValueError(f"unknown: {', '.join(unknown)}; a generation has {', '.join(known)}")
        return replace(self, **changes)

    def plain(self) -> dict[str, Any]:
        """Name -> value."""
        return asdict(self)

    @property
    def rows(self) -> int:
        """Sequences that a step computes."""
        return self.batch * self.num_beams

    @property
    def depth(self) -> int:
        """Decoder layers that a step computes."""
        return self.exit_layer or self.decoder_layers


_LEAST = {"decoder_layers": 1, "encoder_layers": 0, "batch": 1, "num_steps": 1, "input_length": 0, "kv_heads": 1,
          "num_beams": 1, "exit_layer": 0, "num_draft": 0, "weight_bits": 0, "width": 0}  # fmt: skip
_WORDS = {"cache": SWITCH, "compiled": SWITCH, "hold_parameters": SWITCH, "dtype": tuple(DTYPES)}
