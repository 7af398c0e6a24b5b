import pytest
from engine_helpers import save_tiny_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> str:
    """A Qwen2 whose embeddings are tied."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny"), "qwen2", tied=True)


@pytest.fixture(scope="session", params=["qwen2-untied", "qwen2-tied", "llama-untied", "llama-tied"])
def any_tiny(request, tmp_path_factory) -> str:
    arch, tied = request.param.split("-")
    return save_tiny_model(tmp_path_factory.mktemp(request.param), arch, tied == "tied")
