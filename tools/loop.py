"""How long the loop of a developer takes: imports, commands, a smoke run, teachers, `make check`, `make test`.

    python tools/loop.py                          everything that takes seconds, three times each
    python tools/loop.py --only check,test -n 1   what takes minutes is asked for by name
    python tools/loop.py --of FOLDER --as before  the same of another checkout, with this environment

Each measurement is written into benchmarks/loop.json the moment it is there, and benchmarks/loop.md is made from it.
Seconds are those of the clock; behind them those of the processor, with all child processes. Use an idle machine.
"""
import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
RECORD = ROOT/'benchmarks/loop.json'
STAGES = ('cohort', 'upstream', 'preferences', 'align', 'predict', 'analysis')
QUICK = ('cli', *STAGES, 'status', 'help', 'version', 'smoke')
LONG = ('upstream-stage', 'check', 'check-again', 'test')
WORDS = {
    'cli': 'import of the command line',
    **{s: f'import of the stage module `{s}`' for s in STAGES},
    'status': '`mint-nb status` of a finished smoke run',
    'help': '`mint-nb --help`',
    'version': '`mint-nb --version`',
    'smoke': '`mint-nb run --profile smoke`, libraries and ontology cached',
    'upstream-stage': 'stage `upstream` of the laptop profile, nothing cached',
    'check': '`make check` in a fresh clone',
    'check-again': '`make check` again',
    'test': '`make test` in a fresh clone, installed',
}


def environment(checkout: Path) -> dict:
    "Variables with which this interpreter runs the code of a checkout."
    return os.environ | {'PYTHONPATH': str(checkout), 'PATH': f'{BIN}:{os.environ["PATH"]}', 'HF_HUB_OFFLINE': '1'}


def timed(command: list, cwd: Path, env: dict) -> tuple[float, float]:
    "Seconds of the clock and of the processor that a command and its children take; a failure ends the measurement."
    spent = lambda r: r.ru_utime + r.ru_stime
    before, start = spent(resource.getrusage(resource.RUSAGE_CHILDREN)), time.perf_counter()
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(f'{" ".join(map(str, command))} ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}')
    return round(seconds, 2), round(spent(resource.getrusage(resource.RUSAGE_CHILDREN)) - before, 2)


def mint_nb(*args) -> list:
    "The command line of the checkout in PYTHONPATH."
    return [sys.executable, '-c', 'from mint_nb.cli import app; app()', *map(str, args)]


def clone(checkout: Path, folder: Path) -> Path:
    "A fresh clone whose environment counts as installed."
    subprocess.run(['git', 'clone', '-q', str(checkout), str(folder)], check=True)
    (folder/'.make').mkdir()
    (folder/'.make/env').touch()
    return folder


def measure(name: str, checkout: Path, box: Path, turn: int) -> tuple[float, float]:
    "One measurement."
    env, run = environment(checkout), box/'smoke'
    if name in ('cli', *STAGES):
        return timed([sys.executable, '-c', f'import mint_nb.{name}'], box, env)
    if name in ('status', 'help', 'version'):
        if name == 'status' and not run.exists(): timed(mint_nb('run', '--profile', 'smoke', '--out', run), box, env)
        return timed(mint_nb(*(('status', run) if name == 'status' else (f'--{name}',))), box, env)
    if name == 'smoke':
        return timed(mint_nb('run', '--profile', 'smoke', '--out', box/f'smoke-{turn}'), box, env)
    if name == 'upstream-stage':
        run, env = box/f'laptop-{turn}', env | {'MINT_CACHE': str(box/f'cache-{turn}')}
        stage = next((checkout/'nbs').glob('?9_upstream.ipynb')).stem      # 19_upstream in version 0.1
        timed(mint_nb('run', '--profile', 'laptop', '--out', run, '--until', stage), box, env)
        entries = map(json.loads, (run/'manifest.jsonl').read_text().splitlines())
        entry = next(e for e in entries if e['stage'].startswith('upstream'))
        return entry['seconds'], entry['cpu_seconds']
    folder = box/'clone' if name == 'check-again' else box/f'clone-{name}-{turn}'
    if name == 'check-again' and not folder.exists():
        clone(checkout, folder)
        timed(['make', 'check', f'BIN={BIN}'], folder, environment(folder))
    if not folder.exists(): clone(checkout, folder)
    return timed(['make', name.removesuffix('-again'), f'BIN={BIN}'], folder, environment(folder))


def counts(checkout: Path) -> dict:
    "Tests that pytest collects and code cells of the notebooks."
    out = subprocess.run([sys.executable, '-m', 'pytest', 'tests', '--collect-only', '-q'], cwd=checkout,
                         env=environment(checkout), capture_output=True, text=True).stdout
    cells = [c for p in sorted((checkout/'nbs').glob('*.ipynb')) for c in json.loads(p.read_text())['cells']]
    return {'tests': sum('::' in line for line in out.splitlines()), 'code_cells': sum(c['cell_type'] == 'code' for c in cells)}


def table(record: dict) -> str:
    "The record as Markdown, before beside after."
    def cell(row) -> str:
        if not row: return ''
        clock, busy = (statistics.median(x[i] for x in row['seconds']) for i in (0, 1))
        return f'{clock:.2f} ({busy:.2f}), n = {len(row["seconds"])}' if clock < 100 else f'{clock:.0f} ({busy:.0f}), n = {len(row["seconds"])}'
    sides = {k: record[k] for k in ('before', 'after') if k in record}
    lines = ['# The loop, before and after', '',
             'Made by `python tools/loop.py`. Median seconds of the clock (of the processor, with child processes; forked kernels are not counted, so smoke and `make test` show less afterwards than they take).', '']
    lines += [f'- {k}: commit {s["commit"]}, {s["machine"]}' + (f'; {s["remark"]}' if s.get('remark') else '') for k, s in sides.items()]
    lines += ['', '| | ' + ' | '.join(sides) + ' |', '|---' + '|---:'*len(sides) + '|']
    for name in (*QUICK, *LONG):
        rows = [s['rows'].get(name) for s in sides.values()]
        if any(rows): lines.append(f'| {WORDS[name]} | ' + ' | '.join(map(cell, rows)) + ' |')
    for key, words in (('tests', 'tests'), ('code_cells', 'executed code cells in notebooks')):
        lines.append(f'| {words} | ' + ' | '.join(f'{s["counts"][key]:,}' for s in sides.values()) + ' |')
    return '\n'.join(lines) + '\n'


def write(record: dict) -> None:
    "Record and table, each renamed into place."
    for file, text in ((RECORD, json.dumps(record, indent=1) + '\n'), (RECORD.with_suffix('.md'), table(record))):
        tmp = file.with_suffix(file.suffix + '.tmp')
        tmp.write_text(text)
        os.replace(tmp, file)


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument('--of', type=Path, default=ROOT, help='checkout to measure')
    args.add_argument('--as', dest='side', choices=('before', 'after'), default='after')
    args.add_argument('--only', default=','.join(QUICK), help=f'of {", ".join((*QUICK, *LONG))}')
    args.add_argument('-n', type=int, default=3, help='times')
    args.add_argument('--remark', default='', help='what a reader must know of the machine')
    a = args.parse_args()
    checkout, names = a.of.resolve(), a.only.split(',')
    if unknown := [n for n in names if n not in WORDS]: sys.exit(f'there is no measurement {", ".join(unknown)}')
    commit = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], cwd=checkout, capture_output=True, text=True).stdout.strip()
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    side = record.setdefault(a.side, {'rows': {}})
    model = next((l.split(':')[1].strip() for l in Path('/proc/cpuinfo').read_text().splitlines() if 'model name' in l), '')
    side |= {'commit': commit, 'machine': f'{model}, {os.cpu_count()} cores', 'counts': counts(checkout)}
    if a.remark: side['remark'] = a.remark
    box = Path(tempfile.mkdtemp(prefix='loop-'))
    try:
        for name in names:
            if name in QUICK: measure(name, checkout, box, -1)       # the first time fills caches
            side['rows'].pop(name, None)
            for turn in range(a.n):
                side['rows'].setdefault(name, {'seconds': []})['seconds'].append(measure(name, checkout, box, turn))
                write(record)
                print(f'{name:16} {side["rows"][name]["seconds"][-1]}', flush=True)
    finally: shutil.rmtree(box, ignore_errors=True)
    print(table(record))


if __name__ == '__main__': main()
