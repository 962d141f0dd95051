"""The study's machinery: pieces run in worker processes, are written as they finish, and go on after a kill."""

import pytest

from mint_nb.core import read_json, read_table
from mint_nb.study import Piece, comparisons, pieces, run_piece, study_cases, study_general, write_piece

DEMO = Piece('demo', 'simulated', '', 0, ('chance', 'linear', 'base', 'sft', 'mint'), {}, {'q = 1': {'pairs.q': 1}})


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp('study')
    runs = run_piece(DEMO, root/'runs', profile='smoke')
    write_piece(DEMO, runs, root/'out')
    return root, runs


def test_a_piece_holds_every_row_and_no_identifier(finished):
    root, runs = finished
    t = read_table(root/'out/demo.parquet')
    assert set(zip(t.condition, t.method)) == {('', m) for m in DEMO.methods} | {('q = 1', 'mint')}
    assert 'case_id' not in t and t.case.dtype == t.group.dtype == 'int64' and (t.groupby(['condition', 'method']).case.nunique() == 16).all()
    facts = read_json(root/'out/demo.json')
    assert facts['seconds'] > 0 and facts['versions']['torch'] and str(root) not in (root/'out/demo.json').read_text()


def test_tables_come_from_the_written_files(finished):
    root, _ = finished
    scores = study_cases(root/'out')
    assert comparisons(scores, 'simulated').b.tolist() == ['sft', 'linear']
    assert set(study_general(root/'out').method) == {'base', 'sft', 'mint'}


def test_a_second_run_does_nothing_again(finished):
    root, runs = finished
    before = {name: len(r.manifest) for name, r in runs.items()}
    again = run_piece(DEMO, root/'runs', profile='smoke')
    assert {name: len(r.manifest) for name, r in again.items()} == before


def test_students_share_the_frozen_depth_and_variations_the_teacher(finished):
    root, runs = finished
    assert (runs['q = 1']/'upstream').resolve() == (runs['']/'upstream').resolve()
    assert runs['q = 1'].params.pairs.q == 1 and runs[''].params.pairs.q == 2


def test_pieces_stay_below_the_planned_size():
    for p in pieces():
        assert len(p.name) < 40 and p.seed in (0, 1, 2) and (p.cohort == 'simulated' or 'naive_bayes_clean' in p.methods)
