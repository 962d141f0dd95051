"The teacher: who ranked whom, missing views, embeddings, foreign weights, and being the same twice."
from dataclasses import replace

import numpy as np, pytest, torch
from safetensors.torch import save_file

from mint_nb.core import InputError
from mint_nb.tasks import Case, Catalogue, Finding, Ranker
from mint_nb.params import TeacherParams
from mint_nb.portraits import draw_portrait
from mint_nb.teachers import (
    Teacher, cross_fit, divide, folds_of, judging_folds, learn_faces, load_teacher, moved_patches, pooled,
    pretrained_vilt, random_faces, small_vilt, trained, unseen_answers, word_tokenizer)

IDS = [f'OMIM:{i}' for i in range(4)]
CATALOGUE = Catalogue({d: f'Disease {d[5:]}' for d in IDS})
QUICK = TeacherParams(hidden=16, layers=1, heads=2, patch=8, epochs=1, batch=8, folds=2, members=1, pretrain=0)

@pytest.fixture(scope='module')
def root(tmp_path_factory):
    d = tmp_path_factory.mktemp('cases')
    for i in range(16):
        draw_portrait([], None, i, 32).save(d/f'{i}.png'); np.save(d/f'{i}.npy', np.random.default_rng(i).random(5))
    return d

@pytest.fixture
def cases():
    return [Case(f'P{i}', image=f'{i}.png', labels={'disease': IDS[i % 4]}, group=f'F{i//2}',
                 phenotypes=(Finding('HP:0001250', 'Seizure'), Finding(f'HP:000000{i % 4}', f'finding {i % 4}'))) for i in range(16)]

def test_same_seed_same_numbers(root, cases):
    a, b, c = (Teacher(CATALOGUE, QUICK, root, image_size=32, seed=s).fit(cases).scores(cases) for s in (0, 0, 1))
    assert np.array_equal(a, b) and not np.allclose(a, c)
    assert np.allclose(np.exp(a).sum(1), 1, atol=1e-6)

def test_batches_do_not_change_scores(root, cases):
    t = Teacher(CATALOGUE, QUICK, root, image_size=32).fit(cases)
    for view in ('both', 'note', 'portrait'):
        whole = t.scores(cases, view)
        assert np.allclose(whole, np.concatenate([t.scores([c], view) for c in cases]), atol=1e-5)
        assert np.allclose(whole[::-1], t.scores(cases[::-1], view), atol=1e-5)

def test_a_hidden_view_has_no_influence(root, cases):
    t = Teacher(CATALOGUE, QUICK, root, image_size=32).fit(cases)
    other = [replace(c, id=c.id + 'x', image='0.png') for c in cases]
    assert np.allclose(t.scores(cases, 'note'), t.scores(other, 'note'), atol=1e-6)
    silent = [replace(c, id=c.id + 'y', phenotypes=()) for c in cases]
    assert np.allclose(t.scores(cases, 'portrait'), t.scores(silent, 'portrait'), atol=1e-6)
    blind = [replace(c, id=c.id + 'z', image=None) for c in cases]
    assert np.allclose(t.scores(cases, 'note'), t.scores(blind, 'both'), atol=1e-6)

def test_the_diagnosis_of_a_ranked_case_is_never_read(root, cases):
    t = Teacher(CATALOGUE, QUICK, root, image_size=32).fit(cases)
    assert np.array_equal(t.scores(cases), t.scores([replace(c, labels={}) for c in cases]))

def test_cross_fitted_scores_do_not_depend_on_the_own_label(root, cases, monkeypatch):
    "Swap the label of one family: in the same folds its own cross-fitted scores stay, because it trained none of its judges."
    slow, folds = QUICK.model_copy(update={'epochs': 3, 'lr': 1e-2}), judging_folds(cases, 5, 0)
    monkeypatch.setattr('mint_nb.teachers.judging_folds', lambda *a: folds)
    swapped = [replace(c, labels={'disease': IDS[3 - int(c.labels['disease'][5:])]}) if c.group == 'F0' else c for c in cases]
    a, b = (cross_fit(cs, CATALOGUE, slow, root, image_size=32)['both'] for cs in (cases, swapped))
    own = [i for i, c in enumerate(cases) if c.group == 'F0']
    assert np.array_equal(a[own], b[own]) and not np.allclose(np.delete(a, own, 0), np.delete(b, own, 0))

def test_folds_keep_groups_together(cases):
    folds = folds_of(cases, 3, 0)
    assert sorted(i for _, held in folds for i in held) == list(range(16))
    for train, held in folds: assert not {cases[i].group for i in train} & {cases[i].group for i in held}
    with pytest.raises(InputError, match='two groups'): folds_of([replace(c, group='F') for c in cases], 3, 0)

def test_every_answer_with_two_cases_is_known_to_its_judge():
    "Publications that each have one disease, as published cases split by publication do: no judge may be a stranger to it."
    few = [Case(f'P{i}', labels={'disease': f'D{i//4}'}, group=f'PMID:{i//4}') for i in range(40)]
    assert len(unseen_answers(few, folds_of(few, 3, 0))) == 40 and not unseen_answers(few, judging_folds(few, 3, 0))
    mixed = few + [Case(f'Q{i}', labels={'disease': f'D{i}'}, group='PMID:Q') for i in range(10)]       # a second publication for each
    assert not unseen_answers(mixed, judging_folds(mixed, 3, 0))
    for train, held in judging_folds(mixed, 3, 0): assert not {mixed[i].group for i in train} & {mixed[i].group for i in held}

def test_no_judge_is_a_stranger_to_published_diseases(data):
    "The cohorts of the laptop profile and of the study; in whole publications most judges would be."
    from mint_nb.cli import REAL as LAPTOP
    from mint_nb.params import resolve_params
    from mint_nb.ontology import load_ontology
    from mint_nb.readers import choose_answers, load_cases, select_cases
    from mint_nb.study import REAL
    ontology = load_ontology()
    packets = load_cases(data/'phenopackets.zip', ontology)[0]
    for profile, over, strangers in (('laptop', LAPTOP, 272), ('study', REAL['dysmorphic'], 233), ('study', REAL['all'], 474)):
        c = resolve_params(profile, {**over, 'cohort.source': str(data/'phenopackets.zip')}).cohort
        train = [x for x in select_cases(packets, choose_answers(packets, ontology, c, 'disease'), c, 'disease') if x.split == 'train']
        whole, dealt = (len(unseen_answers(train, folds(train, 3, 0))) for folds in (folds_of, judging_folds))
        assert (whole, dealt) == (strangers, 0), len(train)

def test_a_teacher_of_notes_learns_nothing_from_portraits(root, cases):
    a, b = (Teacher(CATALOGUE, QUICK, root, image_size=32, view='note').fit(cs).scores(cs) for cs in (cases, [replace(c, image=cases[i - 1].image) for i, c in enumerate(cases)]))
    assert np.allclose(a, b, atol=1e-6), 'other pictures, the same teacher'

def test_a_stranger_has_no_veto_over_cases_without_a_label(root, cases):
    "One labelled case of an answer: one of three judges does not know it, and the others still put it where they would."
    def judge(seed):
        class Judge:
            def fit(self, some, desc=''): self.known = sorted({c.labels['disease'] for c in some}); return self
            def scores(self, some, view): return np.tile(np.log([.97 if i == IDS[0] and i in self.known else .01 for i in IDS]), (len(some), 1))
        return Judge()
    few = [c for c in cases if c.labels['disease'] != IDS[0]] + [next(c for c in cases if c.labels['disease'] == IDS[0])]
    out = cross_fit([*few, replace(cases[0], id='new', labels={})], CATALOGUE, QUICK.model_copy(update={'folds': 3}), root, make=judge)['both']
    assert np.allclose(np.exp(out[-1, 0]), (2*.97 + .01)/3)

def test_cases_without_a_label_are_ranked_and_not_learnt_from(root, cases):
    bare = [replace(c, labels={}) if c.group in ('F1', 'F2') else c for c in cases]
    a = cross_fit(bare, CATALOGUE, QUICK, root, image_size=32)['both']
    assert np.isfinite(a).all() and (np.abs(a).sum(1) > 0).all()
    fewer = cross_fit([c for c in bare if c.labels], CATALOGUE, QUICK, root, image_size=32)['both']
    assert np.array_equal(a[[i for i, c in enumerate(bare) if c.labels]], fewer)

def test_embeddings_in_place_of_portraits(root, cases, tmp_path):
    vectors = [replace(c, image=c.image.replace('png', 'npy')) for c in cases]
    t = Teacher(CATALOGUE, QUICK.model_copy(update={'pretrain': 64}), root, image_size=32).fit(vectors)
    assert isinstance(t, Ranker) and not np.allclose(t.scores(vectors, 'both'), t.scores(vectors, 'note'))
    again = load_teacher(t.save(tmp_path/'model'), root)
    assert np.allclose(again.scores(vectors), t.scores(vectors), atol=1e-6)
    with pytest.raises(InputError, match='mixed'): t.scores([vectors[0], cases[1]])

def test_rankings_are_whole(root, cases):
    t = Teacher(CATALOGUE, QUICK, root, image_size=32).fit(cases)
    r = t.rank(cases, top=2, bottom=1)
    assert len(r) == 3*16 and set(r['rank']) == {1, 2, 4} and (r.score.groupby(r.case_id).is_monotonic_decreasing).all()
    assert len(t.rank([], top=2)) == 0

def test_nobody_to_learn_from(root, cases):
    with pytest.raises(InputError, match='no training case'): Teacher(CATALOGUE, QUICK, root).fit([replace(c, labels={'disease': 'OMIM:9'}) for c in cases])

@pytest.fixture
def checkpoint(tmp_path):
    tok = word_tokenizer(['seizure', 'finding 0'])
    model = small_vilt(QUICK, len(tok), 528, 32)
    model.config.save_pretrained(tmp_path); tok.save_pretrained(tmp_path)
    return model, tmp_path

def test_a_state_dict_is_read(checkpoint, root, cases):
    model, folder = checkpoint
    save_file({f'module.{k}': v.clone() for k, v in model.state_dict().items()}, folder/'model.safetensors')   # as DataParallel leaves it
    loaded, _ = pretrained_vilt(folder, 4)
    assert all((v == loaded.state_dict()[k]).all() for k, v in model.state_dict().items() if k.startswith('vilt.'))
    t = Teacher(CATALOGUE, QUICK.model_copy(update={'weights': str(folder)}), root, image_size=64).fit(cases)
    assert t.image_size == 32 and t.scores(cases).shape == (16, 4)

def test_a_pickle_is_not_even_opened(checkpoint, tmp_path):
    import pickle
    class Evil:
        def __reduce__(self): return (open, (str(tmp_path/'ran'), 'w'))
    (checkpoint[1]/'pytorch_model.bin').write_bytes(pickle.dumps(Evil()))
    with pytest.raises(InputError, match='pytorch_model.bin, field teacher.weights: is a pickle.*safetensors.torch.save_file'): pretrained_vilt(checkpoint[1], 4)
    assert not (tmp_path/'ran').exists()
    (checkpoint[1]/'model.safetensors').write_bytes(pickle.dumps(Evil()))
    with pytest.raises(InputError, match='not a readable state dict'): pretrained_vilt(checkpoint[1], 4)
    assert not (tmp_path/'ran').exists()

def test_foreign_weights_are_refused(checkpoint, tmp_path):
    save_file({'bert.embeddings': torch.zeros(2)}, checkpoint[1]/'model.safetensors')
    with pytest.raises(InputError, match='missing or of another shape'): pretrained_vilt(checkpoint[1], 4)
    with pytest.raises(InputError, match='config.json'): pretrained_vilt(tmp_path/'nowhere', 4)

def test_no_weights_and_no_tokenizer(checkpoint):
    with pytest.raises(InputError, match='holds no weights'): pretrained_vilt(checkpoint[1], 4)

def scattered(params=QUICK.model_copy(update={'layers': 3}), image_size=32):
    "A small network without a zero in it."
    torch.manual_seed(0)
    model = small_vilt(params, 20, 5, image_size).eval()
    for w in model.parameters(): w.data += .1*torch.randn_like(w)
    return model

@pytest.mark.parametrize('image', ['pixels', 'patches', 'nothing'])
def test_the_short_forward_pass_is_that_of_the_class(image):
    "Answers and the gradient of every weight, of texts of several lengths, with and without a picture."
    model, seen = scattered(), torch.tensor([True, True, True]) if image != 'nothing' else torch.tensor([False]*3)
    ids = torch.tensor([[2, 4, 5, 6], [2, 5, 0, 0], [2, 3, 0, 0]])
    bytes_ = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    pixels = bytes_.float()/255
    x = moved_patches(bytes_, torch.full((3,), 8), 8) if image == 'patches' else pixels   # row 8: not moved, not mirrored
    ours = model.classifier(pooled(model, dict(input_ids=ids, text_mask=ids != 0, pixels=x, image_mask=seen)))
    if image == 'nothing':
        e = model.vilt.embeddings
        cls = (e.cls_token + e.position_embeddings[:, :1]).expand(3, -1, -1)
        whole = dict(image_embeds=cls, pixel_mask=torch.zeros(3, 1).long())
    else: whole = dict(pixel_values=2*pixels - 1, pixel_mask=torch.ones(3, 32, 32).long())
    theirs = model(input_ids=ids, attention_mask=(ids != 0).long(), **whole).logits
    assert torch.allclose(ours, theirs, atol=1e-5)
    names, weights = zip(*model.named_parameters())
    slopes = [torch.autograd.grad(o.square().sum(), weights, allow_unused=True) for o in (ours, theirs)]
    for name, a, b in zip(names, *slopes):
        if a is None: assert b is None or 'key.bias' in name or b.abs().max() == 0, name
        else: assert torch.allclose(a, b, atol=2e-4*max(1, float(b.abs().max()))), name

def test_threads_change_nothing(root, cases):
    "Networks side by side, one after the other, and each teacher by itself: the same numbers."
    two, before, out = QUICK.model_copy(update={'members': 2, 'epochs': 2}), torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            out.append(cross_fit(cases, CATALOGUE, two, root, image_size=32)['both'])
            assert torch.get_num_threads() == n
    finally: torch.set_num_threads(before)
    assert np.array_equal(*out)
    division = divide(cases, CATALOGUE, 2, 0, 'disease')
    for f, (train, held) in enumerate(division.folds):
        alone = Teacher(CATALOGUE, two, root, image_size=32, seed=f).fit([cases[i] for i in train])
        assert np.array_equal(alone.scores([cases[i] for i in held]), out[0][held])

def test_faces_are_the_same_drawn_and_learnt_by_one_core_or_two():
    before, out = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            model, (pictures, marks) = scattered(QUICK, 16), random_faces(400, 16)
            learn_faces(model, pictures, marks, epochs=1)
            out.append((pictures, model.vilt.state_dict()))
    finally: torch.set_num_threads(before)
    assert torch.equal(out[0][0], out[1][0])
    assert all(torch.equal(w, out[1][1][k]) for k, w in out[0][1].items())

def test_two_halves_are_one_batch():
    "The weights after learning from faces are those of plain updates by whole batches."
    from mint_nb.core import one_cycle
    pictures, marks = random_faces(32, 16)
    model, plain = scattered(QUICK, 16), scattered(QUICK, 16)
    learn_faces(model, pictures, marks, epochs=2, batch=32)
    torch.manual_seed(0); head = torch.nn.Linear(16, marks.shape[1])
    weights, rng = [*plain.vilt.parameters(), *head.parameters()], np.random.default_rng(0)
    opt = torch.optim.AdamW(weights, lr=2e-3, weight_decay=.05)
    plan = one_cycle(opt, 2e-3, 2)
    for _ in range(2):
        part = torch.from_numpy(rng.permutation(32))
        x = moved_patches(pictures[part], torch.full((32,), 2*int(rng.integers(9))), 8)
        blank = torch.tensor([[2, 3]]).expand(32, -1)
        b = dict(input_ids=blank, text_mask=blank != 0, pixels=x, image_mask=torch.ones(32).bool())
        out = head(pooled(plain, b))
        opt.zero_grad(); torch.nn.functional.mse_loss(out, marks[part]).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.); opt.step(); plan.step()
    for (k, a), b in zip(model.vilt.named_parameters(), plain.vilt.parameters()):
        assert torch.allclose(a, b, atol=1e-4) or 'key.bias' in k, k

def test_a_weight_has_memory_of_its_own(root, cases, tmp_path):
    "Views of one long vector would be written with all of it, or not at all."
    t = Teacher(CATALOGUE, QUICK, root, image_size=32).fit(cases)
    assert all(w.untyped_storage().nbytes() == 4*w.numel() and w.grad is None for w in t.models[0].parameters())

def test_large_weights_are_trained_one_teacher_at_a_time(checkpoint, root, cases):
    "The second is not made before the first has been taken."
    made, (model, folder) = [], checkpoint
    save_file(model.state_dict(), folder/'model.safetensors')
    class Watched(Teacher):
        def build(self, *a): made.append(self.seed); return super().build(*a)
    params = QUICK.model_copy(update={'weights': str(folder)})
    make = lambda seed: Watched(CATALOGUE, params, root, image_size=32, seed=seed)
    teachers = trained([(lambda: make(0), cases, ''), (lambda: make(1), cases, '')])
    next(teachers); assert made == [0]
    next(teachers); assert made == [0, 1]

def test_an_error_in_one_network_ends_the_others(root, cases, monkeypatch):
    "Nothing is left running, and the threads are given back."
    before, turns = torch.get_num_threads(), []
    def broken(self, model, data, seed):
        for _ in range(1000):
            turns.append(seed)
            if seed == 0 and len(turns) > 4: raise RuntimeError('broken')
            yield
    monkeypatch.setattr(Teacher, 'train_member', broken)
    three = QUICK.model_copy(update={'members': 3})
    with pytest.raises(RuntimeError, match='broken'): Teacher(CATALOGUE, three, root, image_size=32).fit(cases)
    assert torch.get_num_threads() == before and len(turns) < 3000
