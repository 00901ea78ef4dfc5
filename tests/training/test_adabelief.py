"""Our AdaBelief against adabelief-pytorch: the same bits."""

import contextlib
import copy
import io
import itertools

import adabelief_pytorch
import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from stas.errors import UsageError
from stas.models.checkpoint import load_checkpoint, restore_optimizer, save_checkpoint, take_snapshot
from stas.training import adabelief
from stas.training.adabelief import AdaBelief

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-16, "weight_decay": 1e-2}
VARIANTS = [
    {"weight_decouple": decouple, "rectify": rectify} for decouple in (True, False) for rectify in (True, False)
]


def reference(parameters, **options):
    with contextlib.redirect_stdout(io.StringIO()):
        return adabelief_pytorch.AdaBelief(parameters, print_change_log=False, **{**OPTIONS, **options})


def ours(parameters, **options):
    return AdaBelief(parameters, **{**OPTIONS, **options})


def made(dtype=torch.float32) -> list[Parameter]:
    """Parameters of many shapes and memory formats, the same at each call."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=dtype)

    values = [normal(*shape) for shape in [(), (1,), (3,), (17,), (64, 33), (5, 1, 7), (0,), (2, 3, 4, 5, 6)]]
    values += [normal(8, 4, 3, 3).to(memory_format=torch.channels_last), normal(8, 4, 1, 1), normal(9, 7).T]
    values += [normal(12, 10)[::2, ::3], *(normal(31) for _ in range(20))]
    return [Parameter(value) for value in values]


def give_gradients(parameters: list[Parameter], step: int, skip: bool = True) -> None:
    """The same at each call with the same `step`; where `skip`, one in five has none, and one in three begins late."""
    random = torch.Generator().manual_seed(step)
    for index, parameter in enumerate(parameters):
        gradient = torch.randn(parameter.shape, generator=random, dtype=parameter.dtype)
        gradient[gradient > 1.5] = 0.0
        missing = (index + step) % 5 == 0 or (index % 3 == 0 and step < 9)
        parameter.grad = None if skip and missing else gradient


def assert_same(one: torch.optim.Optimizer, other: torch.optim.Optimizer) -> None:
    for group, others_group in zip(one.param_groups, other.param_groups, strict=True):
        for parameter, others in zip(group["params"], others_group["params"], strict=True):
            assert torch.equal(parameter, others)
            state, others_state = one.state[parameter], other.state[others]
            assert set(state) == set(others_state)
            assert type(state.get("step")) is type(others_state.get("step"))
            assert state.get("step") == others_state.get("step")
            for name in set(state) - {"step"}:
                assert torch.equal(state[name], others_state[name])
                assert (state[name].dtype, state[name].stride()) == (parameter.dtype, others_state[name].stride())


def train_both(one, other, steps: range, skip: bool = True) -> None:
    for step in steps:
        for optimizer in (one, other):
            give_gradients([parameter for group in optimizer.param_groups for parameter in group["params"]], step, skip)
            for group in optimizer.param_groups:
                group["lr"] = OPTIONS["lr"] * (1 + step % 7)
            optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_bits(variant, dtype):
    one, other = ours(made(dtype), **variant), reference(made(dtype), **variant)
    train_both(one, other, range(52))
    assert_same(one, other)
    moved = zip(one.param_groups[0]["params"], made(dtype), strict=True)
    assert all(value.isfinite().all() and not (value.numel() and value.equal(old)) for value, old in moved)
    assert len({state["step"] for state in one.state.values()}) > 1


@pytest.mark.parametrize("changed", [{"weight_decay": 0.0}, {"eps": 1e-3}, {"betas": (0.5, 0.8), "rectify": True}])
def test_the_same_bits_with_other_values(changed):
    changed = {"weight_decouple": False, "rectify": False, **changed}
    one, other = ours(made(), **changed), reference(made(), **changed)
    train_both(one, other, range(20))
    assert_same(one, other)


def test_the_same_bits_in_groups_of_two_dtypes_with_options_of_their_own():
    def groups():
        return [
            {"params": [*made(), *made(torch.float64)], "weight_decay": 0.1},
            {"params": made(torch.float64), "eps": 1e-3},
        ]

    one, other = ours(groups(), rectify=False), reference(groups(), rectify=False)
    train_both(one, other, range(10))
    assert_same(one, other)


def test_chunks_hold_so_many_elements_and_leave_nothing_out(monkeypatch):
    monkeypatch.setattr(adabelief, "CHUNK_ELEMENTS_CPU", 100)
    one, other = ours(made()), reference(made())
    train_both(one, other, range(10))
    assert_same(one, other)
    members = [(parameter, parameter, {}) for parameter in made()]
    chunks = list(adabelief._chunks(members))
    assert [id(member[0]) for chunk in chunks for member in chunk] == [id(member[0]) for member in members]
    sizes = [[member[0].numel() for member in chunk] for chunk in chunks]
    assert all(sum(chunk) <= 100 or len(chunk) == 1 for chunk in sizes)
    assert all(sum(left) + right[0] > 100 for left, right in itertools.pairwise(sizes)), "as few as can be"


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_checkpoint_of_the_package_resumes(variant, tmp_path):
    """As one that was written when stas trained with adabelief-pytorch."""

    def networks():
        network = nn.Module()
        network.values = nn.ParameterList(made())
        return network

    theirs, mine = networks(), networks()
    other, one = reference(list(theirs.parameters()), **variant), ours(list(mine.parameters()), **variant)
    for step in range(7):
        give_gradients(list(theirs.parameters()), step)
        other.step()
    save_checkpoint(tmp_path / "last", take_snapshot(theirs, {}, other))
    saved = load_checkpoint(tmp_path / "last")
    mine.load_state_dict(saved.network)
    restore_optimizer(one, saved.optimizer)
    assert_same(one, other)
    train_both(one, other, range(7, 20))
    assert_same(one, other)


def test_a_state_dict_of_the_package_keeps_its_kind_of_decay():
    variant = {"weight_decouple": False, "rectify": False}
    one, other = ours(made(), **variant), reference(made(), **variant)
    train_both(one, other, range(3))
    one.load_state_dict(copy.deepcopy(other.state_dict()))
    train_both(one, other, range(3, 6))
    assert_same(one, other)


def test_a_copy_continues_like_the_original():
    one = ours(made(), weight_decouple=False, rectify=False)
    train_both(one, other := copy.deepcopy(one), range(5))
    assert_same(one, other)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_only_read(variant):
    parameters = made()
    give_gradients(parameters, 0, skip=False)
    before = [gradient.clone() for parameter in parameters if (gradient := parameter.grad) is not None]
    ours(parameters, **variant).step()
    for parameter, gradient in zip(parameters, before, strict=True):
        assert parameter.grad is not None and torch.equal(parameter.grad, gradient)


def test_a_closure_computes_gradients():
    parameter = Parameter(torch.tensor([1.0]))

    def closure() -> float:
        loss = parameter.square().sum()
        loss.backward()
        return loss.item()

    assert ours([parameter]).step(closure) == 1.0
    assert parameter.item() != 1.0


def test_nothing_to_do_is_no_error():
    optimizer = ours(made())
    optimizer.step()
    assert not optimizer.state


def test_what_it_cannot_do_is_said():
    embedding = nn.Embedding(10, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"of shape \(10, 3\) is sparse; it must be dense"):
        ours(embedding.parameters()).step()
    half = made(torch.float16)
    give_gradients(half, 0)
    with pytest.raises(ValueError, match="fp16"):
        ours(half).step()
    with pytest.raises(UsageError, match=r"betas \(0.9, 1.0\)"):
        ours(made(), betas=(0.9, 1.0))
