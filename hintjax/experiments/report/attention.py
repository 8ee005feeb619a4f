"""The picture of a run: the attention maps of teacher and student on test images."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hintjax.experiments.feature_maps import Images, image_batches, map_of, maps
from hintjax.experiments.finished import load_student
from hintjax.experiments.setting import Setting, taught_by
from hintjax.losses import attention_map
from hintjax.networks import Network, Variables
from hintjax.processes import first

ATTENTION = "attention.png"
_FEW = 3  # images in the picture


def attention_picture(
    setting: Setting, run_dir: Path, teacher: Variables, guided: str, hint: str
) -> None:
    """Draws attention.png of a finished run: teacher, student, and their difference.

    Args:
        setting: setting of the run.
        run_dir: run directory.
        teacher: variables of the teacher.
        guided: path of the guided layer.
        hint: path of the hint layer.
    """
    from hintjax.experiments import pictures

    test = setting.dataset.test
    shown = np.arange(min(_FEW, test.n))
    images = list(image_batches(setting, test, shown))
    ours, theirs = setting.places.class_tokens
    student = load_student(run_dir, hints_only=True)[1]
    figure = pictures.attention(
        test.read(shown).image,
        attention_of(images, taught_by(setting), hint, theirs, teacher),
        attention_of(images, setting.student, guided, ours, student),
    )
    if first():
        figure.savefig(run_dir / ATTENTION)


def attention_of(
    images: Sequence[Images],
    network: Network,
    path: str,
    class_tokens: int,
    variables: Variables,
) -> np.ndarray:
    """The attention maps of a layer for some images."""
    hints = maps(map_of(network, path, class_tokens), variables, images)
    height, width = hints.shape[1:3]
    return np.asarray(attention_map(hints)).reshape(-1, height, width)
