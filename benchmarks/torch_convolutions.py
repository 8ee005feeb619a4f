"""The torch side of `convolutions.py`: single convolutions and their gradients.

It needs only torch and numpy, and is run by `convolutions.py`.
"""

import json
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
import worker

LAYOUTS = {
    "channels last": torch.channels_last,
    "default layout": torch.contiguous_format,
}
PARTS = {
    "input gradient": [True, False, False],
    "kernel gradient": [False, True, False],
}


def programs(
    batch: int, side: int, before: int, after: int, stride: int, layout: str
) -> dict[str, Callable[[], torch.Tensor]]:
    """A 3x3 convolution and its two gradients."""
    form = {"memory_format": LAYOUTS[layout]}
    image = torch.randn(batch, before, side, side).to(**form)
    kernel = (torch.randn(after, before, 3, 3) / 10).to(**form)
    small = side // stride
    gradient = torch.randn(batch, after, small, small).to(**form)
    how = [stride, stride], [1, 1], [1, 1], False, [0, 0], 1

    def forward() -> torch.Tensor:
        return torch.nn.functional.conv2d(image, kernel, stride=stride, padding=1)

    def backward(wanted: list[bool]) -> torch.Tensor:
        ops = torch.ops.aten
        return ops.convolution_backward(gradient, image, kernel, None, *how, wanted)

    backwards = {name: partial(backward, wanted) for name, wanted in PARTS.items()}
    return {"forward": forward, **backwards}


def timed(run: Callable[[], torch.Tensor], times: int) -> float:
    """Seconds of one run, from several."""
    run()
    start = time.perf_counter()
    for _ in range(times):
        run()
    return (time.perf_counter() - start) / times


def main() -> None:
    """Times what `convolutions.py` asks for."""
    batch, shapes = json.loads(sys.argv[1])
    found = {
        f"{title}, {part}, {layout}": partial(timed, run)
        for title, shape in shapes.items()
        for layout in LAYOUTS
        for part, run in programs(batch, *shape, layout).items()
    }
    about = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    worker.serve(found, about)


if __name__ == "__main__":
    main()
