"Contracts of the metrics that are not worth a reader's time in the notebook."
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st

from mint_nb.core import InputError
from mint_nb.tasks import Case, Catalogue, ChanceRanker, make_rankings
from mint_nb.metrics import (
    METRICS, agreement, brier, conf_ece, cw_ece, grouped_bootstrap, listed_answers, nll, paired_differences,
    score_cases, score_ids, score_reference, summarise, teacher_ends)

CAT = Catalogue({f'OMIM:{i}': f'disease number {i}' for i in range(100000, 100012)})
CASES = [Case(f'P{i}', labels={'disease': CAT.ids[i % 12]}, group=f'PMID:{i//2}') for i in range(40)]


def per_case(seed, top=5): return score_cases(ChanceRanker(CAT, seed).rank(CASES, top), CASES, CAT, 'disease')


@given(st.lists(st.sampled_from(CAT.ids + [None]), max_size=12), st.sampled_from(CAT.ids))
def test_scores_are_shares_and_ordered(ids, truth):
    s = score_ids(ids, truth, CAT)
    assert all(0 <= s[m] <= 1 for m in s if m != 'listed') and s['listed'] == len(ids)
    assert s['top1'] <= s['top5'] <= s['top10'] and s['top1'] <= s['mrr'] <= max(s['top10'], 1/11) and s['hfa_all'] <= s['hfa']


@given(st.lists(st.sampled_from(CAT.ids + [None]), max_size=8), st.floats(.1, 2))
def test_car_lies_between_its_parts(ids, lam):
    s = agreement(ids, set(CAT.ids[:4]), set(CAT.ids[8:]), lam)
    assert min(s['coverage'], s['avoidance']) - 1e-9 <= s['car'] <= max(s['coverage'], s['avoidance']) + 1e-9


@settings(deadline=None)
@given(st.lists(st.text(max_size=30), max_size=6))
def test_string_rule_survives_any_text(written):
    s = score_reference(written, 'disease number 100000', tuple(CAT.names.values()))
    assert s['top1'] <= s['top5'] <= s['top10'] <= s['hfa']


def test_chance_teacher_agrees_with_itself_and_with_no_other():
    teacher = ChanceRanker(CAT, 1).rank(CASES, top=3, bottom=3)
    mine = score_cases(ChanceRanker(CAT, 1).rank(CASES, 3), CASES, CAT, 'disease', teacher, k=3, q=3)
    assert (mine[mine.metric.isin(['coverage', 'avoidance', 'car'])].value == 1).all()
    other = score_cases(ChanceRanker(CAT, 2).rank(CASES, 3), CASES, CAT, 'disease', teacher, k=3, q=3)
    assert abs(other[other.metric == 'coverage'].value.mean() - .25) < .12


def test_candidates_shorten_the_teachers_ranking():
    few = [Case('P0', labels={'disease': CAT.ids[0]}, candidates=tuple(CAT.ids[:4]))]
    t = make_rankings([dict(case_id='P0', rank=i + 1, answer_id=CAT.ids[i], written='') for i in range(4)])
    assert teacher_ends(t, few, CAT, 1, 1) == {'P0': ({CAT.ids[0]}, {CAT.ids[3]})}
    with pytest.raises(InputError, match='record P0'): teacher_ends(t, [Case('P0')], CAT, 1, 1)


def test_head_and_tail_table_is_not_taken_for_a_long_answer():
    assert len(listed_answers(ChanceRanker(CAT).rank(CASES, top=3, bottom=3))['P0'][0]) == 3
    assert listed_answers(ChanceRanker(CAT).rank([], top=3)) == {}


def test_nobody_answered():
    t = summarise(score_cases(make_rankings([]), CASES, CAT, 'disease'), 100).set_index('metric')
    assert (t.value == 0).all() and (t.n == 40).all() and (t.groups == 20).all()


def test_summary_columns_and_reproducible():
    a, b = summarise(per_case(0), 200, seed=3), summarise(per_case(0), 200, seed=3)
    assert list(a) == ['metric', 'value', 'lo', 'hi', 'n', 'groups'] and a.equals(b) and set(a.metric) <= set(METRICS)
    assert ((a.lo <= a.value + 1e-12) & (a.value <= a.hi + 1e-12)).all()


def test_several_seeds_give_one_interval():
    one = summarise(per_case(0), 1000).set_index('metric').loc['top5']
    many = summarise(pd.concat([per_case(s).assign(seed=s) for s in range(3)]), 1000).set_index('metric').loc['top5']
    assert many.n == one.n == 40 and many.groups == 20 and 0 <= many.lo < many.value < many.hi <= 1


def test_bootstrap_covers_the_truth():
    "About 95 in 100 intervals hold the mean they estimate, with grouped data."
    rng, hits = np.random.default_rng(0), 0
    for i in range(200):
        family = np.repeat(rng.random(60) < .4, 3)
        _, lo, hi = grouped_bootstrap(family, np.repeat(np.arange(60), 3), 500, seed=i)
        hits += lo <= .4 <= hi
    assert .89 <= hits/200 <= .99


def test_pairing_is_tighter_than_comparing_intervals():
    rng = np.random.default_rng(0)
    hard = rng.random(200)
    frame = lambda v: pd.DataFrame({'case_id': [f'P{i}' for i in range(200)], 'group': [f'G{i}' for i in range(200)], 'metric': 'top1', 'value': v})
    a, b = frame((hard < .55).astype(float)), frame((hard < .5).astype(float))
    d, s = paired_differences(a, b, 1000).iloc[0], summarise(a, 1000).iloc[0]
    assert d.lo > 0 and (d.hi - d.lo) < (s.hi - s.lo)


def test_clear_errors():
    with pytest.raises(InputError, match='scored twice'): summarise(pd.concat([per_case(0), per_case(1)]), 100)
    with pytest.raises(InputError, match='record P3'): paired_differences(per_case(0), per_case(1).query('case_id != "P3"'), 100)
    for f in (conf_ece, cw_ece, brier, nll):
        with pytest.raises(InputError, match='distribution'): f([[.5, .6]], [0])
        with pytest.raises(InputError, match='one row per case'): f([[.5, .5]], [0, 1])


def test_honest_probabilities_score_best():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(4), 20_000)
    y = (p.cumsum(1) > rng.random((20_000, 1))).argmax(1)
    sharper = p**3/(p**3).sum(1, keepdims=True)
    assert conf_ece(p, y) < .02 < conf_ece(sharper, y) and cw_ece(p, y) < .02 < cw_ece(sharper, y)
    assert brier(p, y) < brier(sharper, y) and nll(p, y) < nll(sharper, y)
