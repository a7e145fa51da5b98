"""GenerationStudy: somebody's own call of ``generate``, run once to see how it is meant, then by the decoder lab."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from unittest import mock

from effkit import decoder
from effkit.account import Account
from effkit.advice.levers import Advice, Lever, ranked
from effkit.advice.overviews import Overview, beside, described
from effkit.advice.studies import Study
from effkit.decoder import CACHE, WEIGHTS
from effkit.device import synchronize
from effkit.lab import banded
from effkit.timing import interleaved_ns
from effkit.training import evaluating
from effkit.units import readable

SAME_TOKENS = "Time of the same tokens"
_FEWEST_STEPS = 8
_GROWTHS = (2, 4, 8)
_SHALLOW = 4  # decoder layers that a rebalanced model keeps (Canary, arXiv 2503.05931, section 3)
_APART_FRAC = 0.1
_REPEATS, _SLOW_NS = 5, 200_000_000  # timed calls, unless their number is given; two fewer where one takes longer


@dataclass
class Call:
    """How ``generate`` was called."""

    batch: int = 1
    num_steps: int = 0
    cache: str = "on"
    num_beams: int = 1
    wall_ns: int = 0
    inputs: dict[str, Any] = field(default_factory=dict)


class GenerationStudy(Study):
    """A generation: ``generate(inputs)``, or keyword arguments of ``model.generate``.

    ``call`` is what was asked for; ``base`` is it, measured part by part; ``known`` the calibration that predictions
    rest on: the base where it is greedy and cached, else such a one.
    """

    def __init__(self, generate: Any, model: Any, inputs: Any = None, *, repeats: int | None = None) -> None:
        super().__init__(f"{type(model).__name__}, a generation")
        self.model = model
        self._again = partial(called, generate, model, inputs)
        self.unseen = ["what the tokens say: times do not tell whether a lever changes the text"]
        self.call = observed(generate, model, inputs)
        self.inputs = self.call.inputs or inputs
        self.repeats = repeats or (_REPEATS if self.call.wall_ns < _SLOW_NS else _REPEATS - 2)
        sizes: dict[str, Any] = {"num_steps": self.call.num_steps, "batch": self.call.batch}
        measured = partial(decoder.measure, model, self.inputs, repeats=self.repeats)
        if self.call.cache == "on" and self.call.num_beams == 1:
            self.base = self.known = measured(**sizes)
        else:  # costs are fitted to greedy steps with a cache, half as many; and the call is told relative to these
            self.known = measured(**sizes | {"num_steps": max(_FEWEST_STEPS, self.call.num_steps // 2)})
            self.base = measured(base=self.known, cache=self.call.cache, num_beams=self.call.num_beams, **sizes)
        if abs(self.call.wall_ns / self.base.total - 1) > _APART_FRAC:
            once, in_lab = readable(self.call.wall_ns, "ns"), readable(self.base.total, "ns")
            self.unseen.append(f"what else your call does: it took {once} once, and {in_lab} as the lab runs it "
                               "(greedy, so many steps, warmed up)")  # fmt: skip

    def _look(self) -> Overview:
        held = {one.title: one.total for one in self.base.companions if one.title in (WEIGHTS, CACHE)}
        memory = Account.of("Memory of one generation", "bytes", held, total=sum(held.values()),
                            source="the parameters and the cache that the generation left")  # fmt: skip
        others = tuple(account for account in self.base.companions if account.title not in held)
        found = [described(self.model),
                 f"{self.call.batch} sequences, {self.call.num_steps} steps, cache {self.call.cache}, "
                 + ("greedy" if self.call.num_beams == 1 else f"{self.call.num_beams} beams")]  # fmt: skip
        if getattr(self.model.config, "is_encoder_decoder", False):
            found.append("an encoder that runs once, and a decoder that runs at every step")
        definition = ("the largest of: launches x their overhead, bytes over the rate of reading, FLOPs over the "
                      "matrix rate; over the time of the part in one step")  # fmt: skip
        ceilings = beside({str(part): (row["floor_ns"], row["time_ns"],
                                   f"{readable(round(row['time_ns']), 'ns')}, bound by {row['binds']}", definition)
                       for part, row in decoder.roofline(self.known).iterrows()})  # fmt: skip
        return Overview((self.base, memory, *others[:2]), ceilings, tuple(found), tuple(self.unseen))

    def _advise(self, goal: str, budget_bytes: int | None, **more: Any) -> Advice:
        if goal == "memory":
            note = "a generation's memory is its weights and its cache: see decoder.kv_cache_bytes and dtype"
            return Advice(goal, (), notes=(note,), **more)
        found = [*self._cached(), *self._rebalanced(), *(self._batched() if goal == "cost" else ())]
        return ranked(goal, found, **more)

    def _cached(self) -> list[Lever]:
        if self.call.cache == "on" or self.call.num_beams > 1:
            return []
        found = f"use_cache=False: each of {self.call.num_steps} steps computes all tokens before it anew"

        def run() -> Account:
            """The call as it was made, and with a cache, in turn."""
            calls = {"now": self._again, "then": partial(self._again, use_cache=True)}
            times = interleaved_ns(calls, self.repeats, min)
            total = round(self.base.total * times["then"] / times["now"])
            return Account.of(SAME_TOKENS, "ns", {"generation": total}, total=total,
                              source="the wall clock, relative to the call as it is, run in turn")  # fmt: skip

        lever = self._lever("cache", "keep keys and values", found, {"cache": "on"},
                            "model.generate(**inputs, use_cache=True)", (), lambda: {"use_cache": True})  # fmt: skip
        return [replace(lever, run=run)]

    def _rebalanced(self) -> list[Lever]:
        setting = self.known.calibration.setting
        if not setting.encoder_layers or setting.decoder_layers <= _SHALLOW or self.call.num_beams > 1:
            return []
        shares = (account.total for account in self.base.companions if account.title == "Decoder's share of the time")
        share = next(shares, None)
        found = f"{setting.decoder_layers} decoder layers run at each of {self.call.num_steps} steps, and "
        found += f"take {share / 1e6:.0%} of the time" if share is not None else "take most of the time"
        changes = {"decoder_layers": _SHALLOW, "hold_parameters": "on", "cache": self.call.cache}
        code = f"config = decoder.rebalance(model.config, decoder_layers={_SHALLOW})   # and train it"
        name = f"{_SHALLOW} decoder layers, the rest to the encoder"
        return [self._lever("decoder depth", name, found, changes, code,
                            ("another model: it has to be trained, and its quality compared",),
                            partial(decoder.rebalance, self.model.config, decoder_layers=_SHALLOW))]  # fmt: skip

    def _batched(self) -> list[Lever]:
        found = []
        for growth in _GROWTHS:
            batch = self.call.batch * growth
            lever = self._lever(
                "batch size", f"{batch} sequences at a time", "a step reads all weights, for however many sequences",
                {"batch": batch, "cache": self.call.cache}, "generate for several requests together",
                ("a request waits for others, and each step takes longer",), None, scale=1 / growth,
            )  # fmt: skip
            if not lever.predicted.in_range:
                break
            found.append(lever)
        return found

    def _lever(
        self, kind: str, name: str, found: str, changes: Mapping[str, Any], code: str, effects: tuple[str, ...],
        use: Callable[[], Any] | None, scale: float = 1.0,
    ) -> Lever:  # fmt: skip
        wanted = {"num_steps": self.call.num_steps, "batch": self.call.batch, **changes}

        def run() -> Account:
            return _scaled(decoder.measure(self.model, self.inputs, base=self.known, repeats=self.repeats, **wanted),
                           scale)  # fmt: skip

        predicted = _scaled(decoder.predict(self.known, **wanted), scale)
        if not predicted.predicted:  # the calibration's own rest: what it measured is known as well as its repetitions
            predicted = banded(predicted, self.known.calibration.trust.band_frac)
        return Lever(kind, name, found, _scaled(self.base, 1.0), predicted, code, effects, group=kind, run=run, use=use,
                     keep=self.receipts.append)  # fmt: skip


def called(generate: Any, model: Any, inputs: Any, **forced: Any) -> None:
    """Make somebody's call, with some of the keyword arguments of ``model.generate`` put in another's place."""
    native: Any = model.generate
    with (
        evaluating(model),
        mock.patch.object(model, "generate", lambda *args, **kwargs: native(*args, **(kwargs | forced))),
    ):
        own = id(getattr(generate, "__self__", None)) == id(model)
        if own or isinstance(generate, Mapping):
            model.generate(**(inputs or {}), **({} if own else generate))
        elif callable(generate):
            _ = generate(inputs) if inputs is not None else generate()
        else:
            given = type(generate).__name__
            raise TypeError(f"generate is a call, generate(inputs), or keyword arguments; given: {given}")


def observed(generate: Any, model: Any, inputs: Any) -> Call:
    """Run the call once, and note what it asks of the model.

    TypeError or ValueError when it cannot be called, or never comes to the model's ``generate``.
    """
    if not hasattr(model, "generate"):
        raise TypeError(f"model is a transformers model with generate(); given: {type(model).__name__}. For a step of "
                        "your own use decoder.measure(step)")  # fmt: skip
    call = Call()
    native = model.generate

    def noting(*args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("generation_config") or model.generation_config
        begun = time.perf_counter_ns()
        output = native(*args, **kwargs)
        synchronize()
        call.wall_ns = time.perf_counter_ns() - begun
        tokens = getattr(output, "sequences", output)
        prompt = kwargs.get("input_ids", args[0] if args else None)
        coded = getattr(model.config, "is_encoder_decoder", False)
        call.num_steps = int(tokens.shape[1]) - (1 if coded or prompt is None else int(prompt.shape[1]))
        returned = kwargs.get("num_return_sequences", config.num_return_sequences) or 1
        call.batch = int(tokens.shape[0]) // returned
        cached = kwargs.get("use_cache", config.use_cache)
        call.cache = "off" if cached is False else "on"
        call.num_beams = kwargs.get("num_beams", config.num_beams) or 1
        main = model.main_input_name
        value = kwargs.get(main, args[0] if args else None)
        call.inputs = {main: value} if value is not None else {}
        if (mask := kwargs.get("attention_mask")) is not None:
            call.inputs["attention_mask"] = mask
        return output

    with mock.patch.object(model, "generate", noting):
        called(generate, model, inputs)
    if call.num_steps < 1:
        raise ValueError("generate() made no token, or never came to model.generate: there is nothing to study")
    return call


def _scaled(account: Account, scale: float) -> Account:
    """A generation as time of the tokens that the base makes."""
    band: dict[str, Any] = {} if account.low is None or account.high is None else {
        "low": int(scale * account.low), "high": -int(-scale * account.high // 1)}  # fmt: skip
    frame = account.frame.assign(value=(scale * account.frame["value"]).round().astype("int64"))
    return replace(account, title=SAME_TOKENS, frame=frame, total=round(scale * account.total), companions=(),
                   calibration=None, **band)  # fmt: skip
