"""Reference teachers and students in Flax Linen, written plainly.

Every factory is called as `factory(classes=10)`, every module as `module(images,
train=False)`. Text encoders take a dict of token ids and their mask instead of images.
The docstring of each module lists the paths that can be hints.
"""

from hintjax.models.convnext import (
    ConvNeXt,
    convnext_base,
    convnext_large,
    convnext_small,
    convnext_tiny,
)
from hintjax.models.efficientnet import (
    EfficientNetLite,
    efficientnet_lite0,
    efficientnet_lite1,
    efficientnet_lite2,
    efficientnet_lite3,
    efficientnet_lite4,
)
from hintjax.models.encoder import (
    Encoder,
    encoder_mini,
    encoder_small,
    encoder_tiny,
)
from hintjax.models.fitnets import (
    MaxoutCNN,
    fitnet1,
    fitnet2,
    fitnet3,
    fitnet4,
    fitnet_mnist,
    maxout_cifar,
    maxout_mnist,
)
from hintjax.models.foundation import (
    dinov2_vitb14,
    dinov2_vitb14_reg,
    dinov2_vitg14,
    dinov2_vitg14_reg,
    dinov2_vitl14,
    dinov2_vitl14_reg,
    dinov2_vits14,
    dinov2_vits14_reg,
)
from hintjax.models.imagenet import (
    ImageNetResNet,
    imagenet_resnet18,
    imagenet_resnet34,
    imagenet_resnet50,
)
from hintjax.models.maxout import Maxout
from hintjax.models.plain import PlainCNN, plain_thin, plain_thin_he, plain_wide
from hintjax.models.resnet import (
    ResNet,
    resnet8,
    resnet8x4,
    resnet14,
    resnet20,
    resnet32,
    resnet32x4,
    resnet44,
    resnet56,
    resnet110,
)
from hintjax.models.tower import ImageTower
from hintjax.models.vit import (
    VisionTransformer,
    vit_micro,
    vit_mini,
    vit_small,
    vit_tiny,
)
from hintjax.models.wrn import (
    WideResNet,
    wrn_16_1,
    wrn_16_2,
    wrn_40_1,
    wrn_40_2,
)

__all__ = [
    "ConvNeXt",
    "EfficientNetLite",
    "Encoder",
    "ImageNetResNet",
    "ImageTower",
    "Maxout",
    "MaxoutCNN",
    "PlainCNN",
    "ResNet",
    "VisionTransformer",
    "WideResNet",
    "convnext_base",
    "convnext_large",
    "convnext_small",
    "convnext_tiny",
    "dinov2_vitb14",
    "dinov2_vitb14_reg",
    "dinov2_vitg14",
    "dinov2_vitg14_reg",
    "dinov2_vitl14",
    "dinov2_vitl14_reg",
    "dinov2_vits14",
    "dinov2_vits14_reg",
    "efficientnet_lite0",
    "efficientnet_lite1",
    "efficientnet_lite2",
    "efficientnet_lite3",
    "efficientnet_lite4",
    "encoder_mini",
    "encoder_small",
    "encoder_tiny",
    "fitnet1",
    "fitnet2",
    "fitnet3",
    "fitnet4",
    "fitnet_mnist",
    "imagenet_resnet18",
    "imagenet_resnet34",
    "imagenet_resnet50",
    "maxout_cifar",
    "maxout_mnist",
    "plain_thin",
    "plain_thin_he",
    "plain_wide",
    "resnet8",
    "resnet8x4",
    "resnet14",
    "resnet20",
    "resnet32",
    "resnet32x4",
    "resnet44",
    "resnet56",
    "resnet110",
    "vit_micro",
    "vit_mini",
    "vit_small",
    "vit_tiny",
    "wrn_16_1",
    "wrn_16_2",
    "wrn_40_1",
    "wrn_40_2",
]
