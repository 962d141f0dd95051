"""data/examples: what the README's commands run on."""
import json
import subprocess
import sys

import pytest
from conftest import ROOT

from mint_nb.ontology import load_ontology
from mint_nb.readers import load_cases
from mint_nb.tiles import load_tiles

EXAMPLES = ROOT/'data/examples'


def test_the_examples_are_what_their_tool_writes(tmp_path):
    subprocess.run([sys.executable, str(ROOT/'tools/examples.py'), str(tmp_path)], check=True, capture_output=True)
    names = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob('*') if p.is_file())
    assert names == sorted(p.relative_to(EXAMPLES) for p in EXAMPLES.rglob('*') if p.is_file())
    for n in names: assert (tmp_path/n).read_bytes() == (EXAMPLES/n).read_bytes(), n


@pytest.mark.parametrize('source, findings', [('phenopackets', True), ('notes.jsonl', False)])
def test_patients_are_read_without_a_problem_and_are_marked(source, findings):
    cases, problems = load_cases(EXAMPLES/source, load_ontology())
    assert len(cases) == 2 and not problems
    assert all(c.id.startswith('simulated-') and c.labels['disease'].startswith('OMIM:') for c in cases)
    assert all(bool(c.phenotypes) == findings for c in cases)
    assert all('imulated' in p.read_text() for p in EXAMPLES.rglob('*.json*'))


def test_excluded_findings_stay_excluded():
    cases, _ = load_cases(EXAMPLES/'phenopackets', load_ontology())
    packets = [json.loads(p.read_text()) for p in sorted((EXAMPLES/'phenopackets').glob('*.json'))]
    said = {p['id']: {f['type']['id'] for f in p['phenotypicFeatures'] if f.get('excluded')} for p in packets}
    assert {c.id: {f.id for f in c.phenotypes if f.excluded} for c in cases} == said and any(said.values())


def test_tiles_are_read_without_a_problem():
    tiles = load_tiles(EXAMPLES/'tiles')
    assert len(tiles.cases) == 2 and not tiles.problems
    assert {c.labels['tissue'] for c in tiles.cases} == {'Adrenal_gland', 'Kidney'}


@pytest.mark.parametrize('source', ['phenopackets', 'notes.jsonl'])
def test_a_run_answers_for_the_examples(source, smoke_run, tmp_path):
    from typer.testing import CliRunner
    from mint_nb.cli import app
    done = CliRunner().invoke(app, ['predict', '--run', str(smoke_run.path), '--cases', str(EXAMPLES/source), '--out', str(tmp_path)])
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in (tmp_path/'predictions.jsonl').read_text().splitlines()]
    assert [r['case_id'][:10] for r in rows] == ['simulated-']*2 and all(r['answers'] is not None for r in rows)
