import pytest
import yaml

from stas.errors import UsageError
from stas.recipe import dump_recipe, load_recipe, parse_recipe, recipe_names, recipes

REFERENCE = {
    "efficientnet_b6_ns": ("tu-tf_efficientnet_b6.ns_jft_in1k", 16),
    "efficientnetv2_m": ("tu-tf_efficientnetv2_m.in21k_ft_in1k", 16),
    "eca_nfnet_l2": ("tu-eca_nfnet_l2.ra3_in1k", 24),
}


@pytest.mark.parametrize("name", REFERENCE)
def test_the_reference_recipes_are_exact(name):
    recipe = load_recipe(name)
    assert (recipe.model.encoder, recipe.train.batch) == REFERENCE[name]
    assert (recipe.model.architecture, recipe.model.weights, recipe.data.size) == (
        "DeepLabV3Plus",
        "imagenet",
        (800, 800),
    )
    assert (recipe.data.intensity, recipe.data.mean, recipe.data.std) == ("minmax", None, None)
    assert (recipe.data.split.kind, recipe.data.split.count, recipe.data.label) == ("first", 237, "STAS")
    assert recipe.loss.model_dump(include={"dice", "bce", "focal", "tversky"}) == {
        "dice": 1, "bce": 0, "focal": 0, "tversky": 0,
    }  # fmt: skip
    assert recipe.optimizer.model_dump(include={"name", "lr", "eps", "betas", "weight_decay"}) == {
        "name": "adabelief", "lr": 1e-4, "eps": 1e-16, "betas": (0.9, 0.99), "weight_decay": 1e-4,
    }  # fmt: skip
    assert recipe.optimizer.weight_decouple and not recipe.optimizer.rectify
    assert recipe.schedule.name == "constant" and recipe.schedule.warmup == 0
    augment = recipe.augment
    assert (augment.rot90, augment.flip, augment.dihedral, augment.color, augment.stain) == (0.3, 0, False, 0, 0)
    assert (recipe.train.epochs, recipe.infer.threshold) == (500, 0.5)


def test_the_reference_recipes_differ_only_in_encoder_and_batch():
    first, *others = (load_recipe(name) for name in REFERENCE)
    for recipe in others:
        changes = [f"name={recipe.name}", f"summary={recipe.summary}"]
        changes += [f"model.encoder={recipe.model.encoder}", f"train.batch={recipe.train.batch}"]
        assert recipe == load_recipe(first.name, changes)


def test_precedence_is_defaults_then_file_then_set(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("train: {batch: 3, epochs: 7}\n")
    assert load_recipe(str(path)).train.model_dump(include={"batch", "epochs", "seed"}) == {
        "batch": 3, "epochs": 7, "seed": 0,
    }  # fmt: skip
    changed = load_recipe(str(path), ["train.batch=5", "optimizer.lr=1e-3", "data.size=[64, 96]"])
    assert (changed.train.batch, changed.train.epochs, changed.optimizer.lr, changed.data.size) == (
        5,
        7,
        1e-3,
        (64, 96),
    )
    assert changed.name == "mine"


def test_a_recipe_that_extends_another_says_only_what_differs(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: lite0\nmodel: {architecture: FPN}\ntrain: {epochs: 3}\n")
    expected = load_recipe("lite0", ["model.architecture=FPN", "train.epochs=3", "name=mine", "summary=''"])
    assert load_recipe(str(path)) == expected
    (tmp_path / "other.yaml").write_text("name: other\nloss: {bce: 1.0, dice: 0.5}\noptimizer: {lr: 0.1}\n")
    path.write_text("extends: other.yaml\nloss: {dice: 2.0}\n")
    assert load_recipe(str(path), ["optimizer.lr=0.2"]) == load_recipe(
        str(tmp_path / "other.yaml"), ["name=mine", "loss.dice=2.0", "optimizer.lr=0.2"]
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("extends: lite9", "no recipe"),
        ("extends: ../lite0.yaml", "'../lite0.yaml' is outside the recipe's directory"),
        ("extends: [lite0]", r"extends = \['lite0'\]: give the name of one recipe"),
        ("extends: lite0_fpn", "which itself extends 'lite0': extend a recipe that extends no other"),
        ("extends: mine.yaml", "which itself extends 'mine.yaml'"),
        ("extends: lite0\ntrain: {epoch: 3}", r"mine.yaml \(extends lite0\): .*\n.*train.epoch: unknown key"),
        ("extend: lite0", "extend: unknown key; valid here: name, summary, .*, extends"),
    ],
)
def test_a_recipe_that_cannot_be_extended_is_refused(tmp_path, text, said):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UsageError, match=said):
        load_recipe(str(tmp_path / "mine.yaml"))


def test_the_small_recipes_differ_only_in_architecture():
    for name, architecture in (("lite0_fpn", "FPN"), ("lite0_pan", "PAN")):
        recipe = load_recipe(name)
        changes = [f"model.architecture={architecture}", f"name={name}", f"summary={recipe.summary}"]
        assert recipe == load_recipe("lite0", changes)
        assert recipe.summary.endswith(architecture)


def test_unknown_keys_are_refused_with_the_valid_ones():
    with pytest.raises(UsageError, match=r"train\.epoch: unknown key; valid here: batch, epochs, precision") as error:
        load_recipe("lite0", ["train.epoch=3", "optimzer.lr=1", "data.split.folds=1"])
    assert "optimzer: unknown key; valid here: name, summary, data" in str(error.value)
    assert "data.split.folds = 1" in str(error.value)  # all problems are reported together


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.batch=0", "train.batch = 0: "),
        ("data.size=7", "height and width must each be 32 to 8192"),
        ("augment.rot90=0.5", "use a square data.size"),
        ("augment.dihedral=true", "turn 640 x 352 images (width x height) into 352 x 640"),
        ("data.std=null", "give both or neither"),
        ("loss={dice: 0}", "every term of the loss has weight 0"),
        ("schedule.warmup=0", "onecycle needs schedule.warmup"),
        ("data.split.fold=5", "fold 5 of 5 folds"),
        ("data.split.kind=list", "data.split.file"),
        ("model.library=monai", "no encoder"),
        ("model.encoder=null", "needs an encoder"),
        ("train", "write key=value"),
        ("train.batch.size=3", "is a value, not a section"),
        ("train.batch=[", "not readable as YAML"),
        ("train.batch=2001-99-99", "not readable as YAML"),
        ("optimizer.lr=.nan", "optimizer.lr = nan: "),
        ("optimizer.lr=.inf", "optimizer.lr = inf: "),
        ("optimizer.betas=[0.9, 1.0]", "betas (0.9, 1.0): each must be at least 0 and below 1"),
        ("optimizer={name: sgd, nesterov: true, momentum: 0}", "nesterov needs optimizer.momentum above 0"),
        ("model.encoder=tu-hf-hub:somebody/model", "is a location, not a name"),
        ("model.options={pretrained_cfg_overlay: {file: a.pth}}", "must not choose where weights come from"),
    ],
)
def test_wrong_values_are_refused(override, message):
    with pytest.raises(UsageError) as error:
        load_recipe("lite0", [override])
    assert message in str(error.value)


def test_a_missing_or_broken_recipe_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"no recipe 'lite1'.*lite0_fpn"):
        load_recipe("lite1")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [")
    with pytest.raises(UsageError, match="not readable as YAML"):
        load_recipe(str(broken))
    broken.write_text("train: &a {batch: 3}\nloss: *a")
    with pytest.raises(UsageError, match=r"an alias \(\*\) in line 2: write the value out"):
        load_recipe(str(broken))
    broken.write_text("a: " + "[" * 5000)
    with pytest.raises(UsageError, match="too deeply nested"):
        load_recipe(str(broken))
    broken.write_text("# " + "x" * 70_000)
    with pytest.raises(UsageError, match="70002 bytes, more than 65536"):
        load_recipe(str(broken))
    broken.write_text("".join(f"key{number}: 1\n" for number in range(100)))
    with pytest.raises(UsageError, match="and 80 more") as error:
        load_recipe(str(broken))
    assert "key19: unknown key" in str(error.value) and "key20" not in str(error.value)
    broken.write_text("- a")
    with pytest.raises(UsageError, match="mapping of sections, found list"):
        load_recipe(str(broken))


@pytest.mark.parametrize("name", recipe_names())
def test_a_dumped_recipe_reads_back_equal(name):
    recipe = load_recipe(name, ["train.seed=3"])
    assert parse_recipe(yaml.safe_load(dump_recipe(recipe)), "dump") == recipe


def test_the_table_lists_every_recipe():
    lines = recipes().splitlines()[1:]
    assert [line.split()[0] for line in lines] == recipe_names()
    assert "tu-eca_nfnet_l2.ra3_in1k" in lines[recipe_names().index("eca_nfnet_l2")]
    assert "800 x 800" in lines[recipe_names().index("eca_nfnet_l2")]
    assert "640 x 352" in lines[recipe_names().index("lite0")]
