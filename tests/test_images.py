"Portraits and pictures: the terms exist, the drawings are stable, and bad files are named."

import numpy as np, pytest
from PIL import Image

from mint_nb.core import InputError
from mint_nb.ontology import load_ontology
from mint_nb.portraits import (
    DRAWN, LANDMARKS, disease_gestalt, draw_face, draw_portrait, drawn_terms, face, load_image, patient_gestalt)


@pytest.fixture(scope='module')
def ontology(): return load_ontology()

def test_every_drawn_term_is_current_and_carries_its_name(ontology):
    for t, (name, _) in DRAWN.items():
        assert ontology.resolve(t) == (t, 'ok'), t
        assert ontology.label(t) == name, t

def test_enough_terms_on_enough_landmarks():
    assert len(DRAWN) >= 40 and np.any([s != 0 for _, s in DRAWN.values()], axis=0).sum() >= 12

def test_finer_terms_are_drawn_as_their_nearest_ancestor(ontology):
    assert drawn_terms(['HP:0001488'], ontology) == ['HP:0000508']       # bilateral ptosis
    assert drawn_terms(['HP:0000218'], ontology) == []                   # high palate: not to be seen
    assert drawn_terms(['HP:0000565'], ontology) == ['HP:0000565']       # esotropia, not also strabismus
    assert set(drawn_terms(sorted(ontology.facial), ontology)) <= set(DRAWN)

def test_a_patient_is_drawn_the_same_twice_and_unlike_another():
    a, b = (patient_gestalt('OMIM:194190', c, 0) for c in ('P1', 'P2'))
    one, again, other = (np.asarray(draw_portrait(['HP:0000316'], g, 5)) for g in (a, a, b))
    assert (one == again).all() and (one != other).any()
    assert (disease_gestalt('OMIM:194190', 0) != disease_gestalt('OMIM:194190', 1)).any()

@pytest.mark.parametrize('size', [16, 32, 64, 112, 256])
def test_every_size(size): assert draw_portrait([], None, 0, size).size == (size, size)

def test_extreme_faces_can_be_drawn():
    for v in (-50., 50.): draw_face(3.2*np.tanh(np.full(len(LANDMARKS), v)), 0)
    for n in range(len(LANDMARKS)):
        for v in (-3.2, 3.2): draw_face(v*np.eye(len(LANDMARKS))[n], 0, 32)

def test_all_terms_at_once_stay_bounded(): assert np.abs(face(list(DRAWN), None, 0)).max() <= 3.2

@pytest.mark.parametrize('mode', ['L', 'LA', 'P', 'RGBA', '1', 'I;16', 'I', 'F', 'CMYK'])
def test_modes_become_rgb(tmp_path, mode):
    grey = np.tile(np.linspace(0, 255, 40), (30, 1))
    if mode == 'I;16': im = Image.fromarray((grey*257).astype('uint16'))
    elif mode in ('I', 'F'): im = Image.fromarray(grey.astype('int32' if mode == 'I' else 'float32'))
    else: im = Image.fromarray(grey.astype('uint8')).convert('RGB').convert(mode)
    file = tmp_path/f"x.{'tif' if mode in ('F', 'CMYK', 'I') else 'png'}"
    im.save(file)
    x = load_image(file, 16)
    assert x.shape == (3, 16, 16) and x.dtype == 'float32' and 0 <= x.min() and x.max() <= 1 and x[:, :, -1].mean() > x[:, :, 0].mean() + .3

def test_transparency_lies_over_white(tmp_path):
    Image.new('RGBA', (8, 8), (0, 0, 0, 0)).save(tmp_path/'clear.png')
    assert load_image(tmp_path/'clear.png', 8).min() == 1

@pytest.mark.parametrize('make', [lambda f: None, lambda f: f.write_bytes(b''), lambda f: f.write_text('no picture'), lambda f: f.mkdir()])
def test_unreadable_pictures_are_named(tmp_path, make):
    file = tmp_path/'face.png'; make(file)
    with pytest.raises(InputError, match='face.png: is not a readable picture'): load_image(file)

@pytest.mark.parametrize('keep', [10, 60, .5, .9])
def test_truncated_pictures_are_named(tmp_path, keep):
    draw_portrait([], None, 0, 128).save(tmp_path/'whole.png'); data = (tmp_path/'whole.png').read_bytes()
    (tmp_path/'cut.png').write_bytes(data[:keep if keep >= 1 else int(keep*len(data))])
    with pytest.raises(InputError, match='cut.png'): load_image(tmp_path/'cut.png')

@pytest.mark.parametrize('array', [np.zeros((2, 3)), np.array([1., np.nan]), np.array(['a'])])
def test_bad_embeddings_are_named(tmp_path, array):
    np.save(tmp_path/'P1.npy', array)
    with pytest.raises(InputError, match='P1.npy'): load_image(tmp_path/'P1.npy')

def test_pickled_embeddings_are_refused(tmp_path):
    np.save(tmp_path/'P1.npy', np.array([{}], dtype=object))
    with pytest.raises(InputError, match='P1.npy'): load_image(tmp_path/'P1.npy')
