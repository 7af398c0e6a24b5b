"""Stand-in (see ../README.md): the names that SGLang and transformers import, none of which does anything."""

from typing import NoReturn

__version__ = "0.0.0"


def no_images(*args: object, **kwargs: object) -> NoReturn:
    raise RuntimeError("This environment has a stand-in for torchvision (tests/sglang_cpu): text models only.")
