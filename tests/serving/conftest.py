from __future__ import annotations

from pathlib import Path

import pytest

from serving.bench import save_tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("played")
    save_tokenizer(folder)
    return folder
