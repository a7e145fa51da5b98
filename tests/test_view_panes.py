"""Each pane has a picture that shows its numbers, also where a part of them was not recorded."""

import html
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from made_traces import capture_of, event, launched, note, op, written
from matplotlib import pyplot

import effkit as ek
from effkit import view
from effkit.view import style


@pytest.fixture
def gpu(tmp_path):
    """One rank with a device, a collective and memory."""
    steps = [(1, 2**20, 3 * 2**20), (2, 2**20, 4 * 2**20), (1, -(2**20), 3 * 2**20)]
    memory = [
        {"ph": "i", "name": "[memory]", "pid": 1, "tid": 1, "ts": 10 * i, "args": {
            "Total Allocated": total, "Bytes": size, "Addr": address, "Device Id": 0, "Device Type": 1}}
        for i, (address, size, total) in enumerate(steps)
    ]  # fmt: skip
    return capture_of(
        tmp_path,
        note("ProfilerStep#0", 0, 100),
        op("aten::mm", 0, 40),
        launched("sm80_xmma_gemm", 2, 10, 50, correlation=1),
        launched("elementwise", 3, 50, 55, correlation=2),
        note("nccl:all_to_all", 56, 59, **{"Input Dims": [[64]], "Input type": ["float"]}),
        launched("ncclDevKernel_SendRecv", 57, 60, 90, correlation=3),
        memory,
    )


def texts(axes) -> str:
    """Everything that a picture says."""
    legend = axes.get_legend()
    words = [axes.get_title(loc="left"), *(label.get_text() for label in axes.get_yticklabels()),
             *(text.get_text() for text in axes.texts), *(text.get_text() for text in (legend.get_texts() if legend else []))]  # fmt: skip # noqa: E501
    return "\n".join(words)


@pytest.mark.parametrize("pane", view.PANES)
def test_every_pane_has_a_picture(gpu, pane):
    axes = gpu.plot(pane)
    axes.figure.canvas.draw()
    assert axes.has_data() or pane == "rank_pairs"


def test_an_unknown_pane_is_refused(gpu):
    with pytest.raises(ValueError, match="there is no pane “flame”; there are overview, operators"):
        gpu.plot("flame")


def test_the_overview_shows_each_part_with_its_share(gpu):
    words = texts(gpu.plot("overview"))
    assert "kernel 45%" in words
    assert "exposed communication 30%" in words
    assert "dataloader" not in words, "a part that is not there is not in the legend"


def test_the_widths_of_the_overview_are_the_numbers(gpu):
    axes = gpu.plot("overview")
    assert sum(bar.get_width() for bar in axes.patches) == pytest.approx(100_000)


def test_operators_without_a_device_are_shown_by_their_host_time(tmp_path):
    axes = capture_of(tmp_path, op("aten::mm", 0, 30), op("aten::add", 30, 40)).plot("operators")
    assert "on the host: 40.0 us" in texts(axes)
    assert [bar.get_width() for bar in axes.patches] == [30_000, 10_000]


def test_kernels_with_tensor_cores_are_marked(gpu):
    axes = gpu.plot("kernels")
    assert "tensor cores, by its name" in texts(axes)
    assert len({bar.get_facecolor() for bar in axes.patches}) == 2


def test_communication_of_one_rank_says_that_waiting_is_not_told_apart(gpu):
    words = texts(gpu.plot("communication"))
    assert "all_to_all (nccl)" in words
    assert "not told apart: one rank only" in words
    assert "256 B" in words


def test_one_rank_s_legend_leaves_the_title_alone(gpu):
    axes = gpu.plot("communication")
    axes.figure.canvas.draw()
    boxes = [part.get_window_extent() for part in (axes.get_legend(), axes._left_title)]
    assert not boxes[0].overlaps(boxes[1])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["not told apart: one rank only"]


def test_long_names_that_differ_in_their_middle_alone_have_labels_of_their_own(tmp_path):
    head, tail = "void at::native::" + "vectorized_elementwise_kernel<" * 4, "std::array<char*, 3>>(int, std::array)"
    names = [head + kind + tail for kind in ("Add", "Mul", "CUDAFunctor_add<float>", "CUDAFunctor_add<double>")]
    kernels = [event("kernel", name, 10 * i, 10 * i + 9 - i, correlation=i + 1) for i, name in enumerate(names)]
    shown = [label.get_text() for label in capture_of(tmp_path, kernels).plot("kernels").get_yticklabels()]
    assert len(set(shown)) == 4
    assert all(word in label for word, label in zip(("Add", "Mul", "float", "double"), shown, strict=True)), shown
    assert max(map(len, shown)) <= 44


@pytest.mark.parametrize("name", [r"$\x$", r"a${clang}$b\$c$", "x" * 100_000])
def test_a_name_is_drawn_as_it_is_and_is_no_formula(name, tmp_path):
    seen = capture_of(
        tmp_path, op(name, 0, 40), launched(name, 2, 10, 50, correlation=1),
        event("kernel", f"ncclDevKernel_{name}", 60, 70, correlation=2, Collective_name=name),
        note("ProfilerStep#0", 0, 100),
        {"ph": "i", "name": "[memory]", "pid": 1, "tid": 1, "ts": 10, "args": {
            "Total Allocated": 64, "Bytes": 64, "Addr": 1, "Device Id": 0, "Device Type": 1}},
    )  # fmt: skip
    for pane in view.PANES:
        options = {"by": "stack"} if pane == "memory" else {}
        axes = seen.plot(pane, **options)
        drawn = style.svg(axes.figure, label="a picture")
        if "$" in name and pane in ("kernels", "operators"):
            assert name in html.unescape(drawn)
    seen.browse_memory().controls["by"].value = "stack"
    view.page([seen.memory(by="stack")])
    pyplot.close("all")


def test_one_moment_of_memory_is_visible(tmp_path):
    seen = capture_of(tmp_path, {"ph": "i", "name": "[memory]", "pid": 1, "tid": 1, "ts": 10, "args": {
        "Total Allocated": 64, "Bytes": 64, "Addr": 1, "Device Id": 0, "Device Type": 1}})  # fmt: skip
    axes = seen.plot("memory_timeline")
    path = axes.collections[0].get_paths()[0].vertices
    at_level = path[path[:, 1] == 64]
    left, right = axes.get_xlim()
    assert np.ptp(at_level[:, 0]) > 0.2 * (right - left)


def test_more_kinds_of_collectives_than_a_picture_holds(tmp_path):
    kinds = [
        event("kernel", f"ncclDevKernel_{i}", i, i + 1, correlation=i + 1, Collective_name=f"kind{i}")
        for i in range(40)
    ]
    axes = capture_of(tmp_path, kinds).plot("communication")
    assert len(axes.get_yticks()) == 12


def test_rank_pairs_as_a_table_of_colours(tmp_path):
    moved = {"Input Dims": [[8]], "Input type": ["int"]}
    for rank in (0, 1):
        written(tmp_path / f"{rank}.json", [note("nccl:all_to_all", 0, 9, **moved)], rank=rank, world=2)
    axes = ek.load(tmp_path).plot("rank_pairs")
    assert axes.images[0].get_array().shape == (2, 2)
    assert "equal shares assumed" in axes.get_title(loc="left")


def test_more_ranks_than_a_picture_holds_are_the_slowest(tmp_path):
    for rank in range(15):
        written(tmp_path / f"{rank}.json", [note("ProfilerStep#0", 0, 100 + rank), op("a", 0, 9)], rank=rank, world=15)
    labels = [label.get_text() for label in ek.load(tmp_path).plot("overview").get_yticklabels()]
    assert labels == [f"rank {rank}" for rank in range(3, 15)]


def test_bytes_are_marked_in_powers_of_two(gpu):
    axes = gpu.plot("memory_timeline")
    axes.figure.canvas.draw()
    assert all(tick == 0 or (tick / 2**19).is_integer() for tick in axes.get_yticks())
    assert "peak 4.0 MiB" in axes.get_title(loc="left")


def test_the_slider_over_moments_shows_who_holds_the_memory(gpu):
    browser = gpu.browse_memory()
    assert browser.result.total == 4 * 2**20, "it rests at the peak"
    assert browser.shown().startswith("4.0 MiB allocated after")
    browser.controls["moment"].value = browser.controls["moment"].max
    assert browser.result.total == 3 * 2**20
    assert browser.shown().startswith("3.0 MiB allocated after")
    browser.controls["by"].value = "stack"
    assert "aten::mm" in browser.shown()
    picture = re.search(r"<svg.*</svg>", browser.screen.value, flags=re.DOTALL)[0]
    assert ElementTree.fromstring(picture.replace("xlink:", "")).get("role") == "img"
    assert browser._repr_mimebundle_()["image/png"]


def test_there_is_no_slider_where_memory_was_not_recorded(tmp_path):
    with pytest.raises(ValueError, match="memory was not recorded: capture with memory=True"):
        capture_of(tmp_path, event("kernel", "k", 0, 1, correlation=1)).browse_memory()


def test_where_nothing_was_recorded_the_picture_says_so(tmp_path):
    seen = capture_of(tmp_path, {"ph": "M", "name": "process_name", "pid": 1})
    words = {
        pane: seen.plot(pane).get_title(loc="left") for pane in ("overview", "operators", "kernels", "communication")
    }
    assert words == {"overview": "no step was recorded", "operators": "no operator was recorded",
                     "kernels": "no kernel was recorded", "communication": "no collective was recorded"}  # fmt: skip
