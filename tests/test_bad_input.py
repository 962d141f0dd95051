"""Each kind of bad input that the documentation names gives one clear error through the command: file, record, field."""
import json, subprocess, sys, textwrap

import pytest
from typer.testing import CliRunner

from mint_nb.core import InputError
from mint_nb.tasks import Case, list_sizes
from mint_nb.ontology import load_ontology
from mint_nb.splits import check_splits
from mint_nb.readers import load_cases
from mint_nb.cli import app

SEIZURE, FACE = 'HP:0001250', 'HP:0000154'


@pytest.fixture(scope='module')
def ontology(): return load_ontology()


def packet(id='P1', terms=(SEIZURE, FACE), disease='OMIM:105830', pmid='PMID:1') -> dict:
    return {'id': id, 'subject': {'id': id, 'sex': 'MALE'}, 'phenotypicFeatures': [{'type': {'id': t}} for t in terms],
            'interpretations': [{'diagnosis': {'disease': {'id': disease, 'label': 'A disease'}}}], 'metaData': {'externalReferences': [{'id': pmid}]}}


def run(tmp_path, *args):
    return CliRunner().invoke(app, ['run', '--profile', 'smoke', '--methods', 'chance', '--out', str(tmp_path/'r'), '--until', '19_cohort', *map(str, args)])


@pytest.mark.parametrize('content,expected', [
    ('{"id": "P1", ', ['cases.json', 'JSON']),
    (json.dumps(packet(terms=())), ['cases.json', 'P1', 'phenotypicFeatures']),
    (json.dumps(packet()), ['no disease has'])],
    ids=['broken JSON', 'no phenotypes', 'empty cohort'])
def test_unusable_cohorts_through_the_command(tmp_path, content, expected):
    (tmp_path/'cases.json').write_text(content)
    result = run(tmp_path, '--cases', tmp_path/'cases.json')
    assert result.exit_code == 2, result.output
    for part in expected: assert part in result.stderr
    assert 'Traceback' not in result.stderr


def test_unknown_term(tmp_path, ontology):
    "Named with file, record and field; a cohort goes on without the term and lists it."
    (tmp_path/'cases.json').write_text(json.dumps(packet(terms=(SEIZURE, 'HP:9999999'))))
    with pytest.raises(InputError, match='cases.json.*P1.*phenotypicFeatures.*HP:9999999'): load_cases(tmp_path/'cases.json', ontology, on_error='raise')
    cases, problems = load_cases(tmp_path/'cases.json', ontology, on_error='list')
    assert cases[0].findings() == [SEIZURE] and 'HP:9999999' in str(problems[0])


def test_obsolete_term_is_mapped_with_a_warning(tmp_path, ontology):
    old = next(t for t in ('HP:0001388', 'HP:0004334', 'HP:0000057', 'HP:0001119', 'HP:0000368') if ontology.resolve(t)[1] == 'obsolete' and ontology.resolve(t)[0])
    (tmp_path/'cases.json').write_text(json.dumps(packet(terms=(SEIZURE, old))))
    cases, problems = load_cases(tmp_path/'cases.json', ontology, on_error='list')
    assert ontology.resolve(old)[0] in cases[0].findings() and any(old in str(p) for p in problems)


def test_disease_outside_the_catalogue(tmp_path, ontology):
    "A new patient whose disease the run does not know is answered all the same; a label outside the catalogue counts as a miss."
    from mint_nb.metrics import score_cases
    from mint_nb.tasks import Catalogue, ChanceRanker
    catalogue = Catalogue({f'OMIM:{i}': f'Disease {i}' for i in range(4)})
    case = Case('P1', labels={'disease': 'OMIM:999999'}, group='PMID:1')
    scores = score_cases(ChanceRanker(catalogue).rank([case], top=4), [case], catalogue, 'disease', k=1, q=1)
    assert scores[scores.metric == 'top10'].value.tolist() == [0.0]


def test_group_on_both_sides():
    with pytest.raises(InputError, match='record PMID:1, field group'):
        check_splits([Case('P1', group='PMID:1', split='train'), Case('P2', group='PMID:1', split='test')])


def test_lists_too_long_for_the_catalogue():
    with pytest.raises(InputError, match='k \\+ q = 20 exceeds two thirds of the 24 answers'): list_sizes(24, 10, 10, strict=True)


def test_unknown_parameter(tmp_path):
    result = run(tmp_path, '--set', 'cohort.patients=5')
    assert result.exit_code == 2 and 'smoke.yaml, field cohort.patients' in result.stderr


def test_full_disk(tmp_path):
    "A limit on the size of a file is as hard as a full disk: the error names the file, and no half file is left."
    script = textwrap.dedent(f"""
        import resource
        from mint_nb.cohort import make_cohort
        from mint_nb.core import InputError
        from mint_nb.runs import open_run
        run = open_run({str(tmp_path/'r')!r}, 'smoke')
        resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))
        try: make_cohort(run)
        except InputError as e: print(e)
    """)
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
    assert 'cannot be written: File too large' in done.stdout and str(tmp_path/'r') in done.stdout, done.stdout + done.stderr
    assert not list((tmp_path/'r').rglob('*.tmp'))
