"""The pipeline in grouped folds, with the smoke profile."""
import numpy as np, pandas as pd
from PIL import Image
from typer.testing import CliRunner

from mint_nb.folds import run_folds
from mint_nb.cli import app

ORGANS = ('liver', 'kidney', 'colon', 'bladder')


def test_every_patient_is_tested_once_and_a_second_call_runs_nothing(tmp_path, capsys):
    rng, rows = np.random.default_rng(0), []
    for i in range(64):
        shade = np.array([(200, 120, 160), (120, 160, 200), (160, 200, 120), (90, 90, 90)][i % 4])
        Image.fromarray(np.clip(shade + rng.integers(-20, 20, (48, 48, 3)), 0, 255).astype(np.uint8)).save(tmp_path/f'{i}.png')
        rows.append((f'{i}.png', ORGANS[i % 4], f'patient {i % 32}'))
    pd.DataFrame(rows, columns=['file', 'label', 'patient']).to_csv(tmp_path/'labels.csv', index=False)
    t = run_folds(tmp_path, tmp_path/'folds', tmp_path/'out.csv', folds=2, profile='smoke', methods=('chance', 'texture'), aside=4)
    rows = t[t.against == 'chance'].set_index('method')
    assert (rows.loc['texture', 'tiles'], rows.loc['texture', 'patients']) == (64, 32)
    assert rows.loc['texture', 'accuracy'] > .9, 'four colours are told apart'
    assert (tmp_path/'out.csv').read_text().startswith('# mint-nb folds --cases ')
    written = (tmp_path/'out.csv').read_text()
    capsys.readouterr()
    again = CliRunner().invoke(app, ['folds', '--cases', str(tmp_path), '--out', str(tmp_path/'folds'), '--csv', str(tmp_path/'out.csv'), '--folds', '2',
                                     '--profile', 'smoke', '--methods', 'chance,texture', '--aside', '4'])
    assert again.exit_code == 0 and '0 to do' in again.stdout + capsys.readouterr().out
    assert (tmp_path/'out.csv').read_text() == written
