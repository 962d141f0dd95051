"""What a start may cost: which libraries a command or a module loads, digests that are remembered, modules that are missing. Nothing here is timed."""
import json, os, shutil, subprocess, sys, time
from pathlib import Path

import pandas as pd
import pytest

from mint_nb import core, runs
from mint_nb.core import code_digest, code_modules, file_digest, recall, write_json, write_table
from mint_nb.runs import open_run, record, run_stage, stage_done

# ---------------------------------------------------------------------------------------------- what is loaded

MODELS = {'torch', 'transformers', 'peft', 'trl', 'accelerate', 'datasets', 'sklearn', 'skimage'}
FIGURES = {'matplotlib', 'seaborn', 'IPython'}
TABLES = {'pandas', 'pyarrow', 'scipy', 'PIL', 'numpy'}
OTHERS = {'papermill', 'nbformat', 'httpx', 'bm25s', 'rapidfuzz'}
HEAVY = MODELS | FIGURES | TABLES | OTHERS


def run_python(code: str) -> tuple[str, set[str]]:
    "What some code prints in a fresh Python, and which heavy libraries it has loaded."
    code += f"\nimport json, sys\nprint('LOADED', json.dumps([m for m in {sorted(HEAVY)!r} if m in sys.modules]))"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text, _, names = done.stdout.rpartition('LOADED ')
    return text, set(json.loads(names))


def loaded(code: str) -> set[str]:
    "Which heavy libraries some code loads."
    return run_python(code)[1]


def after_command(*args) -> tuple[str, set[str]]:
    "What a command prints, and which heavy libraries it has loaded when it is done."
    return run_python(f"""from mint_nb.cli import app
try: app({[str(a) for a in args]!r})
except SystemExit as e: assert not e.code""")


@pytest.mark.parametrize('args, shown', [(['--help'], 'status'), (['--version'], 'mint-nb 0'), (['run', '--help'], '--profile'), (['status', '--help'], 'run folder')],
                         ids=lambda v: ' '.join(v) if isinstance(v, list) else '')
def test_help_and_version_load_nothing(args, shown):
    text, names = after_command(*args)
    assert shown in text and names == set()


def test_status_loads_no_tables_and_no_models(tmp_path):
    run = open_run(tmp_path/'run', 'smoke')
    run_stage(run, 'cohort', lambda: write_json(run/'cases/card.json', {}), 'mint_nb.cohort', ['cohort', 'task'], [], ['cases/card.json'])
    text, names = after_command('status', run.path)
    assert '19_cohort' in text and ' done ' in text and ' missing ' in text
    assert names <= {'numpy'}


def test_report_loads_no_models(tmp_path):
    run = open_run(tmp_path/'run', 'smoke')
    (run/'analysis').mkdir(parents=True)
    (run/'analysis/table.md').write_text('| method |')
    write_table(run/'analysis/table.parquet', pd.DataFrame({'method': run.params.methods}))
    text, names = after_command('report', run.path)
    assert '| method |' in text and not names & (MODELS | FIGURES | OTHERS)


@pytest.mark.parametrize('module', ['core', 'params', 'runs', 'tasks', 'recipes', 'launch', 'cli'])
def test_modules_that_load_nothing(module):
    assert loaded(f'import mint_nb.{module}') == set()


@pytest.mark.parametrize('module', ['metrics', 'ontology', 'notes', 'splits', 'patients', 'readers', 'findings', 'privacy', 'cohort', 'upstream',
                                    'pairs', 'preferences', 'align', 'baselines', 'retrieve', 'attribution', 'methods', 'predict', 'outputs',
                                    'report', 'checklist', 'pipeline'])
def test_stages_and_what_they_stand_on_load_numpy_at_most(module):
    assert loaded(f'import mint_nb.{module}') <= {'numpy'}


def test_the_analysis_loads_tables_and_no_figures_yet():
    assert loaded('import mint_nb.analysis') <= {'numpy', 'pandas', 'pyarrow'}


def test_a_ranker_that_reads_findings_needs_no_model_library(tmp_path):
    code = f"""from mint_nb.runs import open_run
from mint_nb.predict import predict_method
run = open_run({str(tmp_path/'run')!r}, 'smoke')
for m in ('chance', 'naive_bayes'): predict_method(run, m)
assert (run/'predictions/naive_bayes-0.parquet').exists()"""
    assert not loaded(code) & (MODELS | FIGURES | {'papermill', 'httpx', 'bm25s'})


def test_an_analysis_of_answers_that_are_there_needs_no_model_library(smoke_run, tmp_path):
    "All earlier stages are found done, without the libraries that they work with."
    shutil.copytree(smoke_run.path, tmp_path/'run')
    (tmp_path/'run/analysis/table.md').unlink()
    code = f"""from mint_nb.analysis import analysis
from mint_nb.runs import Run, open_params
run = Run({str(tmp_path/'run')!r}, open_params({str(tmp_path/'run')!r}))
before = len(run.manifest)
analysis(run)
assert [e['stage'] for e in run.manifest[before:]] == ['analysis'] and (run/'analysis/table.md').exists()"""
    assert not loaded(code) & (MODELS | {'papermill', 'httpx', 'bm25s'})


# ---------------------------------------------------------------------------------------------- digests that are remembered

@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    "A cache of this test alone."
    monkeypatch.setenv('MINT_CACHE', str(tmp_path/'cache'))
    return tmp_path/'cache'


@pytest.fixture
def settled(monkeypatch) -> None:
    "Files count as old at once: the age of a file cannot be set from outside."
    monkeypatch.setattr(core, 'SETTLED', -1.)


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    "Names of the files that are read for a digest."
    names, real = [], core._bytes_digest
    monkeypatch.setattr(core, '_bytes_digest', lambda p: names.append(Path(p).name) or real(p))
    return names


def big(path: Path, letter: str = 'a') -> Path:
    "A file that is too large to be read each time."
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(letter.encode()*(core.SMALL + 1))
    return path


def test_a_file_that_has_not_changed_is_read_once(tmp_path, cache, settled, reads):
    f = big(tmp_path/'adapter')
    first = file_digest(f)
    assert file_digest(f) == first and reads == ['adapter'] and len(list(cache.glob('digests/*.json'))) == 1
    assert core._bytes_digest(f) == first


def test_a_fresh_file_is_read_each_time(tmp_path, cache, reads):
    "Within a tick of the clock a second writing leaves no trace, so nothing is remembered of what was written just now."
    f = big(tmp_path/'adapter')
    assert file_digest(f) == file_digest(f) and reads == ['adapter']*2 and not cache.exists()
    os.utime(f, (1, 1))                                          # a date that is set back makes nothing old
    file_digest(f)
    assert reads == ['adapter']*3 and not cache.exists()
    os.utime(f, (4e9, 4e9))                                      # nor does one that lies ahead
    file_digest(f)
    assert not cache.exists()


def test_a_change_that_keeps_size_and_date_is_seen(tmp_path, cache, settled):
    f = big(tmp_path/'adapter')
    os.utime(f, (1000, 1000))
    first = file_digest(f)
    time.sleep(.05)                                              # several ticks of the clock
    with f.open('r+b') as g: g.write(b'b')
    os.utime(f, (1000, 1000))
    assert f.stat().st_mtime == 1000 and file_digest(f) != first
    other = big(tmp_path/'other')
    os.utime(other, (1000, 1000))
    os.replace(other, f)                                         # another file under the name
    assert file_digest(f) == first


def test_a_change_while_a_file_is_read_is_not_remembered(tmp_path, cache, settled, monkeypatch):
    f, real = big(tmp_path/'adapter'), core._bytes_digest
    monkeypatch.setattr(core, '_bytes_digest', lambda p: (real(p), big(f, 'b'))[0])
    file_digest(f)
    monkeypatch.setattr(core, '_bytes_digest', real)
    assert not list(cache.glob('digests/*.json')) and file_digest(f) == real(f)


def test_folders_are_their_files_and_names(tmp_path, cache, settled, reads):
    folder = tmp_path/'cases'
    for name in ('P1', 'P2'): big(folder/name)
    first = file_digest(folder)
    assert file_digest(folder) == first and reads == ['P1', 'P2']
    big(folder/'P3')
    more = file_digest(folder)
    (folder/'P3').rename(folder/'P4')
    renamed = file_digest(folder)
    (folder/'P4').unlink()
    assert len({first, more, renamed}) == 3 and file_digest(folder) == first
    (folder/'.hidden').write_text('x')
    assert file_digest(folder) == first


def test_a_damaged_memory_is_none(tmp_path, cache, settled):
    f = big(tmp_path/'adapter')
    first = file_digest(f)
    memory = next(cache.glob('digests/*.json'))
    for bad in ('', '[', '3', '[]', '{"value": "0"}', '{"what": 1, "state": 2, "value": 3}', '['*5000): memory.write_text(bad); assert file_digest(f) == first
    kept = json.loads(memory.read_text())
    memory.write_text(json.dumps(kept | {'what': 'another', 'value': '0'*16}))
    assert file_digest(f) == first


def test_without_a_place_for_it_digests_are_the_same(tmp_path, settled, monkeypatch):
    (tmp_path/'file').write_text('no folder')
    monkeypatch.setenv('MINT_CACHE', str(tmp_path/'file/cache'))
    f = big(tmp_path/'adapter')
    assert file_digest(f) == file_digest(f) == core._bytes_digest(f)


def test_the_memory_does_not_grow_for_ever(tmp_path, cache, settled, monkeypatch):
    monkeypatch.setattr(core, 'KEPT', 20)
    f = big(tmp_path/'adapter')
    for i in range(50): assert recall(f'value {i}', [f], lambda: i) == i
    assert 10 <= len(list(cache.glob('digests/*.json'))) <= 20
    assert recall('value 49', [f], lambda: 'new') == 49


def test_processes_share_what_they_remember(tmp_path, cache, settled):
    f = big(tmp_path/'adapter')
    first = file_digest(f)
    code = f"""from mint_nb import core
core.SETTLED, core._bytes_digest = -1., None
print(core.file_digest({str(f)!r}))"""
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == first


# ---------------------------------------------------------------------------------------------- modules that are missing

@pytest.fixture
def extra(tmp_path, monkeypatch):
    "A module `mint_nb.extra` whose text a test may write."
    file, real = tmp_path/'extra.py', core._source
    monkeypatch.setattr(core, '_source', lambda name: file if name == 'mint_nb.extra' else real(name))
    def write(text: str) -> None:
        file.write_text(text)
        core._module_code.cache_clear()
        code_digest.cache_clear()
    yield write
    core._module_code.cache_clear()
    code_digest.cache_clear()


def test_code_follows_imports_wherever_they_stand(extra):
    extra('"Words."\nimport re\nfrom . import __version__\ndef f():\n    from mint_nb.pairs import checks\n    import mint_nb.launch\n')
    assert {f'mint_nb.{m}' for m in ('extra', 'pairs', 'launch', 'tasks', 'params', 'core')} == set(code_modules('mint_nb.extra'))
    first = code_digest('mint_nb.extra')
    extra('"Other words."\nimport re\nfrom . import __version__   # a comment\ndef f():\n    from mint_nb.pairs import checks\n    import mint_nb.launch\n')
    assert code_digest('mint_nb.extra') == first
    extra('import re\n')
    assert code_digest('mint_nb.extra') != first


@pytest.mark.parametrize('text', ['from .gone import x', 'from mint_nb.gone import x', 'from . import gone', 'import mint_nb.gone', 'def f():\n    from mint_nb.gone import x'])
def test_a_missing_module_is_an_error_and_no_empty_one(extra, text):
    extra(text)
    with pytest.raises(ModuleNotFoundError, match='there is no module mint_nb.gone'): code_digest('mint_nb.extra')
    with pytest.raises(ModuleNotFoundError): code_digest('mint_nb.gone')


def test_a_stage_of_a_module_that_is_gone_is_not_done(tmp_path):
    run = open_run(tmp_path/'run', 'smoke')
    entry = run_stage(run, 'small', lambda: write_json(run/'small.json', 1), 'mint_nb.core', writes=['small.json'])
    assert stage_done(run, 'small')
    for module in ('mint_nb.renamed', 'other.package', '', 3, None):
        record(run, entry | {'module': module})
        assert stage_done(run, 'small') is None


def test_a_stage_whose_code_cannot_be_read_is_an_error(tmp_path, extra, monkeypatch):
    run = open_run(tmp_path/'run', 'smoke')
    extra('import re')
    entry = run_stage(run, 'small', lambda: write_json(run/'small.json', 1), 'mint_nb.extra', writes=['small.json'])
    extra('from .gone import x')
    monkeypatch.setattr(runs, '_known', lambda module: True)
    with pytest.raises(ModuleNotFoundError, match='mint_nb.gone'): stage_done(run, 'small')
    assert entry['status'] == 'done'
