"""Call stacks become short texts, and the part of a training step they tell of; each distinct stack once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# What a stack tells of. NOTHING: there is none; OTHER: there is one, from none of the places known here; LIBRARY: the
# scratch space of cuBLAS, which stays for good once it is there.
NOTHING, OTHER, FORWARD, BACKWARD, OPTIMIZER, PARAMETER, INPUT, LIBRARY = range(8)

# (end of the file's path, names of functions there), in torch itself and in what moves batches to a device
_PLACES: Sequence[tuple[str, frozenset[str], int]] = (
    ("torch/autograd/graph.py", frozenset({"_engine_run_backward"}), BACKWARD),
    ("torch/autograd/__init__.py", frozenset({"backward", "grad"}), BACKWARD),
    ("torch/utils/checkpoint.py", frozenset({"unpack_hook", "backward"}), BACKWARD),  # computes a forward again
    ("torch/nn/modules/module.py", frozenset({"_call_impl"}), FORWARD),
    ("torch/nn/modules/module.py", frozenset({"_apply"}), PARAMETER),
    ("accelerate/utils/operations.py", frozenset({"send_to_device"}), INPUT),
    ("transformers/trainer.py", frozenset({"_prepare_input"}), INPUT),
    ("utilities/apply_func.py", frozenset({"move_data_to_device"}), INPUT),  # Lightning, Fabric
)
_NATIVE = {
    "torch::autograd::Engine::evaluate_function": BACKWARD,
    "at::cuda::getCurrentCUDABlasHandle": LIBRARY,
    "at::cuda::getCUDABlasLtWorkspace": LIBRARY,
}
_SAYS_NOTHING = frozenset({"_call_impl", "_wrapped_call_impl"})  # between a module and its forward
_FRAME_CHARS, _STACK_FRAMES = 120, 50


class Stacks:
    """Numbers for stacks: equal stacks have equal numbers. Frames must stay alive while stacks are numbered."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.roles: list[int] = []  # what an allocation made here is for
        self.parts: list[int] = []  # the part of the step that was running
        self._latest: tuple[Any, int] = None, -1
        self._by_identity: dict[tuple[int, ...], int] = {}
        self._by_frames: dict[tuple[int, ...], int] = {}
        self._frames: list[tuple[Any, ...]] = [()]  # three texts and what it tells; number 0 is nobody's
        self._frame_by_identity: dict[int, int] = {}
        self._frame_by_text: dict[tuple[str, str, int], int] = {}

    def number(self, frames: list[dict[str, Any]] | None) -> int:
        """The number of a stack, -1 for an empty one."""
        if not frames:
            return -1
        if frames is self._latest[0]:  # a free is asked for and completed by one stack
            return self._latest[1]
        same = tuple(map(id, frames))
        number = self._by_identity.get(same)
        if number is None:
            frame_number = self._frame_by_identity.get
            key = tuple([frame_number(id(frame)) or self._frame(frame) for frame in frames])
            if key not in self._by_frames:
                self._by_frames[key] = self._add(key)
            number = self._by_identity[same] = self._by_frames[key]
        self._latest = frames, number
        return number

    def _frame(self, frame: dict[str, Any]) -> int:
        file, name, line = frame["filename"].replace("\\", "/"), frame["name"], int(frame["line"])
        number = self._frame_by_text.setdefault((file, name, line), len(self._frames))
        if number == len(self._frames):
            texts = ("" if name in _SAYS_NOTHING else f"{_short(file)}:{line} {name}", "", name)
            if not _is_python(file):
                owner, _, runs = name.partition("::apply(")
                texts = ("", runs and owner.rpartition("::")[2], name.partition("(")[0])
            self._frames.append((*(text[:_FRAME_CHARS] for text in texts), _tells(file, name)))
        self._frame_by_identity[id(frame)] = number
        return number

    def _add(self, key: tuple[int, ...]) -> int:
        *texts, tells = zip(*(self._frames[number] for number in key), strict=True)
        # Python where there is any; else the nodes of the graph that ran backward; else C++
        readable = next(filter(any, texts), ())
        self.texts.append(" < ".join([text for text in readable if text][:_STACK_FRAMES]))
        self.roles.append(next((part for part in tells if part != OTHER), OTHER))
        # within a backward an optimizer may step, and a forward be computed again
        parts = (BACKWARD, OPTIMIZER, FORWARD, PARAMETER, INPUT)
        self.parts.append(next((part for part in parts if part in tells), OTHER))
        return len(self.texts) - 1


def _tells(file: str, name: str) -> int:
    """What one frame says about the part of the step, OTHER if nothing."""
    if not _is_python(file):
        return _NATIVE.get(name.partition("(")[0], OTHER)
    if "torch/optim/" in file:
        return OPTIMIZER
    default = FORWARD if name == "forward" else OTHER  # what every module calls it
    return next((phase for end, names, phase in _PLACES if name in names and file.endswith(end)), default)


def _is_python(file: str) -> bool:
    return file.endswith(".py") or file.startswith("<")  # "<string>", "<frozen ...>"


def _short(file: str) -> str:
    """A path from its package on, or its last two parts; but for torch's own, a package is said to be one."""
    packages = next((folder for folder in ("/site-packages/", "/dist-packages/") if folder in file), None)
    if packages is None:
        return "/".join(file.split("/")[-2:])
    inside = file.rpartition(packages)[2]
    return inside if inside.startswith("torch/") else f"site-packages/{inside}"
