"""A name and an image size become a timm model, or an error that says what to type instead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sdcli.errors import UserError
from sdcli.network.backbones import Architecture, create, pretrained_transform, resolve
from sdcli.network.cuts import find_stages


def test_without_wishes_a_model_is_timm_s_own() -> None:
    assert resolve("resnet18", num_classes=None, image_size=None) == Architecture(
        "resnet18", 1000, (3, 224, 224), "imagenet", {}, ()
    )


def test_a_tag_may_name_the_weights() -> None:
    assert resolve("resnet18.a1_in1k", num_classes=10, image_size=None).num_classes == 10


def test_large_images_leave_the_stem_alone() -> None:
    assert resolve("resnet18", num_classes=10, image_size=128).stem == "imagenet"


def test_small_images_change_the_stem() -> None:
    architecture = resolve("resnet18", num_classes=100, image_size=32)
    assert architecture.stem == "cifar"
    assert architecture.notes[0] == (
        "The stem is a 3x3 convolution with stride 1 and no pooling, as in the CIFAR papers."
    )
    plan = find_stages(create(architecture), architecture.input_size)
    assert [stage.size for stage in plan.stages] == [(32, 32), (16, 16), (8, 8), (4, 4)]


def test_pretrained_weights_keep_their_stem() -> None:
    assert resolve("resnet18", num_classes=100, image_size=32, pretrained=True).stem == "unstrided"
    assert resolve("resnet18", num_classes=100, image_size=32, stem="cifar", pretrained=True).stem == "unstrided"


def test_a_stem_that_is_asked_for_is_given() -> None:
    assert resolve("resnet18", num_classes=100, image_size=32, stem="imagenet").stem == "imagenet"
    assert resolve("resnet18", num_classes=100, image_size=64, stem="cifar").stem == "cifar"


def test_transformers_get_smaller_patches() -> None:
    architecture = resolve("test_vit", num_classes=10, image_size=32)
    assert (architecture.stem, architecture.model_args) == ("patch", {"img_size": 32, "patch_size": 4})
    assert create(architecture).patch_embed.grid_size == (8, 8)


def test_pyramids_of_windows_get_patches_of_one_pixel() -> None:
    architecture = resolve("swin_tiny_patch4_window7_224", num_classes=10, image_size=32)
    plan = find_stages(create(architecture), architecture.input_size)
    assert [stage.size[0] for stage in plan.stages] == [32, 16, 8, 4]


def test_pretrained_transformers_keep_their_patches_and_say_so() -> None:
    architecture = resolve("test_vit", num_classes=10, image_size=32, pretrained=True)
    assert (architecture.stem, architecture.model_args) == ("imagenet", {"img_size": 32})
    assert architecture.notes == (
        "The last map is only 2x2, and no smaller stem fits: pretrained weights need their patches of 16x16.",
    )


@pytest.mark.parametrize("model", ["resnet18", "test_vit", "convnext_atto"])
def test_architecture_survives_json_and_builds_the_same_model(model: str) -> None:
    architecture = resolve(model, num_classes=7, image_size=32)
    again = Architecture.from_dict(json.loads(json.dumps(architecture.to_dict())))
    assert again == architecture
    first, second = create(architecture, device="cpu"), create(again, device="cpu")
    second.load_state_dict(first.state_dict())
    image = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(first.eval()(image), second.eval()(image))


def test_model_args_reach_timm() -> None:
    architecture = resolve("test_vit", num_classes=10, image_size=None, model_args={"depth": 3})
    assert architecture.model_args == {"depth": 3}
    assert len(create(architecture).blocks) == 3


def test_encoders_without_a_classifier_build() -> None:
    architecture = resolve("mobilenetv5_300m_enc", num_classes=None, image_size=None)
    assert architecture.num_classes == 0
    assert len(list(create(architecture).parameters())) > 0


# Errors


def test_a_misspelt_model_gets_the_nearest_name() -> None:
    with pytest.raises(UserError) as caught:
        resolve("resent18", num_classes=10, image_size=None)
    assert str(caught.value) == (
        "unknown model 'resent18'\n"
        "  expected: a timm architecture, such as resnet18\n"
        "  fix:      did you mean 'resnet18'?"
    )


@pytest.mark.parametrize(
    ("model", "fix"),
    [
        ("timm/resnet18.a1_in1k", "resnet18.a1_in1k --pretrained"),
        ("someone/resnet18", "hf-hub:someone/resnet18, if this is a timm model on the Hugging Face hub"),
    ],
)
def test_an_id_of_the_hub_is_answered_with_what_to_type(model: str, fix: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve(model, num_classes=10, image_size=None)
    assert str(caught.value) == (
        f"unknown model '{model}'\n  expected: a timm architecture, such as resnet18\n  fix:      {fix}"
    )


def test_unknown_weights_list_the_known_ones() -> None:
    with pytest.raises(UserError) as caught:
        resolve("test_resnet.r160_in2k", num_classes=10, image_size=None)
    assert str(caught.value) == (
        "unknown weights 'test_resnet.r160_in2k'\n"
        "  expected: one of test_resnet.r160_in1k\n"
        "  fix:      did you mean 'test_resnet.r160_in1k'?"
    )


def test_unknown_stem_lists_the_known_ones() -> None:
    with pytest.raises(UserError) as caught:
        resolve("resnet18", num_classes=10, image_size=32, stem="cifr")
    assert str(caught.value) == (
        "unknown stem 'cifr'\n  expected: one of auto, cifar, imagenet\n  fix:      did you mean 'cifar'?"
    )


def test_an_argument_that_the_model_does_not_take_is_reported_in_one_line() -> None:
    with pytest.raises(UserError) as caught:
        resolve("resnet18", num_classes=10, image_size=None, model_args={"dept": 3})
    assert str(caught.value) == (
        "timm cannot build 'resnet18' with dept=3: ResNet.__init__() got an unexpected keyword argument 'dept'"
    )


def test_a_size_that_the_family_refuses_names_one_that_it_takes() -> None:
    with pytest.raises(UserError) as caught:
        resolve("test_vit", num_classes=10, image_size=5, stem="imagenet")
    assert caught.value.fix == "--image-size 160"


def test_pretrained_weights_without_a_network_are_one_message() -> None:
    architecture = resolve("resnet18", num_classes=1000, image_size=None, pretrained=True)
    with pytest.raises(UserError) as caught:
        create(architecture, device="cpu", pretrained=True)
    assert str(caught.value) == (
        "pretrained weights of 'resnet18' are not in the cache, and HF_HUB_OFFLINE is set\n"
        "  expected: a network connection, or a cache that holds them (HF_HOME)\n"
        "  fix:      on a machine with a network: hf download timm/resnet18.a1_in1k, then copy its cache; "
        "or --weights FILE.safetensors; or leave out --pretrained"
    )


def test_model_of_the_hub_without_a_network_is_one_message() -> None:
    with pytest.raises(UserError) as caught:
        resolve("hf-hub:owner/model", num_classes=10, image_size=None)
    assert str(caught.value) == (
        "'hf-hub:owner/model' is not in the cache, and HF_HUB_OFFLINE is set\n"
        "  expected: a network connection, or a cache that holds it (HF_HOME)\n"
        "  fix:      on a machine with a network: hf download owner/model, then copy its cache"
    )


def test_model_of_a_local_folder_is_the_architecture_that_its_config_names(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_resnet", "num_classes": 7}))
    architecture = resolve(f"local-dir:{tmp_path}", num_classes=10, image_size=None)
    assert (architecture.model, architecture.num_classes) == ("test_resnet", 10)


def test_pretrained_weights_in_the_cache_need_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    architecture = resolve("test_resnet", num_classes=1000, image_size=None, pretrained=True)
    model = create(architecture, device="cpu")
    folder = tmp_path / "models--timm--test_resnet.r160_in1k"
    (folder / "snapshots" / "1").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("1")
    save_file(model.state_dict(), folder / "snapshots" / "1" / "model.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    loaded = create(architecture, device="cpu", pretrained=True).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())


def test_pretrained_transform_is_what_preprocess_takes() -> None:
    model = create(resolve("test_vit", num_classes=None, image_size=None))
    assert pretrained_transform(model) == {
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "interpolation": "bicubic",
        "crop_pct": 0.95,
    }
