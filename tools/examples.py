"""Write data/examples: two phenopackets, two notes and two tiles of simulated patients.

    python tools/examples.py            into data/examples
    python tools/examples.py FOLDER     elsewhere, for a comparison

The patients are drawn like those of the default cohort, with a seed of their own; every file says that they are simulated.
"""
import csv
import io
import sys
from pathlib import Path

from mint_nb.core import write_json, write_jsonl
from mint_nb.params import CohortParams
from mint_nb.ontology import load_ontology
from mint_nb.patients import simulate_cohort
from mint_nb.tiles import simulated_tiles

SEED = 29
SIMULATED = 'Simulated: drawn from annotation frequencies of the Human Phenotype Ontology. Not a patient.'
RESOURCE = {'name': 'Human Phenotype Ontology', 'url': 'http://purl.obolibrary.org/obo/hp.owl',
            'namespacePrefix': 'HP', 'iriPrefix': 'http://purl.obolibrary.org/obo/HP_'}


def phenopacket(case, ontology) -> dict:
    "A simulated patient as a phenopacket, version 2."
    name = f'simulated-{case.id}'
    disease = {'id': case.labels['disease'], 'label': ontology.diseases[case.labels['disease']]}
    subject = {'id': name, 'sex': (case.sex or 'unknown_sex').upper()}
    if case.age is not None: subject['timeAtLastEncounter'] = {'age': {'iso8601duration': f'P{round(12*case.age)}M'}}
    return {
        'id': name,
        'subject': subject,
        'phenotypicFeatures': [{'type': {'id': f.id, 'label': f.label}} | ({'excluded': True} if f.excluded else {})
                               for f in case.phenotypes],
        'interpretations': [{'id': f'{name}-1', 'progressStatus': 'SOLVED', 'diagnosis': {'disease': disease}}],
        'metaData': {'created': '2026-12-01T00:00:00Z', 'createdBy': f'tools/examples.py of mint_nb. {SIMULATED}',
                     'resources': [RESOURCE | {'id': 'hp', 'version': ontology.version}], 'phenopacketSchemaVersion': '2.0'},
    }


def note(case) -> dict:
    "A simulated patient as a line of notes.jsonl."
    return {'id': f'simulated-{case.id}', 'note': case.note, 'sex': case.sex, 'age': case.age,
            'disease_id': case.labels['disease'], 'remark': SIMULATED}


def write_patients(out: Path) -> None:
    "Four test patients of four diseases: two as phenopackets, two as notes."
    ontology = load_ontology()
    cases, _ = simulate_cohort(ontology, CohortParams(diseases=16, train=32, calibration=0, validation=0, test=32, seed=SEED))
    first = {c.labels['disease']: c for c in cases if c.split == 'test'}
    a, b, c, d = list(first.values())[:4]
    for case in (a, b): write_json(out/f'phenopackets/simulated-{case.id}.json', phenopacket(case, ontology))
    write_jsonl(out/'notes.jsonl', map(note, (c, d)))


def write_tiles(out: Path) -> None:
    "Tiles of two tissues, with the table that names tissue and patient."
    made = simulated_tiles(CohortParams(diseases=8, train=16, calibration=0, validation=0, test=16, tiles=1, image_size=64, seed=SEED))
    first = {c.labels['tissue']: c for c in made.cases if c.split == 'test'}
    rows = []
    for case in list(first.values())[:2]:
        image, _ = made.picture(case)
        file = f'simulated-{case.id}.png'
        (out/'tiles').mkdir(parents=True, exist_ok=True)
        image.save(out/'tiles'/file)
        rows.append([file, case.labels['tissue'], f'simulated-{case.group}'])
    text = io.StringIO()
    csv.writer(text, lineterminator='\n').writerows([['file', 'label', 'patient'], *rows])
    (out/'tiles/labels.csv').write_text(text.getvalue())


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent/'data/examples'
    write_patients(out)
    write_tiles(out)
    print(f'{out}: {sum(p.is_file() for p in out.rglob("*"))} files')


if __name__ == '__main__': main()
