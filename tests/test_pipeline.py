"""The pipeline from end to end with the smoke profile: Python interface, command, plain papermill, Ctrl-C and resume."""
import re, shutil, signal, subprocess, sys, time
from pathlib import Path

import nbformat, pandas as pd, psutil, pytest, yaml
from click.testing import CliRunner
from papermill.cli import papermill as papermill_command
from papermill.engines import NBClientEngine, papermill_engines

from conftest import ROOT, SMOKE_METHODS
from mint_nb.core import read_table
from mint_nb.params import resolve_params
from mint_nb.runs import open_params
from mint_nb.recipes import RECIPES
from mint_nb.methods import METHODS
from mint_nb.kernels import kernels_of, warm_manager
from mint_nb.pipeline import NotebookFailed, Step, plan, run_group, run_pipeline, status

BIN = Path(sys.executable).parent
METRICS = ['top1', 'top5', 'top10', 'hfa', 'coverage', 'avoidance', 'car']


class Forked(NBClientEngine):
    "papermill's engine, its kernel forked from the warm process."
    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, **kw):
        return super().execute_managed_notebook(nb_man, kernel_name, kernel_manager_class=warm_manager(), **kw)


papermill_engines.register('forked', Forked)


def on_a_terminal(notebook: str, copy: Path, *args: str) -> str:
    "papermill as anybody would call it, with an ordinary kernel: what it says if it fails, '' if not."
    done = subprocess.run([str(BIN/'papermill'), str(ROOT/f'nbs/{notebook}.ipynb'), str(copy), *args], capture_output=True, text=True, cwd=copy.parent)
    return done.stderr if done.returncode else ''


def papermill(notebook: str, copy: Path, *args: str) -> str:
    "The same command in this process, with a forked kernel: seconds less."
    done = CliRunner().invoke(papermill_command, [str(ROOT/f'nbs/{notebook}.ipynb'), str(copy), '--engine', 'forked', '--cwd', str(copy.parent), *args])
    return f'{done.output}{done.exception}' if done.exit_code else ''


def results(run: Path | str, methods: tuple = SMOKE_METHODS) -> pd.DataFrame:
    "The table of results, in a fixed order."
    t = read_table(Path(run)/'analysis/table.parquet')
    return t[t.method.isin(methods)].sort_values(['method', 'seed', 'metric'], ignore_index=True)


def test_everything_is_there(smoke_run):
    assert (status(smoke_run).state == 'done').all()
    table = results(smoke_run.path)
    assert set(table.method) == set(SMOKE_METHODS) and set(METRICS) <= set(table.metric)
    assert {'task', 'cohort', 'method', 'seed', 'metric', 'value', 'lo', 'hi', 'n'} <= set(table)
    assert {'task', 'cohort', 'a', 'b', 'metric', 'diff', 'lo', 'hi', 'n', 'groups', 'seeds'} <= set(read_table(smoke_run/'analysis/differences.parquet'))
    assert table[table.metric.isin(METRICS)].value.between(0, 1).all()
    copies = {p.stem for p in (smoke_run/'notebooks').glob('*.ipynb')}
    assert copies == {s.name for s in plan(smoke_run.params)}
    report = (smoke_run/'analysis/report.html').read_text()
    assert 'simulated' in report.lower() and 'not for clinical decision making' in report and 'src="http' not in report
    links = set(re.findall(r'href="([^"#]+)"', report))
    assert {'checklist.md', '../cases/card.json', '../preferences/mint-0/README.md'} <= links
    assert all((smoke_run/'analysis'/l).exists() for l in links if not l.startswith('http'))


def test_no_group_crosses_the_splits(smoke_run):
    cases = pd.read_parquet(smoke_run/'cases/cases.parquet')
    assert cases.groupby('group').split.nunique().max() == 1 and set(cases.split) >= {'train', 'test'}


def test_second_call_starts_nothing(smoke_run):
    before = {p: p.stat().st_mtime_ns for p in smoke_run.path.rglob('*') if p.is_file() and '.locks' not in p.parts}
    lines = []
    run_pipeline(smoke_run.path, 'smoke', {'methods': list(SMOKE_METHODS)}, say=lines.append, quiet=True)
    assert '0 to do' in lines[0] and all('done before' in l for l in lines[1:])
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_what_has_a_recipe_is_trained_and_nothing_else():
    methods = [*METHODS, 'mint_constrained', 'base_rag']
    trained = [s.values['method'] for s in plan(resolve_params('smoke', {'methods': methods})) if s.notebook == '49_align']
    assert trained == list(RECIPES) and set(RECIPES) < set(METHODS)


def test_changed_training_reruns_only_what_follows(smoke_run, tmp_path):
    run = shutil.copytree(smoke_run.path, tmp_path/'copy')
    params = yaml.safe_load((run/'params.yaml').read_text())
    params['train']['lr'] = 5e-4
    (run/'params.yaml').write_text(yaml.safe_dump(params))
    states = status(run).set_index('step').state
    assert (states[['19_cohort', '29_upstream-0', '39_preferences-0', '59_predict-linear-0']] == 'done').all()
    assert (states[['49_align-sft-0', '49_align-mint-0']] == 'stale').all()


def test_damaged_output_is_noticed(smoke_run, tmp_path):
    run = shutil.copytree(smoke_run.path, tmp_path/'copy')
    (run/'predictions/linear-0.parquet').write_bytes(b'cut')
    states = status(run).set_index('step').state
    assert states['59_predict-linear-0'] == 'stale' and states['59_predict-chance-0'] == 'done'


@pytest.mark.parametrize('notebook,args', [('19_cohort', ()), ('29_upstream', ('-p', 'seed', '0')), ('39_preferences', ()), ('49_align', ('-p', 'method', 'mint')),
                                           ('59_predict', ('-p', 'method', 'chance')), ('69_analysis', ())], ids=lambda v: v if isinstance(v, str) else '')
def test_plain_papermill_runs_each_stage(smoke_run, tmp_path, notebook, args):
    call = on_a_terminal if notebook == '19_cohort' else papermill
    assert not (failed := call(notebook, tmp_path/'out.ipynb', '-p', 'run', str(smoke_run.path), *args)), failed[-2000:]


def test_passed_parameters_arrive(smoke_run, tmp_path):
    run = shutil.copytree(smoke_run.path, tmp_path/'copy')
    assert not (run/'align/dpo-0').exists()
    failed = papermill('49_align', tmp_path/'out.ipynb', '-p', 'run', str(run), '-p', 'method', 'dpo', '-p', 'seed', '0')
    assert not failed, failed[-2000:]
    assert (run/'align/dpo-0/adapter').is_dir()
    failed = papermill('19_cohort', tmp_path/'out.ipynb', '-p', 'run', str(tmp_path/'new'), '-p', 'profile', 'smoke', '-y', 'overrides: {cohort.train: 16, seeds: [3]}')
    assert not failed, failed[-2000:]
    assert open_params(tmp_path/'new').cohort.train == 16 and open_params(tmp_path/'new').seeds == (3,)


@pytest.mark.parametrize('notebook', ['19_cohort', '49_align'])
def test_unknown_parameter_is_an_error(tmp_path, notebook):
    assert 'field metod: unknown parameter' in papermill(notebook, tmp_path/'out.ipynb', '-p', 'run', str(tmp_path/'r'), '-p', 'metod', 'dpo')
    assert not (tmp_path/'r').exists()


def test_ill_typed_parameter_is_an_error(tmp_path):
    assert 'field cohort.train' in on_a_terminal('19_cohort', tmp_path/'out.ipynb', '-y', 'overrides: {cohort.train: many}')


def test_failure_names_the_copy_and_the_cell(tmp_path):
    with pytest.raises(NotebookFailed) as failed:
        run_pipeline(tmp_path/'r', 'smoke', {'cohort.source': str(tmp_path/'absent.zip'), 'methods': ['chance']}, quiet=True)
    assert failed.value.error == 'InputError' and failed.value.copy.exists() and 'absent.zip' in str(failed.value) and failed.value.index is not None
    assert nbformat.read(failed.value.copy, 4).cells[failed.value.index].source == failed.value.cell


def started_by(process: subprocess.Popen) -> list[psutil.Process]:
    "What a command has started: its own children, and the kernels that the warm process of this session has forked for it."
    forked = [psutil.Process(pid) for pid in kernels_of(process.pid) if psutil.pid_exists(pid)]
    return [*forked, *psutil.Process(process.pid).children(recursive=True)]


def kill(process: subprocess.Popen) -> None:
    "kill -9 the command and its kernels."
    family = [*started_by(process), psutil.Process(process.pid)]
    for p in family:
        try: p.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess: pass
    process.wait()
    assert not psutil.wait_procs(family, timeout=60)[1]


def start(run: Path, methods: tuple) -> subprocess.Popen:
    command = [str(BIN/'mint-nb'), 'run', '--profile', 'smoke', '--methods', ','.join(methods), '--out', str(run)]
    heeds_ctrl_c = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)   # a test runner in the background ignores it, and its children would too
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=heeds_ctrl_c)


def test_ctrl_c_in_training_is_clean_and_the_same_command_ends_with_the_same_table(smoke_run, tmp_path):
    "kill -9, and anywhere: test_chaos.py."
    methods, at = ('chance', 'mint'), '49_align-mint-0'
    process, limit = start(tmp_path/'r', methods), time.time() + 900
    while not (tmp_path/f'r/notebooks/{at}.ipynb').exists():
        assert process.poll() is None and time.time() < limit, process.stdout.read()
        time.sleep(.05)
    kernels = started_by(process)
    assert kernels, 'no kernel runs'
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 130 and 'the same command goes on from here' in out and 'Traceback' not in out, out
    assert not psutil.wait_procs(kernels, timeout=60)[1], 'a kernel was left behind'
    again = start(tmp_path/'r', methods)
    out, _ = again.communicate(timeout=900)
    assert again.returncode == 0 and (status(tmp_path/'r').state == 'done').all(), out
    pd.testing.assert_frame_equal(results(tmp_path/'r', methods), results(smoke_run.path, methods))


def test_a_failure_in_a_group_stops_the_rest_and_keeps_what_runs():
    log = []
    def work(step):
        if step.stage == 'b': raise NotebookFailed(Path('copy'), 'ValueError', 'broken')
        time.sleep(.3); log.append(step.stage)
    steps = [Step('49_align', s) for s in 'abcd'] + [Step('59_predict', 'e', needs='b')]
    with pytest.raises(NotebookFailed, match='broken'): run_group(steps, 2, work, lambda s, _: None)
    assert log == ['a']
