"""What was said and what it took: compare the forecasts of finished runs with their measured times, and calibrate.

    python tools/forecast.py runs/smoke runs/laptop            # a line for each step, then the table of 71_forecast anew
    python tools/forecast.py --write runs/smoke runs/laptop    # also put it into the notebook; `make export` then writes the module

A run folder has all that is needed: `forecast.json` (speeds of the machine as they were probed, and what was said), the executed
copies (when each step began and ended) and the manifest (how long its work took). A folder without `forecast.json` was made by an
older version: for it this machine is probed, which only makes sense if it is the one that the run was made on, and idle. Runs that
were interrupted or that shared the machine with other work teach nothing. Give a smoke run and a laptop run: two sizes tell apart
what grows with the work and what does not.
"""
import json, sys
from collections import defaultdict
from datetime import datetime
from pathlib import Path

import typer

from mint_nb.core import read_json
from mint_nb.runs import Run, open_params
from mint_nb.forecast import MEASURED, Cost, Row, Speeds, fit_cost, kind_of, known_counts, parts_of, probe, seconds_of, side_by_side, work_of
from mint_nb.pipeline import nbs_folder, plan, wall_seconds, work_seconds, worker_count

HEAD = '#| export\nMEASURED = {'   # how the cell with the table begins


def facts_of(run: Run) -> tuple[dict[str, Speeds], int, bool, dict]:
    "Speeds, number of workers, whether the cache had what teachers learn from first, and the whole of what was said."
    file = run/'forecast.json'
    if file.exists():
        said = read_json(file)
        return {k: Speeds(**v) for k, v in said['speeds'].items()}, said['workers'], said['learnt'], said
    workers = worker_count(run.params)
    return probe(known_counts(run), workers), workers, False, {}


def wall_of(run: Run) -> float:   # s
    "From the start of the first executed copy to the end of the last one."
    times = [read_json(p)['metadata']['papermill'] for p in (run/'notebooks').glob('*.ipynb')]
    at = lambda key, pick: pick(datetime.fromisoformat(t[key]) for t in times if t.get(key))
    return (at('end_time', max) - at('start_time', min)).total_seconds()


def read_run(folder: Path, rows: dict[str, list[Row]]) -> None:
    "Print what was said and what it took, and add the finished steps to the rows of their kinds."
    run = Run(folder, open_params(folder))
    speeds, workers, learnt, said = facts_of(run)
    p, steps, trained, ended = known_counts(run), plan(run.params), 0, 0
    parts, done = parts_of(p, steps, speeds, workers, learnt), {e['stage'] for e in run.manifest if e['status'] == 'done'}
    print(f'\n{folder}: {workers} workers, ' + ', '.join(f'{k} ' + ' '.join(f'{f} {v:.2f}' for f, v in s._asdict().items()) for k, s in speeds.items()))
    print(f'{"step":32} {"kind":16} {"said":>14} {"took":>14}  ratio     (start + work, s)')
    for s in steps:
        kind, how = kind_of(s, p), speeds['beside' if workers > 1 and side_by_side(s) else 'alone']
        work = seconds_of(work_of(s, p, trained < workers, learnt), how)
        trained += kind == 'align'
        if s.stage not in done or (wall := wall_seconds(run, s)) is None: continue
        ended += 1
        body, part = min(wall, work_seconds(run, s)), parts[s.stage]
        rows[kind].append(Row(how.python, work, wall, body))
        print(f'{s.name:32} {kind:16} {part.start:6.1f} {part.body:7.1f} {wall - body:6.1f} {body:7.1f}  {wall/(part.start + part.body):5.2f}')
    print(f'in all: said {said.get("seconds", "nothing")}, took {wall_of(run):.1f} s' if ended == len(steps) else 'the run is not finished')


def cell_of(table: dict[str, Cost], note: str) -> str:
    "The source of the cell with the table."
    lines = [f"    {kind!r}: Cost({c.start:g}, {c.fixed:g}, {c.efficiency:g})," for kind, c in table.items()]
    return '\n'.join([f'{HEAD}   # {note}', *lines, '}'])


def write_cell(source: str) -> Path:
    "Put the table into the notebook, and leave all else as it is."
    file = nbs_folder()/'71_forecast.ipynb'
    nb = json.loads(file.read_text())
    cell = next(c for c in nb['cells'] if ''.join(c['source']).startswith(HEAD))
    cell['source'] = source.splitlines(keepends=True)
    file.write_text(json.dumps(nb, indent=1, ensure_ascii=False) + '\n')
    return file


def main(folders: list[Path] = typer.Argument(..., help='finished run folders'), write: bool = typer.Option(False, help='put the table into 71_forecast'),
         note: str = typer.Option('', help='what it was measured on, for the head of the table')):
    rows: dict[str, list[Row]] = defaultdict(list)
    for folder in folders: read_run(folder, rows)
    table = {kind: fit_cost(old, rows[kind]) if kind in rows else old for kind, old in MEASURED.items()}
    lost = [kind for kind in MEASURED if kind not in rows]
    source = cell_of(table, note or f'from {", ".join(f.name for f in folders)}' + (f'; not measured: {", ".join(lost)}' if lost else ''))
    print('\n' + source)
    if write: print(f'written into {write_cell(source)}; make export writes the module')


if __name__ == '__main__': sys.exit(typer.run(main))
