"""The shell's door: what each command says, what it exits with, and that it needs no torch."""

import json
import subprocess
import sys

import pytest
from made_snapshots import Allocator, dump
from made_traces import launched, note, op, written

import effkit as ek
from effkit.__main__ import main


def trace(path, gemm_us=40, name="gemm"):
    end = 60 + gemm_us
    return written(path, [note("ProfilerStep#0", 0, end + 10), op("aten::mm", 10, 20), *launched(name, 12, 60, end, 1)])


def snapshot(path):
    allocator = Allocator()
    allocator.allocate(1 << 20)
    path.write_bytes(dump(allocator.trace, segments=allocator.final()))
    return path


def test_a_report_is_printed(tmp_path, capsys):
    path = trace(tmp_path / "trace.json")
    assert main(["report", str(path)]) == 0
    said = capsys.readouterr().out
    study = ek.study(trace=path)
    assert repr(study.overview()) in said
    assert repr(study.advise()) in said


def test_a_report_is_written_as_a_page_as_markdown_and_as_json(tmp_path, capsys):
    path = str(trace(tmp_path / "trace.json"))
    assert main(["report", path, "-o", str(tmp_path / "page.html")]) == 0
    assert "<html" in (tmp_path / "page.html").read_text()
    assert main(["report", path, "--md", "-o", str(tmp_path / "page.md")]) == 0
    assert "| item |" in (tmp_path / "page.md").read_text()
    capsys.readouterr()
    assert main(["report", path, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["overview"]["accounts"][0]["total"] == ek.study(trace=path).overview().time.total


def test_a_folder_of_ranks_a_snapshot_and_a_saved_capture_are_told_apart(tmp_path, capsys):
    folder = tmp_path / "ranks"
    folder.mkdir()
    for rank in range(2):
        written(folder / f"rank{rank}.json", [note("ProfilerStep#0", 0, 9), op("aten::mm", 1, 5)], rank=rank, world=2)
    saved = ek.load(trace(tmp_path / "trace.json")).save(tmp_path / "capture.zip")
    for path, word in ((folder, "2 ranks"), (snapshot(tmp_path / "memory.pickle"), "memory of"), (saved, "one step")):
        assert main(["report", str(path)]) == 0
        assert word in capsys.readouterr().out


@pytest.mark.parametrize("command", [["report", "absent.json"], ["diff", "absent.json", "absent.json"]])
def test_wrong_input_is_one_sentence_and_exit_2(command, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("effkit: no capture at absent.json")
    assert said.err.count("\n") == 1


def test_a_damaged_file_is_exit_2(tmp_path, capsys):
    (tmp_path / "bad.json").write_text("{")
    assert main(["diff", str(trace(tmp_path / "a.json")), str(tmp_path / "bad.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_step_that_grew_by_a_fifth_fails_and_one_that_did_not_passes(tmp_path, capsys):
    before, after = trace(tmp_path / "a.json", 1000), trace(tmp_path / "b.json", 1200)
    assert main(["diff", str(before), str(after), "--fail-above", "5%"]) == 1
    said = capsys.readouterr().out
    assert "kernels of a step: 1.0 ms -> 1.2 ms (+20.0%)" in said
    assert "kernel gemm" in said
    assert main(["diff", str(before), str(after), "--fail-above", "0.25"]) == 0
    assert main(["diff", str(before), str(after)]) == 0
    assert main(["diff", str(after), str(before), "--fail-above", "5%"]) == 0


def test_peaks_of_snapshots_are_compared_and_unlike_files_are_not(tmp_path, capsys):
    one = snapshot(tmp_path / "a.pickle")
    assert main(["diff", str(one), str(one)]) == 0
    assert "peak of memory: 1.0 MiB -> 1.0 MiB" in capsys.readouterr().out
    assert main(["diff", str(one), str(trace(tmp_path / "b.json"))]) == 2


@pytest.mark.parametrize("share", ["much", "-1%", "nan", "inf"])
def test_a_share_is_a_number(share, capsys):
    with pytest.raises(SystemExit):
        main(["diff", "a", "b", f"--fail-above={share}"])
    assert "a share, such as 5% or 0.05" in capsys.readouterr().err


def test_lessons_are_copied_whole_with_what_they_read(tmp_path, capsys):
    folder = tmp_path / "learn"
    assert main(["lessons", str(folder)]) == 0
    assert "jupyter lab" in capsys.readouterr().out
    assert (folder / "notebooks" / "00_start_here.ipynb").exists()
    assert (folder / "notebooks" / "lessons" / "__init__.py").exists()
    assert (folder / "data" / "claims.csv").exists()
    assert not list(folder.rglob("__pycache__"))
    assert [path.name for path in tmp_path.iterdir()] == ["learn"]
    assert main(["lessons", str(folder)]) == 2
    assert "is there already" in capsys.readouterr().err


def test_everything_works_where_torch_and_widgets_are_absent(tmp_path):
    path = trace(tmp_path / "trace.json")
    absent = ["torch", "transformers", "ipywidgets", "jupyterlab", "torch_tb_profiler", "IPython"]
    code = (
        "import sys\n"
        f"for name in {absent}: sys.modules[name] = None\n"
        "from effkit.__main__ import main\n"
        f"assert main(['report', {str(path)!r}, '-o', {str(tmp_path / 'page.html')!r}]) == 0\n"
        f"assert main(['report', {str(path)!r}, '--md']) == 0\n"
        f"assert main(['diff', {str(path)!r}, {str(path)!r}]) == 0\n"
        "import effkit; assert len(effkit.claims()) > 50\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_python_m_is_the_same(tmp_path):
    command = [sys.executable, "-m", "effkit", "report", str(trace(tmp_path / "trace.json"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "Time of one step" in done.stdout
