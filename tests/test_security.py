"""What is read cannot run code, archives stay inside themselves, and the package holds nothing that would change that."""
import ast, re, stat, subprocess, sys, zipfile
from pathlib import Path

import pytest

from mint_nb import readers
from mint_nb.core import InputError, read_yaml
from mint_nb.ontology import load_ontology
from mint_nb.readers import load_cases
from mint_nb.tiles import load_tiles

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted([*(ROOT/'mint_nb').glob('*.py'), *(ROOT/'tools').glob('*.py'), ROOT/'setup.py'])
RUNS_CODE = {'eval', 'exec', 'compile', '__import__'}      # as functions of Python; model.eval() is a method of torch
FORBIDDEN_MODULES = {'pickle', 'cPickle', 'dill', 'cloudpickle', 'joblib', 'marshal', 'shelve'}
FORBIDDEN_CALLS = {('torch', 'load'), ('yaml', 'load'), ('yaml', 'unsafe_load'), ('yaml', 'full_load'), ('os', 'system'), ('os', 'popen'), ('pd', 'read_pickle'), ('shutil', 'unpack_archive')}


@pytest.mark.parametrize('file', SOURCES, ids=lambda p: p.name)
def test_no_code_is_run_from_data(file):
    for n in ast.walk(ast.parse(file.read_text())):
        names = [a.name for a in n.names] if isinstance(n, ast.Import) else [n.module or ''] if isinstance(n, ast.ImportFrom) else []
        assert not FORBIDDEN_MODULES & {m.split('.')[0] for m in names}, f'{file.name}, line {n.lineno}: {names}'
        if not isinstance(n, ast.Call): continue
        f, place = n.func, f'{file.name}, line {n.lineno}'
        if isinstance(f, ast.Name): assert f.id not in RUNS_CODE, f'{place}: {f.id}'
        if isinstance(f, ast.Attribute) and isinstance(f.value, ast.Name): assert (f.value.id, f.attr) not in FORBIDDEN_CALLS, f'{place}: {f.value.id}.{f.attr}'
        options = {k.arg: ast.unparse(k.value) for k in n.keywords}
        if isinstance(f, ast.Attribute) and f.attr in ('extractall', 'to_pickle', 'read_pickle') and options.get('filter') != "'data'": pytest.fail(f'{place}: {f.attr}')
        assert options.get('trust_remote_code', 'False') == 'False' and options.get('shell', 'False') == 'False' and options.get('allow_pickle', 'False') == 'False', place
        if isinstance(f, ast.Attribute) and f.attr == 'load' and isinstance(f.value, ast.Name) and f.value.id == 'np': assert options.get('allow_pickle') == 'False', f'{place}: say allow_pickle=False'


def test_weights_are_read_as_safetensors():
    "Every model that is loaded by name or folder says so; a GGUF file and an adapter of our own are the exceptions."
    for file in (ROOT/'mint_nb').glob('*.py'):
        for n in ast.walk(ast.parse(file.read_text())):
            if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.func.attr == 'from_pretrained':
                text, options = ast.unparse(n), {k.arg for k in n.keywords}
                if re.match(r'\(?(AutoModel|\(?AutoModelFor)', text) and 'gguf_file' not in options and 'use_safetensors' not in options: assert '**how' in text, f'{file.name}, line {n.lineno}: {text}'


def test_no_weights_or_pickles_in_the_repository():
    files = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True)
    if files.returncode: pytest.skip('not a git checkout')
    assert not [f for f in files.stdout.split() if re.search(r'\.(pkl|pickle|pt|pth|bin|ckpt|joblib|safetensors|gguf)$', f)]


def test_yaml_makes_no_objects(tmp_path):
    (tmp_path/'r.yaml').write_text('profile: !!python/object/apply:os.system ["touch ran"]\n')
    with pytest.raises(InputError, match='r.yaml: is not readable as YAML'): read_yaml(tmp_path/'r.yaml')
    assert not Path('ran').exists()


def archive(path: Path, name: str, link: str = '', size: int = 0) -> Path:
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as z:
        z.writestr('good.json', '{"id": "P1", "note": "a child"}'); z.writestr('labels.csv', 'file,label,patient\n')
        info = zipfile.ZipInfo(name)
        if link: info.external_attr = (stat.S_IFLNK | 0o777) << 16
        z.writestr(info, link or b'0'*(size or 2))
    return path


@pytest.mark.parametrize('name,link', [('../up.json', ''), ('a/../../up.json', ''), ('/tmp/up.json', ''), ('..\\up.json', ''), ('C:\\up.json', ''), ('passwd.json', '/etc/passwd'), ('labels', '../../labels.csv')],
                         ids=['up', 'inside up', 'absolute', 'backslash', 'drive', 'link', 'relative link'])
def test_archives_stay_inside_themselves(tmp_path, name, link):
    file = archive(tmp_path/'cases.zip', name, link)
    for load in (lambda: load_cases(file, load_ontology()), lambda: load_tiles(file)):
        with pytest.raises(InputError, match='cases.zip, record .*: an entry points outside the archive; nothing was read'): load()
    assert sorted(p.name for p in tmp_path.rglob('*')) == ['cases.zip']


def test_an_archive_that_unpacks_to_too_much(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, 'MAX_ENTRY', 10_000)
    file = archive(tmp_path/'bomb.zip', 'big.json', size=20_000)
    for load in (lambda: load_cases(file, load_ontology()), lambda: load_tiles(file)):
        with pytest.raises(InputError, match='bomb.zip, record big.json: an entry has 20000 bytes; nothing was read'): load()


def test_the_audit_says_what_it_did():
    "Without a network it says that it did nothing; with one it ends with a verdict."
    done = subprocess.run([sys.executable, str(ROOT/'tools/audit.py'), '--check-only'], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and re.search(r'audit: (SKIPPED, |the database answers)', done.stdout), done.stdout + done.stderr
