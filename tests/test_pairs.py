"Contracts of the preference pairs that do not fit the notebook: properties over random rankings, and what TRL makes of the rows."
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st

from mint_nb.core import InputError
from mint_nb.tasks import Case, Catalogue, get_task, rankings_from_scores
from mint_nb.params import PairParams
from mint_nb.pairs import (
    apply_gold, case_orders, checks, cut_lists, first_difference, leaked_names, length_bias, make_pairs,
    pair_summary, refuse, shuffle_orders)

TASK = get_task('disease')


def clinic(n=10, N=24, seed=0):
    "n labelled cases, N answers, and a full ranking of each case."
    catalogue = Catalogue({f'OMIM:{100000 + i}': f'Syndrome number {i}' for i in range(N)})
    rng = np.random.default_rng(seed)
    cases = [Case(f'P{i}', note=f'A child of {i} years with finding {i}.', labels={'disease': catalogue.ids[rng.integers(N)]}, group=f'G{i//2}') for i in range(n)]
    return cases, catalogue, rankings_from_scores([c.id for c in cases], rng.normal(size=(n, N)), catalogue, top=N)


@given(st.integers(4, 60), st.integers(1, 10), st.integers(1, 4), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_lists_never_meet_and_keep_the_order(N, k, n_rejected, seed):
    order, k = list(range(N)), min(k, max(1, N//4))
    try: chosen, rejected = cut_lists(order, k, k, n_rejected, seed)
    except InputError: return
    assert chosen == order[:k] and rejected[0] == order[-k:] and len(rejected) == n_rejected
    for r in rejected: assert r == sorted(r) and not set(r) & set(chosen) and min(r) >= N//2
    assert len({tuple(r) for r in rejected}) == n_rejected


@given(st.permutations(range(8)), st.integers(0, 7), st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_gold_rules(order, truth, k):
    first = apply_gold(order, truth, k, 'first')
    assert first[0] == truth and sorted(first) == sorted(order) and [a for a in first if a != truth] == [a for a in order if a != truth]
    assert (apply_gold(order, truth, k, 'drop') is None) == (truth not in order[:k])
    assert apply_gold(order, truth, k, 'keep') == list(order)


def test_gold_first_takes_the_truth_out_of_the_rejected_list():
    cases, catalogue, rankings = clinic(40)
    rows = make_pairs(rankings, cases, catalogue, TASK, PairParams(gold='first'))
    assert pair_summary(rows)['chosen_misses_truth'] == pair_summary(rows)['rejected_has_truth'] == 0


def test_an_unlabelled_case_is_kept_by_every_rule():
    cases, catalogue, rankings = clinic(4)
    bare = [Case(c.id, note=c.note, group=c.group) for c in cases]
    for gold in ('keep', 'first', 'drop'):
        rows = make_pairs(rankings, bare, catalogue, TASK, PairParams(gold=gold))
        assert len(rows) == 4 and {r['chosen_has_truth'] for r in rows} == {None}
    assert pair_summary(rows)['chosen_misses_truth'] is None


def test_a_label_outside_the_catalogue_counts_as_unknown():
    cases, catalogue, rankings = clinic(2)
    strange = [Case(c.id, note=c.note, labels={'disease': 'OMIM:999999'}) for c in cases]
    assert len(make_pairs(rankings, strange, catalogue, TASK, PairParams(gold='first'))) == 2


def test_shuffle_is_a_derangement_and_seeded():
    cases, catalogue, rankings = clinic(30)
    orders = case_orders(rankings, cases, catalogue)
    one, two, other = shuffle_orders(orders, 1), shuffle_orders(orders, 1), shuffle_orders(orders, 2)
    assert one == two != other and all(one[i] != orders[i] for i in orders)
    with pytest.raises(InputError, match='one case cannot be shuffled'): shuffle_orders({'P0': ['a']}, 0)


def test_teacher_with_both_ends_only():
    cases, catalogue, rankings = clinic(6, N=60)
    ends = rankings[(rankings['rank'] <= 10) | (rankings['rank'] > 50)]
    full, cut = (make_pairs(r, cases, catalogue, TASK, PairParams(k=5, q=5)) for r in (rankings, ends))
    assert [(r['chosen_ids'], r['rejected_ids']) for r in full] == [(r['chosen_ids'], r['rejected_ids']) for r in cut]


@pytest.mark.parametrize('change, message', [
    (lambda r: r[r.case_id != 'P1'], 'record P1, field rankings: the teacher has not ranked this case'),
    (lambda r: r[r['rank'] < 20], 'the ranking stops at 19 of 24'),
    (lambda r: r.assign(answer_id=r.answer_id.where(r['rank'] > 1, None)), 'outside the catalogue'),
])
def test_bad_rankings_are_refused(change, message):
    cases, catalogue, rankings = clinic(3)
    with pytest.raises(InputError, match=message): make_pairs(change(rankings), cases, catalogue, TASK, PairParams())


def test_lists_too_long_are_shortened_or_refused():
    cases, catalogue, rankings = clinic(3, N=8)
    assert len(make_pairs(rankings, cases, catalogue, TASK, PairParams(k=10, q=10))[0]['chosen_ids']) == 2
    with pytest.raises(InputError, match='do not give 50 different lists'): make_pairs(rankings, cases, catalogue, TASK, PairParams(k=2, q=2, n_rejected=50))
    few = Catalogue({f'O{i}': f'Answer {i}' for i in range(3)})
    with pytest.raises(InputError, match='too small for lists'): make_pairs(rankings_from_scores(['P0'], np.ones((1, 3)), few), cases[:1], few, TASK, PairParams())


def test_checks_find_each_fault():
    cases, catalogue, rankings = clinic(10)
    rows = make_pairs(rankings, cases, catalogue, TASK, PairParams())
    assert not refuse(checks(rows))
    faults = {'the answer is empty': {'chosen': [{'role': 'assistant', 'content': ' '}]}, 'fewer complete lines': {'rejected': rows[0]['rejected'][:1] and [
        {'role': 'assistant', 'content': rows[0]['rejected'][0]['content'][:-1]}]}, 'in the chosen and the rejected': {'rejected': rows[0]['chosen'], 'rejected_ids': rows[0]['chosen_ids']}}
    for message, change in faults.items():
        with pytest.raises(InputError, match=message): refuse(checks([rows[0] | change] + rows[1:]))
    named = rows[0] | {'prompt': TASK.prompt(f"Known {catalogue.names[rows[0]['chosen_ids'][2]]}!", 5)}
    assert leaked_names(named) == [rows[0]['chosen_ids'][2]] and [p.severity for p in checks([named] + rows[1:])] == ['warning']


def test_short_symbols_are_no_leak():
    genes = Catalogue({f'HGNC:{i}': n for i, n in enumerate(('AR', 'CAT', 'SHH', 'KMT2D', 'FGFR3', 'NIPBL', 'NSD1', 'PTPN11'))})
    case = Case('P0', note='A boy with a cat scratch and reduced AR and KMT2D.', labels={'gene': 'HGNC:3'})
    rows = make_pairs(rankings_from_scores(['P0'], np.arange(8.)[None, ::-1], genes, top=8), [case], genes, get_task('gene'), PairParams(k=2, q=2))
    assert leaked_names(rows[0]) == []
    rows = make_pairs(rankings_from_scores(['P0'], np.array([[1, 2, 3, 9, 4, 5, 6, 7.]]), genes, top=8), [case], genes, get_task('gene'), PairParams(k=2, q=2))
    assert leaked_names(rows[0]) == ['HGNC:3']


def test_length_bias_and_first_difference():
    assert length_bias([5], [5]) == 0 and length_bias([6, 6], [5, 5]) == np.inf and length_bias([4, 6], [8, 10]) == -4
    assert first_difference([], [1]) == 0 and first_difference([1, 2], [1, 2]) == 2


def test_trl_takes_the_rows(tmp_path):
    "The Parquet file loads with `datasets`, is seen as conversational with an explicit prompt, and renders with a real chat template."
    from datasets import load_dataset
    from trl.data_utils import apply_chat_template, is_conversational, maybe_extract_prompt
    from mint_nb.students import load_student
    cases, catalogue, rankings = clinic(4)
    rows = make_pairs(rankings, cases, catalogue, TASK, PairParams())
    pd.DataFrame(rows).to_parquet(tmp_path/'train.parquet', index=False)
    data = load_dataset('parquet', data_files=str(tmp_path/'train.parquet'), split='train', cache_dir=str(tmp_path/'cache'))
    first = data[0]
    assert is_conversational(first) and maybe_extract_prompt(first)['prompt'] == first['prompt'] == rows[0]['prompt']
    student = load_student('tiny')
    text = apply_chat_template({k: first[k] for k in ('prompt', 'chosen', 'rejected')}, student.tokenizer)
    assert text['chosen'].startswith(rows[0]['chosen'][0]['content']) and student.tokenizer.eos_token in text['chosen']
    assert student.tokenizer(text['prompt'], add_special_tokens=False)['input_ids'] == student.prompt_ids(TASK, cases[0].note, PairParams().k)
    assert not [p for p in checks(rows, student.tokenizer, 200, 120) if p.severity == 'error']
