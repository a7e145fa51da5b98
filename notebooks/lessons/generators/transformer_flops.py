"""FLOPs of a vision transformer by formula: what one more token costs, and what fewer epochs of pre-training save."""

from __future__ import annotations

import pandas as pd


def forward_flops(num_tokens: int, hidden: int, num_layers: int, *, conditioned: bool = False) -> int:
    """FLOPs of the blocks' products for one image, a multiplication and an addition counted as two.

    A block multiplies each token by ``12 hidden^2`` weights (4 for attention's projections, 8 for a feed-forward
    network of four times the width), and each pair of tokens twice over the width. A diffusion transformer's block also
    makes six vectors of the time and class, once per image (adaLN-Zero: Peebles and Xie, arXiv 2212.09748).

    Raises
    ------
    ValueError
        When a size is not positive.

    Examples
    --------
    >>> round(forward_flops(256, 1152, 28) / 2e9)  # DiT-XL/2 and SiT-XL/2; published: 118.6 billion multiply-adds
    118
    """
    if min(num_tokens, hidden, num_layers) < 1:
        raise ValueError(
            f"given {num_tokens} tokens, hidden {hidden}, {num_layers} layers; expected at least 1 of each"
        )
    per_token, per_pair = 2 * 12 * hidden**2, 2 * 2 * hidden
    block = num_tokens * per_token + num_tokens**2 * per_pair + (2 * 6 * hidden**2 if conditioned else 0)
    return num_layers * block


def added_token(num_tokens: int = 256, hidden: int = 1152, num_layers: int = 28) -> pd.Series[float]:
    """What one more token adds, as a fraction; SiT-XL/2 on 256-pixel images by default.

    Returns
    -------
    Series
        ``tokens``: one in so many; ``products`` per token: the same; ``attention``: of the pairs, twice as much;
        ``all``: of the whole forward pass, where what is done once per image grows not at all.
    """
    pairs = ((num_tokens + 1) ** 2 - num_tokens**2) / num_tokens**2
    before, after = (forward_flops(num, hidden, num_layers, conditioned=True) for num in (num_tokens, num_tokens + 1))
    one = 1 / num_tokens
    return pd.Series({"tokens": one, "products": one, "attention": pairs, "all": after / before - 1}, name="added_frac")


def epochs_saved(
    saved_frac: float = 0.5, *, pretraining_epochs: int = 800, fine_tuning_epochs: int = 100, added_frac: float = 0.0
) -> pd.Series[float]:
    """What fewer epochs of pre-training save of the whole way to a fine-tuned model, as a fraction of its FLOPs.

    An epoch of pre-training is taken to cost what one of fine-tuning does, so that epochs add up. That is near the
    truth where the encoder sees all tokens (SimMIM: Xie et al., arXiv 2111.09886) and the images are of one size.

    Parameters
    ----------
    saved_frac
        Of the epochs of pre-training; a claim, not a measurement.
    pretraining_epochs, fine_tuning_epochs
        Before; a common setting, not MTO's own.
    added_frac
        What the method adds to a step's FLOPs. Unknown for MTO: its abstract gives none.

    Returns
    -------
    Series
        ``of_pretraining`` and ``of_all``, each a fraction saved; negative when the method costs more than it saves.

    Raises
    ------
    ValueError
        For a fraction outside [0, 1].
    """
    if not 0 <= saved_frac <= 1:
        raise ValueError(f"saved_frac is {saved_frac}, expected a fraction between 0 and 1")
    after = pretraining_epochs * (1 - saved_frac) * (1 + added_frac)
    return pd.Series(
        {
            "of_pretraining": 1 - after / pretraining_epochs,
            "of_all": (pretraining_epochs - after) / (pretraining_epochs + fine_tuning_epochs),
        },
        name="saved_frac",
    )
