"""The teacher and the students of benchmarks/edge_table.py on MNIST and CIFAR-10.

    PYTHONPATH=benchmarks hintjax distill --student edge_networks:thin ...

They are plain CNNs, whose maps halve after each of the first three convolutions. So a
device has little to compute.
"""

from flax import linen as nn

from hintjax.models import PlainCNN


def teacher(classes: int) -> PlainCNN:
    """Five convolutions of 16 to 128 channels.

    246,026 parameters for 10 classes and gray images, 246,314 for color images.
    """
    return _cnn((16, 32, 64, 128, 128), classes)


def half(classes: int) -> PlainCNN:
    """The teacher with half of its channels; 62,106 parameters for color images."""
    return _cnn((8, 16, 32, 64, 64), classes)


def thin(classes: int) -> PlainCNN:
    """Four thin convolutions; 18,570 parameters for gray images."""
    return _cnn((6, 12, 32, 48), classes)


def _cnn(widths: tuple[int, ...], classes: int) -> PlainCNN:
    he = nn.initializers.he_normal()
    return PlainCNN(widths, classes, pools=(1, 2, 3), kernel_init=he)
