"""AdaBelief (Zhuang et al., NeurIPS 2020) on lists of tensors instead of one tensor at a time.

Results match adabelief-pytorch 0.2.1 bit for bit on the CPU in fp32 and fp64: the operations and their order are the
same, but one call covers many parameters.
"""
# pyright: reportPrivateImportUsage=false

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from stas.errors import UsageError

# A temporary list is as large as its gradients, so at most this many elements are processed at a time, or one larger
# parameter: 64 MiB in fp32, or on the CPU as much as stays in its cache between operations.
CHUNK_ELEMENTS, CHUNK_ELEMENTS_CPU = 1 << 24, 1 << 18
FEW = 5  # degrees of freedom of the variance below which `rectify` does not divide by it

Member = tuple[Tensor, Tensor, dict[str, Any]]  # a parameter, its gradient and its state


class AdaBelief(Optimizer):
    """AdaBelief with adabelief-pytorch's state: `step` (int), `exp_avg` and `exp_avg_var`, both like the parameter.

    Its `amsgrad` and `fixed_decay` are left out. While the variance has too few degrees of freedom, `rectify` takes
    plain momentum steps, as it does there. Gradients are not changed, and a parameter without one keeps its value and
    state.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-16,
        weight_decay: float = 0.0,
        weight_decouple: bool = True,
        rectify: bool = True,
    ) -> None:
        """Set up the optimiser.

        Args:
            params: parameters in fp32, fp64 or bf16, or groups of them with their own options.
            lr: the learning rate.
            betas: how much of the mean and of the variance is kept from step to step, each in [0, 1).
            eps: added to the variance before taking its root, and to the root.
            weight_decay: times lr, the fraction of a weight that is subtracted at each step.
            weight_decouple: False adds `weight_decay` times the weight to the gradient instead.
            rectify: rectify the variance of the first steps, as RAdam does.

        Raises:
            UsageError: `betas` are out of range.
        """
        if not all(0 <= beta < 1 for beta in betas):
            raise UsageError(f"betas {betas}: each must be at least 0 and below 1, as in (0.9, 0.99)")
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**options, "weight_decouple": weight_decouple, "rectify": rectify})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # adabelief-pytorch keeps these two outside its groups
            for option in ("weight_decouple", "rectify"):
                group.setdefault(option, self.defaults[option])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take one step.

        Args:
            closure: recomputes the loss and its gradients.

        Returns:
            The result of `closure`, or None without one.

        Raises:
            ValueError: a gradient is sparse or in fp16.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for members in _alike(self._members(group)):
                for chunk in _chunks(members):
                    _update(chunk, group)
        return loss

    def _members(self, group: dict[str, Any]) -> Iterator[Member]:
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is None:
                continue
            if gradient.is_sparse or gradient.dtype == torch.float16:
                kind = "sparse" if gradient.is_sparse else "in fp16, where eps and squared gradients become 0"
                raise ValueError(
                    f"AdaBelief: the gradient of a parameter of shape {tuple(parameter.shape)} is {kind}; it must be "
                    "dense and in fp32, fp64 or bf16: convert it (autocast keeps fp32), or use another optimiser"
                )
            state = self.state[parameter]
            if not state:
                state["step"] = 0
                for name in ("exp_avg", "exp_avg_var"):
                    state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            yield parameter, gradient, state


def _alike(members: Iterable[Member]) -> Iterable[list[Member]]:
    """Groups that one call can process.

    On the GPU, one gradient whose strides differ from its parameter's turns the whole call into a loop over tensors.
    """
    found: dict[Hashable, list[Member]] = {}
    for member in members:
        parameter, gradient, state = member
        key = (parameter.device, parameter.dtype, state["step"], parameter.stride() == gradient.stride())
        found.setdefault(key, []).append(member)
    return found.values()


def _chunks(members: Sequence[Member]) -> Iterator[list[Member]]:
    most = CHUNK_ELEMENTS_CPU if members[0][0].device.type == "cpu" else CHUNK_ELEMENTS
    chunk: list[Member] = []
    elements = 0
    for member in members:
        elements += member[0].numel()
        if chunk and elements > most:
            yield chunk
            chunk, elements = [], member[0].numel()
        chunk.append(member)
    yield chunk


def _update(members: list[Member], group: dict[str, Any]) -> None:
    """Update parameters and state in place; all `members` are at the same step."""
    parameters = [parameter for parameter, _, _ in members]
    gradients = [gradient for _, gradient, _ in members]
    means = [state["exp_avg"] for _, _, state in members]
    variances = [state["exp_avg_var"] for _, _, state in members]
    lr, (beta1, beta2), eps, decay = group["lr"], group["betas"], group["eps"], group["weight_decay"]
    step = members[0][2]["step"] + 1

    if decay and group["weight_decouple"]:
        torch._foreach_mul_(parameters, _operand(1.0 - lr * decay, parameters))
    elif decay:
        gradients = torch._foreach_add(gradients, parameters, alpha=decay)
    torch._foreach_mul_(means, _operand(beta1, means))
    torch._foreach_add_(means, gradients, alpha=1 - beta1)
    residuals = torch._foreach_sub(gradients, means)
    torch._foreach_mul_(variances, _operand(beta2, variances))
    torch._foreach_addcmul_(variances, residuals, residuals, value=1 - beta2)
    torch._foreach_add_(variances, _operand(eps, variances))  # eps stays in the state, as in the reference
    del gradients, residuals  # free their memory for the next list

    rate = _rectified_rate(lr, step, beta1, beta2) if group["rectify"] else lr / (1 - beta1**step)
    if group["rectify"] and _freedom(step, beta2) < FEW:
        torch._foreach_add_(parameters, means, alpha=-rate)
    else:
        roots = torch._foreach_sqrt(variances)
        if not group["rectify"]:
            torch._foreach_div_(roots, _operand(math.sqrt(1 - beta2**step), roots))
        torch._foreach_add_(roots, _operand(eps, roots))
        torch._foreach_addcdiv_(parameters, means, roots, value=-rate)
    for _, _, state in members:
        state["step"] = step


def _operand(number: float, tensors: Sequence[Tensor]) -> float | list[Tensor]:
    """`number` as an operand for `tensors`. On the CPU, torch makes a tensor of a plain number for each of them."""
    first = tensors[0]
    if first.device.type != "cpu" or first.dtype not in (torch.float32, torch.float64):
        return number
    return [torch.tensor(number, dtype=first.dtype)] * len(tensors)


def _freedom(step: int, beta2: float) -> float:
    """The degrees of freedom of the variance at `step`, counted from 1."""
    share = beta2**step
    return 2 / (1 - beta2) - 1 - 2 * step * share / (1 - share)


def _rectified_rate(lr: float, step: int, beta1: float, beta2: float) -> float:
    """`lr` corrected for the bias of the mean and, once the variance is usable, times RAdam's rectification."""
    most, now = 2 / (1 - beta2) - 1, _freedom(step, beta2)
    if now < FEW:
        return 1.0 / (1 - beta1**step) * lr
    share = (1 - beta2**step) * (now - 4) / (most - 4) * (now - 2) / now * most / (most - 2)
    return math.sqrt(share) / (1 - beta1**step) * lr
