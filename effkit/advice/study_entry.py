"""study(): chooses the kind of study by what is given, and checks it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from effkit.advice.studies import Study
from effkit.arguments import LOSS, checked_amount, checked_function, checked_model, checked_step, checked_whole
from effkit.captured import Capture
from effkit.progress_bar import working


@working("Studying")
def study(
    step: Callable[..., object] | str | None = None, model: Any = None, loader: Any = None, *,
    generate: Any = None, inputs: Any = None, trace: str | Path | Capture | None = None,
    snapshot: str | Path | Capture | None = None,
    loss: Callable[[Any], Any] | None = None, num_batches: int | None = None, num_ranks: int | None = None,
    link_bytes_per_s: float | None = None, repeats: int | None = None,
) -> Study:  # fmt: skip
    """Look at one's own model as a whole: where its time and memory go, what would help, and by how much.

    Whatever is run, the model and its optimizers come out as they went in. The Study has ``overview()``, ``advise()``,
    ``compare(other)`` and ``report(path)``.

    ::

        study = ek.study(step=step, model=model, loader=loader)          # a training loop: step(batch)
        study = ek.study(generate=generate, model=model, inputs=inputs)  # a generation
        study = ek.study(trace="traces/", snapshot="memory.pickle")      # files alone

    TypeError when what was given is none of the three. ValueError for a training loop on one of several ranks: see
    :func:`effkit.advice.record`.

    Parameters
    ----------
    step, model, loader
        A training step ``step(batch)``, its module, and what yields batches; without a loader ``step()`` makes its own.
    generate, model, inputs
        A call ``generate(inputs)`` that comes to ``model.generate``, or keyword arguments of it.
    trace, snapshot
        A profiler trace or a folder with one per rank; a memory snapshot; either may be a Capture. ``step`` may then
        name the annotation that marks a step, as in :meth:`effkit.Capture.overview`.
    loss, num_batches
        Of a training loop: model output -> scalar, where the output does not hold one and memory is asked about;
        batches to study, as many as fit into a few seconds unless given.
    num_ranks, link_bytes_per_s
        Of a training loop: ranks that its experts will be on (1 unless given), and the links between them.
    repeats
        Of a generation: timed calls (5 unless given, 3 where one takes longer than 0.2 s).
    """
    files = trace is not None or snapshot is not None
    named = step if files and isinstance(step, str) else None
    kinds = {"step": step is not None and named is None, "generate": generate is not None, "trace or snapshot": files}
    given = [name for name, is_given in kinds.items() if is_given]
    if len(given) != 1:
        raise TypeError(
            "study() takes one of: step= with model= and loader=; generate= with model= and inputs=; trace= and "
            f"snapshot=; given: {' and '.join(given) or 'none of them'}"
        )
    options = checked_options(loss=loss, num_batches=num_batches, num_ranks=num_ranks,
                              link_bytes_per_s=link_bytes_per_s, repeats=repeats)  # fmt: skip
    if files:
        from effkit.advice.recorded_study import RecordedStudy

        return RecordedStudy(trace, snapshot, step=named, **options)
    if model is None:
        raise TypeError(f"study({given[0]}=...) takes model= as well: the module that is run")
    if generate is not None:
        from effkit.advice.generation_study import GenerationStudy

        return GenerationStudy(generate, model, inputs, **options)
    checked_model(model, peak=True)
    if not any(True for _ in model.parameters()):
        raise TypeError(f"{type(model).__name__} has no parameters: give model= the one that step() trains")
    checked_step(step, loader)
    assert callable(step)
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise ValueError(
            "this is one of several ranks, which have to take the same steps, and a study takes as many as it needs: "
            "let each rank call effkit.advice.record(folder, step, loader), then study(trace=folder)"
        )
    from effkit.advice.training_study import TrainingStudy

    return TrainingStudy(step, model, loader, **options)


def checked_options(**options: Any) -> dict[str, Any]:
    """Those of :func:`study` that are given. TypeError or ValueError for one that cannot be."""
    given = {name: value for name, value in options.items() if value is not None}
    for name in given.keys() & {"num_batches", "num_ranks", "repeats"}:
        given[name] = checked_whole(name, given[name], 1)
    if "link_bytes_per_s" in given:
        checked_amount("link_bytes_per_s", given["link_bytes_per_s"])
    checked_function("loss", given.get("loss"), LOSS)
    return given
