"""Training loops as people write them, of which each changes something else than its weights."""

from __future__ import annotations

import copy
import itertools
import random

import numpy as np
import torch
from torch import nn
from torch.optim import optimizer as optimizers
from torch.optim import swa_utils

BATCHES = list(torch.randn(4, 8, 4, generator=torch.Generator().manual_seed(1)))


def stack():
    """With buffers that learn, and dropout."""
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 2))


class Loop:
    """A training loop; ``holds`` says what else than the model and the optimizers it changes."""

    make = staticmethod(lambda parameters: torch.optim.AdamW(parameters, lr=0.05))

    def __init__(self):
        self.model = self.built()
        self.updates = [self.make(self.model.parameters())]
        self.begin()

    def built(self):
        return stack()

    def begin(self):
        pass

    def holds(self):
        return ()

    def loss(self, batch):
        return self.model(batch).square().mean()

    def step(self, batch):
        self.updates[0].zero_grad()
        loss = self.loss(batch)
        loss.backward()
        self.after(loss)
        return loss

    def after(self, loss):
        self.updates[0].step()


class Rprop(Loop):
    make = torch.optim.Rprop


class Relative(Loop):
    make = torch.optim.Adafactor


class Momentum(Loop):
    make = staticmethod(lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True))


class Closure(Loop):
    make = staticmethod(lambda parameters: torch.optim.LBFGS(parameters, lr=0.1, max_iter=3))

    def step(self, batch):
        def closure():
            self.updates[0].zero_grad()
            loss = self.loss(batch)
            loss.backward()
            return loss

        return self.updates[0].step(closure)


class Two(Loop):
    def begin(self):
        self.updates = [torch.optim.Adam(self.model[0].parameters()), torch.optim.RMSprop(self.model[3].parameters())]

    def after(self, loss):
        for update in self.updates:
            update.step()


class Scaled(Loop):
    def begin(self):
        self.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)

    def loss(self, batch):
        return self.scaler.scale(super().loss(batch))

    def after(self, loss):
        self.scaler.step(self.updates[0])
        self.scaler.update()

    def holds(self):
        return (self.scaler.state_dict(),)


class OneCycle(Loop):
    def begin(self):
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.updates[0], 0.1, total_steps=120)

    def after(self, loss):
        self.updates[0].step()
        self.schedule.step()

    def holds(self):
        return (self.schedule.state_dict(),)


class Lambda(OneCycle):
    def begin(self):
        self.schedule = torch.optim.lr_scheduler.SequentialLR(self.updates[0], [
            torch.optim.lr_scheduler.LambdaLR(self.updates[0], lambda number: 0.9**number),
            torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(self.updates[0], 5),
        ], [3])  # fmt: skip


class Plateau(OneCycle):
    def begin(self):
        self.schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(self.updates[0], patience=0)

    def after(self, loss):
        self.updates[0].step()
        self.schedule.step(loss.item())


class Average(Loop):
    def begin(self):
        self.average = copy.deepcopy(self.model)

    def after(self, loss):
        super().after(loss)
        with torch.no_grad():
            for mean, now in zip(self.average.state_dict().values(), self.model.state_dict().values(), strict=True):
                mean.copy_(0.9 * mean + 0.1 * now)

    def holds(self):
        return (self.average.state_dict(),)


class Teacher(nn.Module):
    """Updated in forward, as BYOL and DINO do."""

    def __init__(self):
        super().__init__()
        self.student = stack()
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def forward(self, x):
        with torch.no_grad():
            for mean, now in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                mean.lerp_(now, 0.1)
        return self.student(x) - self.teacher(x).detach()


class TeacherInForward(Loop):
    def built(self):
        return Teacher()


class Swa(Loop):
    def begin(self):
        self.average = swa_utils.AveragedModel(self.model, use_buffers=True)
        self.schedule = swa_utils.SWALR(self.updates[0], swa_lr=0.01)

    def after(self, loss):
        super().after(loss)
        self.average.update_parameters(self.model)
        self.schedule.step()

    def holds(self):
        return (self.average.state_dict(), self.schedule.state_dict())


class Unfreezing(Loop):
    def begin(self):
        self.count = 0
        self.model[0].requires_grad_(False)
        self.updates = [torch.optim.AdamW([one for one in self.model.parameters() if one.requires_grad])]

    def after(self, loss):
        super().after(loss)
        self.count += 1
        if self.count == 4:
            self.model[0].requires_grad_(True)
            self.updates[0].add_param_group({"params": list(self.model[0].parameters()), "lr": 0.001})

    def holds(self):
        return (self.count,)


class Freezing(Loop):
    def after(self, loss):
        super().after(loss)
        self.model[0].requires_grad_(False)
        self.model[1].eval()


class Clipping(Loop):
    def after(self, loss):
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.01)
        super().after(loss)


class Accumulating(Loop):
    def begin(self):
        self.count = 0

    def step(self, batch):
        loss = self.loss(batch)
        loss.backward()
        self.count += 1
        if self.count % 3 == 0:
            self.updates[0].step()
            self.updates[0].zero_grad(set_to_none=False)
        return loss

    def holds(self):
        return (self.count,)


class Master(torch.optim.Optimizer):
    """Keeps parameters and moments in float32."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.01})

    @torch.no_grad()
    def step(self):
        for one in self.param_groups[0]["params"]:
            state = self.state[one]
            if not state:
                state.update(master=one.float(), moment=torch.zeros_like(one, dtype=torch.float32), step=0)
            state["moment"] = 0.9 * state["moment"] + one.grad.float()  # replaced, not written into
            state["master"] -= 0.01 * state["moment"]
            state["step"] += 1
            one.copy_(state["master"])


class Bfloat16(Loop):
    make = Master

    def built(self):
        return stack().bfloat16()

    def loss(self, batch):
        return super().loss(batch.bfloat16())


class Codes(nn.Module):
    """Buffers that are bound anew, and grow."""

    def __init__(self):
        super().__init__()
        self.inside = stack()
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("seen", torch.zeros(1))
        self.queue = []

    def forward(self, x):
        y = self.inside(x)
        self.mean = 0.9 * self.mean + 0.1 * y.detach().mean(dim=0)
        self.seen = torch.cat([self.seen, self.mean[:1]])
        self.queue.append(y.detach())
        return y - self.mean


class Reassigned(Loop):
    def built(self):
        return Codes()

    def holds(self):
        return (*self.model.queue, len(self.model.queue))


NUMBER, TABLE = 0, {"losses": []}


class Counting(Loop):
    __slots__ = ("count",)
    total = 0

    def begin(self):
        global NUMBER, TABLE
        NUMBER, TABLE, self.count, number, Counting.total = 0, {"losses": []}, [0, {0}], 0, 0

        def counted():
            nonlocal number
            number += 1
            return number

        self.counted, self.read = counted, lambda: number

    def after(self, loss):
        global NUMBER
        super().after(loss)
        NUMBER += self.counted()
        Counting.total += 1
        TABLE["losses"].append(loss.item())
        TABLE[NUMBER] = NUMBER
        self.count[0] += 1
        self.count[1].add(self.count[0])
        self.last = loss.detach()

    def holds(self):
        return (NUMBER, dict(TABLE), Counting.total, self.count, self.read(), getattr(self, "last", None))


class Drawing(Loop):
    def begin(self):
        self.of_numpy, self.of_torch = np.random.default_rng(3), torch.Generator().manual_seed(3)
        self.of_python, self.legacy = random.Random(3), np.random.RandomState(3)

    def loss(self, batch):
        shift = self.of_numpy.random() + self.of_python.random() + self.legacy.rand() + random.random()
        noise = torch.rand(batch.shape, generator=self.of_torch) + float(np.random.rand())  # noqa: NPY002
        return super().loss(batch + shift + noise)

    def holds(self):
        return (self.of_numpy.bit_generator.state, self.of_torch.get_state(), self.of_python.getstate(),
                self.legacy.get_state())  # fmt: skip


class Overflowing(Loop):
    """Gradients of float16 that are inf or NaN, and weights after them."""

    def built(self):
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).half()

    def loss(self, batch):
        return super().loss(batch.half()) * 1e7


class ByHand(Loop):
    """Writes into ``.data``, or binds it anew; hangs hooks; renames the step's own function."""

    def begin(self):
        self.updates, self.velocity = [], {}

    def step(self, batch):
        self.model.zero_grad()
        loss = self.loss(batch)
        loss.backward()
        for name, one in self.model.named_parameters():
            self.velocity[name] = 0.9 * self.velocity.get(name, 0) + one.grad
            one.data = one.data - 0.05 * self.velocity[name]
        return loss

    def holds(self):
        return (self.velocity,)


class Normed(Loop):
    def built(self):
        return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 8)),
                             nn.utils.parametrizations.weight_norm(nn.Linear(8, 2)))  # fmt: skip


class Hooking(Loop):
    """Hangs a hook in every step, toggles modes, and draws from a loader of its own."""

    def begin(self):
        self.norms = []

    def after(self, loss):
        super().after(loss)
        self.model[0].register_forward_hook(lambda _, __, output: self.norms.append(output.norm().item()))
        self.model.eval()
        self.model.train()
        self.model[2].eval()

    def holds(self):
        return (len(self.norms), len(self.model[0]._forward_hooks))


class Removing(Loop):
    """Swaps a module for another in the middle, and gives the optimizer a new learning rate and a new group."""

    def begin(self):
        self.count = 0

    def after(self, loss):
        super().after(loss)
        self.count += 1
        self.updates[0].param_groups[0]["lr"] *= 0.7
        if self.count == 4:
            self.model[3] = nn.Linear(8, 2)
            self.updates[0] = torch.optim.SGD(self.model.parameters(), lr=0.01)

    def holds(self):
        return (self.count,)


LOOPS = [Loop, Rprop, Relative, Momentum, Closure, Two, Scaled, OneCycle, Lambda, Plateau, Average, TeacherInForward,
         Swa, Unfreezing, Freezing, Clipping, Accumulating, Bfloat16, Reassigned, Counting, Drawing, Overflowing,
         ByHand, Normed, Hooking, Removing]  # fmt: skip


def state(loop):
    """Everything that has to come back: values that do not change with what they were copied from, and identities."""
    model = loop.model
    whole = [
        list(model.state_dict().items()), [one.grad for one in model.parameters()],
        [update.state_dict() for update in loop.updates], loop.holds(), torch.get_rng_state(), random.getstate(),
        np.random.get_state(), [one.training for one in model.modules()],  # noqa: NPY002
        [one.requires_grad for one in model.parameters()],
        [[len(hooks) for name, hooks in sorted(vars(one).items()) if name.endswith("hooks")]
         for one in model.modules()],
        [len(found) for found in (optimizers._global_optimizer_pre_hooks,
                                  optimizers._global_optimizer_post_hooks,
                                  nn.modules.module._global_forward_hooks)],
    ]  # fmt: skip
    places = [(id(one), one.data_ptr()) for one in itertools.chain(model.parameters(), model.buffers())]
    return copy.deepcopy(whole), places, [id(one) for one in (*model.modules(), *loop.updates)]


def same(one, other):
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        alike = one.dtype == other.dtype and one.shape == other.shape
        return alike and bool(((one == other) | (one.isnan() & other.isnan())).all())
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other or one != one


def begun(kind):
    """A loop that has taken three steps, with all random numbers from one seed."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    loop = kind()
    for batch in BATCHES[:3]:
        loop.step(batch)
    return loop
