"""The small-image networks of the papers that timm lacks: `import sdcli.zoo` makes timm know them by name.

    import sdcli.zoo, timm
    model = timm.create_model("cifar_resnet20", num_classes=10)

Each is for images of 3x32x32 and 100 classes, unless it is asked for others. Own code after the papers' descriptions.
"""

from sdcli.zoo import (
    cifar_densenet,
    cifar_googlenet,
    cifar_mobilenet,
    cifar_pyramidnet,
    cifar_resnet,
    cifar_resnext,
    cifar_shufflenet,
    cifar_squeezenet,
    cifar_vgg,
    cifar_wrn,
)
from sdcli.zoo.shell import CifarNet

FAMILIES = (
    cifar_resnet,
    cifar_wrn,
    cifar_resnext,
    cifar_pyramidnet,
    cifar_densenet,
    cifar_vgg,
    cifar_googlenet,
    cifar_squeezenet,
    cifar_mobilenet,
    cifar_shufflenet,
)
NAMES = tuple(name for family in FAMILIES for name in family.default_cfgs)
"""Of all networks, family by family."""

__all__ = ["FAMILIES", "NAMES", "CifarNet"]
