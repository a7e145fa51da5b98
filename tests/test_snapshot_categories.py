"""Categories are told where stacks and lifetimes can tell them, and unknown otherwise."""

import pickle

import pandas as pd
import pytest

from effkit import snapshot

TORCH = "/opt/venv/lib/python3.12/site-packages/torch/"
MAIN = ("/home/me/code/train.py", 10, "<module>")
ENGINE = ("??", 0, "torch::autograd::Engine::evaluate_function(std::shared_ptr<torch::autograd::GraphTask>&, int)")
NODE = ("??", 0, "torch::autograd::generated::MulBackward0::apply(std::vector<at::Tensor>&&)")
CUBLAS = ("??", 0, "at::cuda::getCurrentCUDABlasHandle()")
CALL = (TORCH + "nn/modules/module.py", 1700, "_call_impl")
LINEAR = (TORCH + "nn/modules/linear.py", 125, "forward")
STEP = (TORCH + "optim/adamw.py", 200, "step")

forward = [LINEAR, CALL, MAIN]
backward = [NODE, ENGINE]
optimizer = [("??", 0, "at::empty_cuda(long)"), STEP, MAIN]
other = [MAIN]


def told(*events: tuple, annotations=(), frees_have_stacks: bool = True, same_size: int = 0) -> dict[int, str]:
    """Size -> category, of events (signed size, stack). Sizes are unique, and serve as places; or, where all are of the
    ``same_size``, as places alone."""
    trace, stacks = [], {}
    for time, (size, stack) in enumerate(events):
        frames = [dict(zip(("filename", "line", "name"), frame, strict=True)) for frame in stack]
        if size < 0 and not frees_have_stacks:
            frames = stacks.get(-size, frames)
        stacks[size] = frames
        action = "alloc" if size > 0 else "free_completed"
        place = {"addr": abs(size) * 4096, "size": same_size or abs(size)}
        trace.append({"action": action, "time_us": time, "frames": frames} | place)
    alive = {size for size, _ in events if size > 0} - {-size for size, _ in events if size < 0}
    segments = [
        {
            "address": size * 4096,
            "total_size": 4096,
            "blocks": [
                {
                    "address": size * 4096,
                    "size": 4096,
                    "requested_size": same_size or size,
                    "state": "active_allocated" if size in alive else "inactive",
                    "frames": stacks.get(size, []),
                }
            ],
        }
        for size in sorted({abs(size) for size, _ in events})
    ]
    content = {"segments": segments, "device_traces": [trace], "external_annotations": list(annotations)}
    found = snapshot.read(pickle.dumps(content)).allocations
    assert (found["category"].eq("unknown") == found["known_by"].eq("not recorded")).all()
    sizes = found["size_bytes"].tolist()
    if same_size:  # in order of birth
        born = [size for size, _ in events if size > 0]
        sizes = [-size for size, _ in events if size < 0 and -size not in born] + born
    return dict(zip(sizes, found["category"].tolist(), strict=True))


def test_a_training_step():
    assert told(
        (1, forward), (2, forward), (-2, forward), (3, forward),
        (4, other),
        (5, backward), (-1, backward), (6, backward), (-5, backward), (-3, [MAIN]),
        (7, optimizer), (8, optimizer), (-8, optimizer),
        (-6, other), (-4, other),
    ) == {
        1: "saved activation", 2: "workspace", 3: "activation", 4: "unknown",
        5: "workspace", 6: "gradient", 7: "optimizer state", 8: "workspace",
    }  # fmt: skip


def test_what_a_plain_function_made_and_a_backward_freed_was_saved():
    assert told((1, other), (2, backward), (-1, backward), (-2, backward))[1] == "saved activation"


def test_while_a_backward_runs_nobody_knows_what_will_outlive_it():
    assert told((1, forward), (2, backward)) == {1: "activation", 2: "unknown"}
    assert told((1, forward), (2, backward), (3, other)) == {1: "activation", 2: "gradient", 3: "unknown"}


def test_what_a_forward_asked_for_has_a_name_also_where_no_backward_was_recorded():
    weight = [(TORCH + "nn/modules/module.py", 900, "_apply"), MAIN]
    assert told((9, weight), (1, forward), (2, forward), (-2, other), (3, other), (4, forward)) == {
        9: "parameter", 1: "activation", 2: "activation", 3: "unknown", 4: "activation",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("annotations", "category"),
    [
        ([], "unknown"),
        ([{"stage": "END", "name": "Optimizer.step#AdamW.step", "device": 0, "time_us": 99}], "optimizer state"),
        ([{"stage": "END", "name": "Optimizer.step#AdamW.step", "device": 0, "time_us": 1}], "unknown"),
        ([{"stage": "END", "name": "Optimizer.step#AdamW.step", "device": 1, "time_us": 99}], "unknown"),
        ([{"stage": "START", "name": "Optimizer.step#AdamW.step", "device": 0, "time_us": 99}], "unknown"),
        ([{"stage": "END", "name": "Optimizer.zero_grad#AdamW.zero_grad", "device": 0, "time_us": 99}], "unknown"),
    ],
)
def test_the_last_step_must_have_ended(annotations, category):
    assert told((1, forward), (2, optimizer), (3, optimizer), annotations=annotations)[3] == category


PARAMETER = [(TORCH + "nn/modules/module.py", 900, "_apply"), MAIN]


def own_adam(parameter: int, first: int, second: int, *, old: tuple[int, int, int] | None) -> list[tuple]:
    """The events of a step that puts new tensors in the place of old ones: the two moments, then the parameter; the old
    moments are let go of when the next ones are read."""
    workspace = 90 + first
    made = [(first, optimizer), (second, optimizer), (workspace, optimizer), (parameter, optimizer)]
    gone = [(-place, optimizer) for place in old or ()]
    return [*made, *gone[:1], (-workspace, optimizer), *gone[1:]]


def test_what_an_optimizer_puts_into_the_place_of_a_parameter_is_one():
    events = [
        (1, PARAMETER), (2, PARAMETER), (3, backward), (4, backward), (50, other), (-50, other),
        *own_adam(11, 12, 13, old=(1,)), *own_adam(21, 22, 23, old=(2,)),
        (-3, [STEP, MAIN]), (-4, [STEP, MAIN]),  # gradients that the optimizer clears
        (5, backward), (6, backward), (51, other), (-51, other),
        *own_adam(31, 32, 33, old=(11, 12, 13)), *own_adam(41, 42, 43, old=(21, 22, 23)), (52, other),
    ]  # fmt: skip
    found = told(*events, same_size=64)
    names = {place: found[place] for place in (1, 2, 3, 4, 5, 6)}
    assert names == {1: "parameter", 2: "parameter"} | dict.fromkeys((3, 4, 5, 6), "gradient")
    assert [place for place, name in found.items() if name == "parameter"] == [1, 2, 11, 21, 31, 41]
    assert [place for place, name in found.items() if name == "optimizer state"] == [12, 13, 22, 23, 32, 33, 42, 43]
    assert {found[90 + first] for first in (12, 22, 32, 42)} == {"workspace"}


def test_a_step_that_calls_backward_is_still_the_same_step():
    again = [NODE, ENGINE, STEP, MAIN]
    events = ((1, optimizer), (2, again), (-2, again), (-1, [STEP, MAIN]), (3, other))
    assert told(*events) == {1: "unknown", 2: "workspace", 3: "unknown"}


def test_a_step_within_a_backward():
    inner = [STEP, ENGINE]
    events = ((1, backward), (2, inner), (3, inner), (-3, inner), (4, backward), (-1, [ENGINE]), (5, other))
    assert told(*events) == {
        1: "workspace", 2: "optimizer state", 3: "workspace", 4: "gradient", 5: "unknown",
    }  # fmt: skip


def test_a_forward_computed_again_within_a_backward_is_its_workspace():
    again = [LINEAR, CALL, (TORCH + "utils/checkpoint.py", 9, "unpack_hook"), ENGINE]
    assert told((1, other), (2, again), (-2, backward), (3, other))[2] == "workspace"
    assert told((1, other), (2, again), (3, other))[2] == "activation", "no gradient, at any rate"


def test_frees_that_repeat_the_stack_of_their_allocation_do_not_tell_when():
    events = (
        (1, forward),
        (2, backward),
        (-1, []),
        (3, backward),
        (-3, []),
        (4, other),
        (-2, []),
        (5, forward),
        (-5, []),
    )
    assert told(*events, frees_have_stacks=False) == {
        1: "saved activation", 2: "gradient", 3: "unknown", 4: "unknown", 5: "activation",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("frame", "category"),
    [
        ((TORCH + "nn/modules/module.py", 900, "_apply"), "parameter"),
        (("/x/site-packages/accelerate/utils/operations.py", 5, "send_to_device"), "input"),
        (("/x/site-packages/lightning_fabric/utilities/apply_func.py", 5, "move_data_to_device"), "input"),
        (CUBLAS, "workspace"),
        (("/home/me/module.py", 900, "_apply"), "unknown"),
        (("/home/me/torch.py", 3, "step"), "unknown"),
    ],
)
def test_what_a_stack_tells_alone(frame, category):
    assert told((1, [frame, MAIN]))[1] == category


def test_the_scratch_space_of_cublas_is_no_gradient():
    assert told((1, [CUBLAS, NODE, ENGINE]), (2, backward), (3, other)) == {
        1: "workspace", 2: "gradient", 3: "unknown",
    }  # fmt: skip


def test_what_was_there_before_is_unknown_unless_its_block_tells():
    assert told((-1, backward), (2, other))[1] == "unknown"
    frames = [{"filename": TORCH + "nn/modules/module.py", "line": 900, "name": "_apply"}]
    block = {"address": 0, "size": 512, "requested_size": 9, "state": "active_allocated", "frames": frames}
    segments = [{"address": 0, "total_size": 512, "blocks": [block]}]
    found = snapshot.read(pickle.dumps({"segments": segments})).allocations
    assert found[["category", "known_by"]].iloc[0].tolist() == ["parameter", "stack"]


def test_stacks_are_short_and_readable():
    def text(*frames):
        stack = [dict(zip(("filename", "line", "name"), frame, strict=True)) for frame in frames]
        block = {"size": 512, "requested_size": 9, "state": "active_allocated", "frames": stack}
        content = [{"address": 0, "total_size": 512, "blocks": [block]}]
        return snapshot.read(pickle.dumps(content)).allocations["stack"].iloc[0]

    assert text(("??", 0, "at::empty()"), LINEAR, CALL, MAIN) == (
        "torch/nn/modules/linear.py:125 forward < code/train.py:10 <module>"
    )
    assert text(NODE, ENGINE) == "MulBackward0"
    assert text(("??", 0, "at::empty(long)"), ("??", 0, "clone")) == "at::empty < clone"
    assert text(("C:\\me\\code\\train.py", 4, "main")) == "code/train.py:4 main"
    assert pd.isna(text()), "not recorded"
    assert len(text(*(("/a/b.py", line, "f" * 500) for line in range(900)))) < 50 * 123
