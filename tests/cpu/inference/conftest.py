"""Tiny random models, loaded."""

from collections.abc import Callable
from typing import Any

import pytest

from brim.inference import Loaded


@pytest.fixture(scope="session", params=["gpt2", "llama"])
def causal(request: pytest.FixtureRequest, tiny_model: Callable[[str], Any], tokenizer: Any) -> Loaded:
    return Loaded(tiny_model(request.param), tokenizer)


@pytest.fixture(scope="session")
def llama(tiny_model: Callable[[str], Any], tokenizer: Any) -> Loaded:
    return Loaded(tiny_model("llama"), tokenizer)


@pytest.fixture(scope="session")
def t5(tiny_model: Callable[[str], Any], tokenizer: Any) -> Loaded:
    return Loaded(tiny_model("t5"), tokenizer)
