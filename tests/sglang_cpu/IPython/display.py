"""What sglang.utils imports to show text in a notebook."""


def HTML(*args: object, **kwargs: object) -> None:  # noqa: N802
    """Shows nothing."""


def display(*args: object, **kwargs: object) -> None:
    """Shows nothing."""
