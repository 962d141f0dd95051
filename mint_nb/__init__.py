__version__ = "0.2.0"

# The public face: names are loaded when they are used (PEP 562), so `import mint_nb` and `mint-nb status` stay quick.
PUBLIC = {
    'open_run': 'mint_nb.runs:open_run', 'Run': 'mint_nb.runs:Run', 'run_pipeline': 'mint_nb.pipeline:run_pipeline',
    'load_cases': 'mint_nb.readers:load_cases', 'Case': 'mint_nb.tasks:Case', 'Catalogue': 'mint_nb.tasks:Catalogue',
    'load_student': 'mint_nb.students:load_student', 'train': 'mint_nb.own_data:train_on',
    'LOSSES': 'mint_nb.recipes:LOSSES', 'RECIPES': 'mint_nb.recipes:RECIPES', 'METHODS': 'mint_nb.methods:METHODS',
    'METRICS': 'mint_nb.metrics:METRICS', 'TASKS': 'mint_nb.tasks:TASKS', 'InputError': 'mint_nb.core:InputError'}
__all__ = list(PUBLIC)


def __getattr__(name: str):
    if name not in PUBLIC: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from mint_nb.core import named_object
    return named_object(PUBLIC[name])


def __dir__() -> list[str]: return sorted([*globals(), *PUBLIC])
