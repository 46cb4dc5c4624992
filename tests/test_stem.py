"""Small images keep a map worth reading, and weights keep their names and shapes."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from sdcli.errors import UserError
from sdcli.network.cuts import find_stages
from sdcli.network.stages import StagePlan
from sdcli.network.stem import apply_stem, patch_size, smaller_patches

SMALL = (3, 32, 32)


def on_meta(name: str, **arguments: object) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **arguments)


def sides(plan: StagePlan) -> list[int]:
    return [stage.size[0] for stage in plan.stages]


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def test_cifar_resnet18_is_the_papers_network() -> None:
    model = on_meta("resnet18", num_classes=100)
    notes = apply_stem(model, "cifar", SMALL)
    plan = find_stages(model, SMALL)
    assert sides(plan) == [32, 16, 8, 4]
    assert plan.params == pytest.approx(11.22e6, abs=5e3)
    assert notes == (
        "The stem is a 3x3 convolution with stride 1 and no pooling, as in the CIFAR papers.",
        "The last map is 4x4.",
    )


def test_a_deep_stem_becomes_one_convolution() -> None:
    model = on_meta("resnet26d")
    apply_stem(model, "cifar", SMALL)
    assert isinstance(model.conv1, nn.Conv2d)
    assert model.conv1.weight.shape == (64, 3, 3, 3)


def test_unstrided_resnet_keeps_every_name_and_shape() -> None:
    model = on_meta("resnet18")
    before = shapes(model)
    notes = apply_stem(model, "unstrided", SMALL)
    assert shapes(model) == before
    assert sides(find_stages(model, SMALL)) == [32, 16, 8, 4]
    assert notes == ("Strides removed, weights unchanged: conv1, maxpool.", "The last map is 4x4.")


@pytest.mark.parametrize(
    "name",
    [
        "convnext_atto",
        "efficientnet_b0",
        "mobilenetv3_small_050",
        "regnetx_002",
        "hgnetv2_b0",
        "densenet121",
        "vgg11_bn",
        "ghostnet_050",
        "resnetv2_18",
        "repvgg_a0",
    ],
)
def test_other_convnets_keep_their_weights_and_end_in_four_by_four(name: str) -> None:
    model = on_meta(name)
    before = shapes(model)
    apply_stem(model, "cifar", SMALL)
    assert shapes(model) == before
    plan = find_stages(model, SMALL)
    assert sides(plan)[-1] == 4
    assert len(plan.stages) >= 3


def test_images_smaller_than_cifar_s_shrink_as_cifar_s_do() -> None:
    model = on_meta("resnet18")
    apply_stem(model, "cifar", (3, 8, 8))
    assert sides(find_stages(model, (3, 8, 8))) == [8, 4, 2, 1]


def test_undone_strides_compute_the_same_at_every_position() -> None:
    """With stride 1 the patch stem of ConvNeXt gives, at every fourth pixel, what it gave before."""
    model = timm.create_model("test_convnext").eval()
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        before = model.stem[0](image)
        apply_stem(model, "unstrided", SMALL)
        after = model.stem[0](image)
    # The kernel of 4 is padded by 1 in front, so the patches lie one pixel further on.
    torch.testing.assert_close(after[:, :, 1::4, 1::4], before)


def test_the_same_kind_gives_the_same_network_again() -> None:
    first, second = timm.create_model("test_resnet"), timm.create_model("test_resnet")
    for model in (first, second):
        apply_stem(model, "cifar", SMALL)
    assert shapes(first) == shapes(second)
    second.load_state_dict(first.state_dict())
    image = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(first.eval()(image), second.eval()(image))


def test_a_network_without_strides_is_refused() -> None:
    class Flat(nn.Module):
        num_classes = 2

        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(4))
            self.fc = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return self.fc(x.mean((2, 3)))

    with pytest.raises(UserError) as caught:
        apply_stem(Flat(), "cifar", SMALL)
    assert str(caught.value) == (
        "Flat has no stride that can be removed for small images\n"
        "  expected: a network that shrinks its input by strided convolutions or poolings\n"
        "  fix:      --stem imagenet"
    )


def test_smaller_patches_aim_for_a_grid_of_eight() -> None:
    def build(arguments: object) -> nn.Module:
        return on_meta("test_vit", **arguments)

    for image, patch in ((32, 4), (28, 4), (64, 8), (8, 1)):
        patches = smaller_patches(build, on_meta("test_vit"), (3, image, image))
        assert patches.model_args == {"img_size": image, "patch_size": patch}
    assert smaller_patches(build, on_meta("test_vit"), SMALL).note == (
        "Patches of 4x4 instead of 16x16: the last map is 8x8."
    )
    assert patch_size(on_meta("resnet18")) is None


def test_an_image_that_only_tiny_patches_divide_is_refused_with_the_nearest_that_fits() -> None:
    with pytest.raises(UserError) as caught:
        smaller_patches(lambda arguments: on_meta("test_vit", **arguments), on_meta("test_vit"), (3, 97, 97))
    assert str(caught.value) == (
        "no patch size fits an image of 97 pixels: patches of 1x1 would leave 9409 tokens\n"
        "  expected: an image size divisible by a patch of 2 to 16 pixels\n"
        "  fix:      --image-size 96"
    )
