"""The real SGLang on this machine's CPU.

Engines that several files share are made by the conftest of a folder, a package in pytest's sense, and end with its
last test: an engine holds 3.5 GiB, and those of one folder are all that a machine should have to hold.
"""

import pytest
from tokenizers import Tokenizer

from pipeline.config import BUILTIN_MODEL
from pipeline.models import prepare_model


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(prepare_model(BUILTIN_MODEL) / "tokenizer.json"))
