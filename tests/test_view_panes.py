"""Each pane has a picture that shows its numbers, also where a part of them was not recorded."""

import re
from xml.etree import ElementTree

import pytest
from made_traces import capture_of, event, launched, note, op, written

import effkit as ek
from effkit import view


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
