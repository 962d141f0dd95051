"""What each test file needs and how long it takes, as tests/README.md says it.

    python tests/overview.py      writes the table into tests/README.md; test_notebooks.py checks that it is as it should be
"""
import ast, re
from pathlib import Path

HERE = Path(__file__).resolve().parent
HEAD, TAIL = '<!-- made by tests/overview.py -->\n', '<!-- end -->\n'
NEEDS = {     # what is needed: how a source shows it
    'real data': r'def \w+\([^)]*\bdata\b', 'Chromium': r'\bbrowser\b', 'the smoke run': r'\bsmoke_run\b',
    'kernels': r'run_pipeline|run_notebook|papermill|mint-nb|from test_pipeline', 'SmolLM2': r"smollm2|load_student\(\)", 'MiniLM': r'minilm|load_encoder\(\)',
    'Ray or submitit': r"needs\('(ray|submitit)'\)", 'a GPU': r'pytest\.mark\.cuda|mark\.cuda'}


def slow() -> set[str]:
    "The names in SLOW of conftest.py: a module, or a test as module::name."
    tree = ast.parse((HERE/'conftest.py').read_text())
    value = next(n.value for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == 'SLOW')
    return set(ast.literal_eval(value))


def row(file: Path) -> str:
    "One line of the table."
    text = file.read_text()
    tree, marked = ast.parse(text), slow()
    tests = {n.name: {a.arg for a in n.args.args} for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith('test_')}
    quick = [t for t, fixtures in tests.items() if not {file.stem, f'{file.stem}::{t}'} & marked and 'smoke_run' not in fixtures]
    needs = [what for what, pattern in NEEDS.items() if re.search(pattern, text)]
    what = ast.get_docstring(tree).split('\n')[0].split(': ')[0].rstrip('.')
    share = 'all' if len(quick) == len(tests) else 'none' if not quick else f'{len(quick)} of {len(tests)}'
    return f'| `{file.name}` | {what} | {", ".join(needs) or "nothing"} | {share} |\n'


def table() -> str:
    "The whole table."
    files = sorted(HERE.glob('test_*.py'))
    return '| file | what it is about | needs | in `make check` |\n|---|---|---|---|\n' + ''.join(map(row, files))


def readme() -> str:
    "tests/README.md with the table as it should be."
    text = (HERE/'README.md').read_text()
    return text[:text.index(HEAD)] + HEAD + table() + TAIL + text[text.index(TAIL) + len(TAIL):]


if __name__ == '__main__': (HERE/'README.md').write_text(readme())
