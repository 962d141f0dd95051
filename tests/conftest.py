"""What all tests share: no network, quiet bars, the real data where it is, and one finished smoke run."""
import os, re, shutil
from pathlib import Path

os.environ |= {'HF_HUB_OFFLINE': '1', 'MINT_QUIET': '1', 'TOKENIZERS_PARALLELISM': 'false'}

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent
SMOKE_METHODS = ('chance', 'teacher', 'naive_bayes', 'linear', 'base', 'sft', 'mint')


# The longest files, in the order in which two workers take them; the second does not wait for the smoke run of the first.
LONG = ('test_pipeline', 'test_grid', 'test_engine', 'test_chaos', 'test_browser', 'test_faults', 'test_export', 'test_calibration',
        'test_folds', 'test_privacy', 'test_study', 'test_reason', 'test_vision', 'test_kernels', 'test_endpoint')

# What `make check` leaves out: files, and single tests as file::test. Tests that take the fixture smoke_run are left out as well.
SLOW = (
    'test_browser', 'test_chaos', 'test_endpoint', 'test_engine', 'test_export', 'test_faults', 'test_folds', 'test_gene', 'test_gpu',
    'test_grid', 'test_kernels', 'test_launch', 'test_pipeline', 'test_predict', 'test_privacy', 'test_reason', 'test_retrieve',
    'test_study', 'test_teachers', 'test_vision',
    'test_calibration::test_grid_goes_on_where_it_was',
    'test_cli::test_real_cases_through_the_command',
    'test_dual::test_stage_of_a_smoke_run',
    'test_dual::test_pannuke_through_cohort_and_teacher',
    'test_dual::test_benchmark_on_real_tiles',
    'test_notebooks::test_modules_know_every_name_they_use',
)


def pytest_configure(config):
    "One warm process for all kernels of the session, those of all workers and of the commands that they start; it begins with the first kernel."
    from mint_nb.kernels import share_kernels
    if not hasattr(config, 'workerinput'): share_kernels()


def is_slow(item) -> bool:
    "Does `make check` leave a test out?"
    file, test = item.module.__name__, getattr(item, 'originalname', item.name)
    return file in SLOW or f'{file}::{test}' in SLOW or 'smoke_run' in item.fixturenames


def pytest_collection_modifyitems(items):
    "The longest files first: two workers that take file by file end at about the same time."
    order = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda i: order.get(i.module.__name__, len(LONG)))
    for i in filter(is_slow, items): i.add_marker('slow')


@pytest.fixture(scope='session')
def data() -> Path:
    "Folder of the real data: $MINT_DATA, or ../shared/data beside the checkout; tests that need it are skipped without."
    places = [os.environ.get('MINT_DATA'), ROOT.parent/'shared/data']
    for p in places:
        if p and Path(p).is_dir(): return Path(p)
    pytest.skip('no real data: set MINT_DATA to a folder with phenopackets.zip')


def smoke_key() -> str:
    "What the smoke run depends on: the stage notebooks, the code that they import, its parameters, versions, and the threads it computes with."
    from mint_nb.core import code_digest, digest, file_digest
    from mint_nb.params import resolve_params
    from mint_nb.runs import versions
    stages = sorted((ROOT/'nbs').glob('[0-9]9_*.ipynb'))
    modules = sorted({'pipeline', *re.findall(r'from mint_nb\.(\w+) import', ''.join(p.read_text() for p in stages))})
    return digest([[file_digest(p) for p in stages], [code_digest(f'mint_nb.{m}') for m in modules],
                   resolve_params('smoke', {'methods': list(SMOKE_METHODS)}).model_dump(), versions(), os.environ.get('OMP_NUM_THREADS')])


@pytest.fixture(scope='session')
def smoke_run(tmp_path_factory):
    "A run of the smoke profile, finished through the Python interface: made once for the code as it is (kept in .make/smoke), a copy for each worker."
    from mint_nb.runs import Run
    from mint_nb.pipeline import run_pipeline
    home, key = ROOT/'.make/smoke', smoke_key()
    home.mkdir(parents=True, exist_ok=True)
    with FileLock(home/'lock'):
        for old in home.iterdir():
            if old.is_dir() and old.name != key: shutil.rmtree(old)
        run = run_pipeline(home/key, 'smoke', {'methods': list(SMOKE_METHODS)}, quiet=True)
        return Run(shutil.copytree(run.path, tmp_path_factory.mktemp('runs')/'smoke'), run.params)
