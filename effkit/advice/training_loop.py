"""TrainingLoop: somebody's own training step, run as it is on a few batches, watched, and given back unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from effkit import activations, moe, padding
from effkit.account import Account
from effkit.activations import BACKWARD, FORWARD, OPTIMIZER, PEAK, Observation, observe
from effkit.advice import experts, families
from effkit.advice.examples import Examples, drawn, wait_ns, why_not_drawn
from effkit.advice.experts import ROUNDS, Experts
from effkit.advice.leaks import Kept, kept
from effkit.advice.levers import LEFT
from effkit.advice.overviews import Overview, ceilings, described
from effkit.advice.probing import Peaks, Step
from effkit.advice.step_hooks import listening
from effkit.advice.studies import Study
from effkit.device import Device
from effkit.padding import EPOCH_CELLS
from effkit.recording import capture
from effkit.restoring import unchanged
from effkit.timing import elapsed_ns, interleaved_ns, ratios_in_turn
from effkit.trace.names import DEVICE
from effkit.training import Loss
from effkit.units import readable

TIME = "Time of one step"
Call = Callable[[], object]
_IN_TURN = 5  # runs of each
_FEW = 6  # batches of a second calibration
_FEWEST, _MOST = 4, 16  # batches, unless their number is given
_BUDGET_NS = 400_000_000  # of them, run once
_MOST_ACCUMULATED = 64  # batches to one step of an optimizer
_REPEATS, _SLOW_NS = 3, 100_000_000  # runs of each batch; one fewer where a step takes longer
_PADDED = (families.PRODUCTS, families.ATTENTION, families.NORMS, families.OTHER, families.RECOMPUTATION)


class TrainingLoop(Study):
    """A training loop: ``step(batch)`` over a loader.

    ``model``, ``step`` and ``loss`` are as given; ``step`` takes a batch, and is run many times. ``batches`` are those
    that are studied, ``rhythm`` the first step from the loop's beginning in which an optimizer steps, and every how
    many it does (more than 1 where gradients are accumulated), ``examples`` what they were made of (None where the
    loader does not say), ``heard`` is what one step did, ``steps_ns`` the fastest time of each batch. ``waiting_ns`` is
    for the loader, per step; ``loop_ns`` the whole of the loop, run once: its steps are not the fastest.
    """

    def __init__(
        self, step: Callable[..., object], model: torch.nn.Module, loader: Any = None, *, loss: Loss | None = None,
        num_batches: int | None = None, num_ranks: int = 1, link_bytes_per_s: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__(f"{type(model).__name__}, a training step")
        self.model, self.loader, self.loss = model, loader, loss
        self.num_ranks, self.link_bytes_per_s = num_ranks, link_bytes_per_s
        self.step: Step = step if loader is not None else lambda _: step()
        self.unseen: list[str] = []
        self.examples: Examples | None = None
        self.optimizers: tuple[torch.optim.Optimizer, ...] = ()
        with self.held() as optimizers:
            first = self._drawn(1)[0]
            self.step(first)  # the optimizer makes its state, libraries choose their ways
            at_once = bool(optimizers)
            with listening(model) as self.heard:
                taken = elapsed_ns(partial(self.step, first))
            self.repeats = _REPEATS if taken < _SLOW_NS else _REPEATS - 1
            usual = _FEWEST if loader is None else max(_FEWEST, min(_MOST, _BUDGET_NS // taken))
            self.batches = self._drawn(num_batches or usual)
            if not (each_time := at_once and "optimizer" in self.heard.phases):
                with listening(model) as self.heard:
                    self.step(self.batches[-1])
            self._say_what_is_unseen()
            # the padding lab's account of these batches, which predicts other ones
            lengths_seen = self.examples is not None and self.examples.watched is not None
            self.epoch = self.measured_plan(None) if lengths_seen else None
            if self.epoch is not None:
                steps = self.epoch.calibration.steps
                self.steps_ns = [int(value) for value in steps[steps["whole"]].sort_values("batch")["dur_ns"]]
            else:
                calls = {number: partial(self.step, batch) for number, batch in enumerate(self.batches)}
                self.steps_ns = list(interleaved_ns(calls, self.repeats, min).values())
            self.waiting_ns, self.loop_ns = (
                (0.0, self.computing_ns) if loader is None else wait_ns(self.step, loader, len(self.batches))
            )
            self.rows_ns, self.num_operators = self._rows()
        self.rhythm = (1, 1) if each_time or not self.optimizers else self._rhythm()

    @contextmanager
    def held(self) -> Iterator[list[torch.optim.Optimizer]]:
        """Steps may be run inside; afterwards the model is as it was, and all that the step can reach. Yields the
        optimizers that have taken a step so far."""
        with unchanged(self.model, self.step, self.loss, self.loader) as given:
            self.unseen += [sentence for sentence in given.unseen if sentence not in self.unseen]
            yield given.optimizers
            self.optimizers = tuple(given.optimizers)

    @property
    def computing_ns(self) -> float:
        """Of one step, the mean of the batches' fastest."""
        return sum(self.steps_ns) / len(self.steps_ns)

    @property
    def largest(self) -> Any:
        """The batch that takes longest."""
        return self.batches[max(range(len(self.batches)), key=self.steps_ns.__getitem__)]

    def _drawn(self, num: int) -> list[Any]:
        """So many batches, and the examples that they were made of, where these can be put together anew."""
        if self.loader is None:
            return [None] * num
        if why_not_drawn(self.loader) is None:
            self.examples = drawn(self.loader, num)
            return self.examples.batches
        if not (batches := list(islice(self.loader, num))):
            raise ValueError("the loader is empty: there is no batch to study")
        return batches

    def _say_what_is_unseen(self) -> None:
        told = {
            "what is inside compiled modules: their operators are fused, and have no modules left":
                any(hasattr(module, "_orig_mod") for module in self.model.modules()),
            "the backward pass: no loss.backward() was heard, so that all of a step counts as forward":
                "backward" not in self.heard.phases,
            "the model's own forward: the step does not call it, so that levers on it may do nothing":
                self.heard.forwards == 0,
            "what uneven experts cost: on one rank they cost nothing; give num_ranks=":
                self.num_ranks < 2 and bool(experts.layers_of(self.model)),
        }  # fmt: skip
        why: str | None = "padding and the input pipeline: step() draws its own batches; give loader=, step(batch)"
        if self.loader is not None:
            why = why_not_drawn(self.loader) if self.examples is None else self.examples.why_unseen
        self.unseen += filter(None, [why, *(sentence for sentence, is_so in told.items() if is_so)])

    def measured_plan(self, also: padding.Plan | None) -> Account:
        """The batches as they were delivered, by the padding lab; with larger ones in the calibration, if given."""
        assert self.examples is not None
        return padding.measure(
            self.examples.plan, self.model, make_batch=self.examples.make_batch, step=self.step, repeats=self.repeats,
            also=also, num_batches=None if also is None else min(_FEW, len(self.batches)),
        )  # fmt: skip

    def _rows(self) -> tuple[dict[str, float], int]:
        """Where a step's time goes, by what operators do [ns], and how many it runs, on a device how often it launches:
        of a few batches, from short to long ones, on the clock of all plain steps, for the machine's speed drifts."""
        many, num, taken = len(self.batches), min(self.repeats, len(self.batches)), list[int]()
        by_time = sorted(range(many), key=self.steps_ns.__getitem__)
        chosen = [self.batches[by_time[(2 * i + 1) * many // (2 * num)]] for i in range(num)]

        def turn() -> None:
            taken.append(elapsed_ns(partial(self.step, chosen[len(taken) % num])))

        with listening(self.model) if self.heard.num_recomputed else nullcontext():
            # plain steps, one for the profiler to warm up, recorded steps, plain ones again
            seen = capture(turn, warmup=0, steps=num)
        before, after = taken[:num], taken[2 * num + 1 :]  # the later ones begin at the second batch
        plain_ns = sum(map(min, before, [after[-1], *after[:-1]]))
        on_device = seen.events["category"].isin(DEVICE)
        # a graph's kernels have one launch, an operator may be several deep before it launches
        launched = seen.events.loc[on_device, "correlation"].nunique() or (seen.events["category"] == "cpu_op").sum()
        rows = families.rows_ns(seen, plain_ns)
        return {name: value * self.computing_ns / plain_ns for name, value in rows.items()}, int(launched) // num

    @cached_property
    def account(self) -> Account:
        """Time of one step, the mean of the batches."""
        rows = dict(self.rows_ns)
        if self.epoch is not None:
            of_padding = self.epoch.frame["value"]["padding"] / len(self.steps_ns)
            padded = sum(rows.get(name, 0.0) for name in _PADDED)
            left = max(0.0, 1 - of_padding / padded) if padded else 1.0
            rows = {name: value * left if name in _PADDED else value for name, value in rows.items()}
            rows[families.PADDING] = padded * (1 - left)
        if self.waiting_ns:
            rows[families.DATA] = self.waiting_ns
        rows = {name: rows[name] for name in families.ROWS if rows.get(name, 0) >= 1}
        num_examples = len(self.examples.items) if self.examples else None
        basis = {name: "derived" if name == families.PADDING else "measured" for name in rows}
        return Account.of(
            TIME, "ns", {name: round(value) for name, value in rows.items()}, basis=basis,
            total=round(self.computing_ns + self.waiting_ns),
            source=f"the wall clock: fastest of {self.repeats} runs or more of each of {len(self.steps_ns)} batches, "
                   "and the loader's time between them",
            setting={"num_steps": len(self.steps_ns), "num_examples": num_examples},
        )  # fmt: skip

    @cached_property
    def _steady(self) -> tuple[Observation, Kept]:
        with self.held():
            self.settle(self.largest)
            peaks = self.peaks

            def run(enter: Callable[[str], None]) -> None:
                enter(FORWARD)
                phases = {"backward": BACKWARD, "optimizer": OPTIMIZER}
                with listening(self.model, lambda phase: enter(phases[phase])):
                    self.step(self.largest)

            observed = observe(run, self.model, lambda: peaks.there(self.largest, let_go=peaks.let_go))
            return observed, kept(self.step, self.largest, self.model.parameters(), self.rhythm[1])

    @property
    def observed(self) -> Observation:
        """The step of the largest batch, every operator followed and every allocation recorded."""
        return self._steady[0]

    @property
    def kept(self) -> Kept:
        """What stays from step to step."""
        return self._steady[1]

    @cached_property
    def lab_base(self) -> Account:
        """The activation lab's account of the batch that takes longest, every lever timed.

        ValueError when the lab cannot run this model's step: the output has no loss, say.
        """
        own = [type(optimizer) for optimizer in self.optimizers if type(optimizer) is not torch.optim.AdamW]
        make = partial(own[0], **self.optimizers[0].defaults) if own else None
        return activations.measure(self.model, self.largest, loss=self.loss, optimizer=make, time_levers=True)

    def _rhythm(self) -> tuple[int, int]:
        """The first step in which an optimizer steps, and every how many it does; 1 and 1 where none is heard."""
        steps: list[int] = []
        number = 0
        with self.held():
            hook = register_optimizer_step_post_hook(lambda *_: steps.append(number))
            try:
                for number in range(1, _MOST_ACCUMULATED + 1):  # noqa: B007  (read by the hook)
                    self.step(self.largest)
                    if len(found := sorted(set(steps))) == 2:
                        return found[0], found[1] - found[0]
            finally:
                hook.remove()
        return 1, 1

    def settle(self, batch: Any) -> None:
        """Run steps of this batch until the next is one in which an optimizer steps, and has its state; from the
        beginning of what is :meth:`held`."""
        first, period = self.rhythm
        for _ in range(first + period - 1):
            self.step(batch)

    @property
    def peaks(self) -> Peaks:
        """Peaks of this step on other batches; ask while it is :meth:`held`."""
        return Peaks(self.step, self.model, self.optimizers, let_go=self.heard.let_go is True, settle=self.settle)

    @cached_property
    def memory(self) -> Account:
        """Peak of the step that takes longest, by what fills it."""
        step = self.observed
        return Account.of(PEAK, "bytes", step.rows, total=step.peak_bytes, source=step.source)

    @cached_property
    def experts(self) -> Experts | None:
        """Its mixture-of-experts layers and their loads; None where there are none."""
        if not experts.layers_of(self.model):
            return None
        with self.held():
            return experts.watched(self.model, [partial(self.step, batch) for batch in self.batches])

    @cached_property
    def expert_layer(self) -> Account:
        """One of them, by the MoE lab, on ``num_ranks`` ranks."""
        assert self.experts is not None
        return moe.measure(self.experts.setting(self.num_ranks), num_ranks=self.num_ranks, num_rounds=ROUNDS,
                           link_bytes_per_s=self.link_bytes_per_s)  # fmt: skip

    def _look(self) -> Overview:
        flops, half = self.observed.forward_flops()
        longest_ns = max(self.steps_ns)
        real = None if self.epoch is None else float(self.epoch.companion(EPOCH_CELLS).share["real"])
        near = partial(
            ceilings, step_ns=longest_ns, forward_flops=flops + half, half=half > flops, real_frac=real,
            num_operators=self.num_operators, peak_bytes=self.memory.total,
        )  # fmt: skip
        frame = near(Device.here())
        if frame["reached_frac"].iloc[0] > 1:  # the device was measured while something else ran on it
            frame = near(Device.here(refresh=True))
        return Overview((self.account, self.memory), frame, tuple(self._found()), tuple(self.unseen))

    def _found(self) -> list[str]:
        found = [described(self.model)]
        if self.epoch is not None:
            found.append(f"{self.epoch.companion(EPOCH_CELLS).share['padding']:.0%} of the input cells are padding")
        if self.heard.num_recomputed:
            found.append(f"{self.heard.num_recomputed} modules are computed a second time in backward")
        if self.experts is not None:
            share = self.experts.popularity
            found.append(f"expert {share.argmax()} of {len(share)} gets {share.max():.0%} of the tokens")
        if self.kept.growth_bytes > 1024:
            found.append(f"{readable(self.kept.growth_bytes, 'bytes')} stay in memory after every step")
        return found

    def in_turn(self, now: Sequence[Call], then: Sequence[Call]) -> Account:
        """Time of the calls ``then`` over that of the calls ``now``, in turn, the middle one of several runs each."""
        first, *calls = [partial(elapsed_ns, call) for call in (now[0], *now, *then)]
        with self.held():
            _, ratios = ratios_in_turn(first, calls, lambda done: range(len(calls) * (len(done[0]) < _IN_TURN)))
        times = np.median(ratios, axis=1)
        return self.relative(float(times[len(now) :].sum() / times[: len(now)].sum()))

    def relative(self, computing_ratio: float, waiting_ns: float | None = None) -> Account:
        """Its time per step, with its computing scaled by a measured ratio, its waiting as given [ns]."""
        waiting = self.waiting_ns if waiting_ns is None else waiting_ns
        total = round(self.computing_ns * computing_ratio + waiting)
        return Account.of(
            TIME, "ns", {LEFT: total}, total=total, setting=dict(self.account.setting),
            source="the wall clock, relative to the step as it is, run in turn",
        )  # fmt: skip
