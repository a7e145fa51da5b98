"""A training that is studied from inside goes on as if it had not been, whoever's trainer it is."""

import sys
import types
import warnings

import planted
import pytest
import torch

import effkit as ek
from effkit.advice import callbacks
from effkit.restoring import remembered

pytestmark = pytest.mark.usefixtures("one_thread")
FEW = {"num_batches": 2}


def model():
    torch.manual_seed(0)
    return ek.models.text(layers=1, hidden=32, ffn=64, device="cpu")


def dataset():
    return planted.Texts([12] * 32)


def state_of(optimizer):
    return [value.clone() for one in optimizer.state.values() for value in one.values()]


def same(one, other):
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# Hugging Face


class Dropping(torch.nn.Module):
    """A model whose forward draws random numbers: a draw too many anywhere before would show in its loss."""

    def __init__(self):
        super().__init__()
        self.inner = model()

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        if self.training:
            drop = torch.rand(input_ids.shape) < 0.2
            input_ids = input_ids.masked_fill(drop, 5)
        return self.inner(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


def hugging_face(tmp_path, given, collate=planted.padded, **more):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    losses = []

    class Noting(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            losses.append(logs.get("loss"))

    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=5, per_device_train_batch_size=4, logging_steps=1, report_to=[],
        save_strategy="no", disable_tqdm=True, use_cpu=True, seed=0, remove_unused_columns=False, **more,
    )  # fmt: skip
    torch.manual_seed(0)
    trainer = transformers.Trainer(
        Dropping(), args, train_dataset=dataset(), data_collator=collate, callbacks=[Noting(), *given]
    )
    trainer.train()
    return trainer, losses


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return hugging_face(tmp_path_factory.mktemp("plain"), [])


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    callback = ek.advice.trainer_callback(**FEW)
    return callback, *hugging_face(tmp_path_factory.mktemp("studied"), [callback])


def test_trainer_goes_on_as_if_nothing_had_happened(plain, studied):
    callback, trainer, losses = studied
    assert isinstance(callback.study, ek.advice.Study)
    assert losses[:-1] == plain[1][:-1], "the losses of the steps"
    assert len(losses) > 4
    assert same(list(trainer.model.parameters()), list(plain[0].model.parameters()))
    one, other = (callbacks.unwrapped(each.optimizer) for each in (trainer, plain[0]))
    assert state_of(one)
    assert same(state_of(one), state_of(other))


def test_trainers_own_optimizer_took_the_steps(studied):
    callback, trainer, _ = studied
    assert type(trainer.optimizer).__name__ == "AcceleratedOptimizer"
    assert callback.study.optimizers == (callbacks.unwrapped(trainer.optimizer),)
    assert callback.study.account.total > 0
    assert callback.study.examples is not None, "the loader was seen through accelerate's"


def to_max_length(items):
    return {name: torch.nn.functional.pad(tensor, (0, 20), value=-100 if name == "labels" else 0)
            for name, tensor in planted.padded(items).items()}  # fmt: skip


def test_trainer_with_rows_of_one_width(tmp_path):
    """12 tokens in rows of 32, as with padding="max_length"."""
    callback = ek.advice.trainer_callback(**FEW)
    hugging_face(tmp_path, [callback], to_max_length)
    cells = callback.study.epoch.companion(ek.padding.EPOCH_CELLS)
    assert cells.frame["value"].to_dict() == {"real": 2 * 4 * 12, "padding": 2 * 4 * 20}


def test_trainers_precision_is_the_studys(tmp_path):
    callback = ek.advice.trainer_callback(**FEW)
    hugging_face(tmp_path, [callback], bf16=True)
    assert callback.study.heard.autocast


class Around:
    """What accelerate puts around an optimizer, in the middle of an accumulation: its step does nothing."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self):
        raise AssertionError("the optimizer itself has to step")


def test_the_optimizer_itself_steps_and_the_arguments_say_the_precision():
    pytest.importorskip("transformers")
    given = model()
    update = torch.optim.AdamW(given.parameters())
    loader = torch.utils.data.DataLoader(dataset(), batch_size=4, collate_fn=planted.padded)
    for bf16 in (False, True):
        callback = ek.advice.trainer_callback(**FEW)
        args = types.SimpleNamespace(bf16=bf16, output_dir="unused")
        callback.on_train_begin(args, None, None, model=given, optimizer=Around(update), train_dataloader=loader)
        assert callback.study.optimizers == (update,)
        assert callback.study.heard.autocast == bf16
    assert not update.state, "it was given back as it was"


def test_a_study_that_fails_ends_no_training(tmp_path, monkeypatch):
    def fails(**_):
        raise ValueError("nothing to study")

    monkeypatch.setattr("effkit.advice.callbacks.study", fails)
    callback = ek.advice.trainer_callback()
    with pytest.warns(UserWarning, match=r"did not study this training, which goes on: ValueError: nothing to study"):
        _, losses = hugging_face(tmp_path, [callback])
    assert callback.study is None
    assert len(losses) > 4


# Lightning: a stand-in for its trainer, and itself where it is installed


def lightning_like(base):
    """A module as people write them, of one package or the other, or of none."""

    class Module(base):
        def __init__(self):
            super().__init__()
            self.inner = model()
            self.logged = []
            self.losses = []

        def training_step(self, batch, number):
            drop = torch.rand(batch["input_ids"].shape) < 0.2
            loss = self.inner(**{**batch, "input_ids": batch["input_ids"].masked_fill(drop, 5)}).loss
            self.log("loss", loss)
            self.losses.append(float(loss.detach()))
            return {"loss": loss}

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    torch.manual_seed(0)
    return Module()


class Logging(torch.nn.Module):
    def log(self, name, value):
        self.logged.append(name)


def stand_in(monkeypatch, package, callback_options=None):
    """The few attributes of a Trainer that the callback reads, and the loop around them."""
    for name in callbacks._LIGHTNING:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, types.SimpleNamespace(Callback=type("Callback", (), {})))
    module = lightning_like(Logging)
    update = module.configure_optimizers()
    loader = torch.utils.data.DataLoader(
        dataset(), batch_size=4, shuffle=True, collate_fn=planted.padded, generator=torch.Generator().manual_seed(3)
    )
    callback = None if callback_options is None else ek.advice.lightning_callback(**callback_options)
    torch.manual_seed(1)
    if callback is not None:
        callback.on_train_start(
            types.SimpleNamespace(train_dataloader=loader, optimizers=[update], default_root_dir="unused"), module
        )
    studied_losses = len(module.losses)
    for batch in loader:
        update.zero_grad()
        module.training_step(batch, 0)["loss"].backward()
        update.step()
    return callback, module, update, studied_losses


@pytest.mark.parametrize("package", callbacks._LIGHTNING)
def test_a_trainer_like_lightnings_goes_on_as_if_nothing_had_happened(monkeypatch, package):
    _, expected, its_update, _ = stand_in(monkeypatch, package)
    callback, module, update, before = stand_in(monkeypatch, package, FEW)
    assert isinstance(callback.study, ek.advice.Study)
    assert any("training_step()" in place for place in callback.study.heard.asked), (
        "the study ran the module's own training_step"
    )
    assert before == 0, "and what the module counts is put back"
    assert module.losses == expected.losses
    assert len(module.logged) == len(expected.logged) == 8, "what the study's steps log is not kept"
    assert same(list(module.parameters()), list(expected.parameters()))
    assert same(state_of(update), state_of(its_update))
    assert "log" not in vars(module)


def test_modules_that_step_themselves_are_left_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning.pytorch", types.SimpleNamespace(Callback=object))
    callback = ek.advice.lightning_callback()
    module = lightning_like(Logging)
    module.automatic_optimization = False
    trainer = types.SimpleNamespace(
        train_dataloader=[], optimizers=[module.configure_optimizers()], default_root_dir="unused"
    )
    with pytest.warns(UserWarning, match="the module takes its steps itself"):
        callback.on_train_start(trainer, module)
    assert callback.study is None
    assert not module.losses


def test_without_the_package_one_sentence_says_what_to_install(monkeypatch):
    for name in (*callbacks._LIGHTNING, "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="needs the package lightning or pytorch_lightning: pip install lightning"):
        ek.advice.lightning_callback()
    with pytest.raises(ImportError, match="needs the package transformers: pip install transformers"):
        ek.advice.trainer_callback()


def lightning(given, tmp_path):
    package = pytest.importorskip("lightning.pytorch")
    package.seed_everything(0, verbose=False)
    module = lightning_like(package.LightningModule)
    loader = torch.utils.data.DataLoader(dataset(), batch_size=4, shuffle=True, collate_fn=planted.padded)
    trainer = package.Trainer(
        max_steps=6, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=given, default_root_dir=tmp_path, precision="bf16-mixed",
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, loader)
    return trainer, module


def test_lightning_goes_on_as_if_nothing_had_happened(tmp_path):
    pytest.importorskip("lightning.pytorch")
    trainer, expected = lightning([], tmp_path)
    callback = ek.advice.lightning_callback(**FEW)
    other, module = lightning([callback], tmp_path)
    assert isinstance(callback.study, ek.advice.Study)
    assert callback.study.heard.autocast, "in the trainer's precision"
    assert module.losses == expected.losses
    assert len(expected.losses) == 6
    assert same(list(module.parameters()), list(expected.parameters()))
    assert same(state_of(other.optimizers[0]), state_of(trainer.optimizers[0]))
    assert other.callback_metrics["loss"] == trainer.callback_metrics["loss"]


# the pieces


def test_an_order_that_was_drawn_is_drawn_again():
    loader = torch.utils.data.DataLoader(range(32), shuffle=True, generator=torch.Generator().manual_seed(5))
    with remembered(loader):
        inside = list(callbacks.own_loader(loader))
    assert inside == list(loader)
    assert inside != list(loader), "a generator that goes on gives another order"


def test_workers_that_persist_are_left_to_the_training():
    loader = torch.utils.data.DataLoader(range(8), num_workers=1, persistent_workers=True)
    loader._iterator = "the training's"
    for given in (loader, types.SimpleNamespace(base_dataloader=loader)):  # accelerate's is around one
        own = callbacks.own_loader(given)
        assert own is not loader
        assert own._iterator is None
        assert own.batch_sampler is loader.batch_sampler
    assert loader._iterator == "the training's"
    loader._iterator = None
    assert callbacks.own_loader([1, 2]) == [1, 2]


def test_optimizers_are_found_under_any_number_of_wrappers():
    own = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    assert callbacks.unwrapped(types.SimpleNamespace(optimizer=own)) is own
    assert callbacks.unwrapped(own) is own
