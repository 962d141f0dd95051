"""The command: what it prints, where it writes, its exit codes."""
import json, re, shutil, subprocess, sys
from pathlib import Path

import pandas as pd, pytest
from typer.testing import CliRunner

from conftest import SMOKE_METHODS
from mint_nb.tasks import read_cases
from mint_nb.runs import open_params
from mint_nb.cli import app

BIN = Path(sys.executable).parent
call = lambda *args: CliRunner().invoke(app, [str(a) for a in args])


def packet(id: str, terms: list[str], **more) -> dict:
    "A phenopacket with a diagnosis that must not be read."
    return {'id': id, 'subject': {'id': id, 'sex': 'FEMALE', 'timeAtLastEncounter': {'age': {'iso8601duration': 'P4Y'}}},
            'phenotypicFeatures': [{'type': {'id': t}} for t in terms], 'metaData': {'externalReferences': [{'id': 'PMID:1'}]}, **more}


def test_help_is_complete_and_waits_for_no_model_library():
    done = subprocess.run([sys.executable, '-X', 'importtime', str(BIN/'mint-nb'), '--help'], capture_output=True, text=True)
    assert done.returncode == 0 and not re.search(r'\| +(torch|transformers|trl|sklearn|datasets)$', done.stderr, re.M)
    for name in ('run', 'status', 'predict', 'report', 'fetch', 'doctor'):
        assert name in done.stdout and call(name, '--help').exit_code == 0


def test_run_again_prints_the_table_and_the_report(smoke_run):
    result = call('run', '--profile', 'smoke', '--methods', ','.join(SMOKE_METHODS), '--out', smoke_run.path)
    assert result.exit_code == 0, result.output
    assert 'about' in result.stdout and '0 to do' in result.stdout
    assert '| top1 ' in result.stdout and 'research use only' in result.stdout.lower()
    page = Path(result.stdout.strip().splitlines()[-1].removeprefix('report: '))
    assert page.exists() and page.name == 'report.html'


def test_status_and_report(smoke_run):
    shown = call('status', smoke_run.path)
    assert shown.exit_code == 0 and '49_align-mint-0' in shown.stdout and ' missing' not in shown.stdout
    assert 'top1' in call('report', smoke_run.path).stdout


def test_results_to_commit(smoke_run, tmp_path):
    assert call('report', smoke_run.path, '--csv', tmp_path/'results.csv').exit_code == 0
    table = pd.read_csv(tmp_path/'results.csv', comment='#')
    assert list(table.columns) == ['method', 'seed', 'metric', 'value', 'lo', 'hi', 'n', 'groups'] and set(table.method) == set(SMOKE_METHODS)
    assert 'simulated' in (tmp_path/'results.csv').read_text().splitlines()[0]


def test_other_parameters_are_refused(smoke_run):
    result = call('run', '--profile', 'smoke', '--methods', ','.join(SMOKE_METHODS), '--out', smoke_run.path, '--set', 'pairs.k=1')
    assert result.exit_code == 2 and 'field pairs' in result.stderr and 'choose a new folder' in result.stderr


@pytest.mark.parametrize('args,message', [
    (['--set', 'train.learning_rate=1'], 'field train.learning_rate: extra inputs are not permitted'),
    (['--set', 'train.lr=quick'], 'field train.lr'),
    (['--set', 'train.lr'], 'is not of the form name=value'),
    (['--profile', 'huge'], 'no such profile'),
    (['--task', 'surgery'], 'field task'),
    (['--methods', 'chance,mnit'], 'record mnit, field method: there is no such method'),
    (['--seeds', 'one'], 'field --seeds'),
    (['--max-cases', '-3'], 'field --max-cases'),
    (['--cases', 'absent.zip'], 'file absent.zip, field --cases: does not exist')])
def test_bad_options_are_one_line_and_leave_nothing(tmp_path, args, message):
    args = args if '--profile' in args else ['--profile', 'smoke', *args]
    result = call('run', '--out', tmp_path/'r', *args)
    assert result.exit_code == 2 and message in result.stderr and result.stderr.count('\n') == 1, result.output
    assert not (tmp_path/'r/cases').exists()


def test_predict_lists_broken_inputs_and_answers_the_rest(smoke_run, tmp_path):
    cases = tmp_path/'cases'; cases.mkdir()
    (cases/'good.json').write_text(json.dumps(packet('N1', ['HP:0001250', 'HP:0001263'])))
    (cases/'empty.json').write_text(json.dumps(packet('N2', [])))
    (cases/'broken.json').write_text('{"id": "N3", ')
    result = call('predict', '--run', smoke_run.path, '--cases', cases, '--out', tmp_path/'out', '--method', 'mint')
    assert result.exit_code == 2, result.output
    assert 'broken.json' in result.stderr and 'empty.json' in result.stderr and 'good.json' not in result.stderr
    lines = (tmp_path/'out/predictions.tsv').read_text().splitlines()
    assert any(l.startswith('#') and 'HPO' in l.upper() for l in lines) and any('research use only' in l.lower() for l in lines)
    head, *rows = [l.split('\t') for l in lines if not l.startswith('#')]
    assert head == ['case_id', 'rank', 'disease_id', 'disease_name', 'score'] and {r[0] for r in rows} <= {'N1'}


def test_predict_never_reads_a_diagnosis(smoke_run, tmp_path):
    truth = {'interpretations': [{'diagnosis': {'disease': {'id': read_cases(smoke_run/'cases/cases.parquet')[0].labels['disease'], 'label': 'told'}}}]}
    for name, more in (('without', {}), ('with', truth)):
        (tmp_path/f'{name}.json').write_text(json.dumps(packet('N1', ['HP:0001250', 'HP:0000729'], **more)))
        result = call('predict', '--run', smoke_run.path, '--cases', tmp_path/f'{name}.json', '--out', tmp_path/name, '--method', 'linear')
        assert result.exit_code == 0, result.output
    rows = lambda name: [l for l in (tmp_path/name/'predictions.tsv').read_text().splitlines() if not l.startswith('#')]
    assert rows('without') == rows('with') and len(rows('with')) > 1


def test_predict_with_an_engine(smoke_run, tmp_path):
    (tmp_path/'c.json').write_text(json.dumps(packet('N1', ['HP:0001250', 'HP:0000729'])))
    ask = lambda *more: call('predict', '--run', smoke_run.path, '--cases', tmp_path/'c.json', '--out', tmp_path/'out', *more)
    result = ask('--engine', 'vllm')
    if result.exit_code: assert result.exit_code == 2 and 'pip install vllm on a CUDA machine' in result.stderr and result.stderr.count('\n') == 1, result.output
    result = ask('--engine', 'llama.cpp')
    assert result.exit_code == 2 and 'there are auto, vllm, transformers' in result.stderr and not (tmp_path/'out/predictions.tsv').exists()
    result = ask('--engine', 'auto', '--method', 'linear')
    assert result.exit_code == 2 and 'only a student can be served' in result.stderr
    result = ask('--engine', 'auto', '--method', 'mint_constrained')
    assert result.exit_code == 0 and result.stdout.startswith(('transformers: vllm is not installed', 'transformers: there is no CUDA', 'vllm: ')) and (tmp_path/'out/predictions.tsv').exists(), result.output


def test_predict_needs_a_finished_run(tmp_path):
    (tmp_path/'c.json').write_text(json.dumps(packet('N1', ['HP:0001250'])))
    result = call('predict', '--run', tmp_path, '--cases', tmp_path/'c.json', '--out', tmp_path/'out')
    assert result.exit_code == 2 and 'is not a run folder' in result.stderr


def test_doctor(smoke_run, tmp_path):
    facts = call('doctor')
    assert facts.exit_code == 0 and 'memory' in facts.stdout and 'torch' in facts.stdout
    rows = smoke_run/'preferences/mint-0/train.parquet'
    assert '0 errors' in call('doctor', rows).stdout
    bad = pd.read_parquet(rows)
    bad['chosen'] = [[{'role': 'assistant', 'content': ''}]]*len(bad)
    bad.to_parquet(tmp_path/'bad.parquet')
    result = call('doctor', tmp_path/'bad.parquet')
    assert result.exit_code == 2 and 'error' in result.stdout


def test_real_cases_through_the_command(data, tmp_path):
    cases = Path(shutil.copy(data/'phenopackets.zip', tmp_path))
    result = call('run', '--cases', cases, '--profile', 'laptop', '--out', tmp_path/'r', '--until', '19_cohort', '--max-cases', 90)
    assert result.exit_code == 0, result.output
    assert '19_cohort                          done' in call('status', tmp_path/'r').stdout
    with cases.open('ab') as f: f.write(b'changed')
    assert '19_cohort                          stale' in call('status', tmp_path/'r').stdout
    params, cases = open_params(tmp_path/'r'), read_cases(tmp_path/'r/cases/cases.parquet')
    assert params.cohort.diseases == 40 and 'naive_bayes_clean' in params.methods
    count = pd.Series([c.split for c in cases]).value_counts()
    assert count['train'] <= 60 and count['test'] <= 30
    assert pd.DataFrame([(c.group, c.split) for c in cases], columns=['group', 'split']).groupby('group').split.nunique().max() == 1
