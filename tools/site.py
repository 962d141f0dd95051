"""The docs site without Quarto: execute the notebooks (cached), write README.md, render `_docs/` with smalldocs.

    python tools/site.py             everything
    python tools/site.py --readme    only README.md
    python tools/site.py --check     everything, and fail if README.md was not up to date
    python tools/site.py --execute   no site: only the notebooks that have not been executed as they are now

An executed copy serves tests and site: `make test` and `make docs` both execute what has changed, and nothing twice. Every code cell is executed,
with its assertions, also those that nbdev_test would pass over (`#| eval: false`, and the flags slow and gpu of settings.ini). Each notebook
has a kernel of its own, which is forked from a process that has loaded the libraries (70_kernels); `MINT_WARM=0` starts them one by one.

Where Quarto is installed, `nbdev_docs` builds the same site from the same `_quarto.yml`.
"""
import argparse, ast, json, os, re, shutil, subprocess, sys, tarfile, tempfile, time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS, PROC, DOCS, MAKE = ROOT/'nbs', ROOT/'_proc', ROOT/'_docs', ROOT/'.make'
NOTE = '<!-- This file is made from nbs/index.ipynb by `make docs`. -->\n\n'

os.chdir(ROOT)
sys.path.insert(0, str(ROOT))
os.environ |= {'IN_TEST': '1', 'MINT_QUIET': '1', 'OMP_NUM_THREADS': '1', 'TOKENIZERS_PARALLELISM': 'false'}   # IN_TEST: nbdev_export() in a notebook does nothing

import nbformat
from mint_nb.core import atomic_path, cache_dir, code_digest, digest, file_digest
from mint_nb.runs import locked
from mint_nb.kernels import NotebookFailed, can_fork, run_notebook, warm_up


def code(cell) -> str:
    "Source of a code cell without its directives; '' for text."
    return '\n'.join(l for l in cell.source.splitlines() if not l.startswith('#|')).strip() if cell.cell_type == 'code' else ''


def uses(nb) -> list[str]:
    "Modules of the package that a notebook is or imports."
    source = '\n'.join(c.source for c in nb.cells if c.cell_type == 'code')
    names = set(re.findall(r'(?:from|import)\s+(mint_nb\.\w+)', source)) | {'mint_nb.' + m for m in re.findall(r'^#\|\s*default_exp\s+(\w+)', source, re.M)}
    return sorted(n for n in names if (ROOT/(n.replace('.', '/') + '.py')).exists())


def key(path: Path) -> str:
    "What the outputs of a notebook depend on: its cells, the code behind it, the small recipe, versions, committed results if it reads some."
    nb = nbformat.read(path, 4)
    modules = uses(nb)
    text = [c.source for c in nb.cells] + [(ROOT/(m.replace('.', '/') + '.py')).read_text() for m in modules]
    results = file_digest(ROOT/'benchmarks') if (ROOT/'benchmarks').is_dir() and 'benchmarks' in ''.join(text) else ''
    return digest([[(c.cell_type, c.source) for c in nb.cells], [code_digest(m) for m in modules], file_digest(ROOT/'mint_nb/profiles'), file_digest(ROOT/'constraints.txt'), results])


def copy_of(path: Path) -> Path:
    "Where the executed copy of a notebook stands, once it is executed as it is now."
    return MAKE/f'docs/{path.stem}-{key(path)}.ipynb'


def execute(path: Path) -> tuple[str, float, str]:
    "Execute one notebook unless a copy with the same key is there: its name, seconds, and the error ('' if none)."
    copy, start = copy_of(path), time.perf_counter()
    if not copy.exists():
        with tempfile.TemporaryDirectory(dir=MAKE) as d:
            try: run_notebook(path, f'{d}/{path.name}', cwd=NBS, quiet=True)
            except NotebookFailed as e:
                return path.stem, time.perf_counter() - start, f'{e.error} in cell {e.index}: {e.message}\n{e.cell}'
            for old in copy.parent.glob(f'{path.stem}-*.ipynb'): old.unlink()
            copy.parent.mkdir(exist_ok=True)
            shutil.move(f'{d}/{path.name}', copy)
    return path.stem, time.perf_counter() - start, ''


LONGEST = ('44_engine', '70_kernels', '56_reason', '88_honest', '72_pipeline', '53_retrieve', '73_export', '82_calibration_study')   # where nothing is remembered


def longest_first(paths: list[Path]) -> list[Path]:
    "By the seconds that they took last time: two at a time then end at about the same time."
    file = MAKE/'docs/seconds.json'
    seconds = json.loads(file.read_text()) if file.exists() else {}
    guess = {name: 1000 - i for i, name in enumerate(LONGEST)}
    return sorted(paths, key=lambda p: (-seconds.get(p.stem, guess.get(p.stem, 0)), p.name))


def remember(seconds: dict[str, float]) -> None:
    "Keep how long notebooks took."
    file = MAKE/'docs/seconds.json'
    before = json.loads(file.read_text()) if file.exists() else {}
    with atomic_path(file) as tmp: tmp.write_text(json.dumps(before | seconds, indent=1))


def execute_all(workers: int) -> None:
    "Execute what has changed, two notebooks at a time; stop with the errors if some fail."
    (MAKE/'docs').mkdir(parents=True, exist_ok=True)
    paths, start = sorted(NBS.glob('*.ipynb')), time.perf_counter()
    todo = longest_first([p for p in paths if not copy_of(p).exists()])
    print(f'{len(paths)} notebooks, {len(todo)} to execute', flush=True)
    if not todo: return
    warm_up()
    took, failed = {}, []
    with ThreadPoolExecutor(workers) as pool:
        for done in as_completed([pool.submit(execute, p) for p in todo]):
            name, took[name], error = done.result()
            print(f'  {name:20} {"FAILED" if error else "executed":8} {took[name]:6.1f} s', flush=True)
            if error: failed.append(f'{name}: {error}')
    remember(took)
    print(f'{len(todo)} notebooks in {time.perf_counter() - start:.0f} s, kernels {"forked" if can_fork() else "one by one"}', flush=True)
    if failed: sys.exit('\n'.join(failed))


def executed(stem: str):
    "The executed copy of a notebook, without what papermill adds, without warnings and bars, without paths of this machine."
    text = next((MAKE/'docs').glob(f'{stem}-*.ipynb')).read_text()
    for path, short in ((ROOT, '.'), (cache_dir(), '~/.cache/mint_nb'), (Path.home(), '~')): text = text.replace(f'{path}/', f'{short}/')
    text = re.sub(re.escape(tempfile.gettempdir()) + r'/\w+', '...', text)
    nb = nbformat.reads(text, 4)
    nb.metadata = {'kernelspec': nb.metadata.kernelspec}
    for c in nb.cells:
        c.metadata = {}
        if c.cell_type == 'code': c.outputs = [o for o in c.outputs if o.get('name') != 'stderr']
    return nb


def with_source(nb):
    "Behind each exported cell a folded copy of its code: nbdev shows only the signature, a reader may want the rest."
    cells = []
    for c in nb.cells:
        cells.append(c)
        if c.cell_type != 'code': continue
        body = ast.parse(re.sub(r'^[%!].*', '', code(c), flags=re.M)).body
        imports = [isinstance(n, (ast.Import, ast.ImportFrom)) for n in body]
        types = [ast.unparse(i) for n in body if isinstance(n, ast.If) and getattr(n.test, 'id', '') == 'TYPE_CHECKING' for i in n.body]
        if types: cells.append(nbformat.v4.new_code_cell('\n'.join(['#| hide', *types])))   # nbdev looks types up that a string names
        if not re.match(r'#\|\s*export', c.source):
            if any(imports) and not all(imports): c.source = '#| eval: false\n' + c.source   # nbdev would run it again, out of context
        elif not all(imports):
            cells.append(nbformat.v4.new_code_cell(f'#| eval: false\n#| code-fold: true\n#| code-summary: "Source"\n{code(c)}'))
    nb.cells = cells
    return nb


def unnumbered(text: str) -> str:
    "Page names as nbdev's links write them: 00_core.ipynb becomes core.ipynb."
    return re.sub(r'\b\d\d_(\w+\.ipynb)', r'\1', text)


def process() -> None:
    "nbdev's own processing (documentation of exported functions, links, hidden cells) of the executed copies, into _proc/."
    from execnb.nbio import read_nb, write_nb
    from nbdev.processors import FilterDefaults
    shutil.rmtree(PROC, ignore_errors=True); PROC.mkdir()
    for f in NBS.iterdir():
        if f.suffix == '.yml': (PROC/f.name).write_text(unnumbered(f.read_text()))
        if f.suffix in ('.css', '.svg', '.png'): shutil.copy2(f, PROC)
    for path in sorted(NBS.glob('*.ipynb')):
        page = PROC/unnumbered(path.name)
        nbformat.write(with_source(executed(path.stem)), page)
        nb = read_nb(page)
        FilterDefaults()(nb)
        for c in nb.cells:
            if c.cell_type == 'raw': c.source = re.sub(r'^output-file:.*\n', '', c.source, flags=re.M)
            if c.cell_type == 'markdown': c.source = unnumbered(c.source)
        write_nb(nb, page)


def katex(version: str) -> Path | None:
    "Folder with KaTeX as files, from the npm package; None where npm or its registry cannot be reached."
    home = MAKE/f'katex-{version}'
    if home.exists(): return home
    if not shutil.which('npm'): return None
    with tempfile.TemporaryDirectory(dir=MAKE) as d:
        if subprocess.run(['npm', 'pack', '--silent', f'katex@{version}'], cwd=d, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode: return None
        with tarfile.open(next(Path(d).glob('*.tgz'))) as t: t.extractall(d, filter='data')
        dist = Path(d)/'package/dist'
        with atomic_path(home) as tmp:
            (tmp/'contrib').mkdir(parents=True); (tmp/'fonts').mkdir()
            for f in ('katex.min.css', 'katex.min.js', 'contrib/auto-render.min.js'): shutil.copy2(dist/f, tmp/f)
            for f in (dist/'fonts').glob('*.woff2'): shutil.copy2(f, tmp/'fonts')
            shutil.copy2(Path(d)/'package/LICENSE', tmp)
    return home


def render() -> None:
    "smalldocs over _proc/, strict; then local KaTeX and links that stay inside the site; then into _docs/."
    from nbdev.config import get_config
    from smalldocs.layout import KATEX
    from smalldocs.site import build
    warnings = [str(w) for w in build(str(PROC), quiet=True).warnings]
    if warnings: sys.exit('smalldocs warns:\n  ' + '\n  '.join(warnings))
    site, cfg = PROC/'_docs', get_config()
    home = cfg.doc_host.rstrip('/') + '/' + cfg.doc_baseurl.strip('/') + '/'
    local = katex(re.search(r'katex@([\d.]+)', KATEX)[1])
    if local: shutil.copytree(local, site/'katex')
    else: print('  note: npm is not here, so formulas are drawn only where the reader is online')
    for page in site.rglob('*.html'):
        text = re.sub(rf'\[(`[^`\]]+`)\]\({re.escape(home)}[^)\s]*\)', r'\1', page.read_text())     # a link inside a code block is no link
        lost = sorted({l for l in re.findall(f'href="{home}([^"#]+)', text) if not (site/l).exists()})
        if lost: sys.exit(f'{page.name} links to pages that do not exist: {", ".join(lost)}')
        page.write_text(text.replace(f'href="{home}', 'href="').replace(KATEX, 'katex' if local else KATEX))
    for sheet in site.rglob('*.css'):                                                               # a theme's fonts from elsewhere: the page is read offline, and nobody is told who reads it
        sheet.write_text(re.sub(r'@import\s+url\(["\']?https?:[^)]*\);?', '', sheet.read_text()))
    shutil.rmtree(DOCS, ignore_errors=True); shutil.move(site, DOCS)


def readme() -> bool:
    "Write README.md from the executed index.ipynb; says whether it was up to date."
    from nbconvert import MarkdownExporter
    nb = executed('index')
    nb.cells = [c for c in nb.cells if not re.match(r'#\|\s*hide', c.source)]
    for c in nb.cells:
        if c.cell_type != 'code': continue
        c.outputs = [o for o in c.outputs if 'text/markdown' in o.get('data', {}) or o.output_type == 'stream']
        c.source = '' if re.search(r'^#\|\s*echo:\s*false', c.source, re.M) else code(c)
    nb.metadata.language_info = {'name': 'python'}
    text, _ = MarkdownExporter().from_notebook_node(nb)
    text = NOTE + re.sub(r'\n{3,}', '\n\n', re.sub(r'```(python)?\s*\n```\n', '', text)).strip() + '\n'
    text = re.sub(r'\]\(([\w-]+\.(?:ipynb|svg))\)', r'](nbs/\1)', text)
    file = ROOT/'README.md'
    same = file.exists() and file.read_text() == text
    if not same: file.write_text(text)
    return same


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument('--readme', action='store_true', help='only README.md')
    args.add_argument('--check', action='store_true', help='fail if README.md was not up to date')
    args.add_argument('--execute', action='store_true', help='only execute the notebooks that have changed')
    args.add_argument('--workers', type=int, default=2, help='notebooks executed at a time')
    a = args.parse_args()
    MAKE.mkdir(exist_ok=True)
    with locked(MAKE/'site.lock'):
        if a.execute: return execute_all(a.workers)
        if a.readme:
            name, seconds, error = execute(NBS/'index.ipynb')
            if error: sys.exit(error)
        else: execute_all(a.workers)
        same = readme()
        if not a.readme:
            print('Rendering'); process(); render()
            print(f'The site is in {DOCS.relative_to(ROOT)}/ ({len(list(DOCS.glob("*.html")))} pages): open {DOCS.name}/index.html')
    if a.check and not same: sys.exit('README.md was not up to date with nbs/index.ipynb; it is now: commit it')


if __name__ == '__main__': main()
