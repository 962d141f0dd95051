"""What goes wrong around a run: full disk, folders that cannot be written, two runs at once, clocks, damaged files, dead kernels. One clear message each, and the same command goes on.

Killed runs are in test_chaos.py, Ctrl-C and unknown parameters in test_pipeline.py.
"""
import concurrent.futures, ctypes, datetime as dt, os, resource, shutil, subprocess, sys, textwrap
from pathlib import Path

import nbformat, pandas as pd, pytest

from mint_nb import runs
from mint_nb.core import InputError, file_digest, read_table, write_json
from mint_nb.runs import Run, open_params, open_run, run_stage, stage_done
from mint_nb.cohort import make_cohort
from mint_nb.preferences import preferences
from mint_nb.align import align
from mint_nb.predict import predict_method
from mint_nb.pipeline import NotebookFailed, run_notebook, status

BIN, ROOT = Path(sys.executable).parent, Path(__file__).resolve().parent.parent
SEARCH = {'PYTHONPATH': os.pathsep.join([str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])])}


def cohort_command(out: Path, **kw) -> subprocess.Popen:
    "`mint-nb run` up to the cohort."
    return subprocess.Popen([str(BIN/'mint-nb'), 'run', '--profile', 'smoke', '--methods', 'chance', '--until', '19_cohort', '--out', str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kw)


def small_stage(run: Run, calls: list, text: str = 'x') -> dict:
    "A stage that writes one file."
    def body(): calls.append(text); write_json(run/'small.json', {'text': text})
    return run_stage(run, 'small', body, 'mint_nb.core', writes=['small.json'])


# -------------------------------------------------------------------------------------------------- disk

def test_full_disk_through_the_command(tmp_path):
    "No byte can be written: one line, exit code 2; with room again the same command goes on."
    out = tmp_path/'r'
    open_run(out, 'smoke', {'methods': ['chance']})
    alone = ('COVERAGE_', 'MINT_WARM')      # what `make coverage` writes finds no room either; a warm process of its own has the same limit
    unmeasured = {k: v for k, v in os.environ.items() if not k.startswith(alone)}
    full = cohort_command(out, env=unmeasured, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)))
    _, err = full.communicate(timeout=900)
    assert full.returncode in (1, 2) and 'Traceback' not in err and 'File too large' in err, err
    assert not stage_done(Run(out, open_params(out)), 'cohort') and not list(out.rglob('*.tmp'))
    entry = make_cohort(Run(out, open_params(out)))
    assert entry['status'] == 'done' and len(Run(out, open_params(out)).cases()) == 56


def test_a_full_disk_fails_a_stage_and_loses_no_earlier_one(tmp_path):
    run, calls = open_run(tmp_path/'r', 'smoke'), []
    small_stage(run, calls)
    before = (run/'manifest.jsonl').read_text()
    script = textwrap.dedent(f"""
        import resource
        from mint_nb.core import InputError, write_json
        from mint_nb.runs import open_run, run_stage
        run = open_run({str(run.path)!r})
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        try: run_stage(run, 'big', lambda: write_json(run/'big.json', ['x'*50]*50), 'mint_nb.core', writes=['big.json'])
        except InputError as e: print(e)
    """)
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, env=os.environ | SEARCH)
    assert 'big.json: cannot be written: File too large' in done.stdout, done.stderr
    assert (run/'manifest.jsonl').read_text().startswith(before) and stage_done(run, 'small') and not (run/'big.json').exists()


def bound_by_permissions() -> None:
    "In a child process: give up root's right to pass over permissions (capabilities 1 and 2, dropped from the bounding set)."
    for capability in (1, 2): ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)


def test_read_only_folder(tmp_path):
    "A finished run can be read; what wants to write says which file and what to do."
    run, calls = open_run(tmp_path/'r', 'smoke'), []
    small_stage(run, calls)
    script = textwrap.dedent(f"""
        from mint_nb.core import *
        from mint_nb.runs import *
        try: open({str(run.path/'probe')!r}, 'w'); raise SystemExit('it can be written')
        except PermissionError: run = open_run({str(run.path)!r})
        print('done' if stage_done(run, 'small') else 'not done')
        for call in (lambda: run_stage(run, 'small', print, 'mint_nb.core'), lambda: open_run({str(run.path/'new')!r}, 'smoke'), lambda: write_json(run/'x.json', 1)):
            try: call()
            except InputError as e: print(e)
    """)
    before = {p: p.stat().st_mode for p in [run.path, *run.path.rglob('*')]}
    for p in before: p.chmod(0o555 if p.is_dir() else 0o444)
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, env=os.environ | SEARCH, preexec_fn=bound_by_permissions)
    for p, mode in before.items(): p.chmod(mode)
    if 'it can be written' in done.stderr: pytest.skip('permissions do not bind this user, whatever is given up')
    said = done.stdout.splitlines()
    assert len(said) == 4 and said[0] == 'done', done.stdout + done.stderr
    for line in said[1:]: assert line.startswith(f'file {run.path}') and 'cannot be written: Permission denied' in line, line


# -------------------------------------------------------------------------------------------------- two at once

def test_two_commands_in_one_folder(tmp_path):
    "Both end well; the work is done once, and nothing is mixed."
    both = [cohort_command(tmp_path/'r') for _ in range(2)]
    ends = [p.communicate(timeout=900) for p in both]
    assert [p.returncode for p in both] == [0, 0], ends
    run = Run(tmp_path/'r', open_params(tmp_path/'r'))
    assert [e['status'] for e in run.manifest if e['stage'] == 'cohort'] == ['done'] and stage_done(run, 'cohort')
    nbformat.validate(nbformat.read(run/'notebooks/19_cohort.ipynb', 4))
    assert not list(run.path.rglob('*.tmp'))


def test_a_stage_runs_once_for_four_that_want_it(tmp_path):
    script = textwrap.dedent(f"""
        import sys, time
        from mint_nb.core import write_json
        from mint_nb.runs import open_run, run_stage
        run = open_run({str(tmp_path/'r')!r}, 'smoke')
        def body(): time.sleep(.3); open({str(tmp_path/'calls')!r}, 'a').write('x'); write_json(run/'small.json', 1)
        print(run_stage(run, 'small', body, 'mint_nb.core', writes=['small.json'])['key'])
    """)
    open_run(tmp_path/'r', 'smoke')
    processes = [subprocess.Popen([sys.executable, '-c', script], stdout=subprocess.PIPE, text=True, env=os.environ | SEARCH) for _ in range(4)]
    keys = {p.communicate(timeout=900)[0].strip() for p in processes}
    assert len(keys) == 1 and (tmp_path/'calls').read_text() == 'x'


# -------------------------------------------------------------------------------------------------- clocks

def test_a_clock_that_goes_backwards(tmp_path, monkeypatch):
    "What is done is known by digests, and the newest entry is the last line: no date decides anything."
    class Backwards(dt.datetime):
        days = 0
        @classmethod
        def now(cls, tz=None): cls.days += 1; return dt.datetime(2030, 1, 1, tzinfo=tz) - dt.timedelta(days=400*cls.days)
    monkeypatch.setattr(runs, 'datetime', Backwards)
    run, calls = open_run(tmp_path/'r', 'smoke'), []
    first = small_stage(run, calls)
    (run/'small.json').write_text('{}')
    second = small_stage(run, calls)
    assert calls == ['x', 'x'] and second['time'] < first['time'] and second['seconds'] >= 0
    for year in (1980, 2090):
        t = dt.datetime(year, 1, 1).timestamp()
        for p in run.path.rglob('*'): os.utime(p, (t, t))
        assert small_stage(run, calls)['time'] == second['time'] and stage_done(run, 'small')
    assert calls == ['x', 'x']


# -------------------------------------------------------------------------------------------------- damage

def flip(path: Path, at: float = .5) -> None:
    "Change one byte."
    raw = bytearray(path.read_bytes())
    raw[int(at*len(raw))] ^= 1
    path.write_bytes(raw)


def test_one_changed_byte_is_found_and_the_file_is_made_again(smoke_run, tmp_path):
    run = Run(shutil.copytree(smoke_run.path, tmp_path/'r'), smoke_run.params)
    files = {'cases/cases.parquet': lambda: make_cohort(run), 'predictions/chance-0.parquet': lambda: predict_method(run, 'chance', 0)}
    for file, again in files.items():
        good = file_digest(run/file)
        flip(run/file)
        assert file_digest(run/file) != good
        again()
        assert file_digest(run/file) == good, file
    table = (run/'preferences/mint-0/train.parquet').read_bytes()
    (run/'preferences/mint-0/train.parquet').unlink()
    assert preferences(run, 0, 'mint')['status'] == 'done' and (run/'preferences/mint-0/train.parquet').read_bytes() == table


@pytest.mark.parametrize('text', ['profile: [', 'profile: smoke\nunknown: 1\n', '- a list\n', 'seeds: many\n', '\x00'], ids=['cut', 'unknown', 'list', 'type', 'zero'])
def test_damaged_parameters_are_named(tmp_path, text):
    (tmp_path/'params.yaml').write_text(text)
    for call in (lambda: open_run(tmp_path), lambda: open_params(tmp_path), lambda: status(tmp_path)):
        with pytest.raises(InputError, match='params.yaml'): call()


def test_damaged_lines_of_the_manifest_count_as_none(tmp_path):
    run, calls = open_run(tmp_path/'r', 'smoke'), []
    small_stage(run, calls)
    good = (run/'manifest.jsonl').read_bytes()
    for bad in (b'5\n', b'{"stage": 1}\n', b'\xff\xfe\n', b'{"stage": "small", "status": "done"}\n', b'{"stage": "small", "status": "done", "outputs": 3}\n', b'[' * 5000 + b'\n'):
        (run/'manifest.jsonl').write_bytes(bad + good)
        assert stage_done(run, 'small')
        (run/'manifest.jsonl').write_bytes(good + bad)
        small_stage(run, calls)
    assert set(calls) == {'x'}


# -------------------------------------------------------------------------------------------------- papermill

def notebook(path: Path, *cells: str) -> Path:
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    nb.metadata['kernelspec'] = {'name': 'python3', 'display_name': 'python3', 'language': 'python'}
    nbformat.write(nb, path)
    return path


def test_a_dying_kernel_is_a_failure_and_leaves_nothing_done(tmp_path):
    nb = notebook(tmp_path/'n.ipynb', 'a = 1', 'import os, signal; os.kill(os.getpid(), signal.SIGKILL)', 'print("never")')
    with pytest.raises(NotebookFailed) as failed: run_notebook(nb, tmp_path/'out.ipynb', quiet=True)
    assert failed.value.error == 'KernelDied' and failed.value.index == 1 and 'os.kill' in str(failed.value)


def test_kernels_side_by_side_talk_over_files_and_not_ports(tmp_path):
    "Four at once, on IPC; a port that a kernel's debugger takes for itself is not seen outside the machine."
    nb = notebook(tmp_path/'n.ipynb', 'import json, sys, psutil\nfrom ipykernel.connect import get_connection_info\ninfo = json.loads(get_connection_info())\n'
                  'assert info["transport"] == "ipc", info\nassert all(c.laddr.ip == "127.0.0.1" for c in psutil.Process().net_connections("inet") if c.status == "LISTEN")')
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        copies = list(pool.map(lambda i: run_notebook(nb, tmp_path/f'{i}.ipynb', quiet=True), range(4)))
    assert all(c.exists() for c in copies)


@pytest.mark.parametrize('over', [5, '[1]', 'x', ['cohort.train']], ids=str)
def test_overrides_that_are_none(tmp_path, over):
    with pytest.raises(InputError, match='overrides'): runs.stage_run({'run': str(tmp_path/'r'), 'overrides': over})
    assert not (tmp_path/'r').exists()


# -------------------------------------------------------------------------------------------------- the same seed

def test_the_same_seed_gives_the_same_bytes_and_the_same_metrics(smoke_run, tmp_path):
    "A second run of the seed, in this process instead of kernels, and from other folders."
    run = open_run(tmp_path/'again', 'smoke', {'methods': list(smoke_run.params.methods)})
    preferences(run, 0, 'mint')
    for file in ('cases/cases.parquet', 'cases/catalogue.json', 'preferences/mint-0/train.parquet', 'preferences/mint-0/README.md'):
        assert (run/file).read_bytes() == (smoke_run/file).read_bytes(), file
    align(run, 'mint', 0); predict_method(run, 'mint', 0)
    pd.testing.assert_frame_equal(read_table(run/'predictions/mint-0.parquet'), read_table(smoke_run/'predictions/mint-0.parquet'))
