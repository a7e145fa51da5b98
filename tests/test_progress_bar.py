"""What is said of a call that takes longer than two seconds, and what is not said of one that does not."""

import sys
from functools import partial

import pytest
import torch

import effkit as ek
from effkit import activations, decoder, lab, progress_bar
from effkit.activations import compressed
from effkit.progress_bar import advance, quiet, working


class Screen:
    """In the place of a terminal's line and of a notebook's widget."""

    def __init__(self, *_, **__):
        self.said, self.closed = [], False

    def set_description_str(self, text):
        self.said.append(text)

    def close(self):
        self.closed = True


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress_bar.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def screens(monkeypatch):
    made = []

    def make(**options):
        made.append(Screen())
        return made[-1]

    monkeypatch.setattr(progress_bar, "tqdm", make)
    monkeypatch.setattr(progress_bar, "_kernel", lambda: None)
    return made


def test_nothing_is_said_before_two_seconds_and_then_what_is_done(clock, screens):
    with working("Measuring"):
        clock[0] += 1.9
        advance(1, 40)
        assert not screens
        clock[0] += 0.2
        advance(2, 40)
        assert screens[0].said == ["Measuring, 2 of 40, 2 s (Ctrl-C stops it)"]
        advance(3, 40)  # at once: too soon for another word
        assert len(screens[0].said) == 1
        clock[0] += 1
        advance()
        assert screens[0].said[-1] == "Measuring, 3 s (Ctrl-C stops it)"
    assert screens[0].closed


def test_in_a_terminal_it_is_one_line_that_is_gone_at_the_end(clock, monkeypatch, capsys):
    """tqdm itself, on what is not a terminal only because a test reads it."""
    monkeypatch.setattr(progress_bar, "tqdm", partial(progress_bar.tqdm, file=sys.stderr))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with working("Measuring"):
        for done in (1, 2):
            clock[0] += 3
            advance(done, 2)
    said = capsys.readouterr().err
    assert "Measuring, 1 of 2, 3 s" in said
    assert "Measuring, 2 of 2, 6 s (Ctrl-C stops it)" in said
    assert said.rstrip(" ").endswith("\r")
    assert "\n" not in said


def test_of_calls_inside_calls_the_outermost_speaks(clock, screens):
    with working("Studying"), working("Measuring"):
        clock[0] += 3
        advance()
    assert len(screens) == 1
    assert screens[0].said[0].startswith("Studying")


def test_an_error_or_a_press_closes_it(clock, screens):
    @working("Measuring")
    def pressed():
        clock[0] += 3
        advance()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pressed()
    assert screens[0].closed
    advance()  # of nobody


def test_somebody_elses_progress_silences_it(clock, screens):
    heard = []
    with working("Measuring"):
        clock[0] += 3
        lab.tell(lambda *so_far: heard.append(so_far), 1, 2)
        advance()
    assert heard == [(1, 2)]
    assert not screens


def test_where_it_is_quiet_nothing_is_said(clock, screens):
    with quiet(), working("Measuring"):
        clock[0] += 3
        advance()
    assert not screens


def test_in_a_notebook_it_is_a_widget_that_leaves_no_text(clock, monkeypatch):
    published = []

    class Publisher:
        def publish(self, data):
            published.append(data)

    class Shell:
        kernel, display_pub = object(), Publisher()

    monkeypatch.setattr(progress_bar, "_kernel", Shell)
    with working("Measuring"):
        clock[0] += 3
        advance(1, 2)
        label = progress_bar._bar.get()._screen
        clock[0] += 1
        advance(2, 2)
        assert label.value.startswith("Measuring, 2 of 2")
    assert [list(data) for data in published] == [["application/vnd.jupyter.widget-view+json"]]
    assert label.comm is None, "closed"


MODEL, BATCH = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU()), torch.ones(4, 8)


def loss(output):
    return output.sum()


def step(batch):
    loss(MODEL(batch)).backward()
    torch.optim.SGD(MODEL.parameters(), 0.0).step()


VERBS = {
    "Measuring training steps": lambda: activations.measure(MODEL, BATCH, loss=loss),
    "Predicting": lambda: activations.predict(activations.measure(MODEL, BATCH, loss=loss), batch_size=8),
    "Forecasting": lambda: activations.forecast(MODEL, BATCH, loss=loss),
    "Looking for the largest batch": lambda: activations.largest_batch(MODEL, BATCH, 2**20, loss=loss),
    "Comparing gradients": lambda: activations.gradient_error(MODEL, BATCH, partial(compressed, "int8"), loss=loss),
    "Measuring generations": lambda: decoder.measure(lambda token, cache: (token, cache), 0, num_steps=2),
    "Studying": lambda: ek.study(step=step, model=MODEL, loader=[BATCH] * 4).overview(),
}  # fmt: skip


@pytest.mark.parametrize("word", VERBS)
def test_whatever_may_take_long_says_what_it_does(word, screens, monkeypatch):
    monkeypatch.setattr(progress_bar, "SLOW_S", -1.0)
    monkeypatch.setattr(progress_bar, "_EVERY_S", 0.0)
    VERBS[word]()
    assert any(said.startswith(word) for screen in screens for said in screen.said)
    assert all(screen.closed for screen in screens)
