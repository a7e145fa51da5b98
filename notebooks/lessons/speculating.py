"""Speculative decoding (Leviathan et al., arXiv 2211.17192): what it should gain, and a run with a clock."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from effkit.account import Account
from effkit.decoder.accounting import TIME
from effkit.device import synchronize
from effkit.training import evaluating

DRAFT, VERIFY, REST = "draft", "verify", "cropping and sampling"


def expected_tokens(num_draft: int, acceptance: float) -> float:
    """Tokens that one cycle makes on average: (1 - a^(k+1)) / (1 - a), equation 1 of arXiv 2211.17192.

    A cycle drafts k (``num_draft``) tokens, keeps those before the first rejection, and adds one of the target model's
    own. ``acceptance``: a, probability in [0, 1] that a drafted token is accepted, for each independently.

    >>> expected_tokens(4, 0.0), expected_tokens(4, 0.5), expected_tokens(4, 1.0)
    (1.0, 1.9375, 5.0)
    """
    _check(num_draft, acceptance, least=0)
    return float(sum(acceptance**accepted for accepted in range(num_draft + 1)))  # the sum also holds at a = 1


def speed_up(num_draft: int, acceptance: float, draft_frac: float, verify_frac: float = 1.0) -> float:
    """Time of plain decoding over that of speculative decoding: theorem 3.8 of arXiv 2211.17192.

    (1 - a^(k+1)) / ((1 - a) (k c + v)), with v = 1 in the paper; k and a are those of :func:`expected_tokens`.
    ``draft_frac``: c, time of a step of the draft model over a step of the target model; may be above 1.
    ``verify_frac``: v, time in which the target model checks k + 1 tokens at once, over one of its steps. Near 1 where
    weights have to be read for each step, towards k + 1 where arithmetic binds.
    """
    if draft_frac < 0 or verify_frac <= 0:
        raise ValueError(
            f"draft_frac is {draft_frac} and verify_frac {verify_frac}, expected 0 or more, and more than 0: they are "
            "times over the time of one step of the target model."
        )
    return expected_tokens(num_draft, acceptance) / (num_draft * draft_frac + verify_frac)


def best_num_draft(
    acceptance: float, draft_frac: float, *, verify_frac: float = 1.0, extra_frac: float = 0.0, most: int = 64
) -> int:
    """The number of drafted tokens with the largest :func:`speed_up`: 0 where speculating only loses.

    Parameters
    ----------
    acceptance, draft_frac, verify_frac
        As there; checking k + 1 tokens takes ``verify_frac`` + k ``extra_frac`` steps of the target model.
    extra_frac
        What one more token to check costs, over a step.
    most
        Largest number to try: with acceptance 1 more are always better.

    Examples
    --------
    >>> best_num_draft(acceptance=0.8, draft_frac=0.1), best_num_draft(acceptance=0.3, draft_frac=0.5)
    (6, 0)
    """

    def gain(num: int) -> float:
        return speed_up(num, acceptance, draft_frac, verify_frac + num * extra_frac if num else 1.0)

    return max(range(most + 1), key=lambda num: (gain(num), -num))


def speculate(
    target: Any, draft: Any, *, batch: int = 1, num_steps: int = 64, num_draft: int = 4, acceptance: float = 0.8,
    seed: int = 0, input_length: int = 32,
) -> Account:  # fmt: skip
    """Run speculative decoding and say where its time went.

    Both models run as in earnest: the draft model step by step, the target model over ``num_draft`` + 1 tokens at once,
    both caches cropped after a rejection. Only whether a drafted token is accepted is not theirs to say: models with
    random weights agree by chance alone, so a seeded coin decides, with probability ``acceptance``. The time is real;
    the text is not the target model's. ValueError when a model or a number does not fit.

    Parameters
    ----------
    target, draft
        Decoder-only transformers models with one vocabulary and a cache that grows (DynamicCache).
    batch
        1: rows would be accepted to different lengths.
    num_steps
        Tokens to make; the last cycle may make more.
    num_draft
        Tokens drafted per cycle.
    acceptance
        Probability in [0, 1] that one is accepted.
    seed
        Of the prompt and of the coin.
    input_length
        Tokens of the random prompt, which both models have read before the clock starts.

    Returns
    -------
    Account
        In ns: ``draft``, ``verify`` and ``cropping and sampling``; its total is an outer clock's. In ``setting``:
        ``num_tokens`` made, ``num_cycles``, ``num_draft``, ``acceptance``, and ``accepted_frac``, what the coin gave:
        accepted tokens over those that were put to it (after a rejection none is).
    """
    _check(num_draft, acceptance, least=1)
    _check_run(batch, num_steps, input_length, num_draft, target, draft)
    if target.config.vocab_size != draft.config.vocab_size:
        raise ValueError(
            f"target and draft know {target.config.vocab_size} and {draft.config.vocab_size} tokens, expected as many: "
            "give two models with one vocabulary."
        )
    coin = np.random.default_rng(seed)
    spent_ns = {DRAFT: 0, VERIFY: 0, REST: 0}
    num_tokens = num_cycles = num_accepted = num_tossed = 0
    with evaluating(target, draft):
        caches = [_prefilled(model, input_length, seed) for model in (target, draft)]
        pending = torch.zeros(1, 1, dtype=torch.long, device=target.device)  # made, but in neither cache
        unseen = pending  # what the draft model has not read: after a whole draft was accepted, its last token too
        synchronize()
        start_ns = time.perf_counter_ns()
        while num_tokens < num_steps:
            drafted = []
            with _clocked(spent_ns, DRAFT):
                for _ in range(num_draft):
                    logits = draft(input_ids=unseen, past_key_values=caches[1], use_cache=True).logits
                    unseen = logits[:, -1:].argmax(-1)
                    drafted.append(unseen)
            with _clocked(spent_ns, VERIFY):
                block = torch.cat([pending, *drafted], dim=1)
                logits = target(input_ids=block, past_key_values=caches[0], use_cache=True).logits
            with _clocked(spent_ns, REST):
                chosen = logits.argmax(-1)  # [1, num_draft + 1]
                rejected = coin.random(num_draft) >= acceptance
                num = int(rejected.argmax()) if rejected.any() else num_draft
                pending = chosen[:, num : num + 1]
                caches[0].crop(num - num_draft)
                caches[1].crop(min(num + 1 - num_draft, 0))
                unseen = pending if num < num_draft else torch.cat([drafted[-1], pending], dim=1)
            num_tokens, num_cycles, num_accepted = num_tokens + num + 1, num_cycles + 1, num_accepted + num
            num_tossed += min(num + 1, num_draft)
        synchronize()
        total_ns = time.perf_counter_ns() - start_ns
    setting = {
        "num_tokens": num_tokens, "num_cycles": num_cycles, "num_draft": num_draft, "acceptance": acceptance,
        "accepted_frac": num_accepted / num_tossed, "input_length": input_length, "batch": batch,
    }  # fmt: skip
    return Account.of(TIME, "ns", spent_ns, total=total_ns, source="a clock around all cycles", setting=setting)


def _check(num_draft: int, acceptance: float, least: int) -> None:
    if num_draft < least or not 0 <= acceptance <= 1:
        raise ValueError(
            f"num_draft is {num_draft} and acceptance {acceptance}, expected at least {least} tokens, and a "
            "probability from 0 to 1."
        )


def _check_run(batch: int, num_steps: int, input_length: int, num_draft: int, *models: Any) -> None:
    if batch != 1:
        raise ValueError(
            f"batch is {batch}, expected 1: rows would be accepted to different lengths; run them in turn."
        )
    if num_steps < 1 or input_length < 1:
        raise ValueError(f"num_steps is {num_steps} and input_length {input_length}, expected at least 1 each.")
    for model in models:
        if model.config.is_encoder_decoder or model.get_output_embeddings() is None:
            raise ValueError(
                f"{type(model).__name__} is not a decoder-only language model, as expected; build one with "
                "effkit.models.text()."
            )
        longest = getattr(model.config, "max_position_embeddings", None)
        needed = input_length + num_steps + 2 * num_draft + 1
        if longest is not None and needed > longest:
            raise ValueError(
                f"input_length and num_steps are {input_length} and {num_steps}, which takes {needed} positions; "
                f"{type(model).__name__} has {longest}: make fewer tokens."
            )


def _prefilled(model: Any, input_length: int, seed: int) -> DynamicCache:
    """The model's cache after a random prompt."""
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(model.config.vocab_size, (1, input_length), generator=generator).to(model.device)
    cache = DynamicCache(config=model.config)
    model(input_ids=prompt, past_key_values=cache, use_cache=True)
    return cache


@contextmanager
def _clocked(spent_ns: dict[str, int], row: str) -> Iterator[None]:
    start_ns = time.perf_counter_ns()
    yield
    synchronize()
    spent_ns[row] += time.perf_counter_ns() - start_ns
