"""The notebooks as source: in order, clean, in sync with the modules, small cells, enough prose."""
import ast, builtins, dis, filecmp, functools, importlib, re, shutil, subprocess, sys
from pathlib import Path

import nbformat, pytest, yaml

import overview
from conftest import ROOT

NBS = sorted((ROOT/'nbs').glob('[0-9]*.ipynb'))
PAGES = sorted(p for p in (ROOT/'nbs').glob('[a-z]*.ipynb') if p.stem != 'index')   # guides and other pages that export nothing
STAGES = [p for p in NBS if p.stem[1] == '9']
EXPORT = re.compile(r'^#\|\s*exporti?\b', re.M)
read = functools.cache(lambda p: nbformat.read(p, 4))
code_cells = lambda nb: [c for c in nb.cells if c.cell_type == 'code']
code = lambda c: '\n'.join(l for l in c.source.splitlines() if l.strip() and not l.strip().startswith('#'))
modules = {re.search(r'^#\|\s*default_exp\s+(\w+)', '\n'.join(c.source for c in code_cells(read(p))), re.M)[1]: p for p in NBS}
each = pytest.mark.parametrize('path', NBS, ids=lambda p: p.stem)
every = pytest.mark.parametrize('path', NBS + PAGES, ids=lambda p: p.stem)
each_stage = pytest.mark.parametrize('path', STAGES, ids=lambda p: p.stem)


def imported(tree: ast.AST) -> set[str]:
    "Names of the package's modules that a syntax tree imports."
    froms = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    names = {n.module.split('.')[-1] for n in froms if n.module and (n.level or n.module.startswith('mint_nb.'))}
    names |= {a.name for n in froms if n.module == 'mint_nb' or (n.level and not n.module) for a in n.names}
    return names | {a.name.split('.')[1] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names if a.name.startswith('mint_nb.')}


@each
def test_imports_only_from_smaller_numbers(path):
    cells = '\n'.join(re.sub(r'^\s*[%!].*', '', c.source, flags=re.M) for c in code_cells(read(path)))
    for name in imported(ast.parse(cells)) & set(modules):
        assert modules[name].name < path.name, f'{path.name} imports {name} from {modules[name].name}'


def test_modules_agree_with_notebook_order():
    for name, path in modules.items():
        for other in imported(ast.parse((ROOT/f'mint_nb/{name}.py').read_text())) & set(modules):
            assert modules[other].name < path.name, f'{name}.py imports {other}'


@every
def test_no_outputs(path):
    assert not [i for i, c in enumerate(code_cells(read(path))) if c.outputs or c.execution_count], 'outputs in git: make export clears them'


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "The sources in a fresh folder, where nbdev may write."
    d = tmp_path_factory.mktemp('sync')
    for f in ('settings.ini', 'setup.py', 'pyproject.toml', 'constraints.txt'): shutil.copy2(ROOT/f, d)
    for f in ('nbs', 'mint_nb'): shutil.copytree(ROOT/f, d/f, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    return d


def nbdev(command: str, cwd: Path) -> None:
    done = subprocess.run([str(Path(sys.executable).parent/command)], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_notebooks_are_clean(copy):
    nbdev('nbdev_clean', copy)
    dirty = [p.name for p in NBS + PAGES if read(p) != read(copy/'nbs'/p.name)]
    assert not dirty, f'nbdev_clean changes {", ".join(dirty)}'


def test_modules_are_in_sync(copy):
    nbdev('nbdev_export', copy)
    names = [p.name for p in (ROOT/'mint_nb').glob('*.py')]
    assert sorted(names) == sorted(p.name for p in (copy/'mint_nb').glob('*.py'))
    _, differ, errors = filecmp.cmpfiles(ROOT/'mint_nb', copy/'mint_nb', names, shallow=False)
    assert not differ + errors, f'nbdev_export changes {", ".join(differ + errors)}: run make export'


def test_every_notebook_is_in_the_sidebar():
    contents = yaml.safe_load((ROOT/'nbs/sidebar.yml').read_text())['website']['sidebar']['contents']
    listed = [n for e in contents for n in ([e] if isinstance(e, str) else e['contents'])]
    assert [n for n in listed if n[0].isdigit()] == [p.name for p in NBS], 'in the order of their numbers'
    assert sorted(n for n in listed if not n[0].isdigit()) == sorted(['index.ipynb'] + [p.name for p in PAGES])


@each
def test_opens_with_name_and_promise(path):
    first = read(path).cells[0].source.strip().splitlines()
    assert first[0] == f'# {path.stem[3:]}' and any(l.startswith('> ') for l in first)
    assert first[-1].startswith('>'), 'nbdev drops what follows the promise in the first cell: make it a cell of its own'


@every
def test_imports_stand_alone(path):
    for c in code_cells(read(path)):
        if EXPORT.search(c.source): continue
        body = [n for n in ast.parse(re.sub(r'^\s*[%!].*', '', code(c), flags=re.M)).body if ast.unparse(n) != 'print(versions())']
        imports = [isinstance(n, (ast.Import, ast.ImportFrom)) for n in body]
        end = any('nbdev_export' in ast.unparse(n) for n in body)
        assert end or all(imports) or not any(imports), f'imports beside other code, which nbdev runs again for the docs:\n{c.source}'


@every
def test_no_star_imports_and_no_loading_that_runs_code(path):
    source = '\n'.join(code(c) for c in code_cells(read(path)))
    assert not re.search(r'^\s*from \S+ import \*', source, re.M)
    assert not re.search(r'import pickle|pickle\.load|trust_remote_code\s*=\s*True|allow_pickle\s*=\s*True', source)


@each_stage
def test_stage_parameters(path):
    cells = code_cells(read(path))
    tagged = [i for i, c in enumerate(cells) if 'parameters' in c.metadata.get('tags', [])]
    assert len(tagged) == 1, 'exactly one cell has the tag parameters'
    names = {t.id for n in ast.parse(cells[tagged[0]].source).body for t in n.targets}
    assert names == {'run', 'profile', 'task', 'seed', 'overrides'} | ({'method'} if path.stem in ('49_align', '59_predict') else set())
    after = '\n'.join(c.source for c in cells[tagged[0] + 1:tagged[0] + 3])
    assert 'stage_run(globals())' in after, 'the parameters are not checked'


@each_stage
def test_stage_is_short(path):
    nb = read(path)
    assert len([c for c in code_cells(nb) if not EXPORT.search(c.source)]) <= 10
    assert not any('nbdev_export(' in c.source for c in code_cells(nb)), 'a pipeline run must not rewrite the package'


def test_export_cells_are_small():
    "Measured in characters, so that nothing is gained by writing two statements on a line."
    size = lambda c: sum(map(len, code(c).splitlines()))
    sizes = {(p.stem, i): size(c) for p in NBS for i, c in enumerate(code_cells(read(p))) if EXPORT.search(c.source)}
    assert not {k: n for k, n in sizes.items() if n > 2800}
    assert sorted(sizes.values())[int(.9*len(sizes))] <= 1600


def test_lines_fit_on_a_page():
    lines = [l for p in NBS + PAGES for c in code_cells(read(p)) for l in code(c).splitlines()]
    assert sum(len(l) > 120 for l in lines) < .01*len(lines)


def test_no_function_body_stands_twice():
    "Of three statements or more, in the modules."
    seen = {}
    for file in sorted((ROOT/'mint_nb').glob('[a-z]*.py')):
        for n in ast.walk(ast.parse(file.read_text())):
            if not isinstance(n, ast.FunctionDef): continue
            body = n.body[1:] if ast.get_docstring(n) else n.body
            if len(body) > 2: seen.setdefault(ast.dump(ast.Module(body, [])), []).append(f'{file.stem}.{n.name}')
    assert not [names for names in seen.values() if len(names) > 1]


def test_prose_outweighs_code():
    words = lines = 0
    for p in [*NBS, ROOT/'nbs/index.ipynb']:
        nb = read(p)
        words += sum(len(re.findall(r'\w+', c.source)) for c in nb.cells if c.cell_type == 'markdown')
        lines += sum(len(code(c).splitlines()) for c in code_cells(nb))
    assert words >= 2*lines, f'{words/lines:.2f} words of prose per line of code'


def test_exports_are_shown_at_once():
    "At least 85 % of the exported functions are used in one of the two cells that follow theirs."
    shown = total = 0
    for p in NBS:
        cells = code_cells(read(p))
        for i, c in enumerate(cells):
            if not re.match(r'#\|\s*export\b', c.source): continue
            names = [n.name for n in ast.parse(code(c)).body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith('_')]
            after = '\n'.join(x.source for x in cells[i + 1:i + 4])
            total += len(names); shown += sum(bool(re.search(rf'\b{n}\b', after)) for n in names)
    assert shown >= .85*total, f'{shown} of {total} exported names are shown'


def test_readme_is_made_from_the_index():
    assert 'make docs' in (ROOT/'README.md').read_text().splitlines()[0]


def test_the_table_of_tests_is_up_to_date():
    assert (ROOT/'tests/README.md').read_text() == overview.readme(), 'run python tests/overview.py'


def test_every_slow_name_is_a_test():
    known = {p.stem for p in (ROOT/'tests').glob('test_*.py')}
    for name in overview.slow():
        module, _, test = name.partition('::')
        assert module in known and (not test or f'def {test}(' in (ROOT/f'tests/{module}.py').read_text()), name


@pytest.mark.parametrize('file', sorted(p.stem for p in (ROOT/'mint_nb').glob('[a-z]*.py')))
def test_modules_know_every_name_they_use(file):
    "A name that only the notebook imports works there and fails in the package."
    known = vars(importlib.import_module(f'mint_nb.{file}')).keys() | vars(builtins).keys()
    todo, lost = [compile((ROOT/f'mint_nb/{file}.py').read_text(), file, 'exec')], set()
    while todo:
        code = todo.pop()
        todo += [c for c in code.co_consts if hasattr(c, 'co_code')]
        lost |= {i.argval for i in dis.get_instructions(code) if i.opname == 'LOAD_GLOBAL' and i.argval not in known}
    assert not lost
