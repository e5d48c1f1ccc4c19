"""An optimizer over the trainable parameters, or over FP32 master copies of them.

AdamW is `torch.optim.AdamW(fused=True)`: no temporaries (on request `foreach=True`, with as many as there are
parameters). The others go parameter by parameter. With master copies each parameter has an optimizer of its own, so
that only one parameter's FP32 gradient exists at a time.

On the host all that is kept from step to step is in the host's memory, with a copy of the weights that is stepped
there: a gradient crosses over, is freed on the device, and the rounded weight crosses back. Weights that are on the
host themselves (offload.py) are stepped where they are.

In backward each parameter has one, too, and is stepped when its gradient is complete (a tied weight's once, with the
sum). A gradient that backward does not bring, that of an untied head under the chunked loss, waits for `step`.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from brim.layers.blockwise_adam import Maps, new_state
from brim.memory import owners
from brim.recipe import Optimizer
from brim.training.adamw8bit import AdamW8bit
from brim.training.by_parameter import ByParameter
from brim.training.copies import Shares
from brim.training.lion import Lion
from brim.training.parts import part_of, placed_like, spread_of
from brim.training.rounded_adamw import RoundedAdamW

_MOMENTUM = 0.9
_READ_AS_NUMBERS = {"adamw8bit": ("step",)}
"""States that stay on the CPU."""


class Stepper:
    """Steps parameters from their gradients and frees the gradients.

    `undecayed`: those of the parameters that weight decay leaves alone, stepped at `undecayed_rate` times the learning
    rate. `at_home`: those that are on the host themselves.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        settings: Optimizer,
        *,
        fp32_master: bool,
        fused: bool = True,
        undecayed: Iterable[nn.Parameter] = (),
        undecayed_rate: float = 1.0,
        on_host: bool = False,
        at_home: Iterable[nn.Parameter] = (),
        shares: Shares | None = None,
    ) -> None:
        if shares is not None:
            parameters = shares.own
        self._shares = shares
        self._parameters = parameters
        self._on_host = on_host
        self._place = owners.on_host if on_host else nullcontext
        self._at_home = {id(parameter) for parameter in at_home}
        with self._place():
            self._masters = self._masters_of(parameters, fp32_master=fp32_master)
        # No optimizer of torch's takes an empty list (of few parameters and many ranks, some have none), or whole
        # tensors beside such that are spread over ranks.
        alike = len({spread_of(parameter) for parameter in parameters}) == 1
        one_by_one = bool(self._masters) or settings.in_backward or not alike
        groups = [[parameter] for parameter in self._masters or parameters] if one_by_one else [parameters]
        self._settings = settings
        with self._place():
            stepped = self._masters or parameters
            self._maps = Maps.on(stepped[0].device) if settings.name == "adamw8bit" and stepped else None
        kept = {id(parameter) for parameter in undecayed}
        spared = [own for own, p in zip(self._masters or parameters, parameters, strict=True) if id(p) in kept]
        self._optimizers = [
            _optimizer(
                _groups(group, spared, settings.weight_decay, undecayed_rate), settings, fused=fused, maps=self._maps
            )
            for group in groups
        ]
        self._one_by_one = one_by_one
        if settings.in_backward:
            for index, parameter in enumerate(parameters):
                parameter.register_post_accumulate_grad_hook(partial(self._in_backward, index))

    def _masters_of(self, parameters: list[nn.Parameter], *, fp32_master: bool) -> list[nn.Parameter]:
        """What is stepped in each parameter's place, if anything is; one at home without an FP32 copy is itself."""
        if not self._on_host:
            return [nn.Parameter(parameter.detach().float()) for parameter in parameters] if fp32_master else []
        return [
            nn.Parameter(_host_copy(parameter, in_fp32=fp32_master))
            if fp32_master or id(parameter) not in self._at_home
            else parameter
            for parameter in parameters
        ]

    def _copy(self, index: int) -> Iterator[nn.Parameter]:
        """The parameter's master, if it has one."""
        for master in self._masters[index : index + 1]:
            if master is not self._parameters[index]:
                yield master

    def set_learning_rate(self, learning_rate: float) -> None:
        """Of the steps from now on; before backward, which may step."""
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * group["rate"]

    def step(self, factor: float = 1.0) -> None:
        """One update from the gradients there are, each times `factor`; afterwards no parameter has one."""
        self._step(factor)
        if self._shares is not None:
            self._shares.discard_gradients()
            self._shares.send()

    def _step(self, factor: float) -> None:
        if self._one_by_one:
            for index in range(len(self._parameters)):
                self._step_one(index, factor)
            return
        if factor != 1.0:
            torch._foreach_mul_([p.grad for p in self._parameters if p.grad is not None], factor)
        self._optimizers[0].step()
        self._optimizers[0].zero_grad(set_to_none=True)

    def _in_backward(self, index: int, parameter: Tensor) -> None:
        assert parameter.grad is not None
        owners.claim("gradients", [parameter.grad])
        owners.switch("workspace")
        self._step_one(index)
        owners.claim("optimizer", self._optimizers[index].state[self._stepped(index)].values())
        owners.switch("activations")

    def read_again(self) -> None:
        """Master copies of parameters that another hand has written."""
        with torch.no_grad():
            for index, parameter in enumerate(self._parameters):
                for master in self._copy(index):
                    master.copy_(part_of(parameter))

    def discard_gradients(self) -> None:
        """Free them without a step."""
        if self._shares is not None:
            self._shares.discard_gradients()
        for parameter in self._parameters:
            parameter.grad = None

    def _step_one(self, index: int, factor: float = 1.0) -> None:
        parameter, stepped = self._parameters[index], self._stepped(index)
        if parameter.grad is None:
            return
        with self._place():
            if stepped is parameter:
                pass
            elif self._on_host:
                stepped.grad = _host_copy(parameter.grad, in_fp32=stepped.dtype == torch.float32)
                parameter.grad = None
            elif self._masters:
                stepped.grad = parameter.grad.float()
                parameter.grad = None
            if factor != 1.0:
                assert stepped.grad is not None
                stepped.grad.mul_(factor)
            self._optimizers[index].step()
            stepped.grad = None
            if stepped is not parameter:
                with torch.no_grad():
                    # rounded where it is: what crosses to a device should need no room of its own there
                    if self._on_host:
                        part_of(parameter).copy_(stepped.to(parameter.dtype))
                    else:
                        parameter.copy_(stepped)

    def _stepped(self, index: int) -> nn.Parameter:
        return (self._masters or self._parameters)[index]

    def tensors(self) -> Iterator[Tensor]:
        """Everything that lives from step to step: states and master copies."""
        for index in range(len(self._masters)):
            yield from self._copy(index)
        if self._maps is not None:
            yield from self._maps.tensors()
        for optimizer in self._optimizers:
            for state in optimizer.state.values():
                yield from state.values()

    def tensors_of(self, parameter: Tensor) -> Iterator[Tensor]:
        """What lives from step to step for this parameter: its states and its master copy."""
        for index, trained in enumerate(self._parameters):
            if trained is parameter:
                yield from self._copy(index)
                states = self._optimizers[index if self._one_by_one else 0].state
                yield from (states.get(self._stepped(index)) or {}).values()

    def state_dict(self) -> dict[str, Tensor]:
        """Name -> this rank's part: `INDEX.STATE`, states by torch's names (`exp_avg`, `step`), and `INDEX.master`."""
        tensors: dict[str, Tensor] = {}
        for index in range(len(self._masters)):
            tensors |= {f"{index}.master": part_of(master.detach()) for master in self._copy(index)}
        for index, state in enumerate(self._states()):
            tensors |= {f"{index}.{key}": part_of(value) for key, value in state.items()}
        return tensors

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave, bit by bit. Raises KeyError or ValueError when that was another's."""
        for index in range(len(self._masters)):
            for master in self._copy(index):
                part = part_of(master.data)
                part.copy_(like(tensors[f"{index}.master"], part, f"{index}.master"))
        for index, parameter in enumerate(self._masters or self._parameters):
            optimizer = self._optimizers[index if self._one_by_one else 0]
            # A parameter without a gradient so far has no state.
            optimizer.state.pop(parameter, None)
            models = _states_of(part_of(parameter), self._settings)
            if any(f"{index}.{key}" in tensors for key in models):
                optimizer.state[parameter] = {
                    key: placed_like(
                        like(tensors[f"{index}.{key}"], model, f"{index}.{key}").to(
                            "cpu" if key in _READ_AS_NUMBERS.get(self._settings.name, ()) else parameter.device,
                            copy=True,
                        ),
                        part_of(parameter) if isinstance(optimizer, ByParameter) else parameter,
                    )
                    for key, model in models.items()
                }

    def _states(self) -> Iterator[dict[str, Tensor]]:
        for index, parameter in enumerate(self._masters or self._parameters):
            yield self._optimizers[index if self._one_by_one else 0].state.get(parameter, {})


def _groups(
    owned: list[nn.Parameter], spared: list[nn.Parameter], decay: float, spared_rate: float
) -> list[dict[str, Any]]:
    """As torch's optimizers take them: what decays, and what does not; `rate` is a group's multiple of the rate."""
    kept = {id(parameter) for parameter in spared}
    decayed = [parameter for parameter in owned if id(parameter) not in kept]
    alone = [parameter for parameter in owned if id(parameter) in kept]
    parts = ((decayed, decay, 1.0), (alone, 0.0, spared_rate))
    return [{"params": chosen, "weight_decay": own, "rate": rate} for chosen, own, rate in parts if chosen]


def _optimizer(
    parameters: list[dict[str, Any]], settings: Optimizer, *, fused: bool, maps: Maps | None
) -> torch.optim.Optimizer:
    rate, decay = settings.learning_rate, settings.weight_decay
    match settings.name:
        case "adamw" if settings.rounding == "stochastic":
            return RoundedAdamW(parameters, lr=rate, weight_decay=decay)
        case "adamw":
            return torch.optim.AdamW(
                parameters, lr=rate, weight_decay=decay, fused=fused or None, foreach=not fused or None
            )
        case "sgd":
            # not fused: that kernel takes for granted that all parameters get their first gradient in one step
            return torch.optim.SGD(parameters, lr=rate, weight_decay=decay, momentum=_MOMENTUM, foreach=False)
        case "adafactor":
            return torch.optim.Adafactor(parameters, lr=rate, weight_decay=decay, foreach=False)
        case "lion":
            return Lion(parameters, lr=rate, weight_decay=decay)
        case "adamw8bit":
            assert maps is not None
            by_chance = settings.rounding == "stochastic"
            return AdamW8bit(parameters, lr=rate, weight_decay=decay, maps=maps, by_chance=by_chance)


def _states_of(parameter: Tensor, settings: Optimizer) -> dict[str, Tensor]:
    """State -> a tensor of its shape and dtype, without data, as the optimizer makes it for a parameter."""
    model, step = torch.empty_like(parameter, device="meta"), torch.empty((), device="meta")
    match settings.name:
        case "sgd":
            return {"momentum_buffer": model}
        case "lion":
            return {"exp_avg": model}
        case "adafactor" if parameter.dim() > 1:
            return {"step": step, "row_var": model[..., :1], "col_var": model[..., :1, :]}
        case "adafactor":
            return {"step": step, "variance": model}
        case "adamw8bit":
            return {"step": step, **new_state(parameter, device=torch.device("meta"))}
        case _:
            return {"step": step, "exp_avg": model, "exp_avg_sq": model}


def _host_copy(tensor: Tensor, *, in_fp32: bool) -> Tensor:
    """This rank's part in host memory, in FP32 if asked: made so there, a cast on the device would take room on it."""
    here = part_of(tensor.detach())
    copied = torch.empty(here.shape, dtype=here.dtype, device="cpu").copy_(here)
    return copied.float() if in_fp32 else copied


def like(stored: Tensor, model: Tensor, name: str) -> Tensor:
    """`stored`, if it has the shape and dtype of `model`: the fused kernel trusts them, and would read past the end.

    Raises ValueError.
    """
    if stored.shape != model.shape or stored.dtype != model.dtype:
        raise ValueError(
            f"{name} is {tuple(stored.shape)} {stored.dtype}, and should be {tuple(model.shape)} {model.dtype}"
        )
    return stored
