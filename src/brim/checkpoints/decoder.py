"""A decoder one block at a time: what flows into each, without ever holding more than one of them.

The blocks are transformers' own modules, so what is measured is what runs. Hidden states go from block to block through
a file. Shapes: N sequences, T tokens, D hidden size.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from brim.checkpoints.linears import file_names
from brim.checkpoints.reader import element_type, opened, read_into, tiles
from brim.checkpoints.writer import bytes_of, write_at
from brim.errors import ModelFileError, UsageError
from brim.models.directory import StoredTensor
from brim.models.quiet import quiet_transformers
from brim.models.skeleton import skeleton
from brim.models.spec import ModelSpec

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "olmo2")
"""Whose blocks are run here as the whole model would run them: a test compares the hidden states of each."""


class BlockwiseDecoder:
    """A model of which one block at most has memory."""

    def __init__(self, spec: ModelSpec, stored: Mapping[str, StoredTensor]) -> None:
        """Raises UsageError for a family whose blocks are not known to run alone."""
        if spec.model_type not in FAMILIES:
            raise UsageError(
                f"{spec.name}: calibration runs decoders block by block, of {', '.join(FAMILIES)}, and this is "
                f"{spec.model_type}; use --scales mse or absmax"
            )
        with torch.device("meta"), quiet_transformers():
            model = skeleton(spec, dtype="fp32", attention="sdpa")
        self._base: Any = model.get_decoder()
        self._names = file_names([name for name, _ in model.named_parameters()], frozenset(stored), model)
        self._stored = stored
        self._own = {id(module): name for name, module in model.named_modules()}
        self._rotary = type(self._base.rotary_emb)(config=self._base.config)
        self.blocks: tuple[nn.Module, ...] = tuple(self._base.layers)
        self.hidden_size = int(self._base.config.hidden_size)
        window = getattr(self._base.config, "sliding_window", None)
        # Within the window attention is plainly causal, for which no mask is needed.
        self.max_tokens = min(spec.config.get("max_position_embeddings") or 2**30, window or 2**30)

    def embedded(self, tokens_T: Tensor) -> Tensor:
        """(1, T, D): rows of the embedding, read one by one."""
        stored = self._stored[self._file_name(self._base.embed_tokens, "weight")]
        dtype, width = element_type(stored.spec), self.hidden_size
        rows_TD = torch.empty(len(tokens_T), width, dtype=dtype)
        with opened(stored) as descriptor:
            for row, token in zip(rows_TD, tokens_T.tolist(), strict=True):
                read_into(descriptor, bytes_of(row), token * width * dtype.itemsize, stored)
        return rows_TD.float().unsqueeze(0)

    @contextmanager
    def loaded(self, block: nn.Module) -> Iterator[Mapping[str, nn.Linear]]:
        """While this lasts the block has its weights, in FP32; its linear modules by their weights' names in the file.

        Raises ModelFileError for weights that are no numbers.
        """
        block.to_empty(device="cpu")
        try:
            for name, parameter in block.named_parameters():
                self._read(self._file_name(block, name), parameter.data)
            linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
            yield {self._file_name(block, f"{name}.weight"): module for name, module in linears.items()}
        finally:
            block.to(device="meta")

    def run(self, block: nn.Module, hidden_1TD: Tensor) -> Tensor:
        """The block's output."""
        return run_block(self._base, block, hidden_1TD, rotary=self._rotary)

    def _file_name(self, module: nn.Module, name: str) -> str:
        own = f"{self._own[id(module)]}.{name}"
        if own not in self._names:
            raise ModelFileError(f"tensor {own!r} is not in the model's files; download them again")
        return self._names[own]

    def _read(self, name: str, parameter: Tensor) -> None:
        flat, first = parameter.view(-1), 0
        for tile in tiles(self._stored[name]):
            flat[first : first + len(tile)] = tile
            first += len(tile)
        if not bool(torch.isfinite(flat).all()):
            raise ModelFileError(
                f"{self._stored[name].path}: tensor {name!r} holds NaN or Inf in FP32, and a model with such weights "
                "cannot be calibrated; --audit says where"
            )


def run_block(base: Any, block: nn.Module, hidden_1TD: Tensor, *, rotary: nn.Module | None = None) -> Tensor:
    """Output of a block of this decoder, of one of FAMILIES; `rotary` in the place of its own."""
    positions_1T = torch.arange(hidden_1TD.shape[1], device=hidden_1TD.device).unsqueeze(0)
    output = block(
        hidden_1TD,
        attention_mask=None,  # causal, which SDPA does without
        position_ids=positions_1T,
        position_embeddings=(rotary or base.rotary_emb)(hidden_1TD, positions_1T),
        use_cache=False,
    )
    return output[0] if isinstance(output, tuple) else output


class HiddenStates:
    """(N, T, D) in FP32, in a file; one sequence is held at a time."""

    def __init__(self, path: Path, *, tokens: int, width: int) -> None:
        self._shape, self._path = (1, tokens, width), path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    @property
    def _nbytes(self) -> int:
        return 4 * self._shape[1] * self._shape[2]

    def __getitem__(self, number: int) -> Tensor:
        hidden_1TD = torch.empty(self._shape)
        left, offset = bytes_of(hidden_1TD), number * self._nbytes
        while left:
            got = os.preadv(self._descriptor, [left], offset)
            if not got:
                raise ModelFileError(f"{self._path} lost its end; another program changed it, so run again")
            left, offset = left[got:], offset + got
        return hidden_1TD

    def __setitem__(self, number: int, hidden_1TD: Tensor) -> None:
        write_at(self._descriptor, bytes_of(hidden_1TD.contiguous()), number * self._nbytes)

    def __enter__(self) -> "HiddenStates":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)
        self._path.unlink()
