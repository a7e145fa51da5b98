"""Setting: one way to generate, with everything that can be asked what-if."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from effkit.lab import changed, check, one_of, whole

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
    hold_parameters
        ``"on"``: as many encoder layers as keep the number of parameters.
    """

    decoder_layers: int = whole()
    encoder_layers: int = whole(0, least=0)
    width: int = whole(0, least=0)
    batch: int = whole(1)
    num_steps: int = whole(20)
    input_length: int = whole(0, least=0)
    kv_heads: int = whole(1)
    cache: str = one_of("on", words=SWITCH)
    dtype: str = one_of("float32", words=tuple(DTYPES))
    weight_bits: int = one_of(0, words=(0, 2, 3, 4, 8, 16, 32))
    num_beams: int = whole(1)
    exit_layer: int = whole(0, least=0)
    compiled: str = one_of("off", words=SWITCH)
    hold_parameters: str = one_of("off", words=SWITCH)

    def __post_init__(self) -> None:
        check(self)
        if self.exit_layer > self.decoder_layers:
            raise ValueError(
                f"exit_layer={self.exit_layer} lies behind the last of {self.decoder_layers} decoder layers; take fewer"
            )

    def change(self, **changes: Any) -> Setting:
        """This setting with these changes; None leaves a knob as it is.

        ValueError for a name that no setting has, or a value that cannot be.
        """
        return changed(self, changes)

    def plain(self) -> dict[str, Any]:
        """Name -> value."""
        return asdict(self)

    @property
    def bytes_per_weight(self) -> float:
        """As ``weight_bits`` says, or else ``dtype``."""
        return (self.weight_bits or 8 * DTYPES[self.dtype]) / 8

    @property
    def rows(self) -> int:
        """Sequences that a step computes."""
        return self.batch * self.num_beams

    @property
    def depth(self) -> int:
        """Decoder layers that a step computes."""
        return self.exit_layer or self.decoder_layers
