"""A slow rank or link is found among noisy delays, told for what it is, and nothing is found where nothing is slow."""

import numpy as np
import pytest

from lessons.slow_ranks import Finding, find_slow

KINDS = ("sender", "receiver", "rank", "link")
TRIALS = 20
# ranks, rounds, noise of each delay in each round (standard deviation of its logarithm)
MEASURED = [(3, 20, 0.2), (4, 15, 0.2), (8, 9, 0.2), (8, 3, 0.1), (16, 9, 0.2), (8, 1, 0.05)]


def delays(rng, num_ranks: int, num_rounds: int, noise: float) -> np.ndarray:
    """Alike links; where there are rounds enough to see it, one delay of one round is twenty times too long."""
    times = 1e5 * np.exp(rng.normal(0, noise, (num_rounds, num_ranks, num_ranks)))
    if num_rounds >= 3:
        times[tuple(rng.integers(times.shape))] *= 20
    times[:, np.eye(num_ranks, dtype=bool)] = np.nan
    return times


def slowed(times: np.ndarray, kind: str, rank: int, peer: int, factor: float) -> np.ndarray:
    times = times.copy()
    if kind in ("sender", "rank"):
        times[..., rank, :] *= factor
    if kind in ("receiver", "rank"):
        times[..., :, rank] *= factor
    if kind == "link":
        times[..., rank, peer] *= factor
    return times


@pytest.mark.parametrize(("num_ranks", "num_rounds", "noise"), MEASURED)
@pytest.mark.parametrize("kind", KINDS)
def test_twice_as_slow_is_found_in_every_trial(kind, num_ranks, num_rounds, noise):
    rng = np.random.default_rng([0, num_ranks, num_rounds, KINDS.index(kind)])
    for _ in range(TRIALS):
        rank, peer = rng.choice(num_ranks, 2, replace=False)
        found = find_slow(slowed(delays(rng, num_ranks, num_rounds, noise), kind, rank, peer, 2.0))
        assert found is not None, f"{kind} {rank} was not found"
        assert (found.kind, found.rank, found.peer) == (kind, rank, peer if kind == "link" else None)
        assert 1.4 < found.ratio < 3.2


@pytest.mark.parametrize(("num_ranks", "num_rounds", "noise"), [*MEASURED, (3, 5, 0.2), (4, 3, 0.2), (64, 2, 0.2)])
def test_noise_raises_no_alarm(num_ranks, num_rounds, noise):
    rng = np.random.default_rng([0, num_ranks, num_rounds])
    for _ in range(TRIALS if num_ranks < 64 else 1):
        assert find_slow(delays(rng, num_ranks, num_rounds, noise)) is None


def test_links_that_are_unlike_raise_no_alarm_and_one_level_at_a_time_can_be_looked_at():
    rng = np.random.default_rng(0)
    times = delays(rng, 8, 9, 0.1)
    within = np.arange(8)[:, None] // 4 == np.arange(8) // 4  # two nodes of four
    times[:, ~within] *= 5
    assert find_slow(times) is None
    times[:, 1, 2] *= 3
    level = np.where(within, times, np.nan)
    found = find_slow(level)
    assert (found.kind, found.rank, found.peer) == ("link", 1, 2)


def test_the_ratio_and_the_sentence_say_what_was_done():
    times = np.full((4, 4), 100.0)
    assert find_slow(times) is None
    found = find_slow(slowed(times, "sender", 1, 0, 3.0))
    assert found == Finding("sender", 1, None, pytest.approx(3.0), found.sentence)
    assert found.sentence == "rank 1 is slow as a sender: what it sends takes 3.0 times as long as between the others"
    assert "receiver" in find_slow(slowed(times, "receiver", 1, 0, 3.0)).sentence
    rank = find_slow(slowed(times, "rank", 2, 0, 2.5))
    assert (rank.kind, rank.ratio) == ("rank", pytest.approx(2.5))
    assert "from rank 3 to rank 0" in find_slow(slowed(times, "link", 3, 0, 2.0)).sentence


@pytest.mark.parametrize("kind", KINDS)
def test_the_unit_and_the_numbering_do_not_matter(kind):
    rng = np.random.default_rng(5)
    times = slowed(delays(rng, 6, 9, 0.1), kind, 1, 4, 2.0)
    order = rng.permutation(6)
    found, scaled = find_slow(times), find_slow(times / 1e6)
    assert (found.kind, found.rank, found.peer, pytest.approx(found.ratio)) == (
        scaled.kind, scaled.rank, scaled.peer, scaled.ratio,
    )  # fmt: skip
    moved = find_slow(times[:, order][:, :, order])
    assert (moved.kind, order[moved.rank]) == (kind, 1)
    transposed = find_slow(np.swapaxes(times, 1, 2))
    mirrored = {"sender": "receiver", "receiver": "sender"}.get(kind, kind)
    assert (transposed.kind, transposed.rank) == (mirrored, 4 if kind == "link" else 1)


def test_a_threshold_is_kept():
    times = slowed(delays(np.random.default_rng(1), 8, 9, 0.02), "link", 2, 3, 1.3)
    assert find_slow(times) is None
    assert find_slow(times, threshold=1.2).kind == "link"


def test_one_late_round_is_no_slow_link():
    times = delays(np.random.default_rng(1), 8, 9, 0.02)
    times[4, 0, 1:] *= 50
    assert find_slow(times) is None


def test_what_was_not_measured_is_left_out():
    times = slowed(delays(np.random.default_rng(2), 6, 9, 0.05), "sender", 3, 0, 2.0)
    times[:, 3, 1] = times[:, 0, 4] = np.nan
    times[2, 5] = np.nan  # a rank that missed a round
    found = find_slow(times)
    assert (found.kind, found.rank) == ("sender", 3)
    ring = np.full((4, 4), np.nan)
    ring[[0, 1, 2, 3], [1, 2, 3, 0]] = 100, 100, 300, 100
    found = find_slow(ring)  # one cell per row: a link is all that can be said
    assert (found.kind, found.rank, found.peer) == ("link", 2, 3)


def test_two_ranks_only_tell_the_direction():
    rng = np.random.default_rng(3)
    found = find_slow(slowed(delays(rng, 2, 9, 0.1), "sender", 1, 0, 2.0))
    assert (found.kind, found.rank, found.peer) == ("direction", 1, 0)
    assert "measure with a third" in found.sentence
    assert find_slow(delays(rng, 2, 9, 0.1)) is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (np.ones((2, 3)), r"given: shape \[2, 3\]"),
        (np.ones(4), r"given: shape \[4\]"),
        (np.ones((1, 1)), "of two ranks or more"),
        (np.zeros((0, 3, 3)), "given: shape"),
        (np.full((3, 3), np.nan), "all cells off the diagonal are NaN"),
        (np.diag([1.0, 1.0, 1.0]), "positive times"),
        (np.full((3, 3), np.inf), "positive times"),
        (-np.ones((3, 3)), "positive times"),
        ([["a", "b"], ["c", "d"]], "times in ns in an array"),
    ],
)
def test_bad_delays_are_refused_in_one_sentence(given, said):
    with pytest.raises(ValueError, match=said) as error:
        find_slow(given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("threshold", [1.0, 0.5, float("nan")])
def test_a_threshold_is_a_ratio_above_one(threshold):
    with pytest.raises(ValueError, match="ratio above 1"):
        find_slow(np.ones((3, 3)), threshold)


def test_what_is_given_is_not_changed():
    times = np.full((3, 3), 100.0)
    find_slow(times)
    assert (times == 100).all()
