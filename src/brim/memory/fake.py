"""Fake tensors that take the path that real ones take.

A fake tensor has a size and no data. Left alone, a training step on fake tensors differs from the real one in ten
ways, each mended here; tests hold fake and real peaks equal for every lever and family.

1. Models branch on a few small integer tensors (is anything padded? are sequences packed?): integers that are
   computed from known ones, or from a mask of ones, keep their values.
2. transformers takes another path when it notices fake tensors (an explicit mask where the real run has none:
   1 to 4 % too much): it is told that nothing is being traced.
3. `nn.Module.to` refuses modules that hold fake parameters.
4. Autograd adds a second gradient into the first in place when nobody else holds it, except for tensor subclasses,
   which fake tensors are.
5. The grouped matmul of experts refuses fake inputs that are not BF16; the real one on a CPU takes any format. Its
   sizes do not depend on the routing.
6. Checkpointing keeps the random generator's state for each block, which no operator makes.
7. A step reads norms and losses as numbers: to scale by them (Adafactor), to see whether FP16 has overflowed, to add
   them up (evaluation). They change no size: any number will do.
8. Packed experts are gone through one by one, each with the tokens that are sent to it: here each gets an even share.
   Another routing changes neither what is kept for backward nor its sum, only the temporaries of the one expert at
   work; a test holds what all tokens at the same experts add to that expert's surplus of tokens.
9. DDP puts its buckets in the order of backward after the first step, and reads that order from a tensor: left as they
   are, they have the same bytes.
10. Waiting for a collective gives the tensor itself; of a fake one, another.
"""

import pkgutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import Reducer
from torch._meta_registrations import _create_grouped_mm_output_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed import _functional_collectives
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor._op_schema import OpSchema
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

import brim
from brim.memory.again import Again
from brim.memory.lifetimes import LifetimeMeter, PlainMode, is_sharded

_LARGEST_KNOWN = 2**22
"""Elements. Above it (a batch's full attention mask, say) values are not followed: nothing asks for them."""
_NOT_ASKING = (str(Path(__file__).parent), str(Path(torch.__file__).parent))
"""Frames between who reads a number and the operator that reads it: the modes of this module, and torch."""
_PIECES = (
    "brim.layers.packed_linear:_unpacked", "brim.layers.chunked_loss:_add_chunk", "brim.layers.products:_put_block",
)  # fmt: skip
"""Of which two runs of a kind are run (`memory.again`)."""
_ONES = torch.ops.aten.ones.default


class FakeWorld:
    """Inside `with`, every new tensor is fake and its life is metered; `bring` takes real tensors in."""

    def __init__(self) -> None:
        self._mode = FakeTensorMode()
        self._known = KnownIntegers()
        self.meter = LifetimeMeter()
        self._again = Again(self.meter)
        self._stack = ExitStack()

    def __enter__(self) -> "FakeWorld":
        self._stack.enter_context(self._mode)
        self._stack.enter_context(GroupedMatmulOfAnyFormat())
        self._stack.enter_context(self._known)
        self._stack.enter_context(self.meter)
        self._stack.enter_context(mock.patch("transformers.utils.import_utils.is_fake_tensor", lambda tensor: False))
        self._stack.enter_context(mock.patch.object(nn.Module, "_apply", _apply_to_fakes))
        self._stack.enter_context(mock.patch("brim.layers.packed_experts.routes", _even_routes))
        self._stack.enter_context(mock.patch("torch.get_rng_state", self._rng_state))
        self._stack.enter_context(mock.patch.object(FakeTensor, "__deepcopy__", _copy_of_fake, create=True))
        self._stack.enter_context(mock.patch.object(torch.UntypedStorage, "resize_", _metered_resize(self.meter)))
        self._stack.enter_context(mock.patch.object(_functional_collectives, "wait_tensor", lambda tensor: tensor))
        self._stack.enter_context(mock.patch.object(DeviceMesh, "__init__", _mesh_of_numbers))
        self._stack.enter_context(mock.patch.object(Reducer, "_rebuild_buckets", lambda reducer: False))
        self._stack.enter_context(
            mock.patch.object(ShardingPropagator, "_propagate_tensor_meta_non_cached", _shape_of_the_whole)
        )
        for piece in _PIECES:
            again = self._again.of(pkgutil.resolve_name(piece))
            self._stack.enter_context(mock.patch(piece.replace(":", "."), again))
        # Last, hence the first to see an operator: it counts references, and each mode below adds some.
        self._stack.enter_context(AccumulateInPlace())
        return self

    def __exit__(self, *exception: object) -> None:
        self.meter.stop()
        self._stack.close()

    def bring(self, tensor: Tensor) -> Tensor:
        """A fake tensor of the same size; an integer one keeps its values."""
        fake = self._mode.from_tensor(tensor, static_shapes=True)
        if _followed(tensor):
            self._known.remember(fake, tensor)
        self.meter.claim("workspace", [fake])
        return fake

    def _rng_state(self) -> Tensor:
        state: Tensor = torch.default_generator.get_state()
        self.meter.see(state)
        return state


class KnownIntegers(PlainMode):
    """Runs operators on small integer and boolean tensors a second time, on their real values."""

    def __init__(self) -> None:
        super().__init__()
        self._values = WeakIdKeyDictionary()

    def remember(self, fake: Tensor, value: Tensor) -> None:
        self._values[fake] = value

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if is_sharded(types):
            return NotImplemented
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0] in self._values:
            with _real():
                return self._values[args[0]].item()
        if func is torch.ops.aten._local_scalar_dense.default and _asked_by_the_step():
            return 1.0
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) and out.is_floating_point() and func is not _ONES and not _writes(func):
            return out  # nine in ten: new, and not followed
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if outputs and (func is _ONES or all(_followed(output) for output in outputs)):
            self._follow(func, args, kwargs, outputs)
        else:
            self._lose(outputs)
        return out

    def _follow(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], outputs: list[Tensor]
    ) -> None:
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not all(self._knows(tensor) for tensor in inputs):
            self._lose(outputs)
            return
        with _real():
            known_args, known_kwargs = tree_map_only(Tensor, self._value_of, (args, kwargs))
            known = func(*known_args, **known_kwargs)
        for output, value in zip(outputs, tree_leaves(known), strict=True):
            self._values[output] = value

    def _knows(self, tensor: Tensor) -> bool:
        # what `torch.tensor` makes from numbers is real until its first operator
        return tensor in self._values or not isinstance(tensor, FakeTensor)

    def _value_of(self, tensor: Tensor) -> Tensor:
        return self._values.get(tensor, tensor)

    def _lose(self, outputs: list[Tensor]) -> None:
        """Whatever was known of these was written over by something unknown."""
        for output in outputs:
            self._values.pop(output, None)


@cache
def _writes(func: Any) -> bool:
    """The operator writes into one of its inputs."""
    return bool(func._schema.is_mutable)


@contextmanager
def _real() -> Iterator[None]:
    """Operators work on real tensors until the block ends."""
    with unset_fake_temporarily(), _disable_current_modes():
        yield


def _followed(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() and tensor.numel() <= _LARGEST_KNOWN


class GroupedMatmulOfAnyFormat(PlainMode):
    """`_grouped_mm` gives what its kernel gives; the shape function that fake tensors use insists on BF16."""

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if is_sharded(types):
            return NotImplemented
        kwargs = kwargs or {}
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
            offsets = kwargs.get("offs", args[2] if len(args) > 2 else None)
            return _create_grouped_mm_output_tensor(args[0], args[1], offsets, kwargs.get("out_dtype"))
        return func(*args, **kwargs)


class AccumulateInPlace(PlainMode):
    """Autograd's sum of two gradients of one tensor writes into the first where the engine would.

    Rule (torch/csrc/autograd/input_buffer.cpp, `can_accumulate_inplace`): nobody else holds the first gradient or its
    storage; a view never qualifies, its base holds the storage. What "nobody else" counts to in here is measured once
    on a sum that is known to qualify.
    """

    def __init__(self) -> None:
        super().__init__()
        self._unshared: tuple[int, int, int] | None = None
        self._calibrating = False

    def __enter__(self) -> "AccumulateInPlace":
        super().__enter__()  # type: ignore[no-untyped-call]
        self._calibrating = True
        leaf = torch.zeros(2, requires_grad=True)
        (leaf.exp() + leaf.sin()).sum().backward()
        self._calibrating = False
        assert self._unshared is not None
        return self

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if is_sharded(types):
            return NotImplemented
        if func is torch.ops.prim.device.default:
            return args[0].fake_device  # two of three calls are this question; the modes below add nothing to it
        if func is torch.ops.aten.add.Tensor and _called_by_autograd():
            held = (sys.getrefcount(args[0]), args[0]._use_count(), _storage_holders(args[0]))
            if self._calibrating:
                self._unshared = held
            elif held == self._unshared and args[0].dtype == args[1].dtype:
                return args[0].add_(args[1])
        return func(*args, **(kwargs or {}))


def _even_routes(top_k_index: Tensor, num_experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """`layers.packed_experts.routes` of a router that spreads its tokens evenly, the first experts getting the rest."""
    _one_hot = top_k_index.new_empty(*top_k_index.shape, num_experts + 1)
    share, rest = divmod(top_k_index.numel(), num_experts)
    for expert in range(num_experts if share else rest):
        place_N, token_N = top_k_index.new_empty(share + (expert < rest), 2).unbind(1)
        yield expert, place_N, token_N


def _called_by_autograd() -> bool:
    """The operator was called by the engine itself, not by Python code that the engine runs."""
    if torch._C._current_graph_task_id() == -1:
        return False
    return sys._getframe(2).f_code.co_name == "_engine_run_backward"


_propagate = ShardingPropagator._propagate_tensor_meta_non_cached


def _shape_of_the_whole(propagator: ShardingPropagator, schema: OpSchema) -> Any:
    """A sharded tensor's operator asks what shape its result would have as a whole, and makes fake tensors to find out:
    out of the meter's sight, as they are in a real run."""
    with _real():
        return _propagate(propagator, schema)


_make_mesh = DeviceMesh.__init__


def _mesh_of_numbers(mesh: DeviceMesh, *args: Any, **kwargs: Any) -> None:
    """FSDP joins its mesh with that of tensor parallelism: ranks, read from tensors."""
    with _real():
        _make_mesh(mesh, *args, **kwargs)


def _metered_resize(meter: LifetimeMeter) -> Callable[[torch.UntypedStorage, int], torch.UntypedStorage]:
    """`UntypedStorage.resize_` that the meter hears of."""
    resize = torch.UntypedStorage.resize_

    def resize_(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        resized = resize(storage, size)
        meter.resized(storage)
        return resized

    return resize_


def _asked_by_the_step() -> bool:
    """Brim's code wants to know, or an optimizer that it called; not a model, which may branch on what it reads."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_NOT_ASKING):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename.startswith(str(Path(brim.__file__).parent))


def _copy_of_fake(tensor: Tensor, memo: dict[int, Tensor]) -> Tensor:
    """As PEFT copies a classifier's head; left alone, the copy would be in a copy of the fake mode."""
    if id(tensor) not in memo:
        copied = tensor.detach().clone()
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(copied, requires_grad=tensor.requires_grad) if is_parameter else copied
    return memo[id(tensor)]


def _storage_holders(tensor: Tensor) -> int:
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


def _apply_to_fakes(module: nn.Module, convert: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` that replaces parameters instead of writing into them; unchanged ones stay, ties with them."""
    if recurse:
        for child in module.children():
            child._apply(convert)
    for name, parameter in module._parameters.items():
        if parameter is not None and (converted := convert(parameter.detach())).dtype != parameter.dtype:
            module._parameters[name] = nn.Parameter(converted, requires_grad=parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = convert(buffer)
    return module
