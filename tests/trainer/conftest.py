"""Property tests here: no deadline (a busy machine is no failure), the same examples every time."""

from hypothesis import settings

settings.register_profile("formulas", deadline=None, derandomize=True, max_examples=100)
settings.load_profile("formulas")
