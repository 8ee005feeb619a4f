"""The torch side of `against_torch.py`: the same steps as a plain torch loop.

It needs only torch and numpy, and is run by `against_torch.py`. The networks (WRN), the
losses (KD, the hint regression, CRD with a memory bank) and the optimizer (SGD with
momentum 0.9 and weight decay 5e-4) are those of the CRD benchmark, with random data.
"""

import argparse
import os
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
import worker
from torch import nn

CLASSES = 100
DIM = 128
TEMPERATURE = 0.07
LAYOUTS = {
    "channels last": torch.channels_last,
    "default layout": torch.contiguous_format,
}


class Block(nn.Module):
    """A pre-activation block: BatchNorm, ReLU, convolution, twice."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        """Makes a block that changes the number of channels."""
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(before), nn.BatchNorm2d(after)
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        same = stride == 1 and before == after
        self.shortcut = (
            None if same else nn.Conv2d(before, after, 1, stride, bias=False)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The residual sum."""
        y = F.relu(self.norm1(x))
        x = x if self.shortcut is None else self.shortcut(y)
        return x + self.conv2(F.relu(self.norm2(self.conv1(y))))


class WideResNet(nn.Module):
    """WRN-depth-widen."""

    def __init__(self, depth: int, widen: int) -> None:
        """Makes three groups of (depth - 4) / 6 blocks."""
        super().__init__()
        widths = [16 * widen, 32 * widen, 64 * widen]
        self.stem = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        groups, before = [], 16
        for number, width in enumerate(widths):
            blocks = []
            for place in range((depth - 4) // 6):
                stride = 2 if number > 0 and place == 0 else 1
                blocks.append(Block(before, width, stride))
                before = width
            groups.append(nn.Sequential(*blocks))
        self.group1, self.group2, self.group3 = groups
        self.norm = nn.BatchNorm2d(before)
        self.classifier = nn.Linear(before, CLASSES)

    def hint(self, x: torch.Tensor) -> torch.Tensor:
        """The maps of the second group, where the networks end in the hint stage."""
        return self.group2(self.group1(self.stem(x)))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The pooled vector and the logits."""
        maps = F.relu(self.norm(self.group3(self.hint(x))))
        pooled = maps.mean((2, 3))
        return pooled, self.classifier(pooled)


class Bank(nn.Module):
    """CRD's memory bank of both networks' embeddings, with its constants Z."""

    def __init__(self, size: int, negatives: int) -> None:
        """Makes a random bank."""
        super().__init__()
        bound = (3 / DIM) ** 0.5
        for name in ("student", "teacher"):
            rows = torch.empty(size, DIM).uniform_(-bound, bound)
            self.register_buffer(name, rows)
        self.negatives, self.constants = negatives, {}

    def loss(
        self, s: torch.Tensor, t: torch.Tensor, index: torch.Tensor
    ) -> torch.Tensor:
        """The contrastive loss of both directions; then the rows are moved."""
        size = len(self.student)
        drawn = torch.randint(size, (len(s), self.negatives + 1), device=s.device)
        drawn[:, 0] = index
        value = self._direction("student", s, self.teacher, drawn)
        value = value + self._direction("teacher", t, self.student, drawn)
        with torch.no_grad():
            for rows, new in ((self.student, s), (self.teacher, t)):
                moved = F.normalize(0.5 * rows[index] + 0.5 * new, dim=1)
                rows.index_copy_(0, index, moved)
        return value

    def _direction(
        self, name: str, anchors: torch.Tensor, rows: torch.Tensor, drawn: torch.Tensor
    ) -> torch.Tensor:
        """One network's embeddings against the other's rows."""
        candidates = rows.index_select(0, drawn.view(-1)).view(*drawn.shape, DIM)
        scores = torch.bmm(candidates, anchors.unsqueeze(2)).squeeze(2)
        scores = torch.exp(scores / TEMPERATURE)
        if name not in self.constants:
            self.constants[name] = float(scores.detach().mean()) * len(rows)
        scores = scores / self.constants[name]
        noise = self.negatives / len(rows)
        own = torch.log(scores[:, 0] / (scores[:, 0] + noise + 1e-7))
        others = torch.log(noise / (scores[:, 1:] + noise + 1e-7))
        return -(own.sum() + others.sum()) / len(anchors)


def programs(
    options: argparse.Namespace, layout: torch.memory_format
) -> dict[str, Callable[[], None]]:
    """One step of each method, with networks of their own."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    n, size = options.batch, options.size
    images = torch.randn(n, 3, size, size).to(device, memory_format=layout)
    labels = torch.randint(CLASSES, (n,), device=device)
    index = torch.arange(n, device=device)
    teacher = WideResNet(*options.teacher).to(device, memory_format=layout).eval()

    def networks(*others: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
        student = WideResNet(*options.student).to(device, memory_format=layout).train()
        trained = [p for m in (student, *others) for p in m.parameters()]
        optimizer = torch.optim.SGD(trained, 1e-6, momentum=0.9, weight_decay=5e-4)
        return student, optimizer

    def step(optimizer: torch.optim.Optimizer, loss: Callable[[], torch.Tensor]):
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()

    def kd() -> Callable[[], None]:
        student, optimizer = networks()

        def loss() -> torch.Tensor:
            with torch.no_grad():
                _, taught = teacher(images)
            _, logits = student(images)
            soft = F.kl_div(
                F.log_softmax(logits / 4, 1),
                F.softmax(taught / 4, 1),
                reduction="batchmean",
            )
            return 0.1 * F.cross_entropy(logits, labels) + 0.9 * 16 * soft

        return partial(step, optimizer, loss)

    def hint_stage() -> Callable[[], None]:
        ours, theirs = (32 * widen for _, widen in (options.student, options.teacher))
        regressor = nn.Sequential(
            nn.Conv2d(ours, theirs, 1), nn.BatchNorm2d(theirs), nn.ReLU()
        ).to(device, memory_format=layout)
        student, optimizer = networks(regressor)

        def loss() -> torch.Tensor:
            with torch.no_grad():
                hint = teacher.hint(images)
            return F.mse_loss(regressor(student.hint(images)), hint)

        return partial(step, optimizer, loss)

    def crd() -> Callable[[], None]:
        width = [64 * widen for _, widen in (options.student, options.teacher)]
        heads = [nn.Linear(features, DIM).to(device) for features in width]
        bank = Bank(options.examples, options.negatives).to(device)
        student, optimizer = networks(*heads)

        def loss() -> torch.Tensor:
            with torch.no_grad():
                theirs, _ = teacher(images)
            ours, logits = student(images)
            s, t = (
                F.normalize(head(x), dim=1)
                for head, x in zip(heads, (ours, theirs), strict=True)
            )
            task = F.cross_entropy(logits, labels)
            return task + 0.8 * bank.loss(s, t, index)

        return partial(step, optimizer, loss)

    made = {"kd": kd, "hint_stage": hint_stage, "crd": crd}
    return {name: made[name]() for name in options.methods}


def timed(step: Callable[[], None], steps: int) -> float:
    """The seconds for each of so many steps."""
    start = time.perf_counter()
    for _ in range(steps):
        step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


def main() -> None:
    """Warms the programs up, and times them when asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--methods", nargs="+")
    add("--teacher", nargs=2, type=int)
    add("--student", nargs=2, type=int)
    for name in ("--batch", "--size", "--negatives", "--examples"):
        add(name, type=int)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    torch.set_num_threads(os.cpu_count() or 1)
    steps = {
        f"{name}, {title}": step
        for title, layout in LAYOUTS.items()
        for name, step in programs(options, layout).items()
    }
    for step in steps.values():
        step()
    about = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        about["device"] = torch.cuda.get_device_name()
    worker.serve({name: partial(timed, step) for name, step in steps.items()}, about)


if __name__ == "__main__":
    main()
