import pytest
import torch
from torch.nn import Parameter
from torch.optim.lr_scheduler import OneCycleLR

from stas.config import Optimizer, Schedule
from stas.training.adabelief import AdaBelief
from stas.training.optim import build_optimizer, rate_factor, set_learning_rate


def test_onecycle_is_torchs():
    parameter = Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    torchs = OneCycleLR(optimizer, max_lr=1.0, total_steps=100, pct_start=0.31, div_factor=25, final_div_factor=1e9)
    schedule = Schedule(name="onecycle", warmup=0.3, start=0.04)  # torch's peak is at step 0.31 * 100 - 1
    for step in range(100):
        assert rate_factor(schedule, step, 100) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-8), step
        optimizer.step()
        if step < 99:
            torchs.step()


def test_rates_by_hand():
    constant = Schedule(name="constant", warmup=0.5, start=0.2)
    assert [rate_factor(constant, step, 8) for step in range(8)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1])
    assert {rate_factor(Schedule(), step, 5) for step in range(5)} == {1.0}
    cosine = Schedule(name="cosine", end=0.1)
    assert [rate_factor(cosine, step, 5) for step in (0, 2, 4)] == pytest.approx([1, 0.55, 0.1])


def test_adabelief_is_the_papers():
    """The reference's values, not rectified: the first steps by the paper's formula."""
    parameter = Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = build_optimizer([parameter], Optimizer())
    assert isinstance(optimizer, AdaBelief)
    value = parameter.detach().clone()
    mean = variance = torch.zeros(2, dtype=torch.float64)
    for step, gradient in enumerate(([0.5, -1.0], [0.25, 2.0]), start=1):
        grad = torch.tensor(gradient, dtype=torch.float64)
        parameter.grad = grad.clone()
        optimizer.step()
        value = value * (1 - 1e-4 * 1e-4)
        mean = 0.9 * mean + 0.1 * grad
        variance = 0.99 * variance + 0.01 * (grad - mean) ** 2 + 1e-16
        value -= 1e-4 / (1 - 0.9**step) * mean / ((variance.sqrt() / (1 - 0.99**step) ** 0.5) + 1e-16)
        assert parameter.tolist() == pytest.approx(value.tolist(), rel=1e-9)


@pytest.mark.parametrize(
    ("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)]
)
def test_others_get_the_recipes_values(name, kind):
    spec = Optimizer(name=name, lr=0.5, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-3, momentum=0.7, nesterov=True)
    optimizer = build_optimizer([Parameter(torch.zeros(1))], spec)
    assert type(optimizer) is kind
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.5, 0.1)
    if name == "sgd":
        assert (group["momentum"], group["nesterov"]) == (0.7, True)
    else:
        assert (group["betas"], group["eps"]) == ((0.8, 0.9), 1e-3)
    set_learning_rate(optimizer, 0.25)
    assert optimizer.param_groups[0]["lr"] == 0.25
