"""Which module of a generating model does what: encoder, attention, feed-forward, output layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

ENCODER = "encoder"
ENCODER_LAYER = "encoder layer"
LAYER = "decoder layer"
CROSS_KV = "cross-attention keys/values"
SELF = "self-attention"
CROSS = "cross-attention"
FFN = "feed-forward"
OUTPUT = "output layer"
# What is left of a layer, of a step, and between two steps
NORMS, EMBEDDING, BETWEEN = "norms and sums", "embedding and final norm", "sampling and host"

# Names that transformers gives to the children of a layer, in lower case.
_NAMES = (
    (CROSS, ("encoder_attn", "encdecattention", "crossattention", "cross_attn", "cross_attention")),
    (SELF, ("self_attn", "selfattention", "self_attention", "attn", "attention", "mixer")),
    (FFN, ("mlp", "feed_forward", "ffn", "densereludense", "block_sparse_moe", "moe", "fc1", "fc2")),
)
_KEYS_VALUES = ("k_proj", "v_proj", "k", "v")


@dataclass(frozen=True)
class Part:
    """One module and what it is; ``layer`` is the number of its layer, -1 outside of layers."""

    name: str
    layer: int
    module: nn.Module


def parts(model: Any) -> list[Part]:
    """The parts of a transformers model that have a module of their own, in the order of a step.

    A feed-forward that is no module is told by its first and last matrix: two Parts of one layer. What has an unknown
    name is left out, and its time stays with its layer. Raises ValueError when the decoder holds no list of like
    layers.
    """
    modules = []
    if getattr(model.config, "is_encoder_decoder", False):
        whole = model.get_encoder()
        modules.append(Part(ENCODER, -1, whole))
        modules += [Part(ENCODER_LAYER, number, layer) for number, layer in enumerate(like_layers(whole) or ())]
    for number, layer in enumerate(layers(model)):
        modules.append(Part(LAYER, number, layer))
        modules += [Part(name, number, module) for name, module in of_layer(layer)]
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return modules if output is None else [*modules, Part(OUTPUT, -1, output)]


def layers(model: Any) -> nn.ModuleList:
    """The layers that every step runs; raises ValueError when the decoder holds no list of like layers."""
    stack = like_layers(model.get_decoder() if hasattr(model, "get_decoder") else model)
    if stack is None:
        raise ValueError(
            f"found no list of like decoder layers in {type(model).__name__}; measure a step(token, cache)"
        )
    return stack


def like_layers(stack: nn.Module) -> nn.ModuleList | None:
    """The longest list of layers of one class with an attention or a feed-forward in them."""
    lists = [module for module in stack.modules() if isinstance(module, nn.ModuleList)
             and len({type(layer) for layer in module}) == 1 and any(True for _ in of_layer(module[0]))]  # fmt: skip
    return max(lists, key=len) if lists else None


def of_layer(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Parts of a layer: the outermost modules that a name tells, and apart the keys and values of cross-attention."""
    outermost: list[str] = []
    for path, module in layer.named_modules():
        name = path.rpartition(".")[2].lower()
        part = next((part for part, names in _NAMES if name in names), None)
        if part is None or any(path.startswith(outer + ".") for outer in outermost):
            continue
        outermost.append(path)
        yield part, module
        if part == CROSS:
            for key, child in module.named_modules():
                if key.rpartition(".")[2] in _KEYS_VALUES:
                    yield CROSS_KV, child
