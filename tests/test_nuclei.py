"""Simulated tiles: reproducible, of every tissue, captions that never give the answer away, and a describer that measures what was drawn."""
import re

import numpy as np, pytest
from PIL import Image

from mint_nb.nuclei import (
    ARCHITECTURES, FIELD, LAYOUTS, MORPHOLOGY, TISSUES, Seen, caption_words, case_seed, contact_sheet, describe_tile,
    lay_out, measure_tile, patient_section, random_tiles, scatter, seen_in, simulate_tile, tissue_texts,
    write_caption)
from mint_nb.tiles import READABLE, SPELLINGS

NAMES = {w for t in MORPHOLOGY for name in (t, READABLE.get(t, t), *SPELLINGS.get(t, ())) for w in re.findall(r'[a-z]+', name.lower())}
NAMES -= {'and', 'gland', 'duct', 'ducts', 'large'}   # words of morphology


@pytest.mark.parametrize('tissue', list(MORPHOLOGY))
def test_every_tissue_draws_and_never_names_itself(tissue):
    tiles = [simulate_tile(tissue, f'P{i}', i, size=48) for i in range(6)]
    for t in tiles:
        x = np.asarray(t.image)
        assert t.image.mode == 'RGB' and x.shape == (48, 48, 3) and x.std() > 8
        assert t.caption and not NAMES & set(re.findall(r'[a-z]+', t.caption.lower()))
    assert len({t.caption for t in tiles}) > 3
    assert not NAMES & set(re.findall(r'[a-z]+', ' '.join(tissue_texts(tissue, 20)).lower()))


def test_the_same_call_gives_the_same_tile():
    a, b = (simulate_tile('Stomach', 'P1', 2, 5, 64) for _ in range(2))
    assert a.caption == b.caption and np.array_equal(np.asarray(a.image), np.asarray(b.image))
    for other in (simulate_tile('Stomach', 'P2', 2, 5, 64), simulate_tile('Stomach', 'P1', 3, 5, 64), simulate_tile('Stomach', 'P1', 2, 6, 64)):
        assert not np.array_equal(np.asarray(a.image), np.asarray(other.image))
    assert case_seed('a', 'b').random() != case_seed('ab').random()


def test_stain_varies_by_patient_more_than_within():
    colour = np.array([[np.asarray(simulate_tile('Liver', f'P{p}', i, size=32).image).mean((0, 1)) for i in range(4)] for p in range(12)])
    assert colour.mean(1).std(0).mean() > 1.5*colour.std(1).mean()


def test_a_drawing_is_of_its_morphology():
    "Measured diameters and open space follow the table over tissues."
    some = ['Adrenal_gland', 'Kidney', 'Liver', 'Testis', 'Thyroid', 'Prostate', 'Lung']
    found = {t: np.mean([measure_tile(simulate_tile(t, f'P{i}', 0, size=128).image) for i in range(5)], axis=0) for t in some}
    assert found['Testis'][0] > found['Liver'][0] > found['Kidney'][0] - .6
    assert found['Lung'][7] > 3*found['Liver'][7]                       # open space
    assert found['Thyroid'][5] > found['Testis'][5]                     # dense against pale chromatin
    assert seen_in(MORPHOLOGY['Liver']).arranged == 'cords' and scatter(MORPHOLOGY['Liver'], np.ones(3), case_seed(0)).architecture == 'cords'


@pytest.mark.parametrize('architecture', list(ARCHITECTURES))
def test_layouts_are_well_formed(architecture):
    m = next((m for m in MORPHOLOGY.values() if m.architecture == architecture), None)
    if m is None: pytest.skip(f'no tissue has {architecture}')
    assert ARCHITECTURES[architecture].kind in LAYOUTS
    for seed in range(5):
        l = lay_out(m, np.random.default_rng(seed), 40)
        assert l.nuclei.shape[1] == 6 and np.isfinite(l.nuclei).all() and l.kind.shape == (40, 40) and set(np.unique(l.kind)) <= {0, 1, 2}
        assert (l.nuclei[:, 3] > 0).all() and (l.nuclei[:, 4] <= 1).all() and l.depth.min() >= 0 and l.depth.max() <= 1


def test_captions_leave_attributes_out_at_random_and_stay_in_the_vocabulary():
    seen, rng = seen_in(MORPHOLOGY['Colon'], 40), np.random.default_rng(0)
    texts = [write_caption(seen, rng) for _ in range(200)]
    assert len(set(texts)) > 150 and 0 < np.mean(['droplets' in t for t in texts]) < 1
    assert {w for t in texts for w in re.findall(r'\w+', t)} <= set(caption_words())
    assert write_caption(Seen()) == 'nuclei'


def test_random_tiles_belong_to_no_tissue():
    tiles, captions = random_tiles(20, 32, 3)
    again, _ = random_tiles(20, 32, 3)
    assert tiles.shape == (20, 32, 32, 3) and np.array_equal(tiles, again) and len(set(captions)) == 20
    assert not NAMES & set(re.findall(r'[a-z]+', ' '.join(captions)))


def test_describer_takes_any_tile_and_names_nothing():
    grey = Image.fromarray(np.full((64, 64, 3), 128, 'uint8'))
    rng = np.random.default_rng(0)
    odd = [grey, Image.new('RGB', (32, 32), 'black'), Image.new('RGB', (64, 64), 'white'), Image.fromarray(rng.integers(0, 256, (50, 60, 3), dtype='uint8'))]
    for image in [*odd, *(simulate_tile(t, 'P', 0, size=64).image for t in TISSUES[:6])]:
        text = describe_tile(image)
        assert text and text == describe_tile(image) and not NAMES & set(re.findall(r'[a-z]+', text.lower()))
    text = describe_tile(simulate_tile('Testis', 'P', 0, size=256).image)
    assert text.startswith('large') and 'pale chromatin' in text and 'clear cytoplasm' in text


def test_sections_and_sheet():
    s = patient_section('P1', 3)
    assert s.stains.shape == (2, 3) and (s.white <= 1).all() and s.blur > 0
    assert contact_sheet(TISSUES[:2], 3, size=32, gap=2).size == (102, 68) and FIELD == 64
