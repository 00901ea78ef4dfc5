from contextlib import nullcontext

import pytest
import segmentation_models_pytorch as smp
import torch

from stas.config import Model
from stas.errors import UsageError
from stas.models.network import build_network
from stas.models.trial import check_batch
from stas.recipe import load_recipe

SMP_ARCHITECTURES = [
    "Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "DeepLabV3", "DeepLabV3Plus", "PAN", "UPerNet",
    "Segformer",
]  # fmt: skip
TRIED = [  # what the reference team and others of the contest tried, beyond the three members
    *[(decoder, "resnet34") for decoder in SMP_ARCHITECTURES],
    ("DPT", "tu-vit_base_patch16_224.augreg_in21k"),
    ("DeepLabV3Plus", "resnet152"),
    ("DeepLabV3Plus", "resnet101"),
    ("Unet", "densenet201"),
    ("FPN", "xception"),
    ("DeepLabV3Plus", "tu-eca_nfnet_l3"),
    ("PAN", "tu-eca_nfnet_l1.ra2_in1k"),
    ("DeepLabV3Plus", "tu-tf_efficientnetv2_l.in21k_ft_in1k"),
    ("DeepLabV3Plus", "tu-tf_efficientnetv2_s.in21k_ft_in1k"),
    ("DeepLabV3Plus", "tu-tf_efficientnet_b7.ns_jft_in1k"),
]


@pytest.mark.parametrize(("architecture", "encoder"), TRIED)
def test_smp_networks_are_built(architecture, encoder):
    size = (224, 224) if architecture == "DPT" else (256, 256)
    with torch.device("meta"):  # shapes without memory
        network = build_network(Model(architecture=architecture, encoder=encoder), size, pretrained=False).eval()
        assert network(torch.zeros(2, 3, *size)).shape == (2, 1, *size)


def test_segformer_at_full_resolution():
    network = build_network(Model(architecture="Segformer", encoder="mit_b0"), (96, 160), pretrained=False).eval()
    with torch.no_grad():
        assert network(torch.zeros(1, 3, 96, 160)).shape == (1, 1, 96, 160)


@pytest.mark.parametrize("name", ["efficientnet_b6_ns", "efficientnetv2_m", "eca_nfnet_l2"])
def test_the_reference_networks_are_built(name):
    recipe = load_recipe(name)
    with torch.device("meta"):
        network = build_network(recipe.model, recipe.data.size, pretrained=False).eval()
        assert isinstance(network, smp.DeepLabV3Plus)
        assert network.classification_head is None
        assert network(torch.zeros(1, 3, 800, 800)).shape == (1, 1, 800, 800)


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("UNet", {"channels": [4, 8, 16], "strides": [2, 2]}),
        ("UNETR", {"hidden_size": 48, "mlp_dim": 64, "num_heads": 4, "feature_size": 4}),
        ("SwinUNETR", {"feature_size": 12}),
        ("ViTAutoEnc", {"patch_size": 16, "hidden_size": 48, "mlp_dim": 64, "num_layers": 2, "num_heads": 4}),
    ],
)
def test_monai_networks_give_logits(architecture, options):
    model = Model(library="monai", architecture=architecture, encoder=None, weights=None, options=options)
    network = build_network(model, (64, 64), pretrained=True).eval()
    with torch.no_grad():
        assert network(torch.zeros(2, 3, 64, 64)).shape == (2, 1, 64, 64)


@pytest.mark.parametrize("side", range(256, 897, 32))
def test_sizes_in_steps_of_32(side):
    with torch.device("meta"):
        build_network(Model(weights=None), (side, side), pretrained=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"architecture": "Unett"}, "smp has DPT, DeepLabV3, DeepLabV3Plus"),
        ({"encoder": "resnet35"}, "cannot be built.*resnet35"),
        ({"encoder": "tu-nosuchmodel"}, "cannot be built.*nosuchmodel"),
        ({"options": {"decoder_chanels": 3}}, "does not know decoder_chanels; valid: .*decoder_channels"),
        ({"library": "monai", "architecture": "ViT"}, "UNet, UNETR"),
        ({"encoder": "tu-resnet18", "options": {"decoder_chanels": 3}}, "cannot be built.*decoder_chanels"),
        ({"library": "monai", "architecture": "UNet"}, "channels.*model.options"),
    ],
)
def test_what_cannot_be_built_is_said(values, message):
    model = Model.model_validate({"weights": None} | values)
    with pytest.raises(UsageError, match=f"(?s){message}"):
        build_network(model, (64, 64), pretrained=True)


def test_a_classifier_is_refused():
    model = Model(library="monai", architecture="DenseNet121", encoder=None, weights=None)
    with pytest.raises(UsageError, match=r"DenseNet121 returns \(1, 1\) for images of \(1, 3, 64, 64\)"):
        build_network(model, (64, 64), pretrained=False).eval()(torch.zeros(1, 3, 64, 64))


def test_a_size_the_decoder_cannot_take_is_refused():
    with pytest.raises(UsageError, match=r"data\.size: 256 x 250 pixels \(width x height\) do .* divisible by"):
        build_network(Model(weights=None), (250, 256), pretrained=False)


DPT = {"architecture": "DPT", "encoder": "tu-vit_tiny_patch16_224.augreg_in21k"}
UNETR = {
    "library": "monai",
    "architecture": "UNETR",
    "options": {"hidden_size": 48, "mlp_dim": 64, "num_heads": 4, "feature_size": 4},
}


@pytest.mark.parametrize(
    ("values", "size", "message"),
    [
        (DPT, (256, 256), r"data\.size: 256 x 256 .* DPT .*doesn't match model \(224\).*: 224 x 224 works"),
        (DPT, (224, 448), r"data\.size: 448 x 224 pixels \(width x height\) .*: 224 x 224 works"),
        ({"architecture": "PAN"}, (64, 96), r"data\.size: 96 x 64 .*PAN .*too small.*: 128 x 128 works"),
        (
            {"library": "monai", "architecture": "UNet", "options": {"channels": [4, 8], "strides": [2]}},
            (65, 64),
            r"data\.size: 64 x 65 .*UNet .*: 64 x 96 works",
        ),
    ],
)
def test_a_size_that_fails_in_the_forward_pass_is_refused(values, size, message):
    model = Model.model_validate({"weights": None} | values)
    with pytest.raises(UsageError, match=message):
        build_network(model, size, pretrained=False)


def test_turning_a_rectangle_is_tried_where_tta_is_asked_for():
    model = Model.model_validate(UNETR)
    build_network(model, (64, 96), pretrained=False)
    build_network(model, (64, 64), pretrained=False, turned=True)
    with pytest.raises(UsageError, match=r"UNETR takes 96 x 64 .*not 64 x 96, .*square data\.size.*--no-tta"):
        build_network(model, (64, 96), pretrained=False, turned=True)


def test_the_trial_changes_nothing():
    torch.manual_seed(0)
    network = build_network(Model(encoder="resnet18", weights=None), (64, 64), pretrained=False)
    assert network.training
    state = network.state_dict()
    assert all(value.device.type == "cpu" for value in state.values())
    assert torch.equal(state["encoder.bn1.running_mean"], torch.zeros(64))
    assert state["encoder.bn1.num_batches_tracked"] == 0


def test_what_the_meta_device_does_not_know_is_tried_for_real(monkeypatch):
    monkeypatch.setattr("stas.models.trial._run_on_meta", lambda *_: 1 / 0)
    model = Model.model_validate(UNETR)
    build_network(model, (64, 96), pretrained=False)
    with pytest.raises(UsageError, match="test-time augmentation"):
        build_network(model, (64, 96), pretrained=False, turned=True)


def test_a_batch_of_one_image_is_refused_where_it_cannot_be_normalised():
    for architecture, share, refused in (("DeepLabV3Plus", 1, True), ("DeepLabV3Plus", 2, False), ("Unet", 1, False)):
        model = Model(architecture=architecture, encoder="resnet18", weights=None)
        network = build_network(model, (64, 64), pretrained=False)
        with pytest.raises(UsageError, match=r"train\.batch: .*at least 2") if refused else nullcontext():
            check_batch(network, model, (64, 64), share)
