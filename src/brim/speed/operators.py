"""What a rehearsed step does, operator by operator, and how long a calibrated processor takes for it (a GPU: `gpu`).

The rehearsal runs every operator of the step on fake tensors, so their number and sizes are exact, for every family
and lever. The time of each is its products at the measured rate of their shape and format, its bytes at the measured
rate of such a pass (what it makes is touched for the first time), and its dispatch (`hardware.operator_rates`). An
operator runs after another; nothing overlaps.

Ignored: what reading and preparing a batch takes, and that a tensor may still be in the cache from the operator before.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from brim.hardware.operator_rates import Attention, Format, OperatorRates, Pass, Product, product_shape
from brim.speed.kernels import Kernel, KernelMeter

_aten = torch.ops.aten
_FUNCTIONS = (
    "exp", "tanh", "silu", "gelu", "sigmoid", "softmax", "erf", "log", "cos", "sin", "softplus", "elu", "dropout",
    "bernoulli", "rsqrt", "normal", "random",
)  # fmt: skip
"""Parts of names of operators whose elements take more than an instruction; their backwards, too."""
_REDUCTIONS = ("sum", "mean", "norm", "amax", "argmax", "any", "all", "var", "cumsum")
_NOTHING = ("empty", "new_empty", "detach", "alias", "lift_fresh", "resize_", "_local_scalar_dense", "empty_strided")
"""They allocate or look, and touch no element."""


@dataclass(kw_only=True)
class StepWork:
    """Operators so far, those of one kind and size counted together."""

    products: dict[tuple[Product, Format], float] = field(default_factory=lambda: defaultdict(float))
    """FLOPs by shape and format."""
    attention: dict[tuple[Attention, Format, int], float] = field(default_factory=lambda: defaultdict(float))
    """FLOPs by direction, format and keys of a row."""
    passes: dict[tuple[Pass, Format, int], float] = field(default_factory=lambda: defaultdict(float))
    """Bytes by kind, format and size of the largest tensor."""
    kernels: dict[Kernel, float] = field(default_factory=lambda: defaultdict(float))
    """How many of each: what an accelerator is asked for."""
    num_operators: int = 0

    def add(self, other: "StepWork") -> None:
        """The other's operators, too."""
        for shape, flops in other.products.items():
            self.products[shape] += flops
        for direction, flops in other.attention.items():
            self.attention[direction] += flops
        for kind, nbytes in other.passes.items():
            self.passes[kind] += nbytes
        for kernel, count in other.kernels.items():
            self.kernels[kernel] += count
        self.num_operators += other.num_operators

    def seconds(self, rates: OperatorRates) -> float:
        """On a device of these rates."""
        total = self.num_operators * rates.overhead_s
        for (shape, number_format), flops in self.products.items():
            total += rates.product_s(flops, shape=shape, number_format=number_format)
        for (direction, number_format, tokens), flops in self.attention.items():
            total += rates.attention_s(flops, tokens=tokens, direction=direction, number_format=number_format)
        for (kind, number_format, largest), nbytes in self.passes.items():
            total += rates.pass_s(nbytes, largest=largest, kind=kind, number_format=number_format)
        return total


def continued_work(works: tuple[StepWork, StepWork, StepWork], *, times: int) -> StepWork | None:
    """The first's work and what the second has more of it `times` times; None where the third does not bear that out.

    As `memory.splice` for a long model's trace. Work grows in a straight line with the blocks, and so does the size of
    a tensor with an entry for each: of the sizes that are not in all three, the smallest of a kind are taken together.
    """
    number = _straight([work.num_operators for work in works], times)
    products = _continued([work.products for work in works], times)
    attention = _continued([work.attention for work in works], times)
    passes = _continued([work.passes for work in works], times)
    kernels = _continued([work.kernels for work in works], times)
    if number is None or products is None or attention is None or passes is None or kernels is None:
        return None
    return StepWork(
        products=products,
        attention=attention,
        passes=passes,
        kernels={Kernel(*key): count for key, count in kernels.items()},
        num_operators=number,
    )


_Key = TypeVar("_Key", bound=tuple[Any, ...])
_Number = TypeVar("_Number", int, float)


def _continued(counts: Sequence[Mapping[_Key, float]], times: int) -> dict[_Key, float] | None:
    # what begins with the second block (the first one's input needs no gradient) grows from nothing
    growing = {
        key for key in counts[2] if key not in counts[0] and key in counts[1] and counts[2][key] == 2 * counts[1][key]
    }
    shared = set[_Key].intersection(*map(set, counts)) | growing
    moving = [sorted(set(each) - shared) for each in counts]
    if len(set(map(len, moving))) > 1:
        return None
    found: dict[_Key, float] = defaultdict(float)
    for keys in [*((key, key, key) for key in shared), *zip(*moving, strict=True)]:
        amount = _straight([each.get(key, 0.0) for each, key in zip(counts, keys, strict=True)], times)
        key = keys[0]
        if len(set(keys)) > 1:
            size = _straight([key[-1] for key in keys], times)
            if size is None or len({key[:-1] for key in keys}) > 1:
                return None
            key = cast("_Key", (*key[:-1], size))
        if amount is None:
            return None
        found[key] += amount
    return found


def _straight(three: Sequence[_Number], times: int) -> _Number | None:
    """Where three numbers lead in `times` steps; None where they are in no straight line."""
    first, second, third = three
    return first + times * (second - first) if third - second == second - first else None


class OperatorMeter:
    """Told every operator after it ran, by the meter of lifetimes."""

    def __init__(self) -> None:
        self.kernels = KernelMeter()
        self.start()

    def start(self) -> None:
        """Forget what was seen: a step begins."""
        self.kernels.start()
        self.work = StepWork(kernels=self.kernels.counts)

    @contextmanager
    def apart(self) -> Iterator[StepWork]:
        """What is seen inside the block, alone; after it, with what was seen before."""
        before = self.work
        self.kernels.counts = defaultdict(float)
        self.work = StepWork(kernels=self.kernels.counts)
        try:
            yield self.work
        finally:
            before.add(self.work)
            self.work, self.kernels.counts = before, before.kernels

    def add(self, work: object) -> None:
        """What `apart` gave, once more."""
        assert isinstance(work, StepWork)
        self.work.add(work)

    def on_host(self, func: Any) -> None:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in _NOTHING:
            self.kernels.run_on_host(name)

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        name = func.overloadpacket.__name__
        if name in _NOTHING:
            return
        self.work.num_operators += 1
        if (count := _PRODUCTS.get(func)) is not None:
            for shape, number_format, flops in count(args):
                self.work.products[shape, number_format] += flops
                self.kernels.launch(name, args, [out], number_format=number_format, flops=flops)
            self._move("fresh", [out])
        elif "flash_attention_for_cpu" in name:
            self._attention(name, args)
            self._move("fresh", [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)])
        elif func.is_view:
            self.kernels.launch("view", [], [])
        else:
            self._pass(func, args, kwargs, out)

    def _move(self, kind: Pass, tensors: list[Tensor], size: int | None = None) -> None:
        for tensor in tensors:
            nbytes = _nbytes(tensor)
            self.work.passes[kind, _format(tensor), size or nbytes] += nbytes

    def _attention(self, name: str, args: tuple[Any, ...]) -> None:
        backward = name.endswith("backward")
        query, keys = args[1:3] if backward else args[:2]
        rows, heads, tokens, width = query.shape
        flops = (5 if backward else 2) * 2 * rows * heads * tokens * keys.shape[2] * width
        direction: Attention = "attention-backward" if backward else "attention"
        self.work.attention[direction, _format(query), keys.shape[2]] += flops

    def _pass(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        name = func.overloadpacket.__name__
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        held = {_storage(leaf) for leaf in read}
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in outputs if _storage(leaf) not in held]
        written = _written(func, args, kwargs) if func._schema.is_mutable else []
        if not made and not written:
            return  # a view by another name (contiguous of what is so, to the same format)
        if name in ("embedding", "index_select", "index", "gather"):
            read = made  # as many elements as come out
        self.kernels.launch(name, read, [*written, *made])
        largest = max(map(_nbytes, [*read, *made]), default=0)
        if any(part in name for part in _FUNCTIONS):
            self._move("function", [*read, *(written or made)], largest)
        elif written:
            self._move("in-place", [*read, *written], largest)
        else:
            reduces = any(part in name for part in _REDUCTIONS)
            self._move("reduce" if reduces else "in-place", read, largest)
        self._move("fresh", made)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """What the operator's schema says that it writes over."""
    names = [argument.name for argument in func._schema.arguments if _is_written(argument)]
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    return [leaf for leaf in tree_leaves([given.get(name) for name in names]) if isinstance(leaf, Tensor)]


def _is_written(argument: Any) -> bool:
    # a fused optimizer writes over gradients only where it unscales them, which it is not asked to
    return argument.alias_info is not None and argument.alias_info.is_write and argument.name != "grads"


def _matmul(left: Tensor, right: Tensor) -> Iterator[tuple[Product, Format, float]]:
    *batch, rows, inner = left.shape
    columns = right.shape[-1]
    flops = 2.0 * rows * inner * columns * (batch[0] if batch else 1)
    turned = left.stride(-1) != 1
    yield product_shape(rows, inner, columns, turned=turned), _format(left), flops


def _grouped(left: Tensor, right: Tensor) -> Iterator[tuple[Product, Format, float]]:
    """Experts: each row meets one of them; the weights' gradient has two flat operands."""
    rows, inner = left.shape[-2:]
    yield product_shape(rows, inner, right.shape[-1]), _format(left), 2.0 * rows * inner * right.shape[-1]


_PRODUCTS: dict[Any, Callable[[tuple[Any, ...]], Iterator[tuple[Product, Format, float]]]] = {
    _aten.mm.default: lambda args: _matmul(args[0], args[1]),
    _aten.bmm.default: lambda args: _matmul(args[0], args[1]),
    _aten.addmm.default: lambda args: _matmul(args[1], args[2]),
    _aten.baddbmm.default: lambda args: _matmul(args[1], args[2]),
    _aten._grouped_mm.default: lambda args: _grouped(args[0], args[1]),
}


def _format(tensor: Tensor) -> Format:
    return "bf16" if tensor.dtype in (torch.bfloat16, torch.float16) else "fp32"


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
