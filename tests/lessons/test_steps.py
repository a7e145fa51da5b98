"""The optimizers and trainings behind “steps to quality”, held against hand calculations and torch's own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lessons import meter
from lessons.steps import distilling, growing, language, modalities, pretext, solvers
from lessons.steps.optimizers import Conda, Lamb, matrices_and_rest

pytestmark = pytest.mark.usefixtures("one_thread")


def moved(make, start: torch.Tensor, gradients: list[torch.Tensor]) -> torch.Tensor:
    parameter = torch.nn.Parameter(start.clone())
    update = make([parameter])
    for gradient in gradients:
        parameter.grad = gradient.clone()
        update.step()
    return parameter.detach()


@pytest.fixture
def gradients() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 5, generator=generator) for _ in range(4)]


def test_lambs_first_step_is_a_fixed_fraction_of_the_weights():
    start = torch.tensor([[3.0, 4.0]])
    got = moved(lambda p: Lamb(p, lr=0.1, weight_decay=0.0), start, [torch.tensor([[2.0, -7.0]])])
    # Adam's first direction is the sign, of length sqrt(2); the weights have length 5
    assert torch.allclose(got, start - 0.1 * 5 / 2**0.5 * torch.tensor([[1.0, -1.0]]))


def test_lambs_trust_is_one_where_the_weights_are_zero():
    got = moved(lambda p: Lamb(p, lr=0.1), torch.zeros(2), [torch.tensor([2.0, -7.0])])
    assert torch.allclose(got, torch.tensor([-0.1, 0.1]))


@pytest.mark.parametrize("turned", [False, True], ids=["wide", "tall"])
def test_conda_with_a_basis_that_is_the_identity_is_adamw(monkeypatch, gradients, turned):
    monkeypatch.setattr(torch.linalg, "svd", lambda m, **_: SimpleNamespace(U=torch.eye(m.shape[0])))
    given = [one.T if turned else one for one in gradients]
    start = torch.ones_like(given[0])
    got = moved(lambda p: Conda(p, lr=0.01, weight_decay=0.1), start, given)
    assert torch.allclose(
        got, moved(lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1), start, given), atol=1e-6
    )


def test_condas_first_step_has_the_singular_vectors_of_the_gradient(gradients):
    gradient = gradients[0]
    basis = torch.linalg.svd(gradient, full_matrices=False).U
    got = moved(lambda p: Conda(p, lr=0.01, weight_decay=0.0), torch.zeros(3, 5), [gradient])
    assert torch.allclose(got, -0.01 * basis @ (basis.T @ gradient).sign(), atol=1e-5)


def test_conda_is_the_same_for_a_matrix_and_its_transpose(gradients):
    start = torch.ones(3, 5)
    wide = moved(lambda p: Conda(p, lr=0.01), start, gradients)
    tall = moved(lambda p: Conda(p, lr=0.01), start.T, [one.T for one in gradients])
    assert torch.allclose(wide, tall.T, atol=1e-5)


def test_conda_says_when_it_decomposes(monkeypatch, gradients):
    plain, calls = torch.linalg.svd, []
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: calls.append(1) or plain(*a, **k))
    parameter = torch.nn.Parameter(torch.ones(3, 5))
    update, announced = Conda([parameter], num_steps_kept=3), []
    for gradient in [*gradients, *gradients]:
        announced.append(update.finds_basis_next)
        before = len(calls)
        parameter.grad = gradient
        update.step()
        assert (len(calls) > before) == announced[-1]
    assert announced == [True, False, False, True, False, False, True, False]


def test_optimizers_refuse():
    with pytest.raises(ValueError, match="give vectors to AdamW"):
        Conda([torch.nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match="positive rate"):
        Lamb([torch.nn.Parameter(torch.ones(3))], lr=0.0)
    with pytest.raises(ValueError, match="'LAMB'"):
        language.optimizing("SGD")


def test_every_parameter_has_one_optimizer():
    model = language.language_model()
    inner, rest = matrices_and_rest(model)
    assert {id(one) for one in (*inner, *rest)} == {id(one) for one in model.parameters()}
    assert len(inner) + len(rest) == len(list(model.parameters()))
    assert len(inner) == 2 * 7  # per layer four matrices of attention and three of the feed-forward
    assert any(one is model.lm_head.weight for one in rest)


def test_lambs_table_says_chips():
    table = solvers.lamb_table()
    last = table.iloc[-1]
    assert last["times_faster"] == pytest.approx(81.4 * 60 / 76.19)
    assert last["times_chips"] == 64
    assert table["chip_hours"].iloc[0] == pytest.approx(16 * 81.4)
    samples = (table["num_steps"].iloc[1:8] * [512 * 2**n for n in range(7)]).unique()
    assert len(samples) == 1  # every run of one batch size reads the same


def test_soft_labels_that_are_certain_are_the_text_itself():
    model = language.language_model(layers=1, hidden=32)
    ids = language.english_ids()[1][:4]
    logits = model(input_ids=ids).logits
    sure = torch.full_like(logits, -1e4).scatter(-1, ids.roll(-1, 1)[..., None], 1e4)
    assert distilling.towards(logits, sure).item() == pytest.approx(language.own_loss(model, ids).item(), rel=1e-5)


def test_salts_phases_come_in_order():
    training, seen = distilling.SmallTeacher(0, 2, 3), []
    untaught = training.loss()
    for _ in range(7):
        seen.append(training.phase)
        training.step()
        if training.phase == "teacher's own training":
            assert training.loss() == untaught
    assert seen == ["teacher's own training"] * 2 + ["with teacher"] * 3 + ["alone"] * 2
    assert training.loss() < untaught


def test_salt_without_help_is_plain_adamw():
    plain, unhelped = language.optimizing("AdamW")(3), distilling.salt(150, 0)(3)
    for _ in range(3):
        plain.step()
        unhelped.step()
    assert plain.loss() == unhelped.loss()
    assert unhelped.phase == "alone"


def test_likelihood_of_a_piece_is_its_loss_times_its_letters():
    model = language.language_model(layers=1, hidden=32)
    ids = language.english_ids()[1][:5]
    scores = distilling.log_likelihood(model, ids)
    assert scores.shape == (5,)
    assert -scores.mean().item() / (ids.shape[1] - 1) == pytest.approx(language.own_loss(model, ids).item(), rel=1e-5)


def test_noise_is_the_same_letters_in_another_order():
    clean, noisy = distilling.pool(0.0), distilling.pool(0.5)
    half = len(clean) // 2
    assert torch.equal(clean[half:], noisy[half:])
    assert torch.equal(clean[:half].sort(1).values, noisy[:half].sort(1).values)
    assert (clean[:half] != noisy[:half]).any(1).float().mean() > 0.99
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        distilling.pool(1.0)


def test_what_is_kept_has_the_highest_differences():
    large, small = (language.language_model(layers=1, hidden=32, seed=seed) for seed in (1, 2))
    training = distilling.Selected(0, large, small)
    steps = 0
    while training.phase == "scoring":
        training.step()
        steps += 1
    assert steps == len(training.pool) // 128
    score = distilling.log_likelihood(large, training.pool) - distilling.log_likelihood(small, training.pool)
    left = torch.ones(len(score), dtype=torch.bool)
    left[training.kept] = False
    assert left.sum() == len(score) // 2
    assert score[~left].min() >= score[left].max() - 1e-3


def test_growing_computes_the_same():
    small = language.language_model(layers=1, hidden=32, seed=4)
    ids = language.english_ids()[1][:3]
    wide = growing.widened(small, seed=1)
    experts = growing.upcycled(wide)
    with torch.no_grad():
        logits = small(input_ids=ids).logits
        assert torch.allclose(wide(input_ids=ids).logits, logits, atol=1e-5)
        assert torch.allclose(experts(input_ids=ids).logits, logits, atol=1e-5)
    weights = wide.model.layers[0].mlp.up_proj.weight
    assert weights.shape == (128, 64)
    assert not torch.allclose(weights[:, :32], weights[:, 32:])  # unequal parts: the two halves can part


def test_deeper_is_every_layer_twice():
    model = language.language_model(layers=2, hidden=32)
    deep = growing.deepened(model)
    assert len(deep.model.layers) == 4
    for number, layer in enumerate(deep.model.layers):
        assert torch.equal(layer.mlp.up_proj.weight, model.model.layers[number // 2].mlp.up_proj.weight)
    assert torch.equal(deep.lm_head.weight, model.lm_head.weight)


def test_a_tokens_experts_are_weighted_to_one():
    layer = growing.Experts(torch.nn.Identity(), 8, 4, 2)
    x = torch.randn(3, 5, 8)
    assert torch.allclose(layer(x), x, atol=1e-6)
    with pytest.raises(ValueError, match="top_k"):
        growing.Experts(torch.nn.Identity(), 8, 4, 5)


@pytest.mark.parametrize(
    ("steps", "phases"),
    [
        ((2, 1), ["small"] * 2 + ["grown"] + ["experts"]),
        ((2, 0), ["small"] * 2 + ["experts"] * 2),
        ((0, 0), ["experts"] * 4),
    ],
)
def test_a_model_grows_when_its_phase_ends(steps, phases):
    training, seen = growing.Grown(0, *steps), []
    for _ in range(4):
        seen.append(training.phase)
        training.step()
    assert seen == phases
    assert len(training.model.model.layers) == 2
    assert isinstance(training.model.model.layers[0].mlp, growing.Experts)


def test_experts_of_a_modality_touch_no_other():
    layer = modalities.ChoosingExperts(8, 16)
    layer.is_second = torch.tensor([[False, False, True, True]] * 3)
    x = torch.randn(3, 4, 8)
    layer(x)[:, :2].sum().backward()
    assert layer.down.grad[:4].abs().sum() > 0
    assert layer.down.grad[4:].abs().sum() == 0


def test_a_step_of_experts_costs_a_dense_step_and_the_router():
    flops = {}
    for design in modalities.DESIGNS:
        way = meter.to_target(modalities.learning_both(design), 0.0, seeds=(0,), max_steps=1)
        flops[design] = int(way.totals()["flops"].iloc[0])
    tokens, products = modalities.BATCH * modalities.LENGTH, 2 * 64 * 3  # forward and, twice, backward
    assert flops["grouped experts"] - flops["dense"] == 2 * tokens * products * 8


def test_held_out_routing_does_not_look_ahead():
    model = modalities.model_of("grouped experts").eval()
    for layer in model.model.layers:
        layer.mlp.enough.fill_(0.5)
    rows = modalities.streams()[1][:2]
    other = rows.clone()
    other[:, -1] = 128 + (other[:, -1] + 1) % 128
    with torch.no_grad():
        first, second = (model(input_ids=one).logits[:, :-1] for one in (rows, other))
    assert torch.allclose(first, second, atol=1e-5)
    with pytest.raises(ValueError, match="expected one of dense, grouped experts"):
        modalities.model_of("mixed")


def test_masks_hide_as_many_letters_in_every_piece():
    ids = language.english_ids()[1]
    seen, hidden = pretext.mask(ids, torch.Generator().manual_seed(0))
    assert (hidden.sum(1) == round(0.15 * 32)).all()
    assert (seen[hidden] == pretext.MASK).all()
    assert torch.equal(seen[~hidden], ids[~hidden])


def test_a_probe_explains_what_is_linear_and_no_noise():
    classes = torch.randint(len(pretext.CLASSES), (40, 32), generator=torch.Generator().manual_seed(0))
    known = torch.nn.functional.one_hot(classes, len(pretext.CLASSES)).float()
    assert pretext.unexplained(known, classes) < 0.01
    assert pretext.unexplained(torch.randn(40, 32, 4), classes) > 0.95


@pytest.mark.parametrize("disentangled", [True, False])
def test_whose_embedding_the_detector_moves(disentangled):
    training = pretext.Replaced(0, disentangled=disentangled)
    weight = training.generating.get_input_embeddings().weight
    (gradient,) = torch.autograd.grad(training.losses(training.draw())[1], weight, allow_unused=True)
    assert (gradient is None) == disentangled
    before = weight.detach().clone()
    training.step()
    assert not torch.equal(before, weight)  # the generator's own loss still does
