"""Validation metrics against brute force over all subsets of a prompt's answers."""

import itertools
import json
import statistics
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl.trainer.ppo.validation_metrics import best_and_worst_of, majority_of, validation_metrics


def table(samples) -> pa.Table:
    """samples: (data_source, group, score, extra) tuples."""
    sources, groups, scores, extras = zip(*samples, strict=True)
    return pa.table(
        {
            "data_source": pa.array(sources, pa.string()),
            "group": pa.array(groups, pa.int64()),
            "score": pa.array(scores, pa.float64()),
            "reward_extra": pa.array([json.dumps(extra) for extra in extras], pa.string()),
        }
    )


values = st.lists(st.floats(-10, 10), min_size=1, max_size=7)


@given(values, st.data())
def test_best_and_worst_are_the_mean_over_all_subsets(values, data):
    k = data.draw(st.integers(1, len(values)))
    subsets = list(itertools.combinations(values, k))
    best, worst = best_and_worst_of(np.array(values), k)
    assert best == pytest.approx(statistics.fmean(map(max, subsets)), abs=1e-9)
    assert worst == pytest.approx(statistics.fmean(map(min, subsets)), abs=1e-9)


def test_best_of_k_of_binary_scores_is_the_unbiased_pass_at_k():
    """Chen et al. 2021 (arXiv:2107.03374): 1 - C(n - c, k) / C(n, k), here for n = 10, c = 3, k = 5."""
    best, _ = best_and_worst_of(np.array([1.0] * 3 + [0.0] * 7), 5)
    assert best == pytest.approx(1 - 21 / 252)


def vote(subset):
    """The value of the most frequent answer; tied answers share; (None) does not vote."""
    counts = Counter(answer for _, answer in subset if answer is not None)
    if not counts:
        return statistics.fmean(value for value, _ in subset)
    top = [answer for answer, count in counts.items() if count == max(counts.values())]
    return statistics.fmean(statistics.fmean(v for v, a in subset if a == answer) for answer in top)


answered = st.lists(st.tuples(st.floats(0, 1), st.sampled_from(["a", "b", "c", None])), min_size=1, max_size=7)


@given(answered, st.data())
def test_the_majority_is_the_mean_vote_over_all_subsets(samples, data):
    k = data.draw(st.integers(1, len(samples)))
    expected = statistics.fmean(vote(subset) for subset in itertools.combinations(samples, k))
    found = majority_of(np.array([v for v, _ in samples]), [a for _, a in samples], k, np.random.default_rng(0))
    assert found == pytest.approx(expected, abs=1e-9)


def test_the_majority_over_too_many_subsets_is_drawn_near_its_true_value():
    """10 of 40 answers are right, the others agree on a wrong one; C(40, 3) = 9880 subsets, 1470 with two right."""
    arguments = np.repeat([1.0, 0.0], [10, 30]), ["42"] * 10 + ["41"] * 30, 3
    found = majority_of(*arguments, np.random.default_rng(3))
    assert found == pytest.approx(1470 / 9880, abs=0.045)  # four standard errors of 1000 draws
    assert majority_of(*arguments, np.random.default_rng(3)) == found


def test_drawn_majorities_repeat_with_the_seed():
    rng = np.random.default_rng(0)
    many = table([("d", 0, float(score), {"pred": str(score)}) for score in rng.integers(0, 4, 40)])
    assert validation_metrics(many, seed=1) == validation_metrics(many, seed=1)
    first, second = (validation_metrics(many, seed=seed)["val-aux/d/reward/maj@8"] for seed in (1, 2))
    assert first != second
    assert first == pytest.approx(second, abs=0.2)


def test_one_greedy_answer_a_prompt_gives_mean_at_one_alone():
    metrics = validation_metrics(
        table([("openai/gsm8k", g, s, {}) for g, s in [(0, 1.0), (1, 0.0), (2, 0.0), (3, 1.0)]])
    )
    assert metrics == {"val-core/openai/gsm8k/reward/mean@1": 0.5}


def test_with_accuracy_and_answers_the_core_is_accuracy_and_the_rest_is_auxiliary():
    samples = [
        ("math", 0, 0.9, {"acc": True, "pred": "4"}),
        ("math", 0, -1.0, {"acc": False, "pred": "5"}),
        ("math", 0, 0.8, {"acc": True, "pred": "4"}),
        ("math", 0, -1.0, {"acc": False, "pred": "7"}),
        ("math", 1, -1.0, {"acc": False, "pred": None}),
        ("math", 1, -1.0, {"acc": False, "pred": "3"}),
        ("math", 1, -1.0, {"acc": False, "pred": "3"}),
        ("math", 1, 0.7, {"acc": True, "pred": "8"}),
    ]
    metrics = validation_metrics(table(samples))
    core = {name: value for name, value in metrics.items() if name.startswith("val-core/")}
    assert core == pytest.approx(
        {"val-core/math/acc/mean@4": 3 / 8, "val-core/math/acc/best@4": 1.0, "val-core/math/acc/maj@4": 0.5}
    )
    assert set(metrics) - set(core) == {
        *(f"val-aux/math/acc/{s}" for s in ("std@4", "worst@4", "best@2", "worst@2", "maj@2")),
        *(
            f"val-aux/math/reward/{s}"
            for s in ("mean@4", "std@4", "best@4", "worst@4", "maj@4", "best@2", "worst@2", "maj@2")
        ),
    }
    first, second = ([s[2] for s in samples[i : i + 4]] for i in (0, 4))
    expected_std = statistics.fmean([statistics.pstdev(first), statistics.pstdev(second)])
    assert metrics["val-aux/math/reward/std@4"] == pytest.approx(expected_std)
    assert metrics["val-aux/math/acc/best@2"] == pytest.approx(statistics.fmean([1 - 1 / 6, 3 / 6]))


def test_numbers_of_the_scorer_become_auxiliary_variables_and_text_does_not():
    samples = [("d", 0, 1.0, {"steps": 3, "note": "x", "pred": 7}), ("d", 1, 0.0, {"steps": 5, "note": "y", "pred": 8})]
    metrics = validation_metrics(table(samples))
    assert metrics == {"val-core/d/reward/mean@1": 0.5, "val-aux/d/steps/mean@1": 4.0}


def test_data_sources_are_kept_apart_each_with_its_own_number_of_samples():
    samples = [("a", 0, 1.0, {}), ("a", 0, 0.0, {}), ("a", 0, 0.0, {}), ("b", 1, 0.25, {})]
    metrics = validation_metrics(table(samples))
    assert {name for name in metrics if name.startswith("val-core")} == {
        "val-core/a/reward/mean@3",
        "val-core/a/reward/best@3",
        "val-core/b/reward/mean@1",
    }
    assert metrics["val-aux/a/reward/best@2"] == pytest.approx(2 / 3)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.floats(0, 1)), min_size=1, max_size=20), st.randoms(use_true_random=False)
)
def test_metrics_do_not_depend_on_the_order_of_rows(pairs, random):
    samples = [("d", group, score, {"pred": str(round(score, 1))}) for group, score in pairs]
    before = validation_metrics(table(samples))
    random.shuffle(samples)
    assert validation_metrics(table(samples)) == pytest.approx(before, abs=1e-9)


def test_a_table_without_extra_results_and_without_rows_works():
    plain = table([("d", 0, 1.0, {})]).drop_columns(["reward_extra"])
    assert validation_metrics(plain) == {"val-core/d/reward/mean@1": 1.0}
    assert validation_metrics(plain.slice(0, 0)) == {}
