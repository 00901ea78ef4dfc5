"""Whether pretrained weights fill an encoder. timm and smp load with `strict=False`, which accepts any file."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from stas.errors import UsageError
from stas.system.printing import named

NAMED = 3  # tensors named in a message
COUNTER = "num_batches_tracked"  # of batch normalisation: older files lack it, and nothing reads it


@dataclass
class Loaded:
    """The tensors that were loaded while a network was built. They are known by identity: wrappers rename them."""

    filled: list[Tensor] = field(default_factory=list)
    misfits: list[tuple[Tensor, str]] = field(default_factory=list)  # with their problem
    extra: list[str] = field(default_factory=list)  # of the file, in parts that the network has
    example: str = ""  # a name in the file

    def note(self, module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compare a module with what is to be loaded into it; return what fits."""
        own = module.state_dict(keep_vars=True)
        self.example = next(iter(state), self.example)
        fits = {}
        for name, tensor in own.items():
            if problem := _problem(tensor, state.get(name)):
                self.misfits.append((tensor, f"{name} {problem}"))
            else:
                self.filled.append(tensor)
                fits[name] = state[name]
        parts = {name.split(".")[0] for name in own}
        # Parts that the network does not have are the file's classifier.
        self.extra += [name for name in state if name not in own and name.split(".")[0] in parts]
        return fits


def _problem(tensor: Tensor, found: Tensor | None) -> str:
    if found is None:
        return "is missing"
    if found.shape != tensor.shape:
        return f"is {tuple(found.shape)} instead of {tuple(tensor.shape)}"
    if found.is_floating_point() and not found.isfinite().all():
        return "is not finite"
    return ""


def _named(tensors: Iterable[str]) -> str:
    return named((name[:150] for name in tensors), NAMED)


@contextmanager
def watched_loading() -> Iterator[Loaded]:
    """Note every `load_state_dict` in the block; what does not fit is left out, and `check_filled` reports it."""
    loaded, load = Loaded(), nn.Module.load_state_dict

    def watched(self: nn.Module, state_dict: Mapping[str, Tensor], *_: Any, **__: Any) -> Any:
        return load(self, loaded.note(self, state_dict), strict=False)

    nn.Module.load_state_dict = watched  # timm loads within its constructor, and offers no other way to see how
    try:
        yield loaded
    finally:
        nn.Module.load_state_dict = load


def check_filled(encoder: nn.Module, loaded: Loaded, source: str, name: str) -> None:
    """Check that every tensor of an encoder was loaded, in its shape.

    Args:
        encoder: the encoder, as it will be trained.
        loaded: what was loaded while it was built.
        source: where the weights came from, for the message.
        name: the encoder's name, for the message.

    Raises:
        UsageError: tensors are missing, of another shape or not finite, or the file is a larger encoder's.
    """
    filled = {id(tensor) for tensor in loaded.filled}
    problems = {id(tensor): problem for tensor, problem in loaded.misfits}
    own = {key: tensor for key, tensor in encoder.state_dict(keep_vars=True).items() if not key.endswith(COUNTER)}
    lost = [problems.get(id(value), f"{key} is missing") for key, value in own.items() if id(value) not in filled]
    remedy = (
        "\nFetch the file again with `stas weights fetch DIR`, or give the file of this encoder under the names that "
        "timm (tu-...) or smp gives its tensors; or set model.weights to null (--set model.weights=null)"
    )
    if lost:
        like = f"; the file's own names are like {loaded.example[:60]}" if loaded.example else ""
        raise UsageError(
            f"{source}: {len(lost)} of the {len(own)} tensors of encoder {name!r} do not fit: {_named(lost)}{like}"
            f"{remedy}"
        )
    if extra := [key for key in loaded.extra if not key.endswith(COUNTER)]:
        raise UsageError(
            f"{source}: not the weights of encoder {name!r}, which has no {_named(extra)}: they are of a larger one"
            f"{remedy}"
        )
