"""The site and the notebooks in a real browser: headless Chromium (Debian's, by path), driven by Playwright."""
import functools, http.server, os, re, shutil, socket, subprocess, sys, tempfile, threading, time
from pathlib import Path

import nbformat, nbformat.reader, pytest

from conftest import ROOT
from mint_nb.core import cache_dir

SITE, STAGES = ROOT/'_docs', sorted((ROOT/'nbs').glob('[0-9]9_*.ipynb'))
SHOTS = os.environ.get('MINT_SHOTS')     # a folder for screenshots, to look at
QUIET = ('--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync')


@pytest.fixture(scope='module')
def browser():
    found = os.environ.get('CHROMIUM') or next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    if not found: pytest.skip('no Chromium: `make browser` installs it, or set CHROMIUM to its path')
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=found, args=QUIET)
        yield b
        b.close()


@pytest.fixture(scope='module')
def site():
    "Address of the built site."
    if not (SITE/'index.html').exists(): pytest.skip('the site is not built: make docs')
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_): pass
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Handler, directory=str(SITE))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}'
        server.shutdown()


def shoot(page, name: str, whole: bool = False) -> None:
    "Keep a picture of a page for somebody to look at, if that is wanted."
    if SHOTS: page.screenshot(path=Path(SHOTS)/f'{name}.png', full_page=whole)


def tab(browser, width: int = 1280, height: int = 900):
    "An empty page, and the list that its errors go to."
    page, errors = browser.new_page(viewport={'width': width, 'height': height}), []
    page.set_default_timeout(120_000)         # of a slow machine
    page.on('console', lambda m: errors.append(m.text) if m.type == 'error' and 'ERR_FAILED' not in m.text else None)
    page.on('pageerror', lambda e: errors.append(str(e)))
    def elsewhere(route): errors.append(f'asks for {route.request.url}'); route.abort()
    page.route(lambda u: not u.startswith(('http://127.0.0.1', 'data:', 'blob:')), elsewhere)   # nothing may be needed from the network
    return page, errors


def opened(browser, url: str):
    "A page of that address, and the list that its errors go to."
    page, errors = tab(browser)
    page.goto(url, wait_until='load')
    return page, errors


def test_each_page_on_a_desk_and_on_a_phone(browser, site):
    "No console error, formulas drawn, every picture there, nothing wider than a phone."
    bad = []
    for kind, size in (('desk', (1280, 900)), ('phone', (390, 844))):
        page, errors = tab(browser, *size)
        for file in sorted(SITE.glob('*.html')):
            page.goto(f'{site}/{file.name}', wait_until='load')
            wide = page.evaluate('document.documentElement.scrollWidth - document.documentElement.clientWidth')
            if wide > 1: bad.append(f'{file.name}, {kind}: {wide} pixels too wide')
            lost = page.evaluate('[...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src.slice(0, 80))')
            bad += [f'{file.name}, {kind}: picture {src}' for src in lost]
            raw = page.evaluate(r"[...document.querySelectorAll('main p')].filter(p => /\$\$/.test(p.textContent)).length")
            if raw: bad.append(f'{file.name}, {kind}: {raw} formulas are not drawn')
            text = file.stem.startswith(('guide', 'paper')) or kind == 'desk' and file.stem in ('index', 'limits', 'data', 'glossary')
            shoot(page, f'{file.stem}-{kind}', whole=text)
            bad += [f'{file.name}, {kind}: {e}' for e in errors]
            errors.clear()
        page.close()
    assert not bad, '\n'.join(bad)


def test_search_finds_a_function(browser, site):
    page, errors = opened(browser, f'{site}/index.html')
    page.get_by_label('Search').first.press_sequentially('orpo_loss', delay=20)
    hit = page.locator('.smalldocs-search-results a').first
    hit.wait_for()
    hit.click()
    page.wait_for_load_state()
    assert 'orpo_loss' in page.content() and 'index.html' not in page.url and not errors


def test_navigation(browser, site):
    "From the front page through the sidebar to a guide and back by the title."
    page, errors = opened(browser, f'{site}/index.html')
    page.locator('#quarto-sidebar a', has_text='Your own patients').first.click()
    page.wait_for_url('**/guide_cohort.html')
    assert page.locator('h1').first.inner_text() == 'Your own patients'
    page.locator('.navbar-brand').first.click()
    page.wait_for_url(re.compile(r'.*/(index\.html)?$'))
    assert not errors


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "Address of a JupyterLab over a copy of the stage notebooks, with the small recipe."
    home, token, runtime = tmp_path_factory.mktemp('lab'), 'x'*24, tempfile.mkdtemp(prefix='lab')   # a socket's path may have 107 characters, and pytest's folders are deep
    for f in STAGES: shutil.copy2(f, home)
    (home/'cache').mkdir()
    for f in cache_dir().iterdir():                       # downloads and first lessons are those of this machine, runs are new
        if f.name != 'by-hand': (home/'cache'/f.name).symlink_to(f)
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    env = os.environ | {'MINT_QUIET': '', 'HOME': str(home), 'JUPYTER_CONFIG_DIR': str(home/'.config'), 'JUPYTER_DATA_DIR': str(home/'.data'), 'JUPYTER_RUNTIME_DIR': runtime, 'PYTHONPATH': str(ROOT), 'MINT_CACHE': str(home/'cache'),
                        'XDG_CACHE_HOME': os.environ.get('XDG_CACHE_HOME', str(Path.home()/'.cache'))}
    with open(home/'lab.log', 'w') as log:
        server = subprocess.Popen([sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', f'--port={port}', f'--IdentityProvider.token={token}', f'--ServerApp.root_dir={home}',
                                   '--LabApp.news_url=None', '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate', '--KernelManager.transport=ipc'], cwd=home, env=env, stdout=log, stderr=log)
    try:
        for _ in range(240):
            try: socket.create_connection(('127.0.0.1', port), 1).close(); break
            except OSError: time.sleep(.5)
        else: pytest.fail((home/'lab.log').read_text()[-2000:])
        yield home, f'http://127.0.0.1:{port}/lab', token
    finally:
        server.terminate(); server.wait(20); shutil.rmtree(runtime, ignore_errors=True)


@pytest.mark.parametrize('notebook', STAGES, ids=lambda p: p.stem)
def test_run_all_in_jupyterlab(browser, lab, notebook):
    "Run All with the small recipe: every cell runs, none fails, and the last figure or table is in sight."
    home, url, token = lab
    page, errors = opened(browser, f'{url}/workspaces/{notebook.stem}/tree/{notebook.name}?token={token}&reset')
    page.locator('.jp-Notebook .jp-Cell').first.wait_for(timeout=300_000)
    try: page.get_by_text('| Idle').first.wait_for(timeout=300_000)
    except Exception as e: raise AssertionError('the kernel did not start:\n' + (home/'lab.log').read_text()[-3000:]) from e
    page.wait_for_timeout(1000)
    page.get_by_role('menuitem', name='Run', exact=True).click()
    page.locator('.lm-Menu-itemLabel', has_text=re.compile('^Run All Cells$')).click()
    cells = len([c for c in nbformat.read(notebook, 4).cells if c.cell_type == 'code'])
    end = time.monotonic() + 600
    while time.monotonic() < end:
        page.keyboard.press('Control+s'); page.wait_for_timeout(1500)
        try: nb = nbformat.read(home/notebook.name, 4)
        except nbformat.reader.NotJSONError: continue      # it is being written
        code = [c for c in nb.cells if c.cell_type == 'code']
        failed = [o for c in code for o in c.outputs if o.output_type == 'error']
        if failed or all(c.execution_count for c in code if c.source.strip()): break
    assert not failed, failed[0].evalue
    assert len(code) == cells and all(c.execution_count for c in code if c.source.strip()), 'not all cells ran in ten minutes'
    seen = [k for c in code for o in c.outputs for k in o.get('data', {})] + ['stream' for c in code for o in c.outputs if o.output_type == 'stream']
    assert seen, 'a reader sees nothing'
    shoot(page, f'lab-{notebook.stem}')
    page.close()
    api, header = url.removesuffix('lab') + 'api/sessions', {'Authorization': f'token {token}'}
    for session in browser.new_context().request.get(api, headers=header).json():       # its kernel goes too
        browser.new_context().request.delete(f'{api}/{session["id"]}', headers=header)
