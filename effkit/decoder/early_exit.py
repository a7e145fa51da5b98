"""exit_at(): a decoder cut to a depth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from effkit.decoder.module_roles import layers

# what encoder-decoders call it; others: num_hidden_layers
_DEPTHS = ("decoder_layers", "num_decoder_layers", "decoder_num_hidden_layers")


@contextmanager
def exit_at(model: Any, depth: int) -> Iterator[None]:
    """Let the decoder of a transformers model run only its first ``depth`` layers in this context.

    Then come its last norm and its output layer, as after all layers (nested sub-networks that share parameters:
    SortedNet, arXiv 2309.00255). ``model(...)`` and ``model.generate(...)`` both do, with a cache of ``depth`` layers,
    and ``model.parameters()`` leaves out the layers above. Afterwards, also after an error, the model is as before. A
    cache that was filled at one depth does not serve another. ValueError when there is no such depth.

    Parameters
    ----------
    model
        Decoder-only, or an encoder-decoder, whose encoder stays whole.
    depth
        1 to the number of its decoder layers.

    Examples
    --------
    >>> from effkit.models import text
    >>> model = text(layers=4, hidden=32, heads=2)
    >>> with exit_at(model, 2):
    ...     logits = model(**model.random_batch(1, 8)).logits  # [1, 8, 1000]
    """
    check_depth(model, depth)
    whole = layers(model)
    owner, name = next(
        (module, name) for module in model.modules() for name, child in module._modules.items() if child is whole
    )
    # caches are made with as many layers as the configuration says, and some decoders count by it
    config: Any = model.config
    attribute = next((key for key in _DEPTHS if config.is_encoder_decoder and hasattr(config, key)), None)
    if attribute is None:
        config, attribute = config.get_text_config(decoder=True), "num_hidden_layers"
    before = getattr(config, attribute)
    try:
        owner._modules[name] = whole[:depth]
        setattr(config, attribute, depth)
        yield
    finally:
        owner._modules[name] = whole
        setattr(config, attribute, before)


def check_depth(model: Any, depth: int) -> None:
    """Raise ValueError where the decoder of ``model`` has no such depth."""
    num_layers = len(layers(model))
    if not 1 <= depth <= num_layers:
        raise ValueError(
            f"depth is {depth}, expected 1 to {num_layers}, the decoder layers of this {type(model).__name__}."
        )
