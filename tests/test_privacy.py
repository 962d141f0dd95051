"""A run over real cases: executed notebooks, reports and log lines hold no note and no identifier unless that is allowed; keys never reach a file."""
import json, os, shutil, subprocess, sys
from pathlib import Path

import httpx, nbformat, pytest

from mint_nb.core import InputError, read_json
from mint_nb.params import resolve_params
from mint_nb.runs import Run, open_params
from mint_nb.ontology import load_ontology
from mint_nb.patients import simulate_cohort
from mint_nb.readers import load_cases
from mint_nb.privacy import check_page, check_shown, leak, outputs, run_secrets, secrets_of
from mint_nb.endpoint import EndpointClient, server_said

BIN = Path(sys.executable).parent
KEY = 'sk-live-4f9a77d2c1'


@pytest.fixture(scope='module')
def hospital(tmp_path_factory) -> Path:
    "Notes as a hospital would give them: identifiers of its own, and sentences that stand nowhere else."
    cases, _ = simulate_cohort(load_ontology(), resolve_params('smoke').cohort)
    file = tmp_path_factory.mktemp('hospital')/'wards.jsonl'
    rows = ({'id': f'MRN-{70000 + 37*i}', 'note': f'Seen by Dr. Okonkwo on the {i % 28 + 1}th: {c.note} The grandmother keeps bees near the river.', 'sex': c.sex, 'age': c.age, 'group': f'FAM-{c.group[-4:]}',
             'disease_id': c.labels['disease'], 'disease': c.labels['disease_name']} for i, c in enumerate(cases))
    file.write_text('\n'.join(map(json.dumps, rows)))
    return file


@pytest.fixture(scope='module')
def real_run(hospital, tmp_path_factory):
    "A finished run over them through the command, with a key in the environment, and what it printed."
    out = tmp_path_factory.mktemp('real')/'r'
    command = [str(BIN/'mint-nb'), 'run', '--profile', 'smoke', '--cases', str(hospital), '--methods', 'chance,naive_bayes', '--out', str(out), '--set', 'cohort.min_groups=2', '--set', 'cohort.min_cases=3']
    env = {k: v for k, v in os.environ.items() if k != 'MINT_QUIET'} | {'OPENAI_API_KEY': KEY}      # with bars and all
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    return Run(out, open_params(out)), done.stdout + done.stderr


def test_the_scan_finds_what_is_there(hospital):
    "Every single case is recognised by its id and by any third of its note."
    cases, _ = load_cases(hospital, load_ontology())
    secrets = secrets_of(cases)
    for c in cases:
        words = c.note.split()
        assert leak(f'rank 1 of {c.id}', secrets) and leak(f'<td>{c.group}</td>', secrets)
        assert leak(' '.join(words[len(words)//3:2*len(words)//3 + 6]).upper(), secrets) == 'a piece of a note'
    assert leak('Of 16 patients, MINT names the true answer first in 12.5 (3.1 to 31.2) per cent. OMIM:105830 Angelman syndrome.', secrets) is None


def test_nothing_of_a_patient_is_shown(real_run):
    run, printed = real_run
    assert check_shown(run) > 10                                      # texts that were looked at
    secrets = run_secrets(run)
    assert len(secrets.ids) > 20 and len(secrets.pieces) > 200
    assert leak(printed, secrets) is None and leak((run/'manifest.jsonl').read_text(), secrets) is None
    for copy in (run/'notebooks').glob('*.ipynb'):
        assert 'bees' not in copy.read_text() and 'MRN-' not in copy.read_text(), copy.name
    page = (run/'analysis/report.html').read_text()
    assert 'bees' not in page and 'MRN-' not in page and '--show-cases' in page and 'class="portrait"' not in page
    card = nbformat.read(run/'notebooks/19_cohort.ipynb', 4)
    assert any('real cases are not shown' in text for _, text in outputs(card))


def test_no_key_in_any_file(real_run):
    run, printed = real_run
    assert KEY not in printed
    for f in (p for p in run.path.rglob('*') if p.is_file()): assert KEY.encode() not in f.read_bytes(), f


def test_allowed_cases_are_shown_and_forbidden_ones_refused(real_run, tmp_path):
    "With --show-cases the report has its worked cases; without it again, what shows them must go."
    from mint_nb.analysis import analysis
    run = Run(shutil.copytree(real_run[0].path, tmp_path/'r'), real_run[0].params.model_copy(update={'show_cases': True}))
    analysis(run)
    page = (run/'analysis/report.html').read_text()
    assert 'MRN-' in page and 'bees' in page and check_shown(run) == 0
    forbidden = Run(run.path, real_run[0].params)
    with pytest.raises(InputError, match='report.html: shows an identifier of a real case') as e: check_shown(forbidden)
    assert 'MRN-' not in str(e.value) and 'bees' not in str(e.value)
    with pytest.raises(InputError, match='shows'): check_page(forbidden, page, 'report.html')
    nb = nbformat.read(run/'notebooks/69_analysis.ipynb', 4)
    case = run.cases()[0]
    (run/'analysis/report.html').unlink()
    next(c for c in nb.cells if c.cell_type == 'code')['outputs'] = [nbformat.v4.new_output('error', ename='ValueError', evalue='x', traceback=[f'KeyError: {case.id}'])]
    nbformat.write(nb, run/'notebooks/69_analysis.ipynb')
    with pytest.raises(InputError, match='69_analysis.ipynb, field output of cell'): check_shown(forbidden)


def test_simulated_cases_may_be_shown(smoke_run): assert check_shown(smoke_run) == 0 and 'SIM-' in (smoke_run/'analysis/report.html').read_text()


def test_a_note_in_the_wrong_column_is_not_copied_into_a_message(tmp_path):
    note = 'Seen by Dr. Okonkwo on the third: a girl with seizures. The grandmother keeps bees near the river. '*3
    for record in ({'id': 'P1', 'note': 'x', 'age': note}, {'id': 'P1', 'note': 'x', 'phenotypes': [note]}, {'id': 'P1', 'note': 'x', 'phenotypes': note}, {'id': 'P1', 'subject': {'timeAtLastEncounter': {'age': note}}, 'phenotypicFeatures': [{'type': {'id': 'HP:0001250'}}]}):
        (tmp_path/'n.jsonl').write_text(json.dumps(record))
        _, problems = load_cases(tmp_path/'n.jsonl', load_ontology())
        for p in problems: assert 'bees' not in str(p) and 'P1' in str(p)


@pytest.mark.parametrize('key', [KEY, 'hf_AbCdEf0123456789', '0123456789abcdef0123456789abcdef', 'a b', ''])
def test_a_key_in_place_of_its_variable_is_refused(key):
    with pytest.raises(InputError, match='field endpoint.key') as e: resolve_params('smoke', {'endpoint.key': key})
    assert not key or key not in str(e.value)


def test_a_server_that_repeats_the_request(tmp_path):
    "Its message would carry the note into the log."
    note = 'Seen by Dr. Okonkwo: a girl with seizures. The grandmother keeps bees near the river.'
    request = httpx.Request('POST', 'http://localhost/v1/chat/completions', json={'messages': [{'role': 'user', 'content': note}]})
    for said in (f'cannot parse: {note}', {'messages': [{'role': 'user', 'content': note}]}):
        text = server_said(httpx.Response(400, json={'error': {'message': said}}, request=request))
        assert 'bees' not in text and 'repeats the request' in text
    assert server_said(httpx.Response(400, json={'error': {'message': 'the context is too long'}}, request=request)) == 'the context is too long'


def test_the_key_of_a_client_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setenv('MY_OWN_KEY', KEY)
    params = resolve_params('smoke', {'endpoint.url': 'http://localhost:9/v1', 'endpoint.model': 'm', 'endpoint.key': 'MY_OWN_KEY'})
    client = EndpointClient(params.endpoint, tmp_path)
    assert KEY not in params.model_dump_json() and KEY not in repr(client)
    file = client.cache.put(client.url, {'model': 'm'}, {'text': 'x'})
    assert KEY not in file.read_text() and KEY not in str(read_json(file))
