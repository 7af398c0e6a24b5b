"""The check of GPU memory before an engine starts, with a driver that the test writes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import fake_nvml
import pytest

from verl.errors import UserError
from verl.memory.gpu_balance import (
    GPUProcess,
    GPUReading,
    check_balance,
    disabled_by_user,
    environment_for_engine,
    read_gpus,
)

OLD, OLDER, NEW = (
    "SGLANG_DISABLE_TP_MEMORY_INBALANCE_CHECK",
    "SGL_DISABLE_TP_MEMORY_INBALANCE_CHECK",
    "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK",
)

FOUR_GPUS = [
    ("GPU-aaaa0000", 80994, 81559),
    ("GPU-aaaa1111", 63310, 81559),
    ("GPU-bbbb2222", 80994, 81559),
    ("GPU-bbbb3333", 80994, 81559),
]
USED = "GPU-aaaa1111"
TRAINER = {USED: [(41872, 17684)]}
NAMES = {41872: "/usr/bin/python3", 7: "/opt/server", 9: "python3"}


@pytest.fixture
def driver(monkeypatch) -> Callable[..., None]:
    """Installs a driver that lists these GPUs and processes (``fake_nvml.install``)."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return partial(fake_nvml.install, monkeypatch, names=NAMES)


def refusal(readings: list[GPUReading], **options) -> str:
    with pytest.raises(UserError) as error:
        check_balance(readings, disabled=False, **options)
    return str(error.value)


def free(*megabytes: int) -> list[GPUReading]:
    return [GPUReading(index, amount, 81559) for index, amount in enumerate(megabytes)]


def test_gpus_are_read_with_their_processes_the_largest_first(driver):
    driver(FOUR_GPUS, {USED: [(7, 500), (41872, 17684)]})
    readings = read_gpus(None)
    assert [(gpu.index, gpu.free_mb, gpu.total_mb) for gpu in readings] == [
        (0, 80994, 81559),
        (1, 63310, 81559),
        (2, 80994, 81559),
        (3, 80994, 81559),
    ]
    assert readings[1].processes == (
        GPUProcess(41872, "/usr/bin/python3", 17684),
        GPUProcess(7, "/opt/server", 500),
    )
    assert readings[0].processes == ()


@pytest.mark.parametrize(
    ("visible", "indices", "expected"),
    [
        (None, [3, 1], [3, 1]),
        ("2,0", None, [2, 0]),
        ("2,0", [1], [0]),
        (" 3 , 1", [0, 1], [3, 1]),
        ("GPU-bbbb3333,GPU-aaaa0", [0, 1], [3, 0]),
        ("1,-1,2", None, [1]),
        ("", None, []),
        ("NoDevFiles", None, []),
        ("MIG-aaaa1111", [0], []),
    ],
)
def test_positions_count_the_gpus_that_cuda_visible_devices_shows(driver, monkeypatch, visible, indices, expected):
    driver(FOUR_GPUS)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu.index for gpu in read_gpus(indices)] == expected


@pytest.mark.parametrize(
    ("visible", "indices", "message"),
    [
        (None, [4], "on GPU 4, counted from 0, and the driver lists 4"),
        ("2,0", [0, 2], "on GPU 2, counted from 0, and CUDA_VISIBLE_DEVICES=2,0 shows 2"),
        ("", [0], "on GPU 0, counted from 0, and CUDA_VISIBLE_DEVICES= shows 0"),
        (None, [-1], "on GPU -1"),
        ("0,7", [0], "'7' names no GPU of this machine. It has 0 (GPU-aaaa0000), 1"),
        ("GPU-b", [0], "'GPU-b' names several GPUs"),
    ],
)
def test_a_gpu_that_is_not_there_is_named(driver, monkeypatch, visible, indices, message):
    driver(FOUR_GPUS)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(UserError) as error:
        read_gpus(indices)
    assert message in str(error.value)


def test_without_a_driver_there_is_nothing_to_compare(monkeypatch):
    fake_nvml.remove(monkeypatch)
    assert read_gpus([0, 1]) == []
    assert check_balance(read_gpus([0, 1]), disabled=False) is None


def test_gpus_whose_memory_cannot_be_read_are_left_out(driver):
    driver(["GPU-aaaa0000", ("GPU-aaaa1111", 100, 200)])
    assert [gpu.index for gpu in read_gpus(None)] == [1]


def test_memory_is_read_where_processes_cannot_be(driver):
    driver(FOUR_GPUS, {USED: None})
    assert [(gpu.free_mb, gpu.processes) for gpu in read_gpus([0, 1])] == [(80994, ()), (63310, ())]


@pytest.mark.parametrize("amounts", [[80994] * 8, [80000, 76001], [10], []])
def test_balanced_gpus_pass_without_a_word(amounts, capfd):
    assert check_balance(free(*amounts), disabled=False) is None
    assert check_balance(free(*amounts), disabled=True) is None
    assert capfd.readouterr() == ("", "")


def test_the_tolerance_is_a_share_of_the_largest_free_memory():
    assert check_balance(free(100, 95), disabled=False) is None
    assert "differs by over 5%" in refusal(free(1000, 949))
    assert check_balance(free(1000, 901), tolerance=0.9, disabled=False) is None
    assert "differs by over 10%" in refusal(free(1000, 899), tolerance=0.9)


def test_a_gpu_in_use_is_refused_with_its_number_the_megabytes_and_the_process(driver):
    driver(FOUR_GPUS, TRAINER)
    assert refusal(read_gpus([0, 1])) == (
        "One engine is to run on GPUs 0, 1, whose free memory differs by over 5%:\n"
        "  GPU 0: 80,994 of 81,559 MB free\n"
        "  GPU 1: 63,310 of 81,559 MB free, 17,684 MB less than GPU 0\n"
        "    held by pid 41872 (/usr/bin/python3): 17,684 MB\n"
        "It would get as little memory on each GPU as on GPU 1, and SGLang refuses a difference of over 10%.\n"
        "Stop what holds the memory, or name other GPUs in CUDA_VISIBLE_DEVICES. A trainer that was loaded before the\n"
        "engine has to offload its parameters and empty its cache first. To start the engine all the same:\n"
        "  export SGL_DISABLE_TP_MEMORY_INBALANCE_CHECK=True"
    )


def test_a_disabled_check_warns_with_the_same_facts(driver):
    driver(FOUR_GPUS, TRAINER)
    readings = read_gpus([0, 1])
    warning = check_balance(readings, disabled=True)
    assert warning is not None
    facts, last = warning.rsplit("\n", 1)
    assert refusal(readings).startswith(facts)
    assert last == "The check is disabled: the engine starts, with as little memory on each GPU as on GPU 1."


def test_gpus_outside_the_replica_do_not_count(driver):
    driver(FOUR_GPUS, TRAINER)
    assert check_balance(read_gpus([2, 3]), disabled=False) is None


def test_every_gpu_that_lacks_memory_is_named():
    message = refusal(free(60000, 80000, 78000, 70000))
    assert "GPU 0: 60,000 of 81,559 MB free, 20,000 MB less than GPU 1" in message
    assert "GPU 2: 78,000 of 81,559 MB free\n" in message
    assert "GPU 3: 70,000 of 81,559 MB free, 10,000 MB less than GPU 1" in message
    assert "as little memory on each GPU as on GPU 0" in message


def test_gpus_of_several_nodes_go_by_the_names_that_the_caller_gives():
    message = refusal([GPUReading("node-a:0", 80000, 81559), GPUReading("node-b:0", 60000, 81559)])
    assert "GPUs node-a:0, node-b:0" in message
    assert "GPU node-b:0: 60,000 of 81,559 MB free, 20,000 MB less than GPU node-a:0" in message


@pytest.mark.parametrize(
    ("processes", "line"),
    [
        ([], "18,249 MB held by no process that is visible from here"),
        ([(9, 449)], "17,800 MB held by no process that is visible from here"),
        ([(8, 17684)], "held by pid 8 (name not visible from here): 17,684 MB"),
        ([(9, None)], "held by pid 9 (python3): how much is not visible from here"),
    ],
)
def test_the_message_names_what_a_container_hides(driver, processes, line):
    driver(FOUR_GPUS, {USED: processes})
    message = refusal(read_gpus([0, 1]))
    assert line in message
    assert ("outside of a container and as root,\n    nvidia-smi" in message) == ("held by no process" in line)


def test_an_empty_gpu_of_a_smaller_model_is_not_blamed_on_a_process():
    message = refusal([GPUReading(0, 80994, 81559), GPUReading(1, 40400, 40960)])
    assert "nothing much is held there: it is a smaller GPU" in message
    assert "held by" not in message


@pytest.mark.parametrize(
    ("variables", "disabled"),
    [
        ({}, False),
        ({OLDER: "True"}, True),
        ({OLDER: "1"}, True),
        ({OLDER: "False"}, False),
        ({OLD: "yes"}, True),
        ({OLD: "0"}, False),
        ({NEW: "0"}, True),
        ({NEW: "false"}, True),
        ({NEW: "1"}, False),
        ({NEW: ""}, False),
        ({OLDER: " true "}, True),
        ({OLDER: "True", OLD: "1", NEW: "0"}, True),
        ({OLDER: "0", NEW: "1"}, False),
    ],
)
def test_the_engine_gets_what_the_users_variables_mean_by_their_names(variables, disabled):
    environ = {"PATH": "/bin", "SGL_OTHER": "1", **variables}
    assert disabled_by_user(environ) is disabled
    assert environment_for_engine(environ) == {"PATH": "/bin", "SGL_OTHER": "1", NEW: "0" if disabled else "1"}
    assert environ == {"PATH": "/bin", "SGL_OTHER": "1", **variables}


@pytest.mark.parametrize(("name", "off"), [(OLDER, "true"), (OLD, "true"), (NEW, "false")])
@pytest.mark.parametrize("value", ["ture", "2", "None"])
def test_a_value_that_is_neither_yes_nor_no_is_an_error_that_names_the_variable(name, off, value):
    for function in (disabled_by_user, environment_for_engine):
        with pytest.raises(UserError) as error:
            function({name: value})
        assert str(error.value) == (
            f"The environment variable {name} is {value!r}. It takes true, 1, yes, y or false, 0, no, n; "
            f"{off} switches the tensor-parallel memory check off."
        )


def test_variables_that_contradict_each_other_are_an_error_that_names_them():
    with pytest.raises(UserError) as error:
        environment_for_engine({OLDER: "True", NEW: "1"})
    assert f"both off ({OLDER}=True) and on ({NEW}=1)" in str(error.value)
