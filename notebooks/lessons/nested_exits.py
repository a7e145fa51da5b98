"""Sub-networks of a decoder's first layers (SortedNet, arXiv 2309.00255): their cost, one model for all."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from effkit.decoder.early_exit import check_depth, exit_at
from effkit.decoder.memory import in_cache, in_weights
from effkit.decoder.module_roles import layers
from effkit.device import synchronize
from effkit.models import text
from effkit.training import evaluating

_VOCABULARY, _LENGTH, _ROWS, _NOISE_FRAC = 16, 24, 32, 0.05  # of the task of train_nested


def exits(
    model: Any,
    depths: Sequence[int] | None = None,
    *,
    batch: int = 1,
    input_length: int = 64,
    num_steps: int = 20,
    repeats: int = 3,
    seed: int = 0,
) -> pd.DataFrame:
    """What each depth costs, and how often it would choose the same token as the whole model.

    Agreement says something of trained models only: between layers of random weights it is chance.

    Parameters
    ----------
    model
        A transformers model that generates.
    depths
        Depths to run; all unless given.
    batch, input_length
        Random input: rows, and tokens of a prefix (or, for speech, 10 ms frames).
    num_steps
        Tokens that each row generates.
    repeats
        Runs of each depth, in turn with the others; their median counts.
    seed
        Of the input.

    Returns
    -------
    Indexed by ``depth``: ``token_ns``, time of a generation over its tokens, the encoder or the prefix included
    [ns]; ``weight_bytes``, parameters in use [bytes]; ``cache_bytes``, keys and values at the end [bytes];
    ``agreement_frac``, positions at which the likeliest next token is that of the whole model, given the same random
    prefix of ``input_length`` (encoder-decoder: of ``num_steps``) tokens.

    Raises
    ------
    ValueError
        When there is no such depth, or the input cannot be made.
    """
    num_layers = len(layers(model))
    depths = range(1, num_layers + 1) if depths is None else depths
    for depth in depths:
        check_depth(model, depth)
    if min(batch, input_length, num_steps, repeats) < 1:
        given = f"{batch}, {input_length}, {num_steps} and {repeats}"
        raise ValueError(f"batch, input_length, num_steps and repeats are {given}, expected at least 1 each.")
    times_ns: dict[int, list[int]] = {depth: [] for depth in depths}
    rows: dict[int, dict[str, Any]] = {depth: {} for depth in depths}
    with evaluating(model):
        inputs = _inputs(model, batch, input_length, seed)
        prefix = _prefix(model, inputs, num_steps, seed)
        chosen = model(**prefix).logits.argmax(-1)
        for repeat in range(repeats + 1):  # the first warms up, and is where the bytes are counted
            for depth in depths:
                with exit_at(model, depth):
                    dur_ns, cache = _generate(model, inputs, num_steps)
                    if repeat:
                        times_ns[depth].append(dur_ns)
                        continue
                    agrees = model(**prefix).logits.argmax(-1) == chosen
                    rows[depth] = {
                        "token_ns": 0,
                        "weight_bytes": in_weights(model),
                        "cache_bytes": sum(in_cache(cache)),
                        "agreement_frac": float(agrees.double().mean()),
                    }
    for depth, durations in times_ns.items():
        rows[depth]["token_ns"] = round(statistics.median(durations) / num_steps)
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("depth")


def train_nested(
    model: Any = None, depths: Sequence[int] | None = None, num_steps: int = 80, seed: int = 0
) -> pd.DataFrame:
    """Train one model at all depths, as SortedNet does (arXiv 2309.00255), beside one trained at full depth only.

    Every step draws one depth and trains that; the twin sees the same batches at full depth. The task: random tokens
    of which each, but for 5% noise, follows from the two before it by a fixed table. The usual outcome: the model that
    was trained whole loses more with every layer that is cut off; the nested one hardly loses, down to depth 1.

    Parameters
    ----------
    model
        A decoder-only language model with at least 16 tokens; it is trained, in place. A Llama with 4 layers, 64 wide,
        unless given.
    depths
        Depths to train; all unless given.
    num_steps
        Training steps of each of the two.
    seed
        Of the model, the table, the batches and the drawn depths.

    Returns
    -------
    Indexed by ``depth``: ``nested_loss``, ``full_only_loss`` on batches not trained on [nats per token]; in ``attrs``,
    ``guessing_loss``, of one that knows nothing.

    Raises
    ------
    ValueError
        When there is no such depth, or the model is an encoder-decoder.
    """
    if model is None:
        model = text(layers=4, hidden=64, heads=4, vocabulary=_VOCABULARY, seed=seed)
    if model.config.is_encoder_decoder or model.config.get_text_config(decoder=True).vocab_size < _VOCABULARY:
        raise ValueError(
            f"the model is a {type(model).__name__}, expected a decoder-only language model with {_VOCABULARY} tokens "
            "or more; build one with effkit.models.text()."
        )
    num_layers = len(layers(model))
    depths = list(range(1, num_layers + 1) if depths is None else depths)
    for depth in depths:
        check_depth(model, depth)
    twin = copy.deepcopy(model)
    random = np.random.default_rng(seed)
    table = random.integers(_VOCABULARY, size=(_VOCABULARY, _VOCABULARY))
    batches = [_batch(table, random, model.device) for _ in range(num_steps)]
    drawn = random.choice(depths, num_steps)
    unseen = [_batch(table, random, model.device) for _ in range(4)]
    _train(model, batches, [int(depth) for depth in drawn])
    _train(twin, batches, [num_layers] * num_steps)
    rows = {d: {"nested_loss": _loss(model, unseen, d), "full_only_loss": _loss(twin, unseen, d)} for d in depths}
    result = pd.DataFrame.from_dict(rows, orient="index").rename_axis("depth")
    result.attrs = {"guessing_loss": float(np.log(_VOCABULARY))}
    return result


def _inputs(model: Any, batch: int, input_length: int, seed: int) -> dict[str, torch.Tensor]:
    """Random input of ``generate()``: one of the model's own making, or tokens [B, T]."""
    if hasattr(model, "random_batch"):
        made = model.random_batch(batch, input_length, seed)
        inputs = {name: tensor for name, tensor in made.items() if name != "labels"}
    elif model.main_input_name == "input_ids":
        inputs = {"input_ids": _tokens(model, batch, input_length, seed)}
    else:
        raise ValueError(
            f"{type(model).__name__} takes {model.main_input_name}, expected tokens or a model that makes its own "
            "batches; give it a method random_batch(batch_size, length, seed), as effkit.models have."
        )
    main = inputs[model.main_input_name]
    return {**inputs, "attention_mask": torch.ones(main.shape[:2], dtype=torch.long, device=main.device)}


def _tokens(model: Any, batch: int, length: int, seed: int) -> torch.Tensor:
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (batch, length), generator=generator).to(model.device)


def _prefix(model: Any, inputs: dict[str, torch.Tensor], num_steps: int, seed: int) -> dict[str, Any]:
    """Input of ``forward()`` that gives the decoder its tokens, so that depths differ by nothing but themselves."""
    prefix: dict[str, Any] = {**inputs, "use_cache": False}
    if model.config.is_encoder_decoder:
        batch = inputs[model.main_input_name].shape[0]
        prefix["decoder_input_ids"] = _tokens(model, batch, num_steps, seed + 1)
    return prefix


def _generate(model: Any, inputs: dict[str, torch.Tensor], num_steps: int) -> tuple[int, Any]:
    """Time of one greedy generation [ns], and its cache."""
    filler = 0 if model.generation_config.pad_token_id is None else model.generation_config.pad_token_id
    synchronize()
    start_ns = time.perf_counter_ns()
    made = model.generate(
        **inputs, max_new_tokens=num_steps, min_new_tokens=num_steps, do_sample=False, num_beams=1, use_cache=True,
        return_dict_in_generate=True, pad_token_id=filler,
    )  # fmt: skip
    synchronize()
    return time.perf_counter_ns() - start_ns, made.past_key_values


def _batch(table: Any, random: np.random.Generator, device: Any) -> torch.Tensor:
    """Tokens [B, T] of the task."""
    tokens = random.integers(_VOCABULARY, size=(_ROWS, _LENGTH))
    for position in range(2, _LENGTH):
        follows = random.random(_ROWS) >= _NOISE_FRAC
        ruled = table[tokens[:, position - 2], tokens[:, position - 1]]
        tokens[:, position] = np.where(follows, ruled, tokens[:, position])
    return torch.as_tensor(tokens, device=device)


def _train(model: Any, batches: Sequence[torch.Tensor], depths: Sequence[int]) -> None:
    update = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for tokens, depth in zip(batches, depths, strict=True):
        with exit_at(model, depth):
            model(input_ids=tokens, labels=tokens).loss.backward()
        update.step()
        update.zero_grad()


def _loss(model: Any, batches: Sequence[torch.Tensor], depth: int) -> float:
    with evaluating(model), exit_at(model, depth):
        return float(np.mean([float(model(input_ids=tokens, labels=tokens).loss) for tokens in batches]))
