"""Merge an adapter into its base: the folder of a plain model.

    tritium merge runs/lora out/model          # a run, one of its checkpoints, or a peft adapter's folder

An adapter that was trained on an NF4 base is added to what the codes stand for: to no other weights is it the same
model (peft issue 2321). The largest difference that rounding makes, of a weight and of a logit, is told.
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from tritium.core.checkpoint import model_folder
from tritium.core.config import UserError
from tritium.core.output import make_folder
from tritium.core.setup import DTYPES, read_model
from tritium.model.adapters import base_folder
from tritium.model.hf import ADAPTER_CONFIG, read_json
from tritium.model.lora import merge
from tritium.model.transformer import Transformer
from tritium.parallel.files import tensor_files
from tritium.parallel.mesh import Mesh
from tritium.stages.cli import run_stage


def main(argv: Sequence[str] | None = None) -> int:
    """Write the folder and say how exact it is. Raises: UserError for a folder without an adapter."""
    parser = argparse.ArgumentParser(prog="tritium merge", description=__doc__.partition("\n")[0])
    parser.add_argument("adapter", metavar="ADAPTER", help="run, checkpoint or peft folder")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the merged weights (default: bf16)")
    arguments = parser.parse_args(argv)
    source, out = Path(model_folder(arguments.adapter)), make_folder(arguments.out, "OUT")
    if not (source / ADAPTER_CONFIG).exists():
        raise UserError(f"{source} holds no adapter: there is no {ADAPTER_CONFIG}")
    if tensor_files(out, "model"):
        raise UserError(f"OUT={out} holds a model already: name another folder, or delete it")
    model = read_model(str(source), arguments.dtype, Mesh.single())
    before = probe(model)
    try:
        rounding = merge(model)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None
    model.save(str(out))
    for folder in (base_folder(source, read_json(source / ADAPTER_CONFIG)), source):
        for file in folder.glob("*token*"):
            shutil.copyfile(file, out / file.name)
    print(f"{out}: largest rounding of a weight {rounding:.3g}, of a logit {(probe(model) - before).abs().max():.3g}")
    return 0


@torch.no_grad()
def probe(model) -> torch.Tensor:
    """Outputs on a few tokens, to compare."""
    count = min(64, model.config.max_positions, model.config.vocab_size)
    tokens = torch.linspace(0, model.config.vocab_size - 1, count).long()
    return (model.logits if isinstance(model, Transformer) else model.values)(tokens).float()


if __name__ == "__main__":
    raise SystemExit(run_stage("merge"))
