"""The dual encoder: learns from captions, keeps patients apart, survives saving, and says clearly which weights it cannot take."""
import numpy as np, pytest, torch

from mint_nb.core import InputError, read_json, read_table, write_json
from mint_nb.tasks import Case, Ranker
from mint_nb.params import TeacherParams, resolve_params
from mint_nb.runs import open_run
from mint_nb.nuclei import random_tiles, simulate_tile
from mint_nb.tiles import tissue_catalogue
from mint_nb.teachers import cross_fit
from mint_nb.dual import (
    DUAL_VIEWS, DualTeacher, TextureRanker, caption_tokenizer, contrastive_loss, embed_texts, embed_tiles,
    learn_pairs, linear_probe, load_dual, pixels, pretrained_clip, small_clip, texture_features, tile_benchmark)

TINY = TeacherParams(hidden=32, layers=1, heads=2, patch=8, pretrain=64, pretrain_epochs=2, epochs=2, tune_epochs=2, batch=16, folds=2, view='probe', weight_decay=.05)
IDS = ['Liver', 'Colon', 'Thyroid', 'Testis']


@pytest.fixture(scope='module')
def tiles(tmp_path_factory):
    folder, cases, captions = tmp_path_factory.mktemp('tiles'), [], {}
    for i in range(64):
        t, p = IDS[i % 4], f'P{i//8}-{i % 4}'
        image, caption = simulate_tile(t, p, i, size=32); image.save(folder/f'{i}.png')
        cases.append(Case(f'T{i}', image=f'{i}.png', labels={'tissue': t}, group=p)); captions[f'T{i}'] = caption
    return folder, cases, captions


@pytest.fixture(scope='module')
def teacher(tiles):
    folder, cases, captions = tiles
    return DualTeacher(tissue_catalogue(IDS), TINY, folder, image_size=32, captions=captions).fit(cases[:48])


def test_it_learns_and_ranks(teacher, tiles):
    _, cases, _ = tiles
    truth = [IDS.index(c.labels['tissue']) for c in cases[48:]]
    order = [teacher.catalogue.ids.index(i) for i in IDS]
    assert isinstance(teacher, Ranker)
    for view in DUAL_VIEWS:
        s = teacher.scores(cases[48:], view)[:, order]
        assert np.allclose(np.exp(s).sum(1), 1) and s.shape == (16, 4)
    assert (teacher.scores(cases[48:], 'probe')[:, order].argmax(1) == truth).mean() >= .5
    assert len(teacher.rank(cases[48:50], top=1, bottom=1)) == 4
    with pytest.raises(InputError, match='there are zero_shot, probe, tuned'): teacher.scores(cases, 'note')


def test_the_picture_matters(teacher, tiles):
    "Another tile under the same case changes the scores; the caption does not."
    _, cases, _ = tiles
    from dataclasses import replace
    swapped = [replace(a, id=f'{a.id}x', image=b.image) for a, b in zip(cases[48:52], cases[53:57])]
    assert np.abs(teacher.scores(cases[48:52]) - teacher.scores(swapped)).max() > .05
    mute = load_like(teacher); mute.captions = {}
    assert np.allclose(mute.scores(cases[48:]), teacher.scores(cases[48:]))


def load_like(t):
    import copy
    return copy.copy(t)


def test_save_and_load(teacher, tiles, tmp_path):
    folder, cases, _ = tiles
    back = load_dual(teacher.save(tmp_path/'t'), folder)
    for v in DUAL_VIEWS: assert np.allclose(back.scores(cases, v), teacher.scores(cases, v), atol=1e-5)
    assert not list((tmp_path/'t').glob('*.bin')) and back.view == 'probe'


def test_cross_fitting_never_sees_the_patient(tiles):
    folder, cases, captions = tiles
    seen = []
    class Spy(DualTeacher):
        def fit(self, cases, desc=''): self.mine = {c.group for c in cases}; seen.append(self); return self
        def scores(self, cases, view=None):
            assert not self.mine & {c.group for c in cases}
            return np.zeros((len(cases), 4))
    out = cross_fit(cases, tissue_catalogue(IDS), TINY, folder, 'tissue', 32, 0, DUAL_VIEWS, lambda s: Spy(tissue_catalogue(IDS), TINY, folder, seed=s))
    assert len(seen) == 2 and set(out) == set(DUAL_VIEWS) and seen[0].seed != seen[1].seed


def test_zero_shot_uses_no_labels(tiles):
    "Shuffled labels leave the zero-shot scores as they are."
    folder, cases, captions = tiles
    from dataclasses import replace
    wrong = [replace(c, labels={'tissue': IDS[(IDS.index(c.labels['tissue']) + 1) % 4]}) for c in cases]
    a, b = (DualTeacher(tissue_catalogue(IDS), TINY, folder, image_size=32, captions=captions).fit(cs[:32]) for cs in (cases, wrong))
    assert np.array_equal(a.scores(cases, 'zero_shot'), b.scores(cases, 'zero_shot'))
    assert not np.allclose(a.scores(cases, 'probe'), b.scores(cases, 'probe'))


def test_bad_teacher_input(tiles, tmp_path):
    folder, cases, captions = tiles
    with pytest.raises(InputError, match='fewer than two labels'): DualTeacher(tissue_catalogue(IDS), TINY, folder, image_size=32).fit(cases[:1])
    with pytest.raises(InputError, match='do not divide'): DualTeacher(tissue_catalogue(IDS), TINY, folder, image_size=36).fit(cases)
    (tmp_path/'bad.png').write_bytes(b'no')
    with pytest.raises(InputError, match='not a readable picture'): DualTeacher(tissue_catalogue(IDS), TINY, tmp_path, image_size=32).fit([Case(f'B{i}', image='bad.png', labels={'tissue': t}) for i, t in enumerate(IDS)])


def test_weights_from_a_folder(teacher, tiles, tmp_path):
    folder, cases, captions = tiles
    teacher.clip.save_pretrained(tmp_path/'plip'); teacher.tok.save_pretrained(tmp_path/'plip')
    write_json(tmp_path/'plip/preprocessor_config.json', {'image_mean': [.5]*3, 'image_std': [.5]*3})
    own = DualTeacher(tissue_catalogue(IDS), TINY.model_copy(update={'weights': str(tmp_path/'plip')}), folder, image_size=224).fit(cases[:32])
    assert own.image_size == 32 and own.norm == ((.5,)*3, (.5,)*3)
    assert all(torch.equal(a, b) for a, b in zip(own.clip.parameters(), teacher.clip.parameters()))      # not trained on captions
    assert load_dual(own.save(tmp_path/'own'), folder).scores(cases[:4], 'tuned') == pytest.approx(own.scores(cases[:4], 'tuned'), abs=1e-5)
    torch.save(dict(teacher.clip.state_dict()), tmp_path/'plip/pytorch_model.bin'); (tmp_path/'plip/model.safetensors').unlink()
    with pytest.raises(InputError, match='pytorch_model.bin.*is a pickle.*save_file'): pretrained_clip(tmp_path/'plip')        # the form in which PLIP is published: convert it once


def test_conch_and_other_models_are_refused_with_a_way_out(tmp_path):
    (tmp_path/'CONCH').mkdir(); (tmp_path/'CONCH/pytorch_model.bin').write_bytes(b'x')
    with pytest.raises(InputError, match='mahmoodlab/CONCH.*MahmoodLab/CONCH'): pretrained_clip(tmp_path/'CONCH')
    (tmp_path/'vit').mkdir(); write_json(tmp_path/'vit/config.json', {'model_type': 'vit'})
    with pytest.raises(InputError, match="type 'vit'"): pretrained_clip(tmp_path/'vit')
    with pytest.raises(InputError, match='no config.json'): pretrained_clip(tmp_path/'nowhere')


def test_loss_and_towers():
    u = torch.nn.functional.normalize(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    v = torch.nn.functional.normalize(torch.randn(6, 8, generator=torch.Generator().manual_seed(1)), dim=-1)
    s = 3*u @ v.T                                                        # by hand, from the formula
    hand = -(torch.diagonal(s.log_softmax(1)).mean() + torch.diagonal(s.log_softmax(0)).mean())/2
    assert torch.allclose(contrastive_loss(u, v, torch.tensor(3.).log()), hand, atol=1e-6)
    tok = caption_tokenizer()
    torch.manual_seed(0); model = small_clip(TINY, len(tok), 32).eval()
    a = embed_texts(model, tok, ['small round nuclei']); b = embed_texts(model, tok, ['small round nuclei', 'large slim nuclei with dark chromatin, in crossing bundles'])
    assert torch.allclose(a[0], b[0], atol=1e-5)                         # padding changes nothing
    x, captions = random_tiles(32, 32, 1)
    assert learn_pairs(model, tok, x, captions, 6, 2e-3, TINY)[-1] < learn_pairs(small_clip(TINY, len(tok), 32), tok, x, captions, 1, 0., TINY)[0]
    assert embed_tiles(model, pixels(x)).shape == (32, 32)


def test_probe_equals_scikit_learn():
    from sklearn.linear_model import LogisticRegression
    rng = np.random.default_rng(0)
    x = rng.normal(size=(90, 5)); y = (x[:, 0] > 0).astype(int) + (x[:, 1] > .5)
    w, b = linear_probe(x, y, 3)
    z = (x - x.mean(0))/(x.std(0) + 1e-6)
    assert np.allclose(x @ w + b, LogisticRegression(C=1., max_iter=1000).fit(z, y).decision_function(z), atol=1e-6)
    w, b = linear_probe(x, (y > 0)*3, 4)                                 # two classes, and two that were never seen
    assert (x @ w + b).argmax(1).tolist() != [] and set((x @ w + b).argmax(1)) <= {0, 3}


def test_texture_ranker(tiles):
    folder, cases, _ = tiles
    catalogue = tissue_catalogue(IDS)
    r = TextureRanker.fit(cases[:48], catalogue, folder, size=32)
    truth = [catalogue.index[c.labels['tissue']] for c in cases[48:]]
    assert isinstance(r, Ranker) and (r.scores(cases[48:]).argmax(1) == truth).mean() > .5
    assert np.isfinite(texture_features(np.zeros((32, 32, 3), 'uint8'))).all() and np.isfinite(texture_features(np.full((32, 32, 3), 255, 'uint8'))).all()


def test_profiles_of_the_task():
    smoke, plain = resolve_params('smoke', {'task': 'tissue'}), resolve_params('smoke')
    assert smoke.profile == 'smoke' and smoke.teacher.view == 'probe' and plain.teacher.view == 'both' and smoke.cohort != plain.cohort
    assert resolve_params('laptop', {'task': 'tissue', 'cohort.tiles': 3}).cohort.tiles == 3
    assert resolve_params('study', {'task': 'gene'}).cohort.train == 240
    with pytest.raises(InputError, match='no such profile') as e: resolve_params('huge')
    assert 'laptop-tissue' not in str(e.value)


def test_stage_of_a_smoke_run(tmp_path):
    from mint_nb.cohort import cohort_captions, make_cohort
    from mint_nb.upstream import teacher_rankings, upstream
    run = open_run(tmp_path/'run', 'smoke', {'task': 'tissue'})
    upstream(run, 0)
    assert make_cohort(run)['status'] == 'done' and upstream(run, 0)['seconds'] == upstream(run, 0)['seconds']
    train, captions = run.cases('train'), cohort_captions(run, 'train')
    assert set(captions) == {c.id for c in train} and len(cohort_captions(run)) == len(run.cases())
    for view in DUAL_VIEWS:
        t = teacher_rankings(run, 0, 'train', view)
        assert set(t.case_id) == {c.id for c in train} and t.groupby('case_id').size().unique().tolist() == [len(run.catalogue)]
        assert set(read_json(run/f'upstream/{view}-0/metrics.json')) == {'train, cross-fitted', 'heldout'}
    assert teacher_rankings(run, 0).equals(read_table(run/'upstream/probe-0/train.parquet'))
    wrong = open_run(tmp_path/'wrong', 'smoke', {'task': 'tissue', 'teacher.view': 'both'})
    with pytest.raises(InputError, match='has the views zero_shot, probe, tuned'): upstream(wrong, 0)


def test_pannuke_through_cohort_and_teacher(tmp_path):
    from mint_nb.cohort import make_cohort
    from mint_nb.upstream import upstream
    from test_tiles import pannuke
    over = {'task': 'tissue', 'cohort': {'source': str(pannuke(tmp_path/'p', 'Fold {k}/images/fold{k}', 12, 48)), 'min_cases': 3, 'train': 12, 'calibration': 4, 'validation': 4, 'test': 8}}
    run = open_run(tmp_path/'run', 'smoke', over)
    upstream(run, 0)
    card = read_json(run/'cases/card.json')
    assert card['patients'] is False and any('names no patients' in w for w in card['warnings']) and not card['simulated']
    assert {c.split for c in run.cases()} == {'train', 'calibration', 'validation', 'test'} and make_cohort(run)['status'] == 'done'


def test_benchmark_on_real_tiles(data, tmp_path):
    "The command of benchmarks/tissue_teacher.csv, at toy size, on some patients of the real collection."
    if not (data/'tissue.zip').exists(): pytest.skip('no tissue.zip there')
    import zipfile
    with zipfile.ZipFile(data/'tissue.zip') as z, zipfile.ZipFile(tmp_path/'some.zip', 'w') as out:
        rows = z.read('labels.csv').decode().splitlines()
        keep = [r for r in rows[1:] if r.split(',')[1] in ('breast', 'kidney')][::6]
        out.writestr('labels.csv', '\n'.join([rows[0], *keep]))
        for r in keep: out.writestr(f := r.split(',')[0], z.read(f))
    t = tile_benchmark(tmp_path/'some.zip', tmp_path/'t.csv', 2, 32, hidden=32, layers=1, heads=2, patch=8, batch=16, pretrain=64, pretrain_epochs=2, epochs=1, tune_epochs=1)
    assert list(t.method) == [*DUAL_VIEWS, 'texture'] and t.accuracy.between(0, 1).all()
    assert (tmp_path/'t.csv').read_text().startswith('# python -c "from mint_nb.dual import tile_benchmark')


@pytest.mark.parametrize('steps', range(1, 25))
def test_schedule_of_any_length(steps):
    "Ten steps, of which one is the rise, once divided by zero (five batches, two epochs)."
    from mint_nb.dual import schedule
    w = torch.nn.Parameter(torch.ones(1))
    opt, plan = schedule([w], steps, 1e-3, 0.)
    for _ in range(steps - 1): opt.step(); plan.step()
    assert 0 < max(plan.get_last_lr()) <= 1e-3


def test_the_last_layer_is_computed_for_one_token_only():
    "With the answers and gradients of the class, which computes all of them."
    torch.manual_seed(0)
    model = small_clip(TINY.model_copy(update={'layers': 3}), 10, 32)
    x = torch.randn(3, 3, 32, 32)
    ours = embed_tiles(model, x)
    theirs = torch.nn.functional.normalize(model.get_image_features(pixel_values=x).pooler_output, dim=-1)
    assert torch.allclose(ours, theirs, atol=1e-5)
    names, weights = zip(*[(k, w) for k, w in model.named_parameters() if k.startswith('vis')])
    mine, its = (torch.autograd.grad((o*torch.arange(32)).sum(), weights, allow_unused=True) for o in (ours, theirs))
    for name, a, b in zip(names, mine, its):
        assert 'k_proj.bias' in name or torch.allclose(a, b, atol=1e-4*max(1, float(b.abs().max()))), name
