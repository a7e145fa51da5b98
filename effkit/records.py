"""Record: figures as plain data, as Markdown, and as scalars for whatever tracks a run."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from effkit.arguments import described
from effkit.whole_files import write_text

VERSION = 1  # of what to_dict() gives; docs/data.md describes it
_LARGEST_BYTES = 2**28  # of a file of JSON that is read


class Record:
    """What holds figures. A subclass has ``_plain()``, ``_of_plain()`` and ``_scalars()``, and says its Markdown."""

    def to_dict(self) -> dict[str, Any]:
        """Everything that this says, in values that JSON has; ``schema`` names the type and the version of its form.

        Times are in ns, sizes in bytes; a key's unit is in its name, or in ``unit`` beside it.
        """
        return {"schema": f"effkit {type(self)._kind()} {VERSION}", **plain(self._plain())}

    def to_json(self, path: str | Path | None = None) -> str:
        """:meth:`to_dict` as JSON text, and into a file where a path is given: whole, or not at all."""
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
        if path is not None:
            write_text(Path(path), text + "\n", f"{self._kind()}.json")
        return text

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The other way. ValueError for what is no such data, or of a newer version."""
        if not isinstance(data, Mapping):
            raise ValueError(f"from_dict() takes what to_dict() gave; given: {described(data)}")
        kind, _, version = str(data.get("schema", "")).rpartition(" ")
        if kind != f"effkit {cls._kind()}":
            raise ValueError(f"from_dict() takes “effkit {cls._kind()}”; this says {data.get('schema')!r:.80}")
        if not version.isdecimal() or int(version) > VERSION:
            raise ValueError(f"this is of version {version:.20}, and this effkit reads up to {VERSION}: upgrade effkit")
        try:
            return cls._of_plain(data)
        except (KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ValueError(f"this is no complete “effkit {cls._kind()}”: {reason}") from error

    @classmethod
    def from_json(cls, source: str | Path) -> Self:
        """From the text that :meth:`to_json` gave, or from a file (a ``Path``) that holds it."""
        if isinstance(source, Path):
            if source.stat().st_size > _LARGEST_BYTES:
                raise ValueError(f"{source} is larger than {_LARGEST_BYTES:,} bytes: it is no such file")
            source = source.read_text(encoding="utf-8")
        try:
            data = json.loads(source)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"from_json() takes what to_json() gave; this is no JSON: {error}") from error
        return cls.from_dict(data)

    def to_markdown(self) -> str:
        """As GitHub, a pull request or a chat shows it."""
        raise NotImplementedError

    def log_to(self, run: Any, step: int | None = None) -> dict[str, float]:
        """Log every figure to a run of W&B, MLflow or Lightning, or to TensorBoard's writer; returns what was logged.

        Anything with ``add_scalar(name, value, step)``, ``log_metrics(figures, step=step)`` or
        ``log(figures, step=step)`` will do. Names are like ``effkit/time_of_one_step/padding_ns``: the account, the
        row, and the unit. TypeError for anything else.
        """
        figures = {f"effkit/{name}": value for name, value in self._scalars() if math.isfinite(value)}
        if callable(add := getattr(run, "add_scalar", None)):
            for name, value in figures.items():
                add(name, value, step)
        elif callable(log := getattr(run, "log_metrics", getattr(run, "log", None))):
            log(figures, step=step)
        else:
            raise TypeError(
                "log_to() takes a run with log() or log_metrics(), or a writer with add_scalar(); given: "
                + described(run)
            )
        return figures

    @classmethod
    def _kind(cls) -> str:
        return cls.__name__.lower()

    def _plain(self) -> dict[str, Any]:
        raise NotImplementedError

    @classmethod
    def _of_plain(cls, data: Mapping[str, Any]) -> Self:
        raise NotImplementedError

    def _scalars(self) -> Iterable[tuple[str, float]]:
        raise NotImplementedError


def plain(value: Any) -> Any:
    """The value as JSON has it: what is not a number there (NaN, <NA>, infinite) is null, what it lacks is text."""
    if isinstance(value, Record):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(each) for each in value]
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:  # a number of numpy's
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return None if str(value) in ("<NA>", "NaT") else str(value)


def named(*words: object) -> str:
    """A name for a figure, which every tracker accepts: ``time_of_one_step``.

    >>> named("Time of one step, in ns")
    'time_of_one_step_in_ns'
    """
    return re.sub(r"[^a-z0-9]+", "_", " ".join(map(str, words)).lower()).strip("_")
