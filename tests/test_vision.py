"Students that see: real vision-language models by their own processors, the engine's exactness with images, bad pictures, and a run from tiles to a report."
from dataclasses import replace

import numpy as np, pytest, torch
from PIL import Image
from transformers import (AutoTokenizer, CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, MllamaConfig,
                          MllamaForConditionalGeneration, MllamaImageProcessorPil, MllamaProcessor)
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

from mint_nb.core import InputError
from mint_nb.tasks import Case, Catalogue, get_task
from mint_nb.params import StudentParams, TrainParams, VisionParams
from mint_nb.vision import load_tower, make_tower
from mint_nb.students import OwnVision, add_lora, attach_tower, has_vision, load_student, smollm2_folder
from mint_nb.packing import Item
from mint_nb.engine import Engine, SeparateEngine, make_engine, separate_logps
from mint_nb.trainer import caption_items, learn_captions, train
from mint_nb.decode import StudentRanker, decode_batch, encode_prompts, generate, score_names

TASK = get_task('tissue')
TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'image' %}IMAGE{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
CATALOGUE = Catalogue({n: n for n in ('Liver', 'Colon', 'Skin', 'Testis')})


@pytest.fixture(scope='module')
def tiles(tmp_path_factory):
    "Four coloured tiles."
    folder = tmp_path_factory.mktemp('tiles')
    for i, name in enumerate(CATALOGUE.ids):
        Image.fromarray(np.random.default_rng(i).integers(60*i, 60*i + 70, (64, 64, 3), dtype=np.uint8)).save(folder/f'{name}.png')
    return folder


def llava(folder):
    "A random LLaVA with SmolLM2's tokenizer: its image stands in the prompt."
    tok = AutoTokenizer.from_pretrained(smollm2_folder()); torch.manual_seed(0)
    tok.add_special_tokens({'additional_special_tokens': ['<image>']})
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16)
    text = LlamaConfig(vocab_size=len(tok), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, pad_token_id=tok.pad_token_id)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=tok.convert_tokens_to_ids('<image>'), vision_feature_layer=-1))
    processor = LlavaProcessor(CLIPImageProcessorPil(size={'shortest_edge': 32}, crop_size={'height': 32, 'width': 32}), tok, patch_size=16,
                               vision_feature_select_strategy='default', num_additional_image_tokens=1, chat_template=TEMPLATE.replace('IMAGE', '<image>'))
    model.save_pretrained(folder); processor.save_pretrained(folder)
    return str(folder)


def mllama(folder):
    "A random model of Llama-3.2-Vision's kind: it looks at its image by cross-attention."
    tok = AutoTokenizer.from_pretrained(smollm2_folder()); torch.manual_seed(0)
    tok.add_special_tokens({'additional_special_tokens': ['<|image|>']}); tok.bos_token = '<|im_start|>'
    vision = MllamaVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_global_layers=1, attention_heads=2, image_size=32, patch_size=16, max_num_tiles=1,
                                intermediate_layers_indices=[0, 1], vision_output_dim=96, supported_aspect_ratios=[[1, 1]])
    text = MllamaTextConfig(vocab_size=len(tok), hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, cross_attention_layers=[1],
                            pad_token_id=tok.pad_token_id, bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id)
    model = MllamaForConditionalGeneration(MllamaConfig(vision_config=vision, text_config=text, image_token_index=tok.convert_tokens_to_ids('<|image|>')))
    with torch.no_grad():
        for n, p in model.named_parameters():
            if 'gate' in n: p.fill_(1.)                 # a fresh gate is closed: the image would not be seen
    processor = MllamaProcessor(MllamaImageProcessorPil(size={'height': 32, 'width': 32}, max_image_tiles=1), tok, chat_template=TEMPLATE.replace('IMAGE', '<|image|>'))
    model.save_pretrained(folder); processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope='module', params=[llava, mllama], ids=['llava', 'mllama'])
def own(request, tmp_path_factory):
    "A student with a vision encoder of its own, and whether its image stands in the prompt."
    where = request.param(tmp_path_factory.mktemp('vlm')/'model')
    assert has_vision(where)
    return load_student(where, vision='own', precision='fp32'), request.param is llava


def items_for(student, tiles, names=('Liver', 'Colon')):
    "An item for each tile, its own name against another."
    image = lambda n: str(tiles/f'{n}.png')
    answer = lambda *n: student.answer_ids(TASK.answer(n))
    return [Item(n, student.prompt_ids(TASK, '', 2, image=image(n)), [answer(n, 'Skin'), answer('Testis', 'Skin')], image(n)) for n in names]


def test_own_vision_is_used(own, tiles):
    student, _ = own
    assert isinstance(student.vision, OwnVision) and student.vision.place_id in items_for(student, tiles)[0].prompt
    a = items_for(student, tiles)[0]
    with torch.no_grad(): seen, other = separate_logps(student, a), separate_logps(student, replace(a, image=str(tiles/'Testis.png')))
    assert (seen - other).abs().max() > 1e-3


def test_engine_takes_images_in_the_prompt_and_names_the_way_out_for_others(own, tiles):
    student, in_prompt = own
    if not in_prompt:
        with pytest.raises(InputError, match='train.engine=separate'): Engine(student)
        return
    items = items_for(student, tiles)
    with torch.no_grad(): lp, want = Engine(student).logps(items), torch.stack([separate_logps(student, i) for i in items])
    assert torch.allclose(torch.stack([lp.chosen, lp.rejected], 1), want, rtol=1e-4)


def test_separate_rows_are_the_models_own_loss(own, tiles):
    student, _ = own
    item = items_for(student, tiles)[0]
    inputs = student.row_inputs(item.prompt, item.answers[0], item.image)
    labels = inputs['input_ids'].clone(); labels[:, :len(item.prompt)] = -100
    with torch.no_grad(): loss, mine = student.model(**inputs, labels=labels).loss, SeparateEngine(student).logps(item).chosen
    assert torch.allclose(-loss*len(item.answers[0]), mine[0], rtol=1e-4)


@pytest.mark.parametrize('loss', ['sft', 'orpo', 'dpo'])
def test_training_reaches_the_projector(own, tiles, tmp_path, loss):
    student, in_prompt = own
    from mint_nb.engine import reference_logps
    fresh = load_student(student.name, vision='own', precision='fp32')
    tuned = add_lora(fresh, StudentParams(lora_r=4, lora_layers=0), seed=1, tune='projector')
    before = {n: p.detach().clone() for n, p in tuned.model.named_parameters() if p.requires_grad}
    assert any('projector' in n for n in before) and not any('lora' in n and 'vision' in n for n in before)
    params = TrainParams(lr=5e-4, dpo_lr=5e-4, batch=2, engine='mint' if in_prompt else 'separate')
    items, engine = items_for(tuned, tiles), make_engine(tuned, params)
    ref = reference_logps(engine, items) if loss == 'dpo' else None
    log = train(tuned, items, loss, params, tmp_path, steps=6, reference=ref, engine=engine)
    assert log[-1]['loss'] < log[0]['loss']
    moved = {n for n, p in tuned.model.named_parameters() if n in before and not torch.equal(p, before[n])}
    assert any('projector' in n for n in moved) and any('lora' in n for n in moved)


def test_own_generate_free_and_constrained(own, tiles):
    student, _ = own
    cases = [Case(n, image=f'{n}.png') for n in CATALOGUE.ids[:2]]
    ranker = StudentRanker(student, TASK, CATALOGUE, 2, max_new_tokens=4, folder=tiles)
    assert set(ranker.rank(cases).case_id) <= {c.id for c in cases} and set(ranker.texts) == {c.id for c in cases}
    held = replace(ranker, constrained=True, texts={}).rank(cases)
    assert held.answer_id.notna().all() and (held.groupby('case_id').size() == 2).all()
    inputs = student.row_inputs(student.prompt_ids(TASK, '', 2, image=str(tiles/'Liver.png')), (), str(tiles/'Liver.png'))
    with torch.no_grad(): first = student.model(**inputs).logits[0, -1].argmax().item()
    assert decode_batch(student, [student.prompt_ids(TASK, '', 2, image=str(tiles/'Liver.png'))], 1, images=[str(tiles/'Liver.png')])[0] == ([first] if first != student.eos_id else [])


@pytest.fixture(scope='module')
def seeing(tiles):
    "The tiny student with a small tower."
    make_tower(VisionParams(size=32, patch=8, merge=2, hidden=32, layers=1, heads=2), width=32, seed=0).save(tiles/'tower')
    return lambda **kw: load_student('tiny', vision=tiles/'tower', **kw)


def test_decoding_with_images_is_that_of_one_at_a_time(seeing, tiles):
    student = seeing()
    items = items_for(student, tiles, CATALOGUE.ids)
    def naive(item, n):
        new = []
        with torch.no_grad():
            for _ in range(n): new.append(int(student.model(**student.row_inputs(item.prompt, new, item.image)).logits[0, -1].argmax()))
        return new
    together = decode_batch(student, [i.prompt for i in items], 6, images=[i.image for i in items])
    assert together == [naive(i, 6) for i in items]
    with torch.no_grad():
        logits = encode_prompts(student, [i.prompt for i in items], [i.image for i in items])[0]
        alone = torch.cat([student.model(**student.row_inputs(i.prompt, (), i.image)).logits[:, -1] for i in items])
    assert torch.allclose(logits, alone, atol=1e-5) and (logits[0] - logits[1]).abs().max() > 1e-4
    texts = generate(student, [i.prompt for i in items], 6, images=[i.image for i in items], batch_size=3)
    assert [student.tokenizer.decode(t, skip_special_tokens=True) for t in together] == texts


def test_constrained_list_begins_with_the_likeliest_name(seeing, tiles):
    from mint_nb.candidates import CandidateRanker
    student, cases = seeing(), [Case(n, image=f'{n}.png') for n in CATALOGUE.ids]
    held = StudentRanker(student, TASK, CATALOGUE, 1, constrained=True, folder=tiles).rank(cases)
    scores = CandidateRanker(student, TASK, CATALOGUE, 1, folder=tiles).scores(cases)
    assert held.sort_values('case_id').answer_id.tolist() == [CATALOGUE.ids[j] for _, j in sorted(zip((c.id for c in cases), scores.argmax(1)))]
    free = score_names(student, student.prompt_ids(TASK, '', 1, image=str(tiles/'Liver.png')), list(CATALOGUE.ids), TASK, image=str(tiles/'Liver.png'))
    assert free.shape == (4,) and np.ptp(scores, axis=0).max() > 1e-4


def test_a_text_run_does_not_know_that_images_exist():
    student = load_student('tiny')
    assert student.vision is None and not any('vision' in n for n in student.model.state_dict())
    config = add_lora(student, StudentParams(lora_r=4, lora_layers=1)).model.peft_config['default']
    assert config.exclude_modules is None and config.modules_to_save is None


def test_warm_up_moves_the_tower_only(tiles):
    student = load_student('tiny')
    student.vision = attach_tower(student.model, make_tower(VisionParams(size=32, patch=8, hidden=32, layers=1, heads=2), 32))
    text = {n: p.detach().clone() for n, p in student.model.named_parameters() if not n.startswith('vision')}
    before = {n: p.detach().clone() for n, p in student.vision.named_parameters()}
    images = {n: str(tiles/f'{n}.png') for n in CATALOGUE.ids}
    items = caption_items({n: f'nuclei of kind {i}' for i, n in enumerate(images)}, images, student)
    log = learn_captions(student, items, VisionParams(epochs=6, lr=3e-3, batch=2), seed=0)
    assert np.mean(log[-2:]) < np.mean(log[:2])
    assert all(torch.equal(p, text[n]) for n, p in student.model.named_parameters() if n in text)
    assert sum(not torch.equal(p, before[n]) for n, p in student.vision.named_parameters()) > len(before)/2


@pytest.mark.parametrize('name, make, words', [
    ('cut.png', lambda p: p.write_bytes(b'\x89PNG\r\n\x1a\n cut'), 'not a readable image'),
    ('wide.png', lambda p: Image.new('RGB', (64, 32)).save(p), '64 x 32'),
    ('gone.png', lambda p: None, 'does not exist')])
def test_bad_pictures_are_named(seeing, tmp_path, name, make, words):
    make(tmp_path/name)
    student = seeing()
    with pytest.raises(InputError, match=words) as e: student.embeds(torch.tensor(student.prompt_ids(TASK, '', 2, image=str(tmp_path/name))), [str(tmp_path/name)])
    assert name in str(e.value)


def test_a_case_without_a_tile_is_named(seeing):
    with pytest.raises(InputError, match='record T9'): StudentRanker(seeing(), TASK, CATALOGUE, 2).rank([Case('T9')])


def test_tower_survives_a_round_trip(tiles, tmp_path):
    tower = make_tower(VisionParams(size=32, patch=8, merge=2, hidden=32, layers=1, heads=2), 32, rms=.3, seed=4)
    again = load_tower(tower.save(tmp_path/'t'))
    assert torch.equal(again.vectors([tiles/'Liver.png']), tower.eval().vectors([tiles/'Liver.png'])) and again.n_tokens == tower.n_tokens == 4


def test_pannuke_in_three_layouts_reaches_the_student(tmp_path):
    "float64 arrays, three layouts, one cohort; and from it through teacher, pairs and warm-up to a student that answers and is mapped."
    from mint_nb.cohort import make_cohort
    from mint_nb.core import read_table
    from mint_nb.runs import open_run
    from mint_nb.predict import predict_method
    from test_tiles import LAYOUTS, pannuke
    sizes, runs = {'min_cases': 3, 'train': 12, 'calibration': 4, 'validation': 4, 'test': 8}, []
    for n, layout in enumerate(LAYOUTS):
        folder = pannuke(tmp_path/f'p{n}', layout, 12, 48)
        assert np.load(next(folder.rglob('images.npy')), mmap_mode='r').dtype == np.float64
        runs.append(open_run(tmp_path/f'run{n}', 'smoke', {'task': 'tissue', 'cohort': {'source': str(folder), **sizes}}))
        make_cohort(runs[-1])
    first = runs[0].cases()
    for run in runs[1:]:
        assert run.cases() == first
        assert all((run/'cases'/c.image).read_bytes() == (runs[0]/'cases'/c.image).read_bytes() for c in first)
    run, test = runs[0], [c for c in first if c.split == 'test']
    for m in ('teacher', 'base', 'mint', 'mint_constrained', 'mint_wrong_image_constrained'): predict_method(run, m)
    ranks = {m: read_table(run/f'predictions/{m}-0.parquet') for m in ('teacher', 'mint_constrained', 'mint_wrong_image_constrained')}
    for t in ranks.values(): assert set(t.case_id) == {c.id for c in test} and t.answer_id.notna().all()
    assert load_tower(run/'align/warmup-0/tower').size == 32 and len(read_table(run/'attribution/mint-0/masking.parquet')) == len(test)
    assert all(e['cpu_seconds'] >= 0 for e in run.manifest if e['status'] == 'done')


@pytest.mark.parametrize('epochs', [5, 10])
def test_ten_updates_on_words(tiles, epochs):
    from mint_nb.vision import learn_words
    tower = make_tower(VisionParams(size=32, patch=8, merge=2, hidden=32, layers=1, heads=2), 32)
    images, captions = [tiles/f'{n}.png' for n in CATALOGUE.ids], ['few large nuclei', 'many small nuclei', 'few small nuclei', 'many large nuclei']
    log = learn_words(tower, images, captions, VisionParams(size=32, word_epochs=epochs, batch=2 if epochs == 5 else 4), lambda words: torch.randn(len(words), 32, generator=torch.manual_seed(0)))
    assert np.isfinite(log).all()
