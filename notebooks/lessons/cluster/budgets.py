"""Tokens, copies and FLOPs on paper: MegaScience, Asymmetric conflict, Inversion-DPO, BLIP3-o."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from effkit import Account

# MegaScience (arXiv 2507.16812): mean tokens of an answer in its two data sets, by a blog about it, not looked up in
# the paper; the third is assumed
ANSWER_TOKENS: Mapping[str, int] = {"TextbookReasoning": 410, "MegaScience": 721, "long chains (assumed)": 4000}
INSTANCES = 1_250_000  # of MegaScience
QUESTION_TOKENS = 100  # assumed


@dataclass(frozen=True)
class Decoder:
    """A language model that answers one question at a time; memory bandwidth sets its pace. All assumed.

    ``weights_bytes`` and ``cache_bytes_per_token`` are read for every token, at ``bytes_per_s``.
    """

    weights_bytes: float = 15.2e9
    cache_bytes_per_token: float = 57_344.0
    bytes_per_s: float = 2e12

    def answer_ns(self, question: int, answer: int) -> int:
        """Time of an answer [ns]: for each token the weights, and the keys and values of all before it."""
        read = answer * self.weights_bytes + self.cache_bytes_per_token * (
            answer * question + answer * (answer - 1) / 2
        )
        return round(1e9 * read / self.bytes_per_s)


def answers(lengths: Mapping[str, int] = ANSWER_TOKENS, decoder: Decoder | None = None) -> pd.DataFrame:
    """What the length of answers costs, twice: in fine-tuning, and in every answer afterwards.

    Returns
    -------
    DataFrame
        Indexed by ``answers``: ``answer_tokens``; ``training_tokens`` of 1.25 million instances; ``answer_ns``;
        both over those of the row ``MegaScience`` (or the first): ``times_tokens``, ``times_time``.
    """
    decoder = decoder or Decoder()
    if not lengths or min(lengths.values()) < 1:
        raise ValueError(f"answers have at least 1 token; given: {dict(lengths)}")
    rows = {
        name: {
            "answer_tokens": tokens,
            "training_tokens": INSTANCES * (QUESTION_TOKENS + tokens),
            "answer_ns": decoder.answer_ns(QUESTION_TOKENS, tokens),
        }
        for name, tokens in lengths.items()
    }
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("answers")
    unit = table.loc["MegaScience"] if "MegaScience" in table.index else table.iloc[0]
    table["times_tokens"] = table["training_tokens"] / unit["training_tokens"]
    table["times_time"] = table["answer_ns"] / unit["answer_ns"]
    return table


@dataclass(frozen=True)
class Recipe:
    """A pre-training: ``num_params`` of the model, of which ``active_params`` work on a token, and ``num_tokens``."""

    num_params: float
    active_params: float
    num_tokens: float


# Asymmetric conflict (arXiv 2502.11223): 20B tokens and 17B parameters, 5.5 times the tokens and 1.7 times the size
# before. What works on a token is assumed: a base of 13B, and before it one of several language modules of 2B.
OURS = Recipe(17e9, 13e9, 20e9)
BEFORE = Recipe(1.7 * 17e9, 15e9, 5.5 * 20e9)


def training_flops(recipe: Recipe, count: str = "all") -> Account:
    """6 N D [10^15 FLOPs]: 2 per parameter and token forward, 4 backward (Kaplan et al., arXiv 2001.08361).

    Parameters
    ----------
    recipe
        What is trained.
    count
        ``"all"`` parameters, or those that are ``"active"`` on a token, which is what is really computed.

    Raises
    ------
    ValueError
        For another word.
    """
    if count not in ("all", "active"):
        raise ValueError(f"count is {count!r}, expected 'all' or 'active'")
    n = recipe.num_params if count == "all" else recipe.active_params
    per_pass = round(2 * n * recipe.num_tokens / 1e15)
    return Account.of(
        "Pre-training", "PFLOPs", {"forward": per_pass, "backward": 2 * per_pass}, total=3 * per_pass,
        source=f"6 x {count} parameters x tokens", basis="derived" if count == "all" else "assumed",
    )  # fmt: skip


def recipes(before: Recipe = BEFORE, after: Recipe = OURS) -> pd.DataFrame:
    """How many times fewer: ``tokens``, ``parameters``, and the FLOPs by both counts, in the column ``times_fewer``."""
    rows = {
        "tokens": before.num_tokens / after.num_tokens,
        "parameters": before.num_params / after.num_params,
        "FLOPs, all parameters": training_flops(before).total / training_flops(after).total,
        "FLOPs, active parameters": training_flops(before, "active").total / training_flops(after, "active").total,
    }
    return pd.DataFrame({"times_fewer": rows}).rename_axis("what")


def preference_ledger(*, sampling_steps: int = 50, used_steps: int = 50) -> pd.DataFrame:
    """What one preference pair takes to train a diffusion model, by three ways. A backward counts as two forwards.

    Reward model: both pictures are sampled and scored, then policy and frozen reference pass over ``used_steps`` of
    each trajectory (policy gradients with a KL term; after arXiv 2305.13301). Diffusion-DPO (arXiv 2311.12908): one
    random noise level per picture, nothing is sampled. Inversion-DPO (arXiv 2507.11554), by our reading of its
    abstract: the reference inverts both pictures step by step, then as with the first on ``used_steps``. A reward model
    counts as one more copy, whatever its size.

    Returns
    -------
    DataFrame
        Indexed by ``way``: ``model_copies`` in memory, ``models_trained``, ``sampling``, ``scoring`` and ``training``
        [forwards of one picture], ``forwards`` of all, and ``forwards_per_signal``: per step that is learned from.

    Raises
    ------
    ValueError
        When ``used_steps`` is not between 1 and ``sampling_steps``.
    """
    if not 1 <= used_steps <= sampling_steps:
        raise ValueError(f"used_steps is {used_steps}, expected 1 to sampling_steps, {sampling_steps}")
    learned = 3 + 1  # policy forward and backward, and the reference
    counts = {  # copies, trained, sampling, scoring, steps learned from per picture
        "reward model": (3, 2, sampling_steps, 1, used_steps),
        "Diffusion-DPO": (2, 1, 0, 0, 1),
        "Inversion-DPO": (2, 1, sampling_steps, 0, used_steps),
    }
    rows = {}
    for way, (copies, trained, sampled, scored, steps) in counts.items():
        training = 2 * learned * steps
        forwards = 2 * (sampled + scored) + training
        rows[way] = {
            "model_copies": copies, "models_trained": trained, "sampling": 2 * sampled, "scoring": 2 * scored,
            "training": training, "forwards": forwards, "forwards_per_signal": forwards / (2 * steps),
        }  # fmt: skip
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("way")


def picture_targets(
    pixels: Sequence[int] = (256, 512, 1024), *, clip_tokens: int = 64, clip_channels: int = 1792, vae_stride: int = 8,
    patch: int = 2, vae_channels: int = 16,
) -> pd.DataFrame:  # fmt: skip
    """What a generator has to predict for a picture: features of CLIP, always as many, or latents of a VAE.

    BLIP3-o (arXiv 2505.09568) predicts 64 vectors (second-hand) whatever the size; their width, and
    stride, patch and channels of the VAE (a common one of today), are assumed.

    Returns
    -------
    DataFrame
        Indexed by ``pixels`` of a side: ``clip_tokens, vae_tokens, clip_numbers, vae_numbers``; ``times_tokens`` and
        ``times_pairs`` (of attention), VAE over CLIP.
    """
    if min(pixels, default=0) < vae_stride * patch:
        raise ValueError(f"pixels are {tuple(pixels)}, expected at least one patch of {vae_stride * patch}")
    rows = {}
    for side in pixels:
        latents = side // vae_stride
        tokens = (latents // patch) ** 2
        rows[side] = {"clip_tokens": clip_tokens, "vae_tokens": tokens, "clip_numbers": clip_tokens * clip_channels,
                      "vae_numbers": latents**2 * vae_channels, "times_tokens": tokens / clip_tokens,
                      "times_pairs": (tokens / clip_tokens) ** 2}  # fmt: skip
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("pixels")
