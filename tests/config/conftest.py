import pytest

from verl.config import Config, Loaded, load, report

REQUIRED = ("actor_rollout_ref.model.path=model", "actor_rollout_ref.rollout.name=hf")


@pytest.fixture
def load_valid():
    """load, with the required keys given and no problem expected."""

    def run(*arguments: str, required: tuple[str, ...] = REQUIRED, schema=Config) -> Loaded:
        loaded = load([*required, *arguments], schema)
        assert not loaded.problems, report(loaded.problems)
        return loaded

    return run


@pytest.fixture
def problems_of():
    """key -> problem, of these arguments besides the required ones."""

    def run(*arguments: str, required: tuple[str, ...] = REQUIRED) -> dict:
        loaded = load([*required, *arguments])
        assert loaded.config is None
        return {problem.key: problem for problem in loaded.problems}

    return run


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str, name: str = "run.yaml") -> str:
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write
