"""Tiles of users: three layouts of PanNuke, zips and folders with a table, and one clear message for each thing that can be wrong."""
import io, zipfile
from pathlib import Path

import numpy as np, pytest
from PIL import Image

from mint_nb.core import InputError
from mint_nb.tasks import Case
from mint_nb.params import CohortParams
from mint_nb.runs import open_run
from mint_nb.splits import check_splits
from mint_nb.nuclei import TISSUES, simulate_tile
from mint_nb.tiles import (
    deal, load_labelled, load_pannuke, load_tiles, open_tile, pannuke_folds, real_tiles, save_tiles, simulated_tiles,
    split_tiles, stain_jitter, tile_files, tissue_catalogue, tissue_id, turned)
from mint_nb.cohort import make_cohort

LAYOUTS = ('Fold {k}/images/fold{k}', 'fold_{k}/images', 'fold{k}')


def png(image, form='PNG', **more):
    out = io.BytesIO(); image.save(out, form, **more); return out.getvalue()


TILE = simulate_tile('Liver', 'P1', 0, size=64).image
PNG = png(TILE)


def pannuke(folder, layout='fold{k}', n=8, size=64, folds=(1, 2, 3)) -> Path:
    "A folder in PanNuke's form: float64 in 0-255, types as text."
    for k in folds:
        d = Path(folder)/layout.format(k=k); d.mkdir(parents=True)
        tissues = [TISSUES[i % 4] for i in range(n)]
        np.save(d/'images.npy', np.stack([np.asarray(simulate_tile(t, f'{k}-{i}', 0, size=size).image, 'float64') for i, t in enumerate(tissues)]))
        np.save(d/'types.npy', np.array(tissues, '<U13'))
    return Path(folder)


def table(*rows, columns='file,label,patient'): return '\n'.join([columns, *rows]).encode()


def zipped(path, **entries) -> Path:
    with zipfile.ZipFile(path, 'w') as z:
        for n, raw in entries.items(): z.writestr(n.replace('__', '/').replace('_png', '.png').replace('_csv', '.csv'), raw)
    return path


@pytest.mark.parametrize('layout', LAYOUTS)
def test_pannuke_layouts(tmp_path, layout):
    where = pannuke(tmp_path/'p', layout)
    s = load_tiles(where)
    assert sorted(pannuke_folds(where)) == [1, 2, 3] and len(s.cases) == 24 and not s.problems and not s.patients
    i = next(c.id for c in s.cases if s.folds[c.id] == 2)
    files = sorted(where.rglob('images.npy'))
    assert np.array_equal(np.asarray(s.read(i)), np.load(files[1])[0].astype('uint8'))


def test_pannuke_is_mapped_not_loaded(tmp_path, monkeypatch):
    where, modes = pannuke(tmp_path/'p'), []
    load = np.load
    monkeypatch.setattr(np, 'load', lambda f, mmap_mode=None, **kw: modes.append((Path(f).name, mmap_mode, kw.get('allow_pickle'))) or load(f, mmap_mode=mmap_mode, **kw))
    load_pannuke(where)
    assert ('images.npy', 'r', False) in modes and ('images.npy', None, False) not in modes


def test_pannuke_folds_become_splits(tmp_path):
    s = load_tiles(pannuke(tmp_path/'p', n=16))
    parts = split_tiles(s, s.cases, CohortParams(train=12, calibration=4, validation=4, test=12))
    check_splits(parts)
    assert {(c.split, s.folds[c.id]) for c in parts} == {('train', 1), ('calibration', 2), ('validation', 2), ('test', 3)}
    assert len([c for c in parts if c.split == 'test']) == 12 and len({c.id for c in parts}) == len(parts)
    two = load_tiles(pannuke(tmp_path/'q', n=32, folds=(1, 3)))
    parts = split_tiles(two, two.cases, CohortParams(train=12, calibration=4, validation=4, test=12))
    assert {(c.split, two.folds[c.id]) for c in parts} == {('train', 1), ('calibration', 1), ('validation', 1), ('test', 3)}


@pytest.mark.parametrize('change, message', [
    (lambda x, t: (x[..., 0], t), 'grey-scale'), (lambda x, t: (x[..., :1], t), 'grey-scale'), (lambda x, t: (np.concatenate([x, x[..., :1]], -1), t), 'alpha'),
    (lambda x, t: (x[:, :40], t), 'another shape'), (lambda x, t: (x.astype('uint16'), t), 'uint16'), (lambda x, t: (x, t[:-1]), 'for 8 images'),
    (lambda x, t: (x, np.where(np.arange(8) == 3, '', t)), 'type is missing'), (lambda x, t: (x, np.where(np.arange(8) == 3, 'Spleen', t)), 'not one of the 19'),
    (lambda x, t: (x, None), 'is missing')])
def test_pannuke_refusals(tmp_path, change, message):
    where = pannuke(tmp_path/'p', folds=(1,))
    d = where/'fold1'
    x, t = change(np.load(d/'images.npy'), np.load(d/'types.npy'))
    np.save(d/'images.npy', x)
    (d/'types.npy').unlink()
    if t is not None: np.save(d/'types.npy', t)
    with pytest.raises(InputError, match=message) as e: load_pannuke(where)
    assert e.value.file is not None


def test_pannuke_bad_pixels_truncation_and_pickles(tmp_path):
    where = pannuke(tmp_path/'p', folds=(1,))
    f = where/'fold1/images.npy'
    x = np.load(f); x[0] = np.nan; x[1] /= 255; np.save(f, x)
    s = load_pannuke(where)
    for i, message in ((0, 'outside 0-255'), (1, 'in 0-1')):
        with pytest.raises(InputError, match=message): s.read(s.cases[i].id)
    made = real_tiles(CohortParams(source=str(where), train=4, calibration=0, validation=0, test=2, diseases=0, min_cases=2))
    (tmp_path/'images').mkdir()
    kept, captions, lost = save_tiles(made, tmp_path/'images')
    assert len(kept) + len(lost) == len(made.cases) and all((tmp_path/c.image).exists() for c in kept)
    f.write_bytes(f.read_bytes()[:5000])
    with pytest.raises(InputError, match='truncated'): load_pannuke(where)
    np.save(f, np.array([{}], dtype=object))
    with pytest.raises(InputError, match='not a plain NumPy array'): load_pannuke(where)


@pytest.mark.parametrize('raw, message', [
    (PNG[:len(PNG)//2], 'truncated'), (png(TILE, 'JPEG')[:600], 'truncated'), (png(TILE.convert('L')), 'grey-scale'), (png(TILE.convert('RGBA')), 'alpha'), (png(TILE.convert('LA')), 'alpha'),
    (png(Image.fromarray(np.zeros((64, 64), 'uint16'))), '16 bits'), (png(TILE.convert('P')), 'palette'), (png(TILE.convert('1')), 'black and white'), (png(TILE.convert('CMYK'), 'JPEG'), 'CMYK'),
    (png(TILE.crop((0, 0, 64, 30))), '64 x 30'), (png(TILE.resize((16, 16))), '16 x 16'), (b'', 'not a readable picture'), (b'GIF89a' + bytes(60), 'not a readable picture')])
def test_unusable_pictures(raw, message):
    with pytest.raises(InputError, match=message) as e: open_tile(raw, file='a.png')
    assert str(e.value).startswith('file a.png')


def test_a_16_bit_rgb_png_is_refused():
    "Pillow would open it as 8 bits without a word."
    import struct, zlib
    chunk = lambda kind, data: struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    raw = b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', 40, 40, 16, 2, 0, 0, 0)) + chunk(b'IDAT', zlib.compress(b''.join(b'\0' + bytes(240) for _ in range(40)))) + chunk(b'IEND', b'')
    with pytest.raises(InputError, match='16 bits'): open_tile(raw, file='a.png')


@pytest.mark.parametrize('row, message', [
    ('a.png,,P1', 'type is missing'), ('a.png,spleen,P1', 'outside the catalogue'), ('a.png,Liver,', 'names no patient'), ('b.png,Liver,P1', 'not there')])
def test_rows_that_cannot_be_used_are_listed(tmp_path, row, message):
    z = zipped(tmp_path/'t.zip', labels_csv=table('ok.png,Liver,P0', row), ok_png=PNG, a_png=PNG)
    with pytest.raises(InputError, match=message): load_labelled(z)
    s = load_labelled(z, 'list')
    assert [c.id for c in s.cases] == ['ok'] and len(s.problems) == 1 and message in str(s.problems[0])


@pytest.mark.parametrize('column', ['split', 'fold'])
def test_a_patient_on_both_sides_refuses_the_source(tmp_path, column):
    z = zipped(tmp_path/'t.zip', labels_csv=table('a.png,Liver,P1,train', 'b.png,Liver,P1,test', columns=f'file,label,patient,{column}'), a_png=PNG, b_png=PNG)
    with pytest.raises(InputError, match='both sides') as e: load_tiles(z)
    assert e.value.record == 'P1'


def test_patients_and_splits_are_read_without_blanks_and_case(tmp_path):
    z = zipped(tmp_path/'t.zip', labels_csv=table('a.png,Liver,P1,train', 'b.png,Liver,P1 ,Test', columns='file,label,patient,split'), a_png=PNG, b_png=PNG)
    with pytest.raises(InputError, match='both sides'): load_tiles(z)
    z = zipped(tmp_path/'u.zip', labels_csv=table('a.png,Liver,P1,training', columns='file,label,patient,split'), a_png=PNG)
    with pytest.raises(InputError, match="'training' is no split") as e: load_tiles(z)
    assert (e.value.record, e.value.field) == ('a.png', 'split')


def test_a_tile_a_few_pixels_off_a_square_is_cut(tmp_path):
    out = io.BytesIO(); Image.new('RGB', (66, 64)).save(out, 'PNG')
    assert open_tile(out.getvalue()).size == (64, 64)


@pytest.mark.parametrize('rows, overrides, message', [
    (['{n}.png,{t},P{n},train'], {}, 'no case is in test'), (['{n}.png,{t},P{n},'], {'cohort.label_share': .5}, 'tiles keep their labels')])
def test_a_cohort_that_cannot_be_tested_ends_before_any_training(tmp_path, rows, overrides, message):
    lines = [rows[0].format(n=n, t=('Liver', 'Colon', 'Kidney', 'Bladder')[n % 4]) for n in range(32)]
    z = zipped(tmp_path/'t.zip', labels_csv=table(*lines, columns='file,label,patient,split'), **{f'{n}_png': PNG for n in range(32)})
    run = open_run(tmp_path/'run', 'smoke', {'task': 'tissue', 'cohort.source': str(z), 'cohort.train': 0, 'cohort.test': 0} | overrides)
    with pytest.raises(InputError, match=message): make_cohort(run)


def test_zip_slip_links_and_broken_archives(tmp_path):
    for name in ('../a.png', '/a.png', 'x/../../a.png', 'C:\\a.png'):
        with zipfile.ZipFile(tmp_path/'s.zip', 'w') as z: z.writestr(name, PNG)
        with pytest.raises(InputError, match='outside the archive'): tile_files(tmp_path/'s.zip')
    with zipfile.ZipFile(tmp_path/'l.zip', 'w') as z:
        info = zipfile.ZipInfo('a.png'); info.external_attr = 0o120777 << 16
        z.writestr(info, '/etc/passwd')
    with pytest.raises(InputError, match='outside the archive'): tile_files(tmp_path/'l.zip')
    (tmp_path/'b.zip').write_bytes(b'PK nothing')
    with pytest.raises(InputError, match='not a readable zip'): tile_files(tmp_path/'b.zip')
    with pytest.raises(InputError, match='neither a folder nor a zip'): tile_files(zipped(tmp_path/'t.zip', a_png=PNG).rename(tmp_path/'t.bin'))
    with pytest.raises(InputError, match='no labels.csv'): load_labelled(zipped(tmp_path/'n.zip', a_png=PNG))


def test_folder_published_split_and_unlabelled(tmp_path):
    (tmp_path/'t').mkdir()
    for n in 'abcd': (tmp_path/f't/{n}.png').write_bytes(PNG)
    (tmp_path/'t/labels.csv').write_bytes(table('a.png,Liver,P1,train', 'b.png,Colon,P2,train', 'c.png,Liver,P3,test', 'd.png,Colon,P4,test', columns='file,label,patient,split'))
    s = load_tiles(tmp_path/'t')
    parts = split_tiles(s, s.cases, CohortParams(train=0, calibration=0, validation=0, test=0))
    assert {c.id: c.split for c in parts} == {'a': 'train', 'b': 'train', 'c': 'test', 'd': 'test'}
    bare = load_tiles(tmp_path/'t', labels=False)
    assert len(bare.cases) == 4 and not bare.cases[0].labels and bare.read('a').size == (64, 64)


def test_names():
    assert len(tissue_catalogue()) == 19 and tissue_id('Head and Neck') == 'HeadNeck' and tissue_id('bile duct') == 'Bile-duct' and tissue_id('') is None
    c = tissue_catalogue(['Ovarian', 'Pancreatic', 'Brain'])
    assert c.resolve('ovarian').id == 'Ovarian' and c.names['Pancreatic'] == 'Pancreas'


def test_simulated_tiles_split_by_patient_and_say_nothing_in_ids():
    made = simulated_tiles(CohortParams(diseases=0, train=76, calibration=19, validation=19, test=38, image_size=32, tiles=2))
    check_splits(made.cases)
    assert len(made.catalogue) == 19 and not made.cases[0].note
    for split in ('train', 'test'): assert {c.labels['tissue'] for c in made.cases if c.split == split} == set(TISSUES)
    first = [c.labels['tissue'] for c in sorted(made.cases, key=lambda c: c.id)][::2]
    assert first != sorted(first) and all(c.id.startswith('SIM-') and c.group.startswith('SIM:') for c in made.cases)
    a, b = (simulated_tiles(CohortParams(diseases=5, train=20, calibration=0, validation=0, test=10, seed=s)) for s in (0, 0))
    assert a.cases == b.cases and a.picture(a.cases[0])[1] == b.picture(b.cases[0])[1]
    with pytest.raises(InputError, match='needs a number'): simulated_tiles(CohortParams(train=0))


def test_deal_keeps_every_tile_once():
    cases = [Case(f'T{i}', labels={'tissue': TISSUES[i % 3]}) for i in range(30)]
    out = deal(cases, {'calibration': 9, 'validation': 12}, 1)
    assert len({c.id for c in out}) == 21 and [sum(c.split == s for c in out) for s in ('calibration', 'validation')] == [9, 12]


def test_stain_augmentation():
    x = np.stack([np.asarray(TILE)]*4)
    assert np.abs(stain_jitter(x, np.random.default_rng(0), 0)*255 - x).max() < 1e-3
    y = stain_jitter(x, np.random.default_rng(0), .2)
    assert y.dtype == np.float32 and y.min() >= 0 and y.max() <= 1 and np.abs(y[0] - y[1]).mean() > .01
    t = turned(x, np.random.default_rng(1))
    assert t.shape == x.shape and np.allclose(np.sort(t[0].ravel()), np.sort(x[0].ravel()))


def test_the_real_collection(data):
    if not (data/'tissue.zip').exists(): pytest.skip('no tissue.zip there')
    s = load_tiles(data/'tissue.zip')
    assert len(s.cases) == 440 and not s.problems and len({c.group for c in s.cases}) == 44 and len({c.labels['tissue'] for c in s.cases}) == 8
    made = real_tiles(CohortParams(source=str(data/'tissue.zip'), train=200, calibration=20, validation=20, test=100, diseases=0))
    check_splits(made.cases)
    assert {c.labels['tissue'] for c in made.cases if c.split == 'train'} == {c.labels['tissue'] for c in s.cases}
    assert made.picture(made.cases[0])[0].size == (250, 250) and made.picture(made.cases[0])[1]


def test_a_changed_source_is_noticed_without_reading_the_arrays(tmp_path, monkeypatch):
    import os
    from mint_nb import runs
    from mint_nb.runs import open_run, stage_done
    from mint_nb.cohort import make_cohort
    where, read = pannuke(tmp_path/'p', n=12), []
    run = open_run(tmp_path/'run', 'smoke', {'task': 'tissue', 'cohort': {'source': str(where), 'min_cases': 3, 'train': 12, 'calibration': 4, 'validation': 4, 'test': 8}})
    digest = runs.file_digest
    monkeypatch.setattr(runs, 'file_digest', lambda f: read.append(Path(f).name) or digest(f))
    entry = make_cohort(run)
    assert 'types.npy' in read and 'images.npy' not in read and make_cohort(run) == entry and stage_done(run, 'cohort') == entry
    os.utime(where/'fold2/images.npy', (1, 1))
    assert make_cohort(run)['key'] != entry['key']
