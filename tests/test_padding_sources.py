"""lengths(): every source gives the same tidy frame, and a bad row is found where an editor shows it."""

from __future__ import annotations

import gzip
import json
import time

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from lhotse import CutSet, MonoCut, SupervisionSegment
from lhotse.cut import MixedCut, MixTrack
from torch.utils.data import DataLoader

from effkit.padding import lengths

WORDS = ["one two three", "four", "five six"]
SECONDS = [1.234, 0.5, 12.0]


def columns(frame):
    assert all(dtype == "int64" for dtype in frame.dtypes)
    return {name: frame[name].tolist() for name in frame}


def written(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def json_lines(path, rows):
    return written(path, "".join(json.dumps(row) + "\n" for row in rows))


# What comes in


@pytest.mark.parametrize("shape", [list, np.array, torch.tensor, pd.Series, lambda x: np.array(x)[:, None]])
def test_one_length_per_example(shape):
    assert columns(lengths(shape([120, 80, 5]))) == {"input_length": [120, 80, 5]}


def test_input_and_output_lengths():
    assert columns(lengths(np.array([[120, 7], [80, 5]]))) == {"input_length": [120, 80], "output_length": [7, 5]}


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=50))
def test_whole_numbers_come_out_as_they_went_in(values):
    assert lengths(values)["input_length"].tolist() == values
    assert lengths(pd.DataFrame({"num_tokens": values}, dtype="float64"))["input_length"].tolist() == values


def test_a_frame_with_columns_of_any_name():
    table = pd.DataFrame({"clip": ["a", "b"], "wide": [9, 4], "deep": [2, 3]})
    frame = lengths(table, input="wide", output="deep")
    assert columns(frame) == {"input_length": [9, 4], "output_length": [2, 3]}
    assert frame.attrs == {"input_unit": "cells", "output_unit": "cells"}
    assert columns(lengths(table, input="wide")) == {"input_length": [9, 4]}


def test_a_csv_with_seconds_and_text(tmp_path):
    path = tmp_path / "clips.csv"
    pd.DataFrame({"duration": SECONDS, "text": WORDS}).to_csv(path, index=False)
    frame = lengths(path)
    assert columns(frame) == {"input_length": [124, 50, 1200], "output_length": [13, 4, 8]}
    assert frame.attrs == {"input_unit": "frames of 10 ms", "output_unit": "characters"}
    assert columns(lengths(str(path))) == columns(frame)


def test_text_is_counted_as_the_tokenizer_says(tmp_path):
    path = json_lines(tmp_path / "a.json", [{"duration": s, "text": t} for s, t in zip(SECONDS, WORDS, strict=True)])
    by_list, by_number = lengths(path, tokenize=str.split), lengths(path, tokenize=lambda text: len(text.split()))
    assert columns(by_list) == columns(by_number) == {"input_length": [124, 50, 1200], "output_length": [3, 1, 2]}
    assert by_list.attrs["output_unit"] == "tokens"


@given(st.integers(1, 10**7))
def test_hundredths_of_seconds_are_whole_frames(hundredths):
    assert lengths(pd.DataFrame({"duration": [hundredths / 100]}))["input_length"].tolist() == [hundredths]


@given(st.floats(0.001, 5000), st.sampled_from([50, 100, 12.5]))
def test_frames_cover_the_seconds(seconds, rate):
    frames = lengths(pd.DataFrame({"duration_s": [seconds]}), frames_per_second=rate)["input_length"][0]
    assert (frames - 1) / rate < seconds <= frames / rate * (1 + 1e-6)


def test_a_nemo_manifest_with_token_counts(tmp_path):
    rows = [{"audio_filepath": "a.wav", "duration": 1.0, "tokens": 5}, {"duration": 2.0, "tokens": 7}]
    assert columns(lengths(json_lines(tmp_path / "m.jsonl", rows)))["output_length"] == [5, 7]
    listed = [row | {"tokens": [0] * row["tokens"]} for row in rows]
    assert columns(lengths(json_lines(tmp_path / "l.jsonl", listed)))["output_length"] == [5, 7]


def test_fields_of_any_name_in_a_manifest(tmp_path):
    path = json_lines(tmp_path / "m.jsonl", [{"num_pieces": 4, "duration": 1.0}, {"num_pieces": 6, "duration": 1.0}])
    assert columns(lengths(path, input="num_pieces")) == {"input_length": [4, 6]}


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_cuts_that_lhotse_wrote(tmp_path, suffix):
    def cut(i, seconds, texts):
        parts = [SupervisionSegment(f"s{i}-{j}", "r", 0, seconds, text=text) for j, text in enumerate(texts)]
        return MonoCut(id=f"c{i}", start=0, duration=seconds, channel=0, supervisions=parts)

    path = tmp_path / f"cuts{suffix}"
    CutSet.from_cuts([cut(0, 1.234, ["one two"]), cut(1, 0.5, ["three", "four five"])]).to_file(path)
    assert columns(lengths(path, tokenize=str.split)) == {"input_length": [124, 50], "output_length": [2, 3]}


def test_a_hugging_face_dataset():
    dataset = Dataset.from_dict({"input_ids": [[1, 2, 3], [4]], "labels": [[1], [2, 3]], "note": ["x", "y"]})
    assert columns(lengths(dataset)) == {"input_length": [3, 1], "output_length": [1, 2]}
    assert columns(lengths(Dataset.from_dict({"size": [3, 1]}), input="size")) == {"input_length": [3, 1]}


def test_a_running_loader():
    def padded(rows):
        mask = torch.zeros(len(rows), max(rows), dtype=torch.long)
        for i, row in enumerate(rows):
            mask[i, :row] = 1
        return {"attention_mask": mask, "labels": torch.where(mask.bool(), 7, -100)[:, :2]}

    loader = DataLoader([3, 1, 4, 1, 5], batch_size=2, collate_fn=padded)
    assert columns(lengths(loader)) == {"input_length": [3, 1, 4, 1, 5], "output_length": [2, 1, 2, 1, 2]}


def test_a_million_rows_in_two_seconds():
    values = np.random.default_rng(0).integers(1, 4000, 1_000_000)
    start = time.process_time()
    frame = lengths(values)
    assert time.process_time() - start < 2
    assert (frame["input_length"].to_numpy() == values).all()


# What is wrong with it


@pytest.mark.parametrize("bad", [0, -3, float("nan"), float("inf")])
def test_the_first_bad_row_of_an_array(bad):
    with pytest.raises(ValueError, match=r"row 2: input_length is .*positive number \(2 such in all\): mend or drop"):
        lengths([4.0, 2.0, bad, 1.0, bad])


@pytest.mark.parametrize("bad", ["-3", "", "0", "nan", "soon"])
def test_a_csv_names_the_line_that_an_editor_shows(tmp_path, bad):
    path = written(tmp_path / "clips.csv", f"duration,text\n1.5,a\n{bad},b\n2.5,c\n{bad},d\n")
    with pytest.raises(ValueError, match=r"clips\.csv, line 3: duration is"):
        lengths(path)


def test_blank_lines_of_a_csv_count(tmp_path):
    with pytest.raises(ValueError, match=r"clips\.csv, line 3: "):
        lengths(written(tmp_path / "clips.csv", "duration\n1.5\n\n-2.5\n"))


@pytest.mark.parametrize("bad", ['{"duration": -1}', '{"text": "no duration"}', '{"duration": "x"}', "{", "[1]"])
def test_a_manifest_names_the_line(tmp_path, bad):
    good = '{"duration": 1.5, "text": "a"}\n'
    with pytest.raises(ValueError, match=r"m\.json, line 3: "):
        lengths(written(tmp_path / "m.json", good * 2 + bad + "\n" + good))


def test_a_missing_text_is_named_too(tmp_path):
    with pytest.raises(ValueError, match=r"m\.jsonl, line 2: text is"):
        lengths(json_lines(tmp_path / "m.jsonl", [{"duration": 1.5, "text": "a"}, {"duration": 1.5}]))


@pytest.mark.parametrize("content", ["", "duration,text\n"], ids=["no byte", "no row"])
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_an_empty_file(tmp_path, name, content):
    with pytest.raises(ValueError, match=name):
        lengths(written(tmp_path / name, content))


def test_a_truncated_gzip(tmp_path):
    whole = gzip.compress(b"".join(b'{"duration": %d}\n' % i for i in range(1, 5000)))
    path = tmp_path / "cuts.jsonl.gz"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cuts\.jsonl\.gz is not a whole gzip file"):
        lengths(path)


def test_a_missing_column():
    table = pd.DataFrame({"wide": [1], "deep": [2]})
    with pytest.raises(ValueError, match="none of the columns wide, deep is a usual length: say which with input="):
        lengths(table)
    with pytest.raises(ValueError, match="no column 'width'; the columns are wide, deep"):
        lengths(table, input="width")


def test_what_is_no_list_of_lengths(tmp_path):
    with pytest.raises(ValueError, match=r"shape \[examples\] or \[examples, 2\]; given: shape \(2, 3\)"):
        lengths(np.ones((2, 3)))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.csv"):
        lengths(tmp_path / "nowhere.csv")
    with pytest.raises(ValueError, match=r"a\.xlsx: lengths\(\) reads \.csv"):
        lengths(written(tmp_path / "a.xlsx", "x"))


# Known defects


def test_blank_lines_of_a_manifest_count(tmp_path):
    with pytest.raises(ValueError, match=r"m\.jsonl, line 3: "):
        lengths(written(tmp_path / "m.jsonl", '{"duration": 1}\n\n{"duration": -1}\n'))


def test_a_text_of_two_lines_in_a_csv_counts_twice(tmp_path):
    with pytest.raises(ValueError, match=r"clips\.csv, line 5: "):
        lengths(written(tmp_path / "clips.csv", 'duration,text\n1,"a\nb"\n2,c\n-3,d\n'))


def test_the_first_offending_line_whichever_column_offends(tmp_path):
    with pytest.raises(ValueError, match=r"clips\.csv, line 3: output_tokens"):
        lengths(written(tmp_path / "clips.csv", "duration,output_tokens\n1,1\n2,-1\n3,1\n-3,1\n"))


def test_a_word_in_the_first_row_of_durations(tmp_path):
    with pytest.raises(ValueError, match=r"clips\.csv, line 2: duration is 'soon'"):
        lengths(written(tmp_path / "clips.csv", "duration\nsoon\n1.5\n"))


@pytest.mark.parametrize("nothing", [[], np.zeros((0, 2))], ids=["list", "array"])
def test_an_empty_array(nothing):
    with pytest.raises(ValueError, match="empty list of lengths"):
        lengths(nothing)


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"plain text"])
def test_a_damaged_csv_gz(tmp_path, damage):
    path = tmp_path / "clips.csv.gz"
    path.write_bytes(damage(gzip.compress(b"duration\n" + b"".join(b"%d\n" % i for i in range(1, 5000)))))
    with pytest.raises(ValueError, match=r"clips\.csv\.gz"):
        lengths(path)


def test_a_gzip_with_a_flipped_byte(tmp_path):
    whole = bytearray(gzip.compress(b"".join(b'{"duration": %d}\n' % i for i in range(1, 500))))
    whole[12] ^= 0xFF
    path = tmp_path / "cuts.jsonl.gz"
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"cuts\.jsonl\.gz"):
        lengths(path)


def test_the_word_null_is_a_text(tmp_path):
    frame = lengths(written(tmp_path / "clips.csv", "duration,text\n1,eins\n2,null\n"))
    assert frame["output_length"].tolist() == [4, 4]


def test_the_bad_value_stands_in_the_message_as_the_reader_wrote_it():
    with pytest.raises(ValueError, match=r"row 1: input_length is -2\.5;"):
        lengths([1.5, -2.5])


# Manifests of other kinds


def test_a_pointer_of_git_lfs(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n"
    with pytest.raises(ValueError, match=r"m\.jsonl is a pointer of Git LFS .*: run git lfs pull"):
        lengths(written(tmp_path / "m.jsonl", pointer))


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_list(tmp_path, indent):
    path = written(tmp_path / "m.json", json.dumps([{"duration": 1.5}, {"duration": 2.0}], indent=indent))
    with pytest.raises(ValueError, match=r"m\.json is a JSON list, .*pandas\.read_json"):
        lengths(path)
    assert columns(lengths(pd.read_json(path))) == {"input_length": [150, 200]}


def test_mixed_cuts_last_until_their_last_track_ends(tmp_path):
    def cut(i, seconds, text):
        spoken = SupervisionSegment(f"s{i}", "r", 0, seconds, text=text)
        return MonoCut(id=f"c{i}", start=0, duration=seconds, channel=0, supervisions=[spoken])

    path = tmp_path / "cuts.jsonl"
    mixed = MixedCut("m", [MixTrack(cut(0, 1.0, "one two")), MixTrack(cut(1, 2.0, "three"), offset=0.5)])
    CutSet.from_cuts([mixed, cut(2, 0.5, "four")]).to_file(path)
    assert columns(lengths(path, tokenize=str.split)) == {"input_length": [250, 50], "output_length": [3, 1]}


@pytest.mark.parametrize("empty", ["", None])
def test_an_empty_text_has_its_own_words_and_inputs_alone_are_allowed(tmp_path, empty):
    path = json_lines(tmp_path / "m.jsonl", [{"duration": 1.5, "text": "a"}, {"duration": 2.5, "text": empty}])
    with pytest.raises(ValueError, match=r"m\.jsonl, line 2: text is .*without output \(1 such.*output=False"):
        lengths(path)
    assert columns(lengths(path, output=False)) == {"input_length": [150, 250]}
    assert columns(lengths(pd.DataFrame({"duration": [1, 2], "text": ["a", ""]}), output=False)) == {
        "input_length": [100, 200]
    }
