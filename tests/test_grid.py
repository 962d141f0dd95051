"""Grids: cells share what they can, failures are retried and reported, a killed worker costs an attempt, and every engine ends with the same table."""
import importlib.util, json, os, shutil, signal, subprocess, sys, time
from collections import Counter
from pathlib import Path

import pandas as pd, psutil, pytest, yaml

from mint_nb.core import InputError, read_table
from mint_nb.grid import Local, OnSlurm, engine_for, grid_wide, job_of, read_grid, run_grid

SMALL = {'profile': 'smoke', 'overrides': {'cohort.train': 16, 'cohort.test': 8}, 'methods': ['linear', 'mint'], 'seeds': [0], 'vary': {'train.beta': [.1, .5]}, 'retries': 1}
needs = lambda package: pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f'{package} is not installed (extra grid)')
columns = ['method', 'seed', 'train.beta', 'metric', 'value', 'lo', 'hi', 'n', 'groups']


@pytest.fixture(scope='module')
def here(tmp_path_factory):
    "The small grid, run in this process."
    root = tmp_path_factory.mktemp('grid')/'here'
    table, ended = run_grid(SMALL, root, 'here')
    return root, table, ended


def same(table, here):
    pd.testing.assert_frame_equal(table[columns], here[1][columns])


def attempts(root: Path) -> list[dict]: return [json.loads(l) for l in (root/'attempts.jsonl').read_text().splitlines()]


LEFT = ['train.beta_0.5: align/mint-0', 'train.beta_0.5: predict/mint-0']

def one_cell_left(here, root: Path) -> Path:
    "A copy of the small grid in which one cell, a training and its predictions, is still to do."
    shutil.copytree(here[0], root, symlinks=True)
    shutil.rmtree(root/'train.beta_0.5')
    (root/'attempts.jsonl').unlink()
    return root


def test_shared_stages_run_once(here):
    root, table, ended = here
    assert Counter(j.stage for j in ended) == {'cohort': 1, 'upstream': 1, 'preferences': 1, 'align': 2, 'predict': 3} and all(e.state == 'done' for e in ended.values())
    assert Counter(l['job'].split(': ')[1].split('/')[0] for l in attempts(root)) == {'cohort': 1, 'upstream': 1, 'preferences': 1, 'align': 2, 'predict': 3}
    lines = [json.loads(l) | {'folder': f.parent.name} for f in root.glob('*/manifest.jsonl') for l in f.read_text().splitlines()]
    times = {(l['stage'], l['time'], l['seconds']) for l in lines if l['stage'] in ('cohort', 'upstream/0', 'preferences/mint-0')}
    assert len(times) == 3 and len({l['folder'] for l in lines}) == 3, 'a folder made a shared stage again'
    assert len(list(root.glob('*/cases/cases.parquet'))) == 3


def test_the_table_has_every_cell(here):
    root, table, _ = here
    assert set(zip(table.method, table['train.beta'])) == {(m, b) for m in ('linear', 'mint') for b in (.1, .5)} and (table.state == 'done').all()
    wide = grid_wide(table)
    assert len(wide) == 4 and 'missing' not in wide and wide[wide.method == 'linear'].top1.nunique() == 1
    pd.testing.assert_frame_equal(read_table(root/'table.parquet'), table)


def test_a_failing_cell_is_tried_again_reported_and_stops_nothing(tmp_path):
    "A student whose weights are cut off: the error is that of the file format, so it is no matter of a wrong parameter."
    from mint_nb.students import load_student
    broken = tmp_path/'broken'
    s = load_student('tiny'); s.model.save_pretrained(broken); s.tokenizer.save_pretrained(broken)
    (broken/'model.safetensors').write_bytes((broken/'model.safetensors').read_bytes()[:1000])
    grid = {**SMALL, 'methods': ['chance', 'base'], 'vary': {'student.model': [str(broken), 'tiny']}}
    said = []
    table, ended = run_grid(grid, tmp_path/'grid', 'here', say=said.append)
    lost = [(j, e) for j, e in ended.items() if e.state != 'done']
    assert len(lost) == 1 and lost[0][0].what == 'base' and lost[0][1].attempts == 2 and 'SafetensorError' in lost[0][1].error
    assert any('failed' in l and 'after 2 attempts' in l for l in said)
    row = table[(table.method == 'base') & (table['student.model'] == str(broken))]
    assert row.state.tolist() == ['failed'] and row.value.isna().all() and table[table.state == 'done'].groupby(['method', 'student.model']).ngroups == 3
    assert grid_wide(table).missing.str.contains('failed').sum() == 1
    # mended, the same command does what was missing and nothing else
    before = len(attempts(tmp_path/'grid'))
    s.model.save_pretrained(broken)
    table, ended = run_grid(grid, tmp_path/'grid', 'here', say=said.append)
    assert all(e.state == 'done' for e in ended.values()) and len(attempts(tmp_path/'grid')) == before + 1


def test_what_needs_a_failed_job_is_not_run(tmp_path):
    table, ended = run_grid({**SMALL, 'methods': ['chance', 'sft'], 'vary': {'teacher.weights': ['/nowhere']}, 'retries': 0}, tmp_path/'g', 'here', say=lambda l: None)
    states = {j.stage: e.state for j, e in ended.items()}
    assert states == {'cohort': 'done', 'upstream': 'failed', 'preferences': 'not run', 'align': 'not run', 'predict': 'not run'}
    assert table.error.str.contains('needs').all() and table.value.isna().all()


def test_local_processes_give_the_same_table(here, tmp_path):
    root = one_cell_left(here, tmp_path/'g')
    table, ended = run_grid(SMALL, root, 'local', workers=2, say=lambda l: None)
    assert all(e.state == 'done' for e in ended.values())
    assert [l['job'] for l in attempts(root)] == LEFT
    same(table, here)


def test_a_killed_process_is_tried_again(tmp_path):
    job, engine = job_of('cohort', {}), Local(read_grid(SMALL), 1)
    (tmp_path/'base').mkdir()
    handle = engine.submit(tmp_path/'base', job)
    handle[0].kill(); handle[0].wait()
    assert engine.ended(handle) == (True, 'killed by signal 9')


START = '''
import sys, yaml
from mint_nb.grid import run_grid
table, ended = run_grid(sys.argv[1], sys.argv[2], 'ray', workers=1)
'''

@needs('ray')
def test_a_ray_worker_killed_in_the_middle_loses_nothing(here, tmp_path):
    "kill -9 the worker while it trains: the job is tried again, everything is there, and the table is that of an undisturbed grid."
    root = one_cell_left(here, tmp_path/'g')
    (tmp_path/'grid.yaml').write_text(yaml.safe_dump(SMALL)); (tmp_path/'go.py').write_text(START)
    driver = subprocess.Popen([sys.executable, str(tmp_path/'go.py'), str(tmp_path/'grid.yaml'), str(root)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              env={**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)})
    limit, killed = time.time() + 1800, None
    while killed is None and driver.poll() is None and time.time() < limit:
        if any(root.glob('*/.locks/align_mint-0.lock')):                    # a training has begun
            workers = [p for p in psutil.Process(driver.pid).children(recursive=True) if is_busy(p)]
            if workers: killed = workers[0].pid; os.kill(killed, signal.SIGKILL)
        time.sleep(.02)
    out, _ = driver.communicate(timeout=1800)
    assert killed and driver.returncode == 0, out
    log = attempts(root)
    assert [l for l in log if l['state'] == 'failed' and 'worker was lost' in l['error']], log
    table = read_table(root/'table.parquet')
    assert (table.state == 'done').all()
    same(table, here)


def is_busy(p: psutil.Process) -> bool:
    "A Ray worker that trains; Ray names its process after the task."
    try: return 'ray::' in ' '.join(p.cmdline()) and 'align/mint-0' in ' '.join(p.cmdline())
    except psutil.Error: return False


@needs('submitit')
def test_submitit_gives_the_same_table(here, tmp_path):
    root = one_cell_left(here, tmp_path/'g')
    table, ended = run_grid({**SMALL, 'slurm': {'cluster': 'local', 'timeout_min': 30}}, root, 'slurm', workers=1, say=lambda l: None)
    assert [l['job'] for l in attempts(root)] == LEFT and all(e.state == 'done' for e in ended.values())
    same(table, here)


@needs('submitit')
def test_slurm_says_what_is_wrong(tmp_path):
    if not shutil.which('srun'):
        with pytest.raises(InputError, match='there is no Slurm here'): OnSlurm(read_grid(SMALL), tmp_path)
    with pytest.raises(InputError, match='submitit refuses'): OnSlurm(read_grid({**SMALL, 'slurm': {'cluster': 'local', 'timeout': 3}}), tmp_path)


@pytest.mark.parametrize('on,package', [('ray', 'ray'), ('slurm', 'submitit')])
def test_a_missing_engine_says_how_to_install_it(on, package, tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr('mint_nb.grid.find_spec', lambda name: None if name == package else real(name))
    with pytest.raises(InputError, match=r'mint_nb\[grid\]'): engine_for(on, read_grid(SMALL), tmp_path)


def test_the_command(tmp_path, here):
    from typer.testing import CliRunner
    from mint_nb.cli import app
    (tmp_path/'grid.yaml').write_text(yaml.safe_dump(SMALL))
    out = CliRunner().invoke(app, ['grid', str(tmp_path/'grid.yaml'), '--on', 'here', '--out', str(here[0])])
    assert out.exit_code == 0 and 'done before' in out.output and 'table.parquet' in out.output and 'top1' in out.output, out.output
    (tmp_path/'bad.yaml').write_text(yaml.safe_dump({**SMALL, 'vary': {'pairs.z': [1]}}))
    out = CliRunner().invoke(app, ['grid', str(tmp_path/'bad.yaml')])
    assert out.exit_code == 2 and 'pairs.z' in out.output
    (tmp_path/'lost.yaml').write_text(yaml.safe_dump({**SMALL, 'methods': ['chance'], 'vary': {'teacher.weights': ['/nowhere']}, 'retries': 0}))
    out = CliRunner().invoke(app, ['grid', str(tmp_path/'lost.yaml'), '--on', 'here', '--out', str(tmp_path/'lost')])
    assert out.exit_code == 1 and '1 of 3 jobs failed' in out.output, out.output
