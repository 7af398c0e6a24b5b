"""Stand-in (see ../README.md)."""  # noqa: N999
