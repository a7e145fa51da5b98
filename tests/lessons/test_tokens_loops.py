"""What a token of data buys: filters, loops, angles, against hand calculations."""

import numpy as np
import pandas as pd
import pytest
import torch

from lessons.tokens import angles, filtering, linear, sampling_loops

pytestmark = pytest.mark.usefixtures("one_thread")


def test_concentration_is_the_mean_cosine_of_pairs():
    hidden = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    unit = hidden / hidden.norm(dim=-1, keepdim=True)
    pairs = [(unit[:, i] * unit[:, j]).sum(-1) for i in range(5) for j in range(5) if i != j]
    assert torch.allclose(angles.concentration(hidden), torch.stack(pairs).mean(0), atol=1e-6)
    assert angles.concentration(torch.ones(1, 4, 3)).item() == pytest.approx(1)
    assert angles.concentration(torch.eye(4)[None]).item() == pytest.approx(0)
    with pytest.raises(ValueError, match="at least 2"):
        angles.concentration(torch.ones(1, 1, 3))


def test_the_gradient_of_a_layer_is_the_sum_over_pairs_that_the_notebook_states():
    generator = torch.Generator().manual_seed(0)
    x, g = torch.randn(6, 4, generator=generator), torch.randn(6, 3, generator=generator)
    weight = torch.zeros(3, 4, requires_grad=True)
    ((x @ weight.T) * g).sum().backward()
    assert weight.grad.norm().item() ** 2 == pytest.approx(((x @ x.T) * (g @ g.T)).sum().item(), rel=1e-4)


def test_examples_have_the_gradient_norm_of_their_own_batch():
    model = angles.language_model(torch.arange(400) % 9, num_steps=2, length=16)
    pieces = torch.randint(0, 9, (3, 12), generator=torch.Generator().manual_seed(0))
    table = angles.examples(model, pieces)
    model.zero_grad()
    model(input_ids=pieces[1:2], labels=pieces[1:2]).loss.backward()
    alone = torch.cat([one.grad.flatten() for one in model.parameters()]).norm().item()
    assert table.loc[1, "gradient_norm"] == pytest.approx(alone, rel=1e-4)


def test_hashed_features_are_words_and_pairs_in_buckets():
    found = filtering.hashed("one two one")
    assert len(found) == 3 + 2
    assert found[0] == found[2] != found[1]
    assert all(0 <= place < filtering.BUCKETS for place in found)
    assert filtering.hashed("one two") != filtering.hashed("two one")


def test_the_classifier_learns_and_scores_each_document_alone():
    texts = [f"{'fine' if number % 2 else 'poor'} text number {number}" for number in range(40)]
    model = filtering.classifier(texts, [bool(number % 2) for number in range(40)])
    together = filtering.in_batches(model, texts, size=7)
    assert torch.allclose(together, torch.cat([model([text]) for text in texts]).detach(), atol=1e-5)
    assert ((together > 0) == torch.arange(40).remainder(2).bool()).all()


def test_perplexity_scores_are_minus_the_loss_of_each_document():
    model = angles.language_model(torch.arange(400) % 90 + 30, num_steps=1, length=16)
    texts = ["some text here", "and other text"]
    from lessons import corpora

    for text, score in zip(texts, filtering.perplexity_scores(model, texts), strict=True):
        ids = corpora.encode(text)[None]
        assert score.item() == pytest.approx(-model(input_ids=ids, labels=ids).loss.item(), rel=1e-4)


def test_agreement_of_decisions():
    scores = torch.arange(10.0)
    assert filtering.agreement_frac(scores, 3 * scores + 1) == 1
    assert filtering.agreement_frac(scores, -scores) == 0
    assert filtering.agreement_frac(scores, (scores - 4.4).abs()) == pytest.approx(0.6)  # 3 of 5 kept by both


def test_a_linear_classifier_draws_nothing_and_takes_adams_first_step():
    before = torch.get_rng_state()
    x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 1])
    model = linear.fitted(x, y, 2, num_steps=1, learning_rate=0.1, decay=0.0)
    assert torch.equal(torch.get_rng_state(), before)
    # Adam's first step is the rate against the sign of the gradient
    assert torch.allclose(model.weight, torch.tensor([[0.1, -0.1], [-0.1, 0.1]]), atol=1e-5)


@pytest.fixture(scope="module")
def pieces():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(3, 8, generator=generator)
    y = torch.arange(300) % 3
    x = centres[y] + 0.8 * torch.randn(300, 8, generator=generator)
    return sampling_loops.Pool(x[:240], y[:240], x[240:], y[240:])


@pytest.mark.parametrize("way", sampling_loops.WAYS)
def test_every_way_starts_alike_and_pays_the_same(pieces, way):
    curve = sampling_loops.accuracies(pieces, way, num_first=12, num_more=8, num_rounds=4)
    assert list(curve.index) == [12, 20, 28, 36, 44]
    assert curve.iloc[0] == sampling_loops.accuracies(pieces, "uniform", num_first=12, num_rounds=0).iloc[0]
    assert curve.iloc[-1] > 0.6


@pytest.mark.parametrize("way", sampling_loops.WAYS)
def test_no_example_is_paid_for_twice(pieces, way):
    free = torch.randperm(240, generator=torch.Generator().manual_seed(1))[40:]
    model = linear.fitted(pieces.x[:40], pieces.y[:40], 3, num_steps=30, learning_rate=0.2, decay=1e-4)
    wrong = torch.tensor([3, 3, 5])
    with torch.no_grad():
        more = sampling_loops._more(pieces, model, way, free, wrong, 10)
    assert len(more) == len(more.unique()) == 10
    assert torch.isin(more, free).all()
    if way == "kinds of errors":
        assert pieces.y[more[:3]].tolist() == pieces.y[wrong].tolist()
    if way == "around errors":
        likeness = pieces.x[free] @ pieces.x[3]
        assert more[:2].tolist() == free[likeness.argsort(descending=True)[:2]].tolist()


def test_errors_of_loops():
    pool = sampling_loops.Pool(torch.ones(5, 2), torch.zeros(5).long(), torch.ones(1, 2), torch.zeros(1).long())
    with pytest.raises(ValueError, match="expected one of uniform"):
        sampling_loops.accuracies(pool, "by chance")
    with pytest.raises(ValueError, match="there are 5"):
        sampling_loops.accuracies(pool, "uniform", num_first=4, num_more=1, num_rounds=2)


def test_labels_to_an_accuracy():
    curve = pd.Series([0.2, 0.4, 0.3, 0.8], index=[10, 20, 30, 40])
    assert sampling_loops.labels_to(curve, 0.3) == pytest.approx(15)
    assert sampling_loops.labels_to(curve, 0.6) == pytest.approx(35)  # the fall at 30 counts as 0.4
    assert sampling_loops.labels_to(curve, 0.1) == 10
    assert sampling_loops.labels_to(curve, 0.9) == 40


def test_what_teaches_by_counting_outcomes():
    p = 0.3
    assert sampling_loops.teaches(np.array([p]), 2)[0] == pytest.approx(2 * p * (1 - p))
    assert sampling_loops.teaches(np.array([0.0, 1.0]), 8).tolist() == [0, 0]
    with pytest.raises(ValueError, match="at least 2"):
        sampling_loops.teaches(np.array([0.5]), 1)
    with pytest.raises(ValueError, match="expected 0 to 1"):
        sampling_loops.teaches(np.array([1.5]))


def test_weighting_by_hand():
    # one item that teaches and three that never do: uniform draws it a quarter of the time, known rates always
    table = sampling_loops.weighted(np.array([0.5, 0.0, 1.0, 0.0]), group=2)
    assert table.loc["uniform", "teaching_frac"] == pytest.approx(0.5 / 4)
    assert table.loc["known", "teaching_frac"] == pytest.approx(0.5)
    assert table.loc["known", "distinct_frac"] == pytest.approx(1 / 4)
    assert table.loc["uniform", "distinct_frac"] == 1
    assert 0.5 / 4 <= table.loc["estimated", "teaching_frac"] < 0.5
